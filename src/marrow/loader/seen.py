"""Which rows a training run has seen: the loader's order, asked backwards.

A run that consumed positions [a, b) saw the rows that the order puts there. Of whole epochs nothing
needs to be computed, for each holds every row once; of the two that may be cut, the positions are
gone through. In a mixture whole blocks of positions take what comes next of each source, so the same
holds of a source's own stream; of the two blocks that may be cut, the positions are gone through.
So the answer is exact, from a few numbers and the seed, however long the run was.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marrow.loader.mixture import Schedule
from marrow.loader.plan import Int64Array, Order

_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Seen:
    """times: how often a sample that holds the rows was consumed. first: the earliest position."""

    times: int = 0
    first: int | None = None

    def and_also(self, other: "Seen") -> "Seen":
        """Return what was seen of both, which have no sample in common."""
        first = min((one for one in (self.first, other.first) if one is not None), default=None)
        return Seen(self.times + other.times, first)


def times_seen(
    order: Order, rows_N: Int64Array, start: int, stop: int, skip: Iterable[tuple[int, int]] = ()
) -> Seen:
    """Count how often the positions [start, stop) read any of some rows.

    Args: rows_N: int64, different rows. skip: ranges [low, high) of positions that were left out.
    Cost: about 10 ns for each position of the first and the last epoch of a stretch between skipped
        ranges, if they are cut.
    """
    wanted_R = _wanted(order, rows_N)
    seen = Seen()
    for low, high in _stretches(start, stop, skip):
        seen = seen.and_also(_between(order, wanted_R, low, high, seen.first is not None))
    return seen


def times_mixed(
    schedule: Schedule,
    source: int,
    order: Order,
    rows_N: Int64Array,
    start: int,
    stop: int,
    skip: Iterable[tuple[int, int]] = (),
) -> Seen:
    """Count how often the positions [start, stop) of a mixture read any of some rows of one source.

    Args: source: its number in the schedule. order: its own order. rows_N: int64, numbered within
        it. skip: as for `times_seen`.
    Cost: as `times_seen` of the source's stream, and some ms for each stretch.
    """
    wanted_R = _wanted(order, rows_N)
    seen = Seen()
    for low, high in _stretches(start, stop, skip):
        # | cut block | whole blocks | cut block |
        head = low if schedule.block(low)[0] == low else min(schedule.block(low)[1], high)
        tail = max(head, schedule.block(high)[0])
        seen = seen.and_also(_of_positions(schedule, source, order, wanted_R, low, head))
        first, end = (schedule.counts(at)[source] for at in (head, tail))
        found = _between(order, wanted_R, first, end, seen.first is not None)
        if found.first is not None:
            block = schedule.block(_position_after(schedule, source, found.first, head, tail))
            at = _of_positions(schedule, source, order, wanted_R, *block).first
            found = Seen(found.times, at)
        seen = seen.and_also(found)
        seen = seen.and_also(_of_positions(schedule, source, order, wanted_R, tail, high))
    return seen


def _of_positions(
    schedule: Schedule, source: int, order: Order, wanted_R: NDArray[np.bool_], low: int, high: int
) -> Seen:
    """Go through some positions of a mixture, of two blocks at most."""
    source_N, place_N = schedule.places(np.arange(low, high, dtype=np.int64))
    here = np.flatnonzero(source_N == source)
    hits = here[wanted_R[order.rows(place_N[here])]]
    return Seen(len(hits), low + int(hits[0]) if len(hits) else None)


def _position_after(schedule: Schedule, source: int, place: int, low: int, high: int) -> int:
    """Return the last position in [low, high) before which at most `place` came from a source.

    It lies in the block that has this place of the source's stream.
    """
    while high - low > 1:
        middle = (low + high) // 2
        if schedule.counts(middle)[source] <= place:
            low = middle
        else:
            high = middle
    return low


def _wanted(order: Order, rows_N: Int64Array) -> NDArray[np.bool_]:
    wanted_R = np.zeros(order.num_rows, bool)
    wanted_R[rows_N] = True
    return wanted_R


def _stretches(start: int, stop: int, skip: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield what ranges leave of [start, stop), none of it empty."""
    for low, high in [*sorted(skip), (stop, stop)]:
        if start < min(low, stop):
            yield start, min(low, stop)
        start = max(start, high)


def _between(order: Order, wanted_R: NDArray[np.bool_], start: int, stop: int, has_first: bool) -> Seen:
    """Count the positions in [start, stop) that read a wanted row; find the first, unless there is one."""
    each_epoch = int(wanted_R.sum())
    times, first, position = 0, None, start
    while position < stop and each_epoch:
        is_whole = position % order.num_rows == 0 and position + order.num_rows <= stop
        if is_whole and (has_first or first is not None):
            epochs = (stop - position) // order.num_rows
            times += epochs * each_epoch
            position += epochs * order.num_rows
            continue
        end = min(stop, position + _AT_ONCE, (position // order.num_rows + 1) * order.num_rows)
        hits = np.flatnonzero(wanted_R[order.rows(np.arange(position, end, dtype=np.int64))])
        times += len(hits)
        if len(hits) and first is None:
            first = position + int(hits[0])
        position = end
    return Seen(times, first)
