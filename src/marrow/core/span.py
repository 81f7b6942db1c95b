"""Spans: where the time of a thread went, to the last millisecond.

    with Ledger("train") as ledger:
        with span("data wait"):
            batch = next(batches)
        with span("forward"):
            ...
    ledger.summary().parts      # {"data wait": Part(...), "forward": Part(...), "other": ...}

One idea: a span is charged with its *exclusive* time. Opening an inner span stops the outer
span's clock, so the parts of one thread never overlap and their sum is the wall time of the
ledger, "other" being what no span covered. Work that ran on other threads meanwhile is listed
apart (`overlapped`) and is no part of the sum. A wait is charged to the stage that the awaited
thing was in: name the span after that stage.

Every finished span also goes to the process-wide sink, if one is set (tracing).
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

OTHER = "other"


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """One finished span. Times in seconds; `start_s` is `time.perf_counter()`'s clock."""

    name: str
    start_s: float
    duration_s: float
    exclusive_s: float
    thread: str
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """One line of a ledger: exclusive seconds and how many spans made them."""

    seconds: float
    count: int


@dataclass(frozen=True, slots=True)
class LedgerSummary:
    """A ledger read out: `parts` sum to `wall_s`; `overlapped` ran beside, on other threads."""

    name: str
    wall_s: float
    cpu_s: float
    parts: Mapping[str, Part]
    overlapped: Mapping[str, Part]

    def as_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold."""
        return {
            "name": self.name,
            "wall_s": self.wall_s,
            "cpu_s": self.cpu_s,
            "parts": {k: {"seconds": p.seconds, "count": p.count} for k, p in self.parts.items()},
            "overlapped": {k: {"seconds": p.seconds, "count": p.count} for k, p in self.overlapped.items()},
        }


class Ledger:
    """Adds up the spans of the thread that enters it.

    A ledger opened inside another one is a single part of the outer, under its own name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._parts: dict[str, Part] = {}
        self._overlapped: dict[str, Part] = {}
        self._start_s = 0.0
        self._cpu_start_s = 0.0
        self._closed: LedgerSummary | None = None

    def __enter__(self) -> "Ledger":
        self._start_s = _push(_Frame(OTHER, self))
        self._cpu_start_s = time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cpu_s = time.process_time() - self._cpu_start_s
        frame, now = _pop()
        assert frame.ledger is self and frame.name == OTHER, "spans closed out of order"
        wall_s = now - self._start_s
        self._add(self._parts, OTHER, frame.exclusive_s)
        self._closed = LedgerSummary(self.name, wall_s, cpu_s, self._parts, self._overlapped)
        outer = enclosing_ledger()
        if outer is not None:
            outer._add(outer._parts, self.name, wall_s)

    def overlap(self, name: str, seconds: float) -> None:
        """Record work that another thread did meanwhile. Safe from any thread."""
        self._add(self._overlapped, name, seconds)

    def summary(self) -> LedgerSummary:
        """Read the ledger out; while it is open, up to now, unfinished spans under "other"."""
        if self._closed is not None:
            return self._closed
        with self._lock:
            parts, overlapped = dict(self._parts), dict(self._overlapped)
        wall_s = time.perf_counter() - self._start_s
        parts[OTHER] = Part(wall_s - sum(part.seconds for part in parts.values()), 1)
        cpu_s = time.process_time() - self._cpu_start_s
        return LedgerSummary(self.name, wall_s, cpu_s, parts, overlapped)

    def _add(self, parts: dict[str, Part], name: str, seconds: float) -> None:
        with self._lock:
            old = parts.get(name, NOTHING)
            parts[name] = Part(old.seconds + seconds, old.count + 1)


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[None]:
    """Charge the block's exclusive time to `name` in the thread's ledger, and tell the sink.

    Cost: about 2 microseconds. Without a ledger and a sink it only costs that.
    """
    frame = _Frame(name, enclosing_ledger())
    start_s = _push(frame)
    try:
        yield
    finally:
        popped, now = _pop()
        assert popped is frame, "spans closed out of order"
        if frame.ledger is not None:
            frame.ledger._add(frame.ledger._parts, name, frame.exclusive_s)
        if _sink is not None:
            thread = threading.current_thread().name
            _sink(SpanRecord(name, start_s, now - start_s, frame.exclusive_s, thread, attributes))


def charge(parts: Mapping[str, float]) -> None:
    """Move seconds of the span that is open on this thread to other parts of its ledger.

    For a wait whose reason is known only when it is over. The ledger's sum stays the wall time: what
    is moved is taken off the open span. Without a ledger nothing happens.
    """
    ledger = enclosing_ledger()
    if ledger is None:
        return
    frame = _stack()[-1]
    for name, seconds in parts.items():
        frame.exclusive_s -= seconds
        ledger._add(ledger._parts, name, seconds)


def enclosing_ledger() -> Ledger | None:
    """Return the ledger that this thread's spans are charged to, if there is one."""
    stack = _stack()
    return stack[-1].ledger if stack else None


def is_watched() -> bool:
    """Tell whether spans of this thread go anywhere: into a ledger or to the process's sink."""
    stack: list[_Frame] = getattr(_local, "stack", [])
    return _sink is not None or (bool(stack) and stack[-1].ledger is not None)


def set_sink(sink: Callable[[SpanRecord], None] | None) -> None:
    """Send every finished span of this process to `sink` (called on the span's thread); None resets."""
    global _sink
    _sink = sink


NOTHING = Part(0.0, 0)
_sink: Callable[[SpanRecord], None] | None = None
_local = threading.local()


@dataclass(slots=True)
class _Frame:
    """An open span: the seconds of its own so far, and since when its clock runs."""

    name: str
    ledger: Ledger | None
    exclusive_s: float = 0.0
    resumed_s: float = 0.0


def _stack() -> list[_Frame]:
    try:
        return _local.stack  # type: ignore[no-any-return]
    except AttributeError:
        _local.stack = []
        return _local.stack  # type: ignore[no-any-return]


def _push(frame: _Frame) -> float:
    """Stop the clock of the span on top, start the new one's; return the time."""
    stack = _stack()
    now = time.perf_counter()
    if stack:
        stack[-1].exclusive_s += now - stack[-1].resumed_s
    frame.resumed_s = now
    stack.append(frame)
    return now


def _pop() -> tuple[_Frame, float]:
    """Stop the clock of the span on top, go on with the one below; return the span and the time."""
    stack = _stack()
    now = time.perf_counter()
    frame = stack.pop()
    frame.exclusive_s += now - frame.resumed_s
    if stack:
        stack[-1].resumed_s = now
    return frame, now
