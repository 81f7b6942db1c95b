"""What a caller reads of a running request: pieces of text, then why it ended.

`TextStream` turns token ids into text that may be shown: no half character leaves it, and
nothing that may yet become a stop string. `Stream` hands the pieces from the engine's thread to
the caller's, be that a plain thread (`for`) or an event loop (`async for`).
"""

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field

from marrow.core.errors import ServeError
from marrow.core.records import Completion, FinishReason
from marrow.serve.sequence import TokenLogprobs
from marrow.text.tokenizer import Detokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to a request. The last one has a finish_reason or an error.

    token_ids, logprobs: drawn in this step (logprobs only if asked for). prompt_logprobs: of
    prompt tokens computed in this step. text: may lag behind the tokens. ledger, num_shared,
    num_preemptions: on the last one only.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: ServeError | None = None
    ledger: Mapping[str, float] = field(default_factory=dict)
    num_shared: int = 0
    num_preemptions: int = 0


class TextStream:
    """Decodes tokens to text and finds stop strings across token borders."""

    def __init__(self, detokenizer: Detokenizer, stop: tuple[str, ...]) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._held = ""

    def add(self, token_id: int) -> tuple[str, bool]:
        """Take a token; return the text that may be shown now, and whether a stop string came.

        The stop string and what follows it are not shown.
        """
        return self._search(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """Return all text that was held back, up to a stop string."""
        text, stopped = self._search(self._detokenizer.finish())
        return text if stopped else text + self._held

    def _search(self, text: str) -> tuple[str, bool]:
        self._held += text
        if not self._stop:
            text, self._held = self._held, ""
            return text, False
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            return text, True
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text, False


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class Stream:
    """The answer to one request, read once, by one reader, with `for` or `async for`.

    Args: abort: asks the engine to end the request. loop: the reader's event loop; None for a
    plain thread.
    """

    def __init__(
        self, num_prompt: int, abort: Callable[[], None], loop: asyncio.AbstractEventLoop | None
    ) -> None:
        self.num_prompt = num_prompt
        self.loop = loop
        self.last: Delta | None = None
        self._abort = abort
        self._arrived: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._arrived_async: asyncio.Queue[Delta] = asyncio.Queue()
        self._text: list[str] = []
        self._token_ids: list[int] = []

    def put(self, delta: Delta) -> None:
        """Hand over a piece; called on the reader's event loop, or on any thread if it has none."""
        if self.loop is None:
            self._arrived.put(delta)
        else:
            self._arrived_async.put_nowait(delta)

    def abort(self) -> None:
        """End the request before its next step; its blocks are free then. Twice is fine."""
        self._abort()

    def __iter__(self) -> Iterator[Delta]:
        assert self.loop is None, "this stream belongs to an event loop"
        while self.last is None:
            yield self._note(self._arrived.get())

    async def __aiter__(self) -> AsyncIterator[Delta]:
        assert self.loop is not None, "this stream belongs to a plain thread"
        while self.last is None:
            yield self._note(await self._arrived_async.get())

    def result(self) -> Completion:
        """Read to the end and return the whole. Raises ServeError if the request failed."""
        for _ in self:
            pass
        return self.completion

    @property
    def completion(self) -> Completion:
        """What was read, once the end was."""
        last = self.last
        assert last is not None and last.finish_reason is not None, "the stream has not ended"
        return Completion(
            "".join(self._text), tuple(self._token_ids), last.finish_reason, self.num_prompt, last.ledger
        )

    def _note(self, delta: Delta) -> Delta:
        self._text.append(delta.text)
        self._token_ids.extend(delta.token_ids)
        if delta.finish_reason is not None:
            self.last = delta
        if delta.error is not None:
            raise delta.error
        return delta


class Outbox:
    """Collects the pieces of one step and hands them over with one call for each event loop."""

    def __init__(self) -> None:
        self._items: list[tuple[Stream, Delta]] = []

    def put(self, stream: Stream, delta: Delta) -> None:
        """Keep a piece until the step ends."""
        self._items.append((stream, delta))

    def flush(self) -> None:
        """Hand all over. Requests whose loop was closed have no reader any more: they are aborted."""
        items, self._items = self._items, []
        by_loop: dict[asyncio.AbstractEventLoop | None, list[tuple[Stream, Delta]]] = {}
        for stream, delta in items:
            by_loop.setdefault(stream.loop, []).append((stream, delta))
        for loop, some in by_loop.items():
            if loop is None:
                _hand_over(some)
                continue
            try:
                loop.call_soon_threadsafe(_hand_over, some)
            except RuntimeError:
                for stream, _ in some:
                    stream.abort()


def _hand_over(items: list[tuple[Stream, Delta]]) -> None:
    for stream, delta in items:
        stream.put(delta)
