"""The load driver: many clients at once against an OpenAI-compatible server, and what they felt.

    closed loop    `concurrency` clients; each sends its next request when the last one has ended
    open loop      requests arrive by a Poisson process of `rate_per_s`, however slow the server is

Only the open loop shows what a user of a busy server waits: a closed loop slows down with the
server it measures. Plain asyncio streams and a small HTTP/1.1 reader, so that the client costs
little beside the server on the same cores, and the package needs no HTTP client.

ttft  seconds from sending a request to its first text     itl  between two pieces of text
e2e   seconds from sending to the end
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from marrow.core.errors import ServeError, UsageError
from marrow.core.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class Load:
    """What to send.

    prompts: taken in turn. rate_per_s: None for the closed loop. body: further fields of each
    request; a "seed" is raised by the request's number. Each client has one connection at a time.
    """

    prompts: Sequence[str]
    num_requests: int
    concurrency: int = 8
    rate_per_s: float | None = None
    max_tokens: int = 64
    model: str | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or self.num_requests < 1 or self.concurrency < 1:
            raise UsageError("a load needs at least one prompt, one request and one client")
        if self.rate_per_s is not None and not self.rate_per_s > 0:
            raise UsageError(f"rate_per_s = {self.rate_per_s}", hint="give more than 0 requests a second")


@dataclass(slots=True)
class Answer:
    """What one request got. `error` is None if it was answered whole."""

    number: int
    prompt: str
    text: str = ""
    finish_reason: str | None = None
    num_prompt: int = 0
    num_drawn: int = 0
    sent_s: float = 0.0
    times_s: list[float] = field(default_factory=list)  # of each piece of text
    ended_s: float = 0.0
    error: str | None = None


def drive(url: str, load: Load, progress: Progress = silent) -> tuple[dict[str, Any], list[Answer]]:
    """Send a load and wait for its end.

    Args: url: of the server, as in "http://127.0.0.1:8000".
    Returns: the measurements as a dict that JSON can hold (see `summarise`), and every answer.
    Raises: ServeError if the server cannot be reached at all.
    """
    return asyncio.run(_drive(url, load, progress))


def summarise(answers: Sequence[Answer], wall_s: float) -> dict[str, Any]:
    """Return counts, rates and percentiles (milliseconds; None where nothing was measured)."""
    good = [answer for answer in answers if answer.error is None]
    errors: dict[str, int] = {}
    for answer in answers:
        if answer.error is not None:
            errors[answer.error] = errors.get(answer.error, 0) + 1
    gaps = [b - a for x in good for a, b in zip(x.times_s, x.times_s[1:], strict=False)]
    drawn = sum(answer.num_drawn for answer in good)
    return {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "errors": errors,
        "wall_s": wall_s,
        "requests_per_s": len(good) / wall_s,
        "prompt_tokens": sum(answer.num_prompt for answer in good),
        "completion_tokens": drawn,
        "completion_tokens_per_s": drawn / wall_s,
        "ttft_ms": _percentiles([x.times_s[0] - x.sent_s for x in good if x.times_s]),
        "itl_ms": _percentiles(gaps),
        "e2e_ms": _percentiles([x.ended_s - x.sent_s for x in good]),
    }


def _percentiles(seconds: list[float]) -> dict[str, float] | None:
    """Nearest-rank percentiles, in milliseconds."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    ranks = {f"p{p}": ordered[-(-len(ordered) * p // 100) - 1] * 1e3 for p in (50, 90, 99)}
    return ranks | {"mean": sum(ordered) / len(ordered) * 1e3}


async def _drive(url: str, load: Load, progress: Progress) -> tuple[dict[str, Any], list[Answer]]:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise UsageError(f"{url!r} is no address of a server", hint='write "http://host:port"')
    host, port = parts.hostname, parts.port or 80
    model = load.model or await _first_model(host, port)
    answers: list[Answer] = []
    begin = time.perf_counter()

    async def one(number: int) -> None:
        answer = Answer(number, load.prompts[number % len(load.prompts)])
        body: dict[str, Any] = {
            "model": model,
            "prompt": answer.prompt,
            "max_tokens": load.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        } | dict(load.body)
        if isinstance(body.get("seed"), int):
            body["seed"] += number
        await _ask(host, port, body, answer, load.timeout_s)
        answers.append(answer)
        rate = sum(x.num_drawn for x in answers) / (time.perf_counter() - begin)
        progress(len(answers), load.num_requests, "requests", {"tok/s": f"{rate:.0f}"})

    if load.rate_per_s is None:
        numbers = iter(range(load.num_requests))

        async def client() -> None:
            for number in numbers:
                await one(number)

        await asyncio.gather(*(client() for _ in range(min(load.concurrency, load.num_requests))))
    else:
        rng, due, tasks = random.Random(load.seed), begin, []
        for number in range(load.num_requests):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(number)))
            due += rng.expovariate(load.rate_per_s)
        await asyncio.gather(*tasks)
    facts = summarise(answers, time.perf_counter() - begin)
    facts["concurrency"] = load.concurrency if load.rate_per_s is None else None
    facts["rate_per_s"] = load.rate_per_s
    return facts, sorted(answers, key=lambda answer: answer.number)


async def _ask(host: str, port: int, body: Mapping[str, Any], answer: Answer, timeout_s: float) -> None:
    """Send one streaming completion and fill in its answer; failures become its `error`."""
    answer.sent_s = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s):
            await _read_answer(host, port, body, answer)
    except TimeoutError:
        answer.error = "timeout"
    except (OSError, asyncio.IncompleteReadError) as error:
        answer.error = f"connection: {type(error).__name__}"
    except ValueError as error:
        answer.error = f"bad answer: {error}"
    answer.ended_s = time.perf_counter()


async def _read_answer(host: str, port: int, body: Mapping[str, Any], answer: Answer) -> None:
    done = False
    async for status, line in _post(host, port, "/v1/completions", body):
        if status != 200:
            message = json.loads(line).get("error", {}).get("message", "") if line else ""
            answer.error = f"HTTP {status}: {message.splitlines()[0] if message else ''}".strip()
            return
        if not line.startswith(b"data: "):
            continue
        if line == b"data: [DONE]":
            done = True
            continue
        event = json.loads(line[6:])
        if "error" in event:
            answer.error = str(event["error"]["message"]).splitlines()[0]
            return
        for choice in event["choices"]:
            answer.finish_reason = choice["finish_reason"] or answer.finish_reason
            if choice["text"]:
                answer.times_s.append(time.perf_counter())
                answer.text += choice["text"]
        if usage := event.get("usage"):
            answer.num_prompt, answer.num_drawn = usage["prompt_tokens"], usage["completion_tokens"]
    if not done or answer.finish_reason is None:
        answer.error = "the stream ended before its end"


async def _first_model(host: str, port: int) -> str:
    try:
        text = b"".join([line async for _, line in _exchange(host, port, b"GET /v1/models", b"")])
        return str(json.loads(text)["data"][0]["id"])
    except (OSError, ValueError, KeyError, IndexError, asyncio.IncompleteReadError) as error:
        raise ServeError(
            f"no server answers at http://{host}:{port}: {error}", hint="start one with `marrow serve`"
        ) from None


def _post(host: str, port: int, path: str, body: Mapping[str, Any]) -> AsyncIterator[tuple[int, bytes]]:
    return _exchange(host, port, f"POST {path}".encode(), json.dumps(body).encode())


async def _exchange(host: str, port: int, what: bytes, body: bytes) -> AsyncIterator[tuple[int, bytes]]:
    """Send one request over a connection of its own; yield (status, line) of the answer's body."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    try:
        name = f"[{host}]" if ":" in host else host
        head = f" HTTP/1.1\r\nHost: {name}:{port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(what + head.encode() + body)
        await writer.drain()
        status = int((await reader.readuntil(b"\r\n")).split()[1])
        headers = {}
        while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
            key, _, value = line.decode("latin-1").partition(":")
            headers[key.lower()] = value.strip()
        if headers.get("transfer-encoding") != "chunked":
            length = headers.get("content-length")
            yield status, await (reader.read() if length is None else reader.readexactly(int(length)))
            return
        pending = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            *lines, pending = (pending + await reader.readexactly(size)).split(b"\n")
            await reader.readexactly(2)
            for line in lines:
                yield status, line
        if pending:
            yield status, pending
    finally:
        writer.close()
