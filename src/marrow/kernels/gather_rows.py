"""Packed rows of memory-mapped shards -> the int64 arrays of a batch, in one pass over the tokens.

    table = RowTable([40, 40, 12], stored=513)      # rows of each shard, tokens of a row
    table.put(0, Columns(...))                      # the shards that `table.missing(rows_B)` names
    table.stack(rows_B, out)                        # [B, T+1], or
    table.lay(rows_B, tokens, targets, positions, documents)

Also here, because the same C file holds it: `permute`, the keyed permutation behind the order of
samples. Each operation is one C call that lets Python's lock go if it is long; numpy versions stand beside
(`*_reference`), for machines without a compiler and as the oracle. No torch.

Axes: B rows, T tokens of context, S shards.
"""

import copy
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marrow.kernels import native

Int64Array = NDArray[np.int64]

IGNORED = -100  # the target that torch's cross entropy leaves out
NUM_KEYS = 8  # rounds of the Feistel network
FEWEST_BITS = 6  # with 4, the 120 orders of 5 rows are not equally likely (chi-square 401, not 119)
_HOLD_CELLS = 1 << 18  # of a batch: some 100 us of work
_MULTIPLY_1 = 0xBF58476D1CE4E5B9  # the mixing constants of splitmix64 (Steele et al. 2014)
_MULTIPLY_2 = 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class Columns:
    """A shard's columns as views on mapped memory; whoever holds them keeps the map open.

    tokens: uint16 or uint32 [R, T+1]. starts: int32, where documents begin in a row, row after
    row, with starts_of: int32 [R+1]. num_tokens: int32 [R], without padding. All contiguous.
    """

    tokens: NDArray[Any]
    starts: NDArray[np.int32]
    starts_of: NDArray[np.int32]
    num_tokens: NDArray[np.int32]

    def __post_init__(self) -> None:
        assert self.tokens.dtype in (np.uint16, np.uint32)
        for array in (self.tokens, self.starts, self.starts_of, self.num_tokens):
            assert array.flags.c_contiguous


class RowTable:
    """The open shards of a dataset, and the operations on their rows, all of int64 numbers [B].

    A row's shard must be open when it is read: ask `missing` first. use_native: False takes numpy.
    """

    def __init__(self, rows_of_S: Sequence[int], stored: int, *, use_native: bool = True) -> None:
        self.stored = stored
        self.first_row = np.zeros(len(rows_of_S) + 1, dtype=np.int64)
        np.cumsum(rows_of_S, out=self.first_row[1:])
        self.num_open = 0
        self._columns: list[Columns | None] = [None] * len(rows_of_S)
        self._library = _library() if use_native else None
        self._addresses = np.zeros((len(rows_of_S), 5), dtype=np.int64)  # shard_t in C
        self._shards = len(rows_of_S), _at(self.first_row), _at(self._addresses)

    def copy(self) -> "RowTable":
        """Return a table with the same open shards, which are opened and closed apart from these."""
        other = copy.copy(self)
        other._columns, other._addresses = self._columns.copy(), self._addresses.copy()
        other._shards = (*self._shards[:2], _at(other._addresses))
        return other

    def put(self, index: int, columns: Columns) -> None:
        """Open a shard: its rows can be read from now on."""
        rows = int(self.first_row[index + 1] - self.first_row[index])
        assert columns.tokens.shape == (rows, self.stored)
        assert len(columns.starts_of) == rows + 1 and len(columns.num_tokens) == rows
        self.num_open += self._columns[index] is None
        self._columns[index] = columns
        arrays = (columns.tokens, columns.starts, columns.starts_of, columns.num_tokens)
        self._addresses[index] = [*map(_at, arrays), columns.tokens.itemsize]

    def drop(self, index: int) -> None:
        """Close a shard."""
        self.num_open -= self._columns[index] is not None
        self._columns[index] = None
        self._addresses[index] = 0

    def missing(self, rows_B: Int64Array) -> int | None:
        """Return a shard that must be opened before these rows can be read, or None.

        Raises: IndexError for a row that is out of range.
        """
        if self._library is None:
            found = self._missing_reference(rows_B)
        else:
            found = _library_for(len(rows_B)).find_missing(len(rows_B), _at(rows_B), *self._shards)
        if found < -1:
            raise IndexError(f"there is no row {rows_B[-2 - found]} of {self.first_row[-1]}")
        return None if found == -1 else found

    def stack(self, rows_B: Int64Array, out: Int64Array) -> None:
        """Write the rows' tokens, padding included, to `out`, int64 [B, T+1] and contiguous.

        Cost: 2 bytes read and 8 written a token, at about the speed of memory.
        """
        assert out.shape == (len(rows_B), self.stored) and out.flags.c_contiguous
        if self._library is None:
            self._stack_reference(rows_B, out)
        else:
            library = _library_for(out.size)
            library.stack_rows(len(rows_B), _at(rows_B), *self._shards, self.stored, _at(out))

    def lay(
        self,
        rows_B: Int64Array,
        tokens_N: Int64Array,
        targets_N: Int64Array,
        positions_N: Int64Array,
        documents_N: NDArray[np.int32],
        each: int | None = None,
    ) -> list[int]:
        """Lay the rows end to end, N = B T, as batches of `each` rows (a divisor of B; all in one).

        tokens_N, targets_N (-100 where there is none), positions_N (from 0 at each document):
        int64 [N]. documents_N: int32 [N], rising from 0 in each batch. See `loader/batch.py`.
        Returns: for each batch the number of targets that count.
        Cost: 2 bytes read and 28 written a token.
        """
        outs = (tokens_N, targets_N, positions_N, documents_N)
        for out in outs:
            assert out.shape == (len(rows_B) * (self.stored - 1),) and out.flags.c_contiguous
        each = each or max(1, len(rows_B))
        assert len(rows_B) % each == 0
        if self._library is None:
            return self._lay_reference(rows_B, *outs, each)
        num_targets = (ctypes.c_int64 * (len(rows_B) // each))()
        places = [_at(out) for out in outs]
        _library_for(4 * len(tokens_N)).lay_rows(
            len(rows_B), _at(rows_B), *self._shards, self.stored, each, *places, num_targets
        )
        return list(num_targets)

    def starts(self, rows_B: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return where documents begin, int64, row after row, and each row's first of these, int64 [B+1]."""
        starts = [
            columns.starts[columns.starts_of[place] : columns.starts_of[place + 1]]
            for columns, place in self._places(rows_B)
        ]
        starts_of = np.zeros(len(rows_B) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in starts], out=starts_of[1:])
        joined = np.concatenate(starts) if starts else np.empty(0)
        return joined.astype(np.int64), starts_of

    def num_tokens(self, rows_B: Int64Array) -> Int64Array:
        """Return tokens without padding, int64 [B]."""
        return np.array([columns.num_tokens[at] for columns, at in self._places(rows_B)], dtype=np.int64)

    def tokens(self, rows_B: Int64Array) -> NDArray[Any]:
        """Return the rows as they are stored, [B, T+1]; of shards of two types, the wider."""
        rows = [columns.tokens[place] for columns, place in self._places(rows_B)]
        return np.stack(rows) if rows else np.empty((0, self.stored), dtype=np.uint16)

    def _places(self, rows_B: Int64Array) -> list[tuple[Columns, int]]:
        shard_B = self._shard_of(rows_B)
        found = []
        for shard, place in zip(shard_B.tolist(), (rows_B - self.first_row[shard_B]).tolist(), strict=True):
            columns = self._columns[shard]
            assert columns is not None, "a shard must be open when its rows are read"
            found.append((columns, place))
        return found

    def _shard_of(self, rows_B: Int64Array) -> Int64Array:
        return np.searchsorted(self.first_row, rows_B, side="right") - 1

    def _missing_reference(self, rows_B: Int64Array) -> int:
        outside = np.flatnonzero((rows_B < 0) | (rows_B >= self.first_row[-1]))
        inside = rows_B[: outside[0]] if len(outside) else rows_B
        for index in self._shard_of(inside).tolist():
            if self._columns[index] is None:
                return int(index)
        return -2 - int(outside[0]) if len(outside) else -1

    def _stack_reference(self, rows_B: Int64Array, out: Int64Array) -> None:
        for i, (columns, place) in enumerate(self._places(rows_B)):
            out[i] = columns.tokens[place]

    def _lay_reference(
        self,
        rows_B: Int64Array,
        tokens_N: Int64Array,
        targets_N: Int64Array,
        positions_N: Int64Array,
        documents_N: NDArray[np.int32],
        each: int,
    ) -> list[int]:
        rows, context = len(rows_B), self.stored - 1
        rows_BS = np.empty((rows, self.stored), dtype=np.int64)
        self._stack_reference(rows_B, rows_BS)
        starts, starts_of = self.starts(rows_B)
        num_tokens_B = self.num_tokens(rows_B)
        tokens_N[:] = rows_BS[:, :-1].reshape(-1)
        targets_BT = rows_BS[:, 1:]
        targets_BT[np.arange(context) >= num_tokens_B[:, None] - 1] = IGNORED
        targets_N[:] = targets_BT.reshape(-1)
        row_of_start = np.repeat(np.arange(rows), np.diff(starts_of))
        start_flat = row_of_start * context + starts
        targets_N[start_flat[starts > 0] - 1] = IGNORED  # no document predicts the next one's first
        lengths = np.diff(start_flat, append=rows * context)
        numbers = np.arange(len(lengths)) - starts_of[row_of_start // each * each]  # from 0 in each batch
        documents_N[:] = np.repeat(numbers, lengths)
        positions_N[:] = np.arange(rows * context) - np.repeat(start_flat, lengths)
        # All that is stored is a target, but for the first token of each document or piece.
        num_targets_B = num_tokens_B - np.diff(starts_of)
        counts: list[int] = num_targets_B.reshape(-1, each).sum(axis=1).tolist()
        return counts


def permute(index_N: Int64Array, size: int, keys: Sequence[int]) -> Int64Array:
    """Return where a keyed permutation of [0, size) puts each index, int64 [N] in and out.

    A Feistel network maps [0, 2^bits) to itself one to one whatever its round function does; a
    value beyond `size` is mapped again until it falls inside (cycle walking, fewer than 2 steps on
    average, but up to 64 / size where size < 32).
    Cost: about 10 ns each in C, 0.3 us in numpy. Source: Luby and Rackoff 1988; Black and Rogaway 2002.
    """
    if _library() is None:
        return permute_reference(index_N, size, keys)
    index_N = np.ascontiguousarray(index_N, dtype=np.int64)
    out_N = np.empty(len(index_N), dtype=np.int64)
    low_bits, high_bits = halves(size)
    key_array = (ctypes.c_uint64 * NUM_KEYS)(*keys)
    library = _library_for(len(index_N))
    library.permute(len(index_N), _at(index_N), size, low_bits, high_bits, key_array, _at(out_N))
    return out_N


def permute_reference(index_N: Int64Array, size: int, keys: Sequence[int]) -> Int64Array:
    """Do as `permute`, in numpy."""
    value_N = index_N.astype(np.uint64)
    low_bits, high_bits = halves(size)
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << high_bits) - 1)
    shift = np.uint64(low_bits)
    outside = np.arange(len(value_N))  # of [0, size): still to be mapped
    while len(outside):
        moving = value_N[outside]
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            moving ^= (_mix(moving & low_mask, first) & high_mask) << shift
            moving ^= _mix(moving >> shift, second) & low_mask
        value_N[outside] = moving
        outside = outside[moving >= size]
    return value_N.astype(np.int64)


def halves(size: int) -> tuple[int, int]:
    """Return how many low and high bits the network of a permutation of [0, size) has."""
    bits = max(FEWEST_BITS, (size - 1).bit_length())
    return bits - bits // 2, bits // 2


def _mix(value_N: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    value_N = (value_N ^ np.uint64(key)) * np.uint64(_MULTIPLY_1)
    value_N = (value_N ^ (value_N >> np.uint64(27))) * np.uint64(_MULTIPLY_2)
    return value_N ^ (value_N >> np.uint64(31))


def _at(array: Any) -> int:
    if array.flags.writeable and array.size:
        # PERF: 0.3 us, a quarter of what array.ctypes.data takes; a batch has up to six arrays.
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    address: int = array.ctypes.data
    return address


@cache
def _library() -> ctypes.CDLL | None:
    library: ctypes.CDLL | None = _declared(native.load("gather_rows"))
    return library


def _library_for(cells: int) -> Any:
    """Return the library whose calls let Python's lock go, if the work is worth it.

    PERF: another thread that computes gets the lock for 5 ms at a time, so a call of 40 us that
    lets it go may take 100 times as long; to hold it for that long costs the other thread nothing.
    """
    return _library() if cells > _HOLD_CELLS else _holding()


@cache
def _holding() -> Any:
    library = _library()
    assert library is not None
    return _declared(ctypes.PyDLL(library._name))


def _declared(library: Any) -> Any:
    if library is None:
        return None
    number, pointer, bits = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    shards: tuple[Any, ...] = (number, pointer, pointer)
    library.permute.argtypes = [number, pointer, ctypes.c_uint64, bits, bits, pointer, pointer]
    library.permute.restype = None
    library.find_missing.argtypes = [number, pointer, *shards]
    library.find_missing.restype = number
    library.stack_rows.argtypes = [number, pointer, *shards, number, pointer]
    library.stack_rows.restype = None
    library.lay_rows.argtypes = [number, pointer, *shards, number, number, *[pointer] * 5]
    library.lay_rows.restype = None
    return library
