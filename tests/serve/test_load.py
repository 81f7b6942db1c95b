"""The load driver reports what the server did, and every way in which it failed."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from marrow.core.errors import ServeError, UsageError
from marrow.serve.load import Answer, Load, drive, summarise


def test_a_closed_loop_asks_everything_and_adds_up(serve: Callable[..., str], llama: Path) -> None:
    seen: list[float] = []
    load = Load(
        ["def ", "class ", "x = "], 20, concurrency=6, max_tokens=8, body={"seed": 1, "ignore_eos": True}
    )
    facts, answers = drive(serve(llama), load, lambda done, total, unit, figures=None: seen.append(done))
    assert (facts["requests"], facts["failed"], facts["errors"]) == (20, 0, {})
    assert facts["completion_tokens"] == 160 == sum(answer.num_drawn for answer in answers)
    assert facts["completion_tokens_per_s"] == pytest.approx(160 / facts["wall_s"])
    assert facts["ttft_ms"]["p50"] <= facts["ttft_ms"]["p99"] <= facts["e2e_ms"]["p99"]
    assert [answer.prompt for answer in answers] == [load.prompts[i % 3] for i in range(20)]
    assert sorted(seen) == list(range(1, 21))
    again = drive(serve(llama), load)[1]
    assert [answer.text for answer in again] == [answer.text for answer in answers]


def test_an_open_loop_sends_at_its_own_pace(serve: Callable[..., str], llama: Path) -> None:
    load = Load(["def "], 20, rate_per_s=200, max_tokens=4, seed=1)
    facts, answers = drive(serve(llama), load)
    assert facts["failed"] == 0
    sent = [answer.sent_s for answer in answers]
    assert sent == sorted(sent)
    # 19 exponential gaps of 5 ms on average; the fixed seed makes their sum the same each time.
    assert 0.04 < sent[-1] - sent[0] < 1


def test_refusals_are_counted_by_their_reason(serve: Callable[..., str], llama: Path) -> None:
    facts, _ = drive(serve(llama), Load(["x"], 3, max_tokens=10_000))
    assert facts["failed"] == 3
    assert "10000" in next(iter(facts["errors"]))
    assert facts["ttft_ms"] is None


@contextmanager
def raw_server(answer: bytes) -> Iterator[str]:
    """A server that says one thing to everybody, and hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65_536)
                connection.sendall(answer)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "connection"),
        (CHUNKED + b"5\r\nda", "connection"),
        (CHUNKED + b"0\r\n\r\n", "ended before its end"),
        (CHUNKED + b"zz\r\n", "bad answer"),
        (CHUNKED + b"a\r\ndata: {{{\n\r\n0\r\n\r\n", "bad answer"),
        (b"HTTP/1.1 503 no\r\nContent-Length: 2\r\n\r\n{}", "HTTP 503"),
    ],
)
def test_a_broken_answer_is_an_error_not_a_success(answer: bytes, error: str) -> None:
    with raw_server(answer) as url:
        facts, _ = drive(url, Load(["x"], 2, model="m", timeout_s=5))
    assert facts["failed"] == 2 and error in next(iter(facts["errors"]))


def test_a_server_that_is_not_there_is_told_with_a_hint() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ServeError, match="marrow serve"):
            drive(f"http://127.0.0.1:{unused.getsockname()[1]}", Load(["x"], 1))
    with pytest.raises(UsageError):
        drive("127.0.0.1:8000", Load(["x"], 1))
    with pytest.raises(UsageError):
        Load([], 1)


def test_percentiles_are_nearest_ranks() -> None:
    answers = [
        Answer(i, "", num_drawn=2, sent_s=5, times_s=[5 + i / 1000, 5.5 + i / 1000], ended_s=6)
        for i in range(1, 101)
    ]
    facts = summarise(answers, 2.0)
    assert [round(facts["ttft_ms"][p]) for p in ("p50", "p90", "p99")] == [50, 90, 99]
    assert facts["itl_ms"]["p50"] == pytest.approx(500)
    assert facts["completion_tokens_per_s"] == 100
