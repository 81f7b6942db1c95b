"""The order of samples, as a pure function: position in the run -> row of the data.

    order = FullShuffle(num_rows=5_097, seed=0)
    order.row(12_345)               # row 12_345 % 5_097 of epoch 2's permutation

Nothing is stored and nothing is shuffled: a position's row is computed, in microseconds, for any
number of rows. So resuming is arithmetic, every rank agrees without talking, and another number
of ranks reads the same global order: batch k of B rows is positions [k B, (k+1) B), and each rank
takes its contiguous part.

    FullShuffle      any row can come at any place of its epoch. For data on a local disk.
    WindowShuffle    shards are permuted; the rows of W shards in a row are shuffled fully. Only W
                     shards are read at a time, and each once an epoch: for data that is far away.

Keys of the permutations (`kernels/rows/gather_rows.py`) are SHA-512 of seed, epoch and window.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from marrow.kernels.rows.gather_rows import NUM_KEYS, halves, permute

Int64Array = NDArray[np.int64]

MOST_ROWS = 1 << 62
_MASK64 = (1 << 64) - 1
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB


class Order(Protocol):
    """position -> row. `name` goes into the loader's state: what it needs beside the seed and the data."""

    @property
    def num_rows(self) -> int:
        """Return how many positions an epoch has."""
        ...

    @property
    def name(self) -> str: ...  # noqa: D102

    def rows(self, positions_N: Int64Array) -> Int64Array:
        """Return the rows at many positions, int64 [N], each >= 0."""
        ...

    def ahead(self, position: int, count: int) -> Int64Array:
        """Return rows that tell what is wanted from `position` on, soonest first, at least `count` on."""
        ...


@dataclass(frozen=True, slots=True)
class FullShuffle:
    """Every epoch holds each of `num_rows` rows exactly once, in an order of its own."""

    num_rows: int
    seed: int

    def __post_init__(self) -> None:
        _check_rows(self.num_rows)

    @property
    def name(self) -> str:
        """Return what the state calls it."""
        return "full"

    def row(self, position: int) -> int:
        """Return the row at one position (>= 0). Cost: about 10 microseconds."""
        epoch, value = divmod(position, self.num_rows)
        return permute_one(value, self.num_rows, order_keys(self.seed, epoch))

    def rows(self, positions_N: Int64Array) -> Int64Array:
        """Return the rows at many positions. Cost: about 10 ns each, from some hundreds on."""
        rows_N = np.empty(len(positions_N), dtype=np.int64)
        for epoch, here, index_N in _epochs(positions_N, self.num_rows):
            rows_N[here] = permute(index_N, self.num_rows, order_keys(self.seed, epoch))
        return rows_N

    def ahead(self, position: int, count: int) -> Int64Array:
        """Return the next `count` rows."""
        return self.rows(np.arange(position, position + count, dtype=np.int64))


class WindowShuffle:
    """Shards in a new order each epoch, and the rows of `window` neighbours in it shuffled fully.

    Args: rows_of_S: rows of each shard, in the order that rows are numbered. window: shards of a
        window, >= 1; an epoch's last window may have fewer.
    Cost: O(1) a position where all shards but the last have equal rows (as written by
        `data/shards.py`); else a table of the shards' ends for each epoch in use, 8 bytes a shard.
    Quality: within a window, that of FullShuffle. A row's window is its shard's: two rows of one
        shard are never farther apart than a window, so shards should not be sorted by subject
        more finely than a window evens out.
    """

    def __init__(self, rows_of_S: Sequence[int] | Int64Array, seed: int, window: int) -> None:
        sizes = np.asarray(rows_of_S, dtype=np.int64)
        if not len(sizes) or int(sizes.min()) < 1 or window < 1:
            raise ValueError(f"{len(sizes)} shards in windows of {window}: both are at least 1, with rows")
        self._blocks: _Blocks
        if np.all(sizes[:-1] == sizes[0]) and sizes[-1] <= sizes[0]:
            self._blocks = _EqualBlocks(int(sizes.sum()), int(sizes[0]))
        else:
            self._blocks = _RaggedBlocks(sizes)
        self.num_rows = self._blocks.num_rows
        self.seed, self.window = seed, window
        _check_rows(self.num_rows)

    @classmethod
    def of_equal(cls, num_rows: int, shard_rows: int, seed: int, window: int) -> "WindowShuffle":
        """Make the order for shards of `shard_rows` rows, the last one with the rest: no table at all."""
        _check_rows(num_rows)
        order = cls([1], seed, window)
        order._blocks = _EqualBlocks(num_rows, shard_rows)
        order.num_rows = num_rows
        return order

    @property
    def name(self) -> str:
        """Return what the state calls it."""
        return f"window of {self.window} shards"

    def row(self, position: int) -> int:
        """Return the row at one position (>= 0)."""
        return int(self.rows(np.array([position], dtype=np.int64))[0])

    def rows(self, positions_N: Int64Array) -> Int64Array:
        """Return the rows at many positions. Cost: about 50 ns each and 20 microseconds per window met."""
        rows_N = np.empty(len(positions_N), dtype=np.int64)
        for epoch, here, index_N in _epochs(positions_N, self.num_rows):
            blocks = self._blocks.of(self.seed, epoch)
            window_N = blocks.slots(index_N) // self.window
            moved_N = np.empty_like(index_N)
            for window in _distinct(window_N):
                inside = window_N == window
                low, high = self._bounds(blocks, window)
                keys = order_keys(self.seed, epoch, f"window {window}")
                moved_N[inside] = low + permute(index_N[inside] - low, high - low, keys)
            slots_N = blocks.slots(moved_N)
            rows_N[here] = blocks.first_rows(slots_N) + moved_N - blocks.starts(slots_N)
        return rows_N

    def ahead(self, position: int, count: int) -> Int64Array:
        """Return a row of each shard of this window, of those that begin within `count`, and of the next."""
        found: list[Int64Array] = []
        until = position + count
        while True:
            epoch, index = divmod(position, self.num_rows)
            blocks = self._blocks.of(self.seed, epoch)
            window = int(blocks.slots(np.array([index]))[0]) // self.window
            low = window * self.window
            slots = np.arange(low, min(low + self.window, self._blocks.count))
            found.append(blocks.first_rows(slots))
            if position >= until:
                return np.concatenate(found)
            position = epoch * self.num_rows + self._bounds(blocks, window)[1]

    def _bounds(self, blocks: "_Shuffled", window: int) -> tuple[int, int]:
        """Return the positions of the epoch at which a window begins and ends."""
        ends = np.array([window * self.window, (window + 1) * self.window])
        low, high = blocks.starts(np.minimum(ends, self._blocks.count)).tolist()
        return low, high


class _Shuffled(Protocol):
    """The blocks (shards) of one epoch, laid out in its order: slot 0, 1, ..."""

    def slots(self, index_N: Int64Array) -> Int64Array:
        """Return the slot that each index of the epoch falls in."""
        ...

    def starts(self, slots_N: Int64Array) -> Int64Array:
        """Return the index at which each slot begins; for the slot behind the last, the end."""
        ...

    def first_rows(self, slots_N: Int64Array) -> Int64Array:
        """Return the first row of the block in each slot."""
        ...


class _Blocks(Protocol):
    num_rows: int
    count: int

    def of(self, seed: int, epoch: int) -> _Shuffled: ...


class _EqualBlocks:
    """Blocks of `size` rows, the last of them shorter by `lack`: all is arithmetic.

    The short block lies in some slot j; slots behind it begin `lack` earlier.
    """

    def __init__(self, num_rows: int, size: int) -> None:
        self.num_rows, self.size = num_rows, size
        self.count = -(-num_rows // size)
        self.lack = self.count * size - num_rows

    def of(self, seed: int, epoch: int) -> "_EqualShuffled":
        return _equal_shuffled(self.num_rows, self.size, seed, epoch)


class _EqualShuffled:
    def __init__(self, num_rows: int, size: int, seed: int, epoch: int) -> None:
        self._num_rows, self._size = num_rows, size
        self._count = -(-num_rows // size)
        self._lack = self._count * size - num_rows
        self._keys = order_keys(seed, epoch, "shards")
        self._short = unpermute_one(self._count - 1, self._count, self._keys)
        self._short_end = (self._short + 1) * size - self._lack

    def slots(self, index_N: Int64Array) -> Int64Array:
        return (index_N + np.where(index_N < self._short_end, 0, self._lack)) // self._size

    def starts(self, slots_N: Int64Array) -> Int64Array:
        return slots_N * self._size - np.where(slots_N > self._short, self._lack, 0)

    def first_rows(self, slots_N: Int64Array) -> Int64Array:
        return permute(slots_N, self._count, self._keys) * self._size


class _RaggedBlocks:
    """Blocks of any sizes: the ends of an epoch's blocks in a table."""

    def __init__(self, sizes: Int64Array) -> None:
        self._sizes = sizes
        self._first_row = np.cumsum(sizes) - sizes
        self.num_rows = int(sizes.sum())
        self.count = len(sizes)
        self._known: dict[tuple[int, int], _RaggedShuffled] = {}

    def of(self, seed: int, epoch: int) -> "_RaggedShuffled":
        key = (seed, epoch)
        if key not in self._known:
            while len(self._known) > 1:  # this epoch's and the one that a batch goes over to
                self._known.pop(next(iter(self._known)))
            order = permute(np.arange(self.count), self.count, order_keys(seed, epoch, "shards"))
            self._known[key] = _RaggedShuffled(self._sizes[order], self._first_row[order])
        return self._known[key]


class _RaggedShuffled:
    def __init__(self, sizes: Int64Array, first_rows: Int64Array) -> None:
        self._starts = np.concatenate(([0], np.cumsum(sizes)))
        self._first_rows = first_rows

    def slots(self, index_N: Int64Array) -> Int64Array:
        return np.searchsorted(self._starts, index_N, side="right") - 1

    def starts(self, slots_N: Int64Array) -> Int64Array:
        return self._starts[slots_N]

    def first_rows(self, slots_N: Int64Array) -> Int64Array:
        return self._first_rows[slots_N]


@lru_cache(maxsize=4)
def _equal_shuffled(num_rows: int, size: int, seed: int, epoch: int) -> _EqualShuffled:
    return _EqualShuffled(num_rows, size, seed, epoch)


def permute_one(value: int, size: int, keys: Sequence[int]) -> int:
    """Return where the permutation of [0, size) puts one value; as `permute`, in plain integers."""
    low_bits, high_bits = halves(size)
    low_mask, high_mask = (1 << low_bits) - 1, (1 << high_bits) - 1
    while True:
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            value ^= (_mix(value & low_mask, first) & high_mask) << low_bits
            value ^= _mix(value >> low_bits, second) & low_mask
        if value < size:
            return value


def unpermute_one(value: int, size: int, keys: Sequence[int]) -> int:
    """Return what the permutation puts at `value`: `permute_one` backwards."""
    low_bits, high_bits = halves(size)
    low_mask, high_mask = (1 << low_bits) - 1, (1 << high_bits) - 1
    while True:
        for first, second in zip(keys[-2::-2], keys[::-2], strict=True):
            value ^= _mix(value >> low_bits, second) & low_mask
            value ^= (_mix(value & low_mask, first) & high_mask) << low_bits
        if value < size:
            return value


def _mix(value: int, key: int) -> int:
    value = ((value ^ key) * _MULTIPLY_1) & _MASK64
    value = ((value ^ (value >> 27)) * _MULTIPLY_2) & _MASK64
    return value ^ (value >> 31)


@lru_cache(maxsize=64)
def order_keys(seed: int, epoch: int, what: str = "") -> tuple[int, ...]:
    """Return the keys of one permutation: SHA-512 of what it is for."""
    digest = hashlib.sha512(f"marrow order {seed} {epoch} {what}".rstrip().encode()).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, 8 * NUM_KEYS, 8))


def _epochs(
    positions_N: Int64Array, num_rows: int
) -> "list[tuple[int, slice | NDArray[np.bool_], Int64Array]]":
    """Split positions by epoch: (epoch, where they are, their indices within it)."""
    if not len(positions_N):
        return []
    low, high = int(positions_N.min()) // num_rows, int(positions_N.max()) // num_rows
    if low == high:
        return [(low, slice(None), positions_N - low * num_rows)]
    epochs_N, index_N = np.divmod(positions_N, num_rows)
    return [(epoch, here, index_N[here]) for epoch in _distinct(epochs_N) for here in [epochs_N == epoch]]


def _distinct(values_N: Int64Array) -> list[int]:
    if values_N[0] == values_N[-1] and int(values_N.min()) == int(values_N.max()):
        return [int(values_N[0])]
    distinct: list[int] = np.unique(values_N).tolist()
    return distinct


def _check_rows(num_rows: int) -> None:
    if not 1 <= num_rows <= MOST_ROWS:
        raise ValueError(f"num_rows = {num_rows} is out of range, 1 to 2^62")
