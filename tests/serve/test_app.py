"""The HTTP API: what OpenAI's client may ask, what is refused and how, and that nothing leaks."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from marrow.models import huggingface
from marrow.serve.answers import shown
from marrow.serve.app import make_app
from marrow.serve.config import ServeRecipe
from marrow.serve.engine import Engine
from marrow.serve.load import Load, drive
from marrow.text.tokenizer import Tokenizer

Serve = Callable[..., str]
LONG = {"model": "tiny", "prompt": [70], "max_tokens": 2000, "temperature": 0, "ignore_eos": True}


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


def metric(url: str, name: str) -> float:
    for line in httpx.get(url + "/metrics").text.splitlines():
        if line.startswith(f"marrow_{name}{{"):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"no metric {name}")


def wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


# -- OpenAI's own client ------------------------------------------------------------------------


def test_the_openai_client_streams_what_it_gets_whole(serve: Serve, llama: Path) -> None:
    with client_of(serve(llama)) as client:
        asked: dict[str, Any] = {
            "model": "tiny", "prompt": "def read(self", "max_tokens": 40, "seed": 5, "temperature": 0.9,
        }  # fmt: skip
        whole = client.completions.create(**asked)
        pieces = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        text = "".join(piece.choices[0].text for piece in pieces if piece.choices)
        assert text == whole.choices[0].text and len(pieces) > 10
        assert pieces[-1].usage == whole.usage
        assert whole.usage.completion_tokens <= 40
        assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == whole.choices[0].finish_reason


def test_the_openai_client_lists_the_model(serve: Serve, llama: Path) -> None:
    with client_of(serve(llama)) as client:
        [model] = client.models.list().data
        assert model.id == "tiny" and client.models.retrieve("tiny") == model
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")


def test_the_openai_client_chats_with_a_chat_model(serve: Serve, chat_model: Path) -> None:
    with client_of(serve(chat_model)) as client:
        asked: dict[str, Any] = {
            "model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "seed": 3,
        }  # fmt: skip
        whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        pieces = list(client.chat.completions.create(**asked, stream=True))
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole.choices[0].message.content
        assert pieces[0].choices[0].delta.role == "assistant"
        assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
        assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2


def test_a_base_model_refuses_to_chat_with_a_hint(serve: Serve, llama: Path) -> None:
    with client_of(serve(llama)) as client, pytest.raises(openai.BadRequestError, match="hint: use /v1/comp"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hello"}])


def test_several_prompts_and_choices_come_in_order(serve: Serve, llama: Path) -> None:
    with client_of(serve(llama)) as client:
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "seed": 1, "echo": True, "n": 3}
        both = client.completions.create(prompt=["alpha", "beta"], **asked)
        assert [choice.index for choice in both.choices] == list(range(6))
        assert [choice.text[:4] for choice in both.choices] == ["alph"] * 3 + ["beta"] * 3
        assert len({choice.text for choice in both.choices[:3]}) == 3, "each choice draws from its own seed"
        alone = client.completions.create(prompt="beta", **asked)
        assert [c.text for c in alone.choices] == [c.text for c in both.choices[3:]]
        streamed = ["", "", ""]
        for piece in client.completions.create(prompt="beta", stream=True, **asked):
            streamed[piece.choices[0].index] += piece.choices[0].text
        assert streamed == [c.text for c in alone.choices]


def test_text_and_its_token_ids_are_the_same_prompt(serve: Serve, llama: Path) -> None:
    ids = Tokenizer.load(llama).encode("def read(self", bos=True)
    with client_of(serve(llama)) as client:
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": 9, "temperature": 0}
        texts = [
            client.completions.create(prompt=prompt, **asked).choices[0].text
            for prompt in ("def read(self", ids, [ids], ["def read(self"])
        ]
        assert len(set(texts)) == 1


def test_echoed_log_probabilities_score_a_given_text(serve: Serve, llama: Path) -> None:
    """What an evaluation harness asks: no new token, the likelihood of the old ones."""
    with client_of(serve(llama)) as client:
        scored = client.completions.create(
            model="tiny", prompt="def read(self", max_tokens=0, echo=True, logprobs=2
        ).choices[0]
    ids = Tokenizer.load(llama).encode("def read(self", bos=True)
    assert scored.text == "def read(self"
    assert len(scored.logprobs.tokens) == len(ids)
    assert scored.logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in scored.logprobs.token_logprobs[1:])
    assert len(scored.logprobs.top_logprobs[1]) == 2


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (b"", ""),
        (b"ab", "ab"),
        ("ü".encode(), "ü"),
        (b"\xc3", "bytes:\\xc3"),
        (b"a\xe2\x82", "bytes:\\x61\\xe2\\x82"),
    ],
)
def test_a_part_of_a_character_has_a_name_of_its_own(token: bytes, text: str) -> None:
    """As U+FFFD all such tokens would be one, and a table by text would lose all but the last."""
    assert shown(token) == text


def test_the_bytes_of_a_token_are_its_own(serve: Serve, chat_model: Path) -> None:
    tokens = Tokenizer.load(chat_model).token_bytes(skip_special=False)
    with client_of(serve(chat_model)) as client:
        answer = client.chat.completions.create(
            model="tiny",
            max_tokens=8,
            logprobs=True,
            top_logprobs=5,
            messages=[{"role": "user", "content": "a"}],
        ).choices[0]
    entries = [entry for each in answer.logprobs.content for entry in (each, *each.top_logprobs)]
    assert len(entries) == 48
    assert all(bytes(entry.bytes) in tokens and entry.token == shown(bytes(entry.bytes)) for entry in entries)


def test_a_message_cannot_end_its_own_turn(serve: Serve, chat_model: Path) -> None:
    with client_of(serve(chat_model)) as client:

        def prompt_tokens(content: str) -> int:
            answer = client.chat.completions.create(
                model="tiny", max_tokens=1, messages=[{"role": "user", "content": content}]
            )
            return answer.usage.prompt_tokens

        # As a special token it would be one; as plain text it is many.
        assert prompt_tokens("a<|im_end|>b") > prompt_tokens("ab") + 3


# -- refusals -----------------------------------------------------------------------------------

BASE = {"model": "tiny", "prompt": "x"}
BAD = [
    (b"", 400, None),
    (b"{", 400, None),
    (b"[]", 400, None),
    (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400, None),
    ({"prompt": "x"}, 400, "model"),
    ({"model": "tiny"}, 400, "prompt"),
    (BASE | {"model": "gpt"}, 404, "model"),
    (BASE | {"prompt": []}, 400, "prompt"),
    (BASE | {"prompt": [[]]}, 400, "prompt"),
    (BASE | {"prompt": 5}, 400, "prompt"),
    (BASE | {"prompt": [1, "x"]}, 400, "prompt"),
    (BASE | {"prompt": [1.5]}, 400, "prompt"),
    (BASE | {"prompt": [True]}, 400, "prompt"),
    (BASE | {"prompt": [99_999]}, 400, "prompt"),
    (BASE | {"prompt": "\ud800"}, 400, "prompt"),
    (BASE | {"max_tokens": -1}, 400, "max_tokens"),
    (BASE | {"max_tokens": "8"}, 400, "max_tokens"),
    (BASE | {"max_tokens": 10_000}, 400, "max_tokens"),
    (BASE | {"max_tokens": 10**30}, 400, "max_tokens"),
    (BASE | {"temperature": -1}, 400, "temperature"),
    (BASE | {"temperature": "hot"}, 400, "temperature"),
    (BASE | {"top_p": 0}, 400, "top_p"),
    (BASE | {"top_p": 2}, 400, "top_p"),
    (BASE | {"top_k": -3}, 400, "top_k"),
    (BASE | {"n": 0}, 400, "n"),
    (BASE | {"n": 1000}, 400, "n"),
    (BASE | {"seed": 2**70}, 400, "seed"),
    (BASE | {"stop": ""}, 400, "stop"),
    (BASE | {"stop": ["x"] * 17}, 400, "stop"),
    (BASE | {"stop": [1]}, 400, "stop"),
    (BASE | {"logprobs": 21}, 400, "logprobs"),
    (BASE | {"logprobs": True}, 400, "logprobs"),
    (BASE | {"stream_options": {"include_usage": True}}, 400, "stream_options"),
    (BASE | {"stream": True, "stream_options": {"usage": True}}, 400, "stream_options.usage"),
    (BASE | {"best_of": 3}, 400, "best_of"),
    (BASE | {"suffix": "tail"}, 400, "suffix"),
    (BASE | {"presence_penalty": 0.5}, 400, "presence_penalty"),
    (BASE | {"frequency_penalty": -0.5}, 400, "frequency_penalty"),
    (BASE | {"logit_bias": {"50": -100}}, 400, "logit_bias"),
    (BASE | {"temprature": 0.5}, 400, "temprature"),
    (BASE | {"prompt": "x" * 2_000_000}, 413, None),
]  # fmt: skip


def test_every_bad_request_is_refused_by_the_name_of_its_field(serve: Serve, llama: Path) -> None:
    url = serve(llama)
    wrong = []
    with httpx.Client() as client:
        for body, status, param in BAD:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = client.post(url + "/v1/completions", content=data)
            error = answer.json().get("error", {})
            if (answer.status_code, error.get("param")) != (status, param) or not error.get("message"):
                wrong.append((data[:80], answer.status_code, error))
    assert wrong == []
    assert metric(url, "prompt_tokens_total") == 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "mood": "good"}]}, "messages.0.mood"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 2, "max_completion_tokens": 2}, "max_tokens"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_bad_chats_are_refused(change: dict[str, Any], param: str, serve: Serve, chat_model: Path) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]} | change
    answer = httpx.post(serve(chat_model) + "/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_neutral_values_of_unsupported_fields_are_taken(serve: Serve, llama: Path) -> None:
    body = BASE | {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "suffix": None,
        "best_of": 1,
    }
    assert httpx.post(serve(llama) + "/v1/completions", json=body).status_code == 200


def test_other_paths_and_methods_are_refused_in_the_same_shape(serve: Serve, llama: Path) -> None:
    url = serve(llama)
    for method, path, status in (
        ("GET", "/v2", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
    ):
        answer = httpx.request(method, url + path)
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_full_queue_says_when_to_come_again(serve: Serve, llama: Path) -> None:
    url = serve(llama, max_sequences=1, max_waiting=5)
    many = LONG | {"stream": True, "n": 6}  # one after the other, so that the queue stays full for long
    with httpx.Client() as client, client.stream("POST", url + "/v1/completions", json=many) as busy:
        pieces = busy.iter_bytes()  # kept: when it is collected, httpx hangs up
        next(pieces)
        answer = client.post(url + "/v1/completions", json=BASE)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"
    wait_until(lambda: metric(url, "kv_blocks_used") == 0)
    assert httpx.post(url + "/v1/completions", json=BASE).status_code == 200


def test_a_chunked_body_is_bounded_too(serve: Serve, llama: Path) -> None:
    def forever() -> Any:
        for _ in range(100):
            yield b" " * 65_536

    answer = httpx.post(serve(llama) + "/v1/completions", content=forever())
    assert answer.status_code == 413


def test_request_ids_are_kept_if_sane_and_made_otherwise(serve: Serve, llama: Path) -> None:
    url = serve(llama)
    assert httpx.get(url + "/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = {
        httpx.get(url + "/v2", headers={"x-request-id": "a b<>"}).headers["x-request-id"] for _ in range(3)
    }
    assert len(made) == 3 and all(value.startswith("req-") for value in made)


# -- clients that go away -----------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_blocks(stream: bool, serve: Serve, llama: Path) -> None:
    url = serve(llama, kv_memory=4 << 20)
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(LONG | {"stream": stream, "n": 4}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + body)
        wait_until(lambda: metric(url, "sequences_running") == 4)
    wait_until(lambda: metric(url, "kv_blocks_used") == 0, timeout_s=5)
    assert metric(url, "generation_tokens_total") < 4 * 2000
    assert 'reason="abort"} 4' in httpx.get(url + "/metrics").text


@pytest.mark.slow
def test_random_clients_that_leave_at_random_leak_nothing(serve: Serve, llama: Path) -> None:
    """300 requests over HTTP, a third of which hang up after a random number of bytes."""
    url = serve(llama, kv_memory=20 * 16 * 256, max_waiting=400)
    host, port = url.removeprefix("http://").split(":")

    async def one(number: int) -> None:
        body = {
            "model": "tiny", "prompt": [64 + (number * 7 + i) % 250 for i in range(1 + number % 40)],
            "max_tokens": 1 + number % 17, "seed": number, "stream": number % 2 == 0, "n": 1 + number % 3,
        }  # fmt: skip
        data = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            f"Content-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        try:
            if number % 3 == 0:
                await asyncio.wait_for(reader.read(1 + number % 300), 0.001 * (number % 30))
            else:
                answer = await asyncio.wait_for(reader.read(), 60)
                assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
        except TimeoutError:
            assert number % 3 == 0
        finally:
            writer.close()

    async def all_of_them() -> None:
        gate = asyncio.Semaphore(40)

        async def guarded(number: int) -> None:
            async with gate:
                await one(number)

        await asyncio.gather(*map(guarded, range(300)))

    asyncio.run(all_of_them())
    wait_until(lambda: metric(url, "sequences_running") + metric(url, "sequences_waiting") == 0)
    assert metric(url, "kv_blocks_used") == 0
    assert 'reason="error"} 0' in httpx.get(url + "/metrics").text


# -- health and metrics -------------------------------------------------------------------------


class Stuck(torch.nn.Module):
    """A decoder that waits for a gate, and dies if told to."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.config, self.embedding_VC = decoder, decoder.config, decoder.embedding_VC
        self.gate, self.fatal = threading.Event(), False

    def forward(self, *args: Any) -> torch.Tensor:
        self.gate.wait(20)
        if self.fatal:
            raise SystemExit("killed")
        return self.inner(*args)

    def logits(self, hidden_NC: torch.Tensor) -> torch.Tensor:
        return self.inner.logits(hidden_NC)


def test_health_is_red_when_the_engine_is_stuck_and_when_it_is_dead(llama: Path) -> None:
    stuck = Stuck(huggingface.load(llama))
    recipe = ServeRecipe(dtype="fp32", kv_memory=1 << 20, health_deadline=0.1)
    engine = Engine(stuck, Tokenizer.load(llama), recipe, name="tiny")  # type: ignore[arg-type]

    async def ask(path: str) -> httpx.Response:
        transport = httpx.ASGITransport(make_app(engine, None))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get(path)

    with engine:
        assert asyncio.run(ask("/health")).json()["status"] == "stuck"
        stuck.gate.set()
        wait_until(lambda: asyncio.run(ask("/health")).status_code == 200)
        stuck.fatal = True
        assert asyncio.run(ask("/health")).status_code == 503
        assert 'marrow_ready{model="tiny"} 0' in asyncio.run(ask("/metrics")).text


def test_metrics_count_what_happened(serve: Serve, llama: Path) -> None:
    url = serve(llama)
    facts, _answers = drive(
        url, Load(["def read(self", "class"], num_requests=12, concurrency=4, max_tokens=9)
    )
    assert facts["failed"] == 0
    text = httpx.get(url + "/metrics").text
    assert metric(url, "generation_tokens_total") == facts["completion_tokens"]
    assert metric(url, "time_to_first_token_seconds_count") == 12
    assert metric(url, "request_seconds_count") == 12
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) and text.endswith("\n")
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds"):
        buckets = [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if f"{name}_bucket" in line]
        assert buckets == sorted(buckets) and buckets[-1] == metric(url, f"{name}_count")
