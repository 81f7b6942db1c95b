"""The walk along the order: global batch after global batch, skipped ranges left out, one rank's part.

What it gives is a `Job`: the rows of one batch and where it ends. That is all a maker needs, on
whatever thread or in whatever process it runs, and costs microseconds: positions are turned into
rows some thousands at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from marrow.core.errors import UsageError
from marrow.loader.plan import Int64Array, Order

Ranges = tuple[tuple[int, int], ...]

MOST_POSITIONS = (1 << 63) - 1
# PERF: rows of 4096 positions take 80 us at once in C (2.4 ms in numpy), those of 16 some 10 us.
_ROWS_AT_ONCE = 4096
# Each job says anew which rows come soon: a cache smaller than the data may have dropped their shards.
# An order that needs more than so many rows to say it goes everywhere: what it wants later would push
# out of such a cache what it wants now, and be fetched twice. Then a job's own rows are all that is said.
_MOST_AHEAD = 512
_POSITIONS_AT_ONCE = 1 << 16  # of all ranks: no more than numbers to choose from


@dataclass(frozen=True, slots=True)
class Job:
    """One batch to make: its rows, int64 [B]; the global positions it spans; where all ranks' ends."""

    rows_B: Int64Array
    samples: range
    end: int


class Jobs(NamedTuple):
    """Batches of equal size to make in one go. A tuple: it is made for each batch, in a third of the time.

    rows_N: int64, of batch after batch. samples, ends: of each batch, as of a `Job`.
    """

    rows_N: Int64Array
    samples: Sequence[range]
    ends: Sequence[int]


class Walk:
    """Gives the jobs of one rank from a position on.

    Args: batch_rows: of all ranks together, a multiple of `world`; a rank gets its contiguous part
        of each batch. skip: merged ranges. stop: the first position that is not given out, or None.
        The last batch before `stop` has what is left, rounded down to a multiple of `world`.
        ahead: is told rows that come soon.
    """

    def __init__(
        self,
        order: Order,
        start: int,
        batch_rows: int,
        *,
        rank: int = 0,
        world: int = 1,
        skip: Ranges = (),
        stop: int | None = None,
        ahead: Callable[[Int64Array], None] | None = None,
    ) -> None:
        self._order = order
        self._next = start
        self._batch_rows = batch_rows
        self._rank, self._world = rank, world
        self._skip = [(low, high) for low, high in skip if high > start][::-1]
        self._stop = MOST_POSITIONS if stop is None else stop
        self._ahead = ahead
        at_once = min(_ROWS_AT_ONCE, order.num_rows)  # an epoch has keys of its own, which take time
        self._plan_batches = max(1, min(at_once * world, _POSITIONS_AT_ONCE) // batch_rows)
        self._left = np.empty(0, dtype=np.int64)
        # Planned batches: own rows, own positions, where all ranks' end; those before `_used` are done.
        self._rows, self._size = np.empty(0, dtype=np.int64), 0
        self._samples: list[range] = []
        self._ends: list[int] = []
        self._soon = np.empty(0, dtype=np.int64)  # rows that tell what comes after those of a job
        self._looked_until = start if ahead is not None else MOST_POSITIONS
        self._used = 0

    def __iter__(self) -> Iterator[Job]:
        return self

    def __next__(self) -> Job:
        """Return the next batch's job. Raises: UsageError where positions end, at 2^63."""
        jobs = self.take(1)
        return Job(jobs.rows_N, jobs.samples[0], jobs.ends[0])

    def many(self, batches: int) -> Iterator[Jobs]:
        """Give jobs of up to so many batches each; the first has one, since someone waits for it."""
        try:
            yield self.take(1)
            while True:
                yield self.take(batches)
        except StopIteration:
            return

    def take(self, batches: int) -> Jobs:
        """Return the jobs of the next batches, at most so many. Raises: as `next`."""
        if self._used == len(self._ends):
            self._plan()
        low, high = self._used, min(self._used + batches, len(self._ends))
        rows_N = self._rows[low * self._size : high * self._size]
        jobs = Jobs(rows_N, self._samples[low:high], self._ends[low:high])
        self._used = high
        if self._ahead is not None:
            self._look_ahead(jobs.samples[0].start)
            self._ahead(np.concatenate([jobs.rows_N, self._soon]))
        return jobs

    def _plan(self) -> None:
        """Turn the positions of some batches into rows."""
        positions = self._next_positions(self._plan_batches * self._batch_rows)
        size = min(self._batch_rows, len(positions)) // self._world
        if not size:
            if self._stop == MOST_POSITIONS:
                raise UsageError("positions end at 2^63", hint="start nearer to 0")
            raise StopIteration
        count = len(positions) // (size * self._world)
        over = len(positions) - count * size * self._world
        self._left = positions[len(positions) - over :]  # for the last batch, which is short
        positions = positions[: len(positions) - over].reshape(count, size * self._world)
        own = positions[:, self._rank * size : (self._rank + 1) * size]
        rows = self._order.rows(np.ascontiguousarray(own).reshape(-1))
        spans = zip(own[:, 0].tolist(), (own[:, -1] + 1).tolist(), strict=True)
        self._samples = [range(first, end) for first, end in spans]
        self._ends = (positions[:, -1] + 1).tolist()
        self._rows, self._size, self._used = rows, size, 0

    def _look_ahead(self, position: int) -> None:
        """Find which rows come after `position`; again after some batches, since what is behind misleads."""
        if position < self._looked_until:
            return
        self._soon = self._order.ahead(position, 2 * self._plan_batches * self._batch_rows)
        self._looked_until = position + _MOST_AHEAD * self._world
        if len(self._soon) > _MOST_AHEAD:
            self._soon, self._looked_until = self._soon[:0], MOST_POSITIONS

    def _next_positions(self, count: int) -> Int64Array:
        """Return the next `count` positions that are not skipped; fewer at the end."""
        pieces = [self._left]
        count -= len(self._left)
        while count:
            while self._skip and self._skip[-1][0] <= self._next:
                self._next = max(self._next, self._skip.pop()[1])
            end = min(self._next + count, self._stop, *[low for low, _ in self._skip[-1:]])
            if end <= self._next:
                break
            pieces.append(np.arange(self._next, end, dtype=np.int64))
            count -= end - self._next
            self._next = end
        return np.concatenate(pieces)


def merge(skip: Sequence[tuple[int, int]]) -> Ranges:
    """Sort ranges [low, high) and join those that touch. Raises: UsageError for an empty one."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(skip):
        if not 0 <= low < high <= MOST_POSITIONS:
            raise UsageError(
                f"skip range ({low}, {high}) is empty, negative or beyond 2^63", hint="write [low, high)"
            )
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)
