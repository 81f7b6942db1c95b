"""Mixtures: which source a position comes from, by weights that may change on the way.

    mixture = Mixture([orders...], [Phase(0, (0.7, 0.3)), Phase(1_000_000, (0.5, 0.5))], seed=0)
    mixture.rows(positions)      # rows of all sources, numbered one source after the other
    mixture.counts(10**9)        # how many positions before it came from each: no replay

Two sources share a stream of n positions as floor(share * n) and the rest, an arithmetic that is
exact at every n; more sources are a tree of such splits. So the count of each source up to any
position is known from its number alone, each source's rows come in its own order without a gap,
and over any stretch a source is at most one position per level of the tree off its weight. What
would be a regular beat is broken up: positions are permuted within blocks of 1024 first.

A phase of the schedule starts its own splits where the counts of the one before ended. Epochs are
each source's own: `epochs` says how often a source was gone through.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from marrow.core.errors import UsageError
from marrow.kernels.rows.gather_rows import permute
from marrow.loader.plan import Order, order_keys

Int64Array = NDArray[np.int64]

BLOCK = 1024
_UNIT = 1 << 30  # shares are counted in it: share * n must fit 64 bits


@dataclass(frozen=True, slots=True)
class Phase:
    """From position `start` on, sources come by `weights`, one each, in any unit."""

    start: int
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Split:
    """A node of the tree: `share` of 2^30 goes to the left. A child is a node or a source's number."""

    share: int
    left: "_Split | int"
    right: "_Split | int"


class Schedule:
    """Which source each position comes from, and which place of that source's own stream it has.

    It knows weights and no rows, so it can be asked of one source where the others are not at hand.
    Raises: UsageError for weights or phases that make no sense.
    """

    def __init__(self, phases: Sequence[Phase], seed: int) -> None:
        self.num_sources = len(phases[0].weights) if phases else 0
        check_phases(phases, self.num_sources)
        self.phases = tuple(phases)
        self._seed = seed
        self._trees = [_tree(list(enumerate(phase.weights))) for phase in phases]
        self._starts = [phase.start for phase in phases]
        self._base = [[0] * self.num_sources]  # counts at each phase's start
        for tree, low, high in zip(self._trees, self._starts, self._starts[1:], strict=False):
            used = _counts(tree, high - low, self.num_sources)
            self._base.append([a + b for a, b in zip(self._base[-1], used, strict=True)])

    def places(self, positions_N: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return each position's source and its place in that source's own order."""
        source_N, index_N = np.empty((2, len(positions_N)), dtype=np.int64)
        phase_N = np.searchsorted(self._starts, positions_N, side="right") - 1
        for phase in np.unique(phase_N).tolist():
            here_N = phase_N == phase
            offset_N = self._mixed(positions_N[here_N] - self._starts[phase], phase)
            sources, places = _follow(self._trees[phase], offset_N)
            source_N[here_N] = sources
            index_N[here_N] = np.array(self._base[phase])[sources] + places
        return source_N, index_N

    def counts(self, position: int) -> tuple[int, ...]:
        """Return how many of the positions before `position` come from each source.

        Where a block begins these are the first ones of each source's stream; within a block, which
        is looked at, as many but not always the first. Cost: microseconds.
        """
        phase = bisect_right(self._starts, position) - 1
        low, _ = self.block(position)
        before = _counts(self._trees[phase], low - self._starts[phase], self.num_sources)
        counts = np.array(self._base[phase]) + before
        if position > low:
            sources, _ = self.places(np.arange(low, position, dtype=np.int64))
            counts += np.bincount(sources, minlength=self.num_sources)
        return tuple(counts.tolist())

    def block(self, position: int) -> tuple[int, int]:
        """Return the positions [low, high) that are mixed with `position`: 1024, less where a phase ends."""
        phase = bisect_right(self._starts, position) - 1
        low = position - (position - self._starts[phase]) % BLOCK
        return low, min([low + BLOCK, *self._starts[phase + 1 : phase + 2]])

    def _mixed(self, offset_N: Int64Array, phase: int) -> Int64Array:
        """Permute offsets within blocks; a block that the phase's end cuts is permuted as it is."""
        mixed_N = np.empty_like(offset_N)
        block_N = offset_N // BLOCK
        for block in np.unique(block_N).tolist():
            here_N = block_N == block
            low, high = (end - self._starts[phase] for end in self.block(self._starts[phase] + block * BLOCK))
            keys = order_keys(self._seed, phase, f"mixture {block}")
            mixed_N[here_N] = low + permute(offset_N[here_N] - low, high - low, keys)
        return mixed_N


class Mixture:
    """The order of several sources together; an epoch of it is one of its longest run: see `num_rows`.

    Args: orders: of each source. phases: the first begins at 0, starts rise. seed: of the mixing;
        the sources' orders have their own.
    Raises: UsageError for weights or phases that make no sense.
    """

    def __init__(self, orders: Sequence[Order], phases: Sequence[Phase], seed: int) -> None:
        check_phases(phases, len(orders))
        self.schedule = Schedule(phases, seed)
        self._orders = tuple(orders)
        self._first_row = np.cumsum([0, *(order.num_rows for order in orders)])

    @property
    def num_rows(self) -> int:
        """Return the rows of all sources together. A mixture has no epochs of its own."""
        return int(self._first_row[-1])

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Return the weights over time."""
        return self.schedule.phases

    @property
    def name(self) -> str:
        """Return what the state calls it: all that the order of sources depends on."""
        phases = "; ".join(
            f"from {p.start}: {', '.join(str(float(w)) for w in p.weights)}" for p in self.phases
        )
        kinds = dict.fromkeys(order.name for order in self._orders)
        return f"mixture {phases}; sources {', '.join(kinds)}"

    def rows(self, positions_N: Int64Array) -> Int64Array:
        """Return rows at many positions, each source's rows behind those of the sources before it.

        Cost: about 50 ns a position and source level, and 10 microseconds a block met.
        """
        source_N, index_N = self.places(positions_N)
        rows_N = np.empty(len(positions_N), dtype=np.int64)
        for source, order in enumerate(self._orders):
            here_N = source_N == source
            if here_N.any():
                rows_N[here_N] = self._first_row[source] + order.rows(index_N[here_N])
        return rows_N

    def places(self, positions_N: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return each position's source and its place in that source's own order."""
        return self.schedule.places(positions_N)

    def counts(self, position: int) -> tuple[int, ...]:
        """Return how many of the positions before `position` come from each source."""
        return self.schedule.counts(position)

    def epochs(self, position: int) -> tuple[float, ...]:
        """Return how often each source was gone through before `position`: above 1 it is upsampled."""
        pairs = zip(self.counts(position), self._orders, strict=True)
        return tuple(count / order.num_rows for count, order in pairs)

    def ahead(self, position: int, count: int) -> Int64Array:
        """Return rows that tell what each source needs soon."""
        now, then = self.counts(position), self.counts(position + count)
        return np.concatenate(
            [
                order.ahead(low, high - low) + self._first_row[source]
                for source, (order, low, high) in enumerate(zip(self._orders, now, then, strict=True))
                if high > low
            ]
            or [np.empty(0, dtype=np.int64)]
        )


def check_phases(phases: Sequence[Phase], num_sources: int) -> None:
    """Raise UsageError unless phases make a schedule for so many sources."""
    if not num_sources or not phases:
        raise UsageError("a mixture needs at least one source and one phase", hint="name what to mix")
    if phases[0].start != 0 or any(a.start >= b.start for a, b in pairwise(phases)):
        raise UsageError(
            f"phases begin at {[phase.start for phase in phases]}",
            hint="the first begins at position 0, each other after the one before",
        )
    for phase in phases:
        weights = phase.weights
        if len(weights) != num_sources:
            raise UsageError(
                f"{len(weights)} weights for {num_sources} sources",
                hint="give one weight a source, 0 for none",
            )
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not 0 < sum(weights) < math.inf:
            raise UsageError(
                f"weights {weights} from position {phase.start} on cannot be shares",
                hint="weights are numbers from 0 on, and not all of them 0",
            )
        positive = [w for w in weights if w > 0]
        if min(positive) / sum(positive) < 64 / _UNIT:
            raise UsageError(
                f"weights {weights}: the smallest is less than {64 / _UNIT:.0e} of all",
                hint="leave that source out, or raise its weight",
            )
    for source in range(num_sources):
        if not any(phase.weights[source] for phase in phases):
            raise UsageError(
                f"source {source} has weight 0 in every phase", hint="leave it out of the mixture"
            )


def _tree(sources: list[tuple[int, float]]) -> _Split | int:
    """Split sources with weight in two halves of about equal number, and those again."""
    sources = [(source, weight) for source, weight in sources if weight > 0]
    if len(sources) == 1:
        return sources[0][0]
    left, right = sources[: len(sources) // 2], sources[len(sources) // 2 :]
    share = sum(w for _, w in left) / sum(w for _, w in sources)
    whole = min(_UNIT - 1, max(1, round(share * _UNIT)))
    return _Split(whole, _tree(left), _tree(right))


def _left_of(count: Int64Array | int, share: int) -> Int64Array | int:
    """Return floor((count * share + unit / 2) / unit), whose terms fit 64 bits for any count."""
    return count // _UNIT * share + (count % _UNIT * share + _UNIT // 2) // _UNIT


def _counts(tree: _Split | int, count: int, num_sources: int) -> list[int]:
    """Return how many of the first `count` of a stream each source gets."""
    counts = [0] * num_sources

    def walk(node: _Split | int, number: int) -> None:
        if isinstance(node, int):
            counts[node] = number
        else:
            left = int(_left_of(number, node.share))
            walk(node.left, left)
            walk(node.right, number - left)

    walk(tree, count)
    return counts


def _follow(tree: _Split | int, offset_N: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return the source that each place of a stream goes to, and its place in the source's stream."""
    source_N, place_N = np.empty((2, len(offset_N)), dtype=np.int64)

    def walk(node: _Split | int, here: Int64Array, offset: Int64Array) -> None:
        if isinstance(node, int):
            source_N[here], place_N[here] = node, offset
            return
        left = np.asarray(_left_of(offset, node.share))
        goes_left = np.asarray(_left_of(offset + 1, node.share)) > left
        walk(node.left, here[goes_left], left[goes_left])
        walk(node.right, here[~goes_left], (offset - left)[~goes_left])

    walk(tree, np.arange(len(offset_N)), offset_N)
    return source_N, place_N
