"""Packed rows of memory-mapped shards -> the int64 arrays of a batch, in one pass over the tokens.

    table = RowTable([40, 40, 12], stored=513, open_shard)   # rows of each shard, tokens of a row
    table.stack(rows_B, out)                                 # [B, T+1], or
    table.lay(rows_B, tokens, targets, positions, documents)

A shard is opened when a row of it is first read. Where rows carry checks (XXH64), each is checked
when it is first read, in the same pass, and never again: what nobody reads costs nothing. Also
here, because the same C file holds it: `permute`, the keyed permutation behind the order of samples.
Each operation is one C call that lets Python's lock go if it is long; numpy versions stand beside,
for machines without a compiler and as the oracle. No torch.

Axes: B rows, T tokens of context, S shards.
"""

import copy
import ctypes
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh64_intdigest

from marrow.core.errors import DataError
from marrow.kernels import native

Int64Array = NDArray[np.int64]

IGNORED = -100  # the target that torch's cross entropy leaves out
NUM_KEYS = 8  # rounds of the Feistel network
FEWEST_BITS = 6  # with 4, the 120 orders of 5 rows are not equally likely (chi-square 401, not 119)
_SHARD_FIELDS = 8
_HOLD_CELLS = 1 << 18  # of a batch: some 100 us of work
_MULTIPLY_1 = 0xBF58476D1CE4E5B9  # the mixing constants of splitmix64 (Steele et al. 2014)
_MULTIPLY_2 = 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class Columns:
    """A shard's columns as views on mapped memory; whoever holds them keeps the map open.

    tokens: uint16 or uint32 [R, T+1]. starts: int32, where documents begin in a row, row after
    row, with starts_of: int32 [R+1]. num_tokens: int32 [R], without padding. checks: uint64 [R], of
    each row (`check_rows`), or None: they were checked some other way. checked: uint8 [R], 1 for the
    rows whose check is known to be right; it is written to. All contiguous. name: for errors.
    """

    tokens: NDArray[Any]
    starts: NDArray[np.int32]
    starts_of: NDArray[np.int32]
    num_tokens: NDArray[np.int32]
    checks: NDArray[np.uint64] | None = None
    checked: NDArray[np.uint8] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        assert self.tokens.dtype in (np.uint16, np.uint32)
        assert (self.checks is None) == (self.checked is None)
        for array in (self.tokens, self.starts, self.starts_of, self.num_tokens, self.checks, self.checked):
            assert array is None or array.flags.c_contiguous


class RowTable:
    """The open shards of a dataset, and the operations on their rows, all of int64 numbers [B].

    Args: rows_of_S: of each shard. stored: T + 1. open_shard: index -> its columns; called when a
        row of it is first read. use_native: False takes numpy.
    Every read raises IndexError for a row that is out of range, and DataError for one whose bytes are
    not those that were written.
    """

    def __init__(
        self,
        rows_of_S: Sequence[int],
        stored: int,
        open_shard: Callable[[int], Columns],
        *,
        use_native: bool = True,
    ) -> None:
        self.stored = stored
        self.first_row = np.zeros(len(rows_of_S) + 1, dtype=np.int64)
        np.cumsum(rows_of_S, out=self.first_row[1:])
        self._open_shard = open_shard
        self._columns: list[Columns | None] = [None] * len(rows_of_S)
        self._use_native = use_native and _library() is not None
        libraries: tuple[Any, Any] = _libraries() if self._use_native else (None, None)
        self._library, self._holding = libraries
        self._shards = np.zeros((len(rows_of_S), _SHARD_FIELDS), dtype=np.int64)  # shard_t in C
        self._describe()

    def _describe(self) -> None:
        fields = [len(self._columns), self.stored, _at(self.first_row), _at(self._shards)]  # table_t in C
        self._fields = np.array(fields, dtype=np.int64)
        self._at = _at(self._fields)

    def copy(self) -> "RowTable":
        """Return a table with the same open shards, which are opened and closed apart from these."""
        other = copy.copy(self)
        other._columns, other._shards = self._columns.copy(), self._shards.copy()
        other._describe()
        return other

    def is_open(self, index: int) -> bool:
        """Tell whether a shard is open."""
        return self._columns[index] is not None

    def put(self, index: int, columns: Columns) -> None:
        """Open a shard: its rows can be read from now on."""
        rows = int(self.first_row[index + 1] - self.first_row[index])
        assert columns.tokens.shape == (rows, self.stored)
        assert len(columns.starts_of) == rows + 1 and len(columns.num_tokens) == rows
        self._columns[index] = columns
        self._shards[index] = _fields_of(columns)

    def drop(self, index: int) -> None:
        """Close a shard."""
        self._columns[index] = None
        self._shards[index] = 0

    def stack(self, rows_B: Int64Array, out: Int64Array) -> None:
        """Write the rows' tokens, padding included, to `out`, int64 [B, T+1] and contiguous.

        Cost: 2 bytes read and 8 written a token, at about the speed of memory.
        """
        assert out.shape == (len(rows_B), self.stored) and out.flags.c_contiguous
        if not self._use_native:
            self._stack_reference(rows_B, out)
            return
        read = (self._library if out.size > _HOLD_CELLS else self._holding).stack_rows
        while (done := read(len(rows_B), _at(rows_B), self._at, _at(out))) < len(rows_B):
            self._place(int(rows_B[done]))  # opens its shard, or says what is wrong

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
        if not self._use_native:
            return self._lay_reference(rows_B, *outs, each)
        num_targets = (ctypes.c_int64 * (len(rows_B) // each))()
        places = [_at(out) for out in outs]
        read = (self._library if 4 * len(tokens_N) > _HOLD_CELLS else self._holding).lay_rows
        while (done := read(len(rows_B), _at(rows_B), self._at, each, *places, num_targets)) < len(rows_B):
            self._place(int(rows_B[done]))  # opens its shard, or says what is wrong
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
        """Find rows, with the shards opened and the rows checked that were not yet."""
        return [self._place(row) for row in rows_B.tolist()]

    def _place(self, row: int) -> tuple[Columns, int]:
        if not 0 <= row < self.first_row[-1]:
            raise IndexError(f"there is no row {row} of {self.first_row[-1]}")
        index = bisect_right(self.first_row, row) - 1
        if (columns := self._columns[index]) is None:
            columns = self._open_shard(index)
            self.put(index, columns)
        place = row - int(self.first_row[index])
        _check(columns, place)
        return columns, place

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


def check_rows(columns: Columns) -> NDArray[np.uint64]:
    """Return the check of each row, uint64 [R]: XXH64 of its tokens, seeded with that of its starts,
    seeded with its number of tokens. Cost: 0.4 us a row of 1024 tokens of 2 bytes.
    """
    if (library := _library()) is None:
        return np.array([_check_of(columns, place) for place in range(len(columns.tokens))], dtype=np.uint64)
    checks = np.empty(len(columns.tokens), dtype=np.uint64)
    shard = np.array(_fields_of(columns), dtype=np.int64)
    library.check_rows(len(checks), _at(shard), columns.tokens.shape[1], _at(checks))
    return checks


def _check_of(columns: Columns, place: int) -> int:
    starts = columns.starts[columns.starts_of[place] : columns.starts_of[place + 1]]
    # Of another format's reader a damaged number may be negative: as C does, it is taken modulo 2^64.
    seed = xxh64_intdigest(starts.tobytes(), int(columns.num_tokens[place]) % (1 << 64))
    return xxh64_intdigest(columns.tokens[place].tobytes(), seed)


def _check(columns: Columns, place: int) -> None:
    """Check a row that was not yet. Raises: DataError."""
    if columns.checks is None or columns.checked is None or columns.checked[place]:
        return
    low, high = columns.starts_of[place : place + 2].tolist()
    if not 0 <= low <= high <= len(columns.starts):
        why = f"its documents are said to begin at {low} to {high} of {len(columns.starts)}"
    elif (found := _check_of(columns, place)) != (told := int(columns.checks[place])):
        why = f"its XXH64 is {found:016x}, its check says {told:016x}"
    else:
        columns.checked[place] = 1
        return
    raise DataError(
        f"{columns.name or 'a shard'} is damaged: row {place}: {why}",
        hint="run the shards step again (delete the damaged artifact first, if the store keeps it)",
    )


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
    library = _libraries()[len(index_N) <= _HOLD_CELLS]
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


def _fields_of(columns: Columns) -> list[int]:
    """Return a shard_t of C."""
    arrays = (columns.tokens, columns.starts, columns.starts_of, columns.num_tokens)
    checks = [0, 0] if columns.checks is None else [_at(columns.checks), _at(columns.checked)]
    return [*map(_at, arrays), *checks, columns.tokens.itemsize, len(columns.starts)]


def _at(array: Any) -> int:
    try:
        # PERF: 0.3 us, a quarter of what array.ctypes.data takes; a batch has up to six arrays.
        return ctypes.addressof(ctypes.c_char.from_buffer(array))
    except (TypeError, ValueError):  # not writeable, or empty
        address: int = array.ctypes.data
        return address


@cache
def _library() -> ctypes.CDLL | None:
    library: ctypes.CDLL | None = _declared(native.load("gather_rows"))
    return library


@cache
def _libraries() -> tuple[Any, Any]:
    """Return the library whose calls let Python's lock go, for work that is worth it, and one that holds it.

    PERF: another thread that computes gets the lock for 5 ms at a time, so a call of 40 us that
    lets it go may take 100 times as long; to hold it for that long costs the other thread nothing.
    """
    library = _library()
    assert library is not None
    return library, _declared(ctypes.PyDLL(library._name))


def _declared(library: Any) -> Any:
    if library is None:
        return None
    number, pointer, bits = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    library.permute.argtypes = [number, pointer, ctypes.c_uint64, bits, bits, pointer, pointer]
    library.permute.restype = None
    library.check_rows.argtypes = [number, pointer, number, pointer]
    library.check_rows.restype = None
    library.stack_rows.argtypes = [number, pointer, pointer, pointer]
    library.stack_rows.restype = number
    library.lay_rows.argtypes = [number, pointer, pointer, number, *[pointer] * 5]
    library.lay_rows.restype = number
    return library
