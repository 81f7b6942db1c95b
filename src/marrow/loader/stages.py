"""The stages of a batch, and to which of them the consumer's wait is charged.

    fetch      bytes come from elsewhere            copy    onto the accelerator
    verify     their check is computed              queue   none of these: the batch stood in line,
    decode     bytes become rows                            or was handed over
    transform  rows become samples
    collate    samples become a batch

Whoever makes a batch says what it does (`with stage("decode"):`); inner stages stop the clock of
outer ones, so the marks of a batch are a line of time without gaps or overlap. A consumer that
waits is charged with what the batch it waits for was in, moment by moment: `split` lays the wait
over that line. It holds between threads and processes, since they share the monotonic clock.
"""

import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

QUEUE = "queue"
STAGES = ("fetch", "verify", "decode", "transform", "collate", "copy", QUEUE)
WAIT = "data wait"
MOST_NOTES = 20  # of a batch

Mark = tuple[float, str]  # from this time on (perf_counter) the batch is in this stage


class Timeline:
    """The stages that one batch went through, what was counted on the way, and notes on it.

        with Timeline() as timeline:    # the stages that this thread goes through inside the block
            ...

    packing_s: what it took to put it into shared memory. Travels from worker to parent;
    `on_change` stays behind.
    """

    __slots__ = ("_before", "_on_change", "counts", "marks", "notes", "packing_s")

    def __init__(self, on_change: Callable[[str], None] | None = None) -> None:
        self.marks: list[Mark] = [(time.perf_counter(), QUEUE)]
        self.counts: dict[str, int] = {}
        self.notes: list[str] = []
        self.packing_s = 0.0
        self._on_change = on_change

    def enter(self, stage: str) -> None:
        """Note that the batch is in another stage from now on."""
        self.marks.append((time.perf_counter(), stage))
        if self._on_change is not None:
            self._on_change(stage)

    def __enter__(self) -> "Timeline":
        self._before: Timeline | None = getattr(_local, "timeline", None)
        _local.timeline = self
        return self

    def __exit__(self, *_: object) -> None:
        _local.timeline = self._before
        self.enter(QUEUE)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.marks, self.counts, self.notes, self.packing_s

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.marks, self.counts, self.notes, self.packing_s = state
        self._on_change = None


_local = threading.local()


def enter(name: str) -> None:
    """Say what this thread does from now on, until it says something else or the recording ends."""
    timeline: Timeline | None = getattr(_local, "timeline", None)
    if timeline is not None:
        timeline.enter(name)


class stage:  # noqa: N801 - reads like `span`; a class because it is entered some times for each batch
    """Say what this thread does for the batch it makes. Cost: about 1 microsecond; none unrecorded."""

    __slots__ = ("_name", "_outer", "_timeline")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        self._timeline: Timeline | None = getattr(_local, "timeline", None)
        if self._timeline is not None:
            self._outer = self._timeline.marks[-1][1]
            self._timeline.enter(self._name)

    def __exit__(self, *_: object) -> None:
        if self._timeline is not None:
            self._timeline.enter(self._outer)


def count(name: str, note: str = "") -> None:
    """Count something about the batch that this thread makes, such as a sample left out; say which."""
    timeline: Timeline | None = getattr(_local, "timeline", None)
    if timeline is not None:
        timeline.counts[name] = timeline.counts.get(name, 0) + 1
        if note and len(timeline.notes) < MOST_NOTES:
            timeline.notes.append(note)


def split(marks: Sequence[Mark], start_s: float, end_s: float) -> dict[str, float]:
    """Divide the wait [start_s, end_s) by the stages that the awaited batch was in.

    Returns: seconds by stage; their sum is end_s - start_s.
    """
    parts: dict[str, float] = {}
    now, inside = start_s, QUEUE
    for mark_s, name in marks:
        until = min(max(mark_s, start_s), end_s)
        if until > now:
            parts[inside] = parts.get(inside, 0.0) + until - now
            now = until
        inside = name
    if end_s > now:
        parts[QUEUE] = parts.get(QUEUE, 0.0) + end_s - now
    return parts


def totals(marks: Sequence[Mark]) -> dict[str, float]:
    """Return the seconds that a batch spent in each stage, the queue left out."""
    parts: dict[str, float] = {}
    for (start_s, name), (end_s, _) in pairwise(marks):
        if name != QUEUE:
            parts[name] = parts.get(name, 0.0) + end_s - start_s
    return parts


def account(marks: Sequence[Mark], start_s: float, end_s: float) -> tuple[dict[str, float], dict[str, float]]:
    """Return the wait [start_s, end_s) by stage, as `split`, and the work by stage, as `totals`.

    PERF: a batch that was made within the wait, as without a thread, is looked through once.
    """
    worked = totals(marks)
    if not marks or marks[0][0] < start_s or marks[-1][0] > end_s:
        return split(marks, start_s, end_s), worked
    return worked | {QUEUE: end_s - start_s - sum(worked.values())}, worked
