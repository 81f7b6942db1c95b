"""Keys of values: which are repeated, and which are not among others, exactly and out of core.

Each value becomes a key of 128 bits: numbers their own bits, texts their xxh3-128 (two different
texts among 10^9 share a key with a probability of 10^-21). Keys are parted by their first bits
into buckets; when memory is full, buckets go to a file. In the end each bucket is sorted alone.
"""

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from marrow.core.errors import explain_os_errors

NUM_BUCKETS = 64
MEMORY_BYTES = 64 << 20
KEY = np.dtype([("high", np.uint64), ("low", np.uint64), ("row", np.int64)])

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
Keys = NDArray[Any]


def keys_of(column: pa.Array, row: int) -> Keys:
    """Return the key and row number of every value that is not null.

    Args: column: booleans, numbers, decimals, times, texts or bytes. row: number of its first row.
    Equal numbers have equal keys, whatever their width; NaN equals NaN, and -0.0 equals 0.0.
    Cost: 0.05 us a number, 0.5 us a text that the batch did not have yet.
    """
    valid = np.asarray(pc.is_valid(column))
    keys = np.empty(int(valid.sum()), KEY)
    keys["row"] = np.flatnonzero(valid) + row
    bits = number_bits(column)
    if bits is not None:
        keys["high"] = mix(bits[valid])
        keys["low"] = 0
        return keys
    encoded = column.drop_null().dictionary_encode()
    values = encoded.dictionary
    if not (pa.types.is_binary(values.type) or pa.types.is_fixed_size_binary(values.type)):
        values = values.cast(pa.string()).cast(pa.binary())  # decimals too
    digest = xxhash.xxh3_128_digest
    pairs = np.frombuffer(b"".join([digest(value) for value in values.to_pylist()]), ">u8").reshape(-1, 2)
    index = np.asarray(encoded.indices)
    keys["high"] = pairs[index, 0]
    keys["low"] = pairs[index, 1]
    return keys


def number_bits(column: pa.Array) -> U64 | None:
    """Return the bits that tell numbers, booleans and times apart; None for other types."""
    kind = column.type
    if pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
    elif pa.types.is_temporal(kind):
        column = column.cast(pa.int32() if kind.bit_width == 32 else pa.int64())
    kind = column.type
    if pa.types.is_floating(kind):
        floats = np.asarray(column.cast(pa.float64()).fill_null(0.0)) + 0.0  # -0.0 becomes 0.0
        return np.where(np.isnan(floats), np.nan, floats).view(np.uint64)
    if pa.types.is_integer(kind):
        numbers = np.asarray(column.fill_null(0))
        return numbers.astype(np.uint64 if pa.types.is_uint64(kind) else np.int64).view(np.uint64)
    return None


def mix(bits_N: U64) -> U64:
    """Spread bits over the whole word, one to one (the finaliser of splitmix64, Steele 2014)."""
    mixed = bits_N + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@dataclass(slots=True)
class KeyStore:
    """Keys in buckets, in memory or in a temporary file that dies with the process.

    spill: the folder for that file. memory_bytes: what may be held before it is used.
    """

    spill: Path | None = None
    memory_bytes: int = MEMORY_BYTES
    num_keys: int = 0
    spilled_bytes: int = 0
    _held: list[Keys] = field(default_factory=list)
    _held_bytes: int = 0
    _file: IO[bytes] | None = None
    _runs: list[list[tuple[int, int]]] = field(default_factory=lambda: [[] for _ in range(NUM_BUCKETS)])

    def __enter__(self) -> "KeyStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, keys: Keys) -> None:
        """Take keys; those of a row come once."""
        self._held.append(keys)
        self._held_bytes += keys.nbytes
        self.num_keys += len(keys)
        if self._held_bytes >= self.memory_bytes:
            self._spill()

    def buckets(self, *, whole: bool = False) -> Iterator[Keys]:
        """Yield the keys of one bucket after the other, in the order in which they came.

        Args: whole: all keys as one bucket; only for keys that are all in memory.
        """
        held = np.concatenate(self._held) if self._held else np.empty(0, KEY)
        if whole:
            assert not self.spilled_bytes
            yield held
            return
        parts = _bucket_of(held)
        for bucket in range(NUM_BUCKETS):
            pieces = [self._read(start, count) for start, count in self._runs[bucket]]
            yield np.concatenate([*pieces, held[parts == bucket]])

    def close(self) -> None:
        """Let the file go; closing twice is fine."""
        self._held, self._held_bytes = [], 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def _spill(self) -> None:
        keys = np.concatenate(self._held)
        part = _bucket_of(keys)
        order = np.argsort(part, kind="stable")
        keys, starts = keys[order], np.searchsorted(part[order], np.arange(NUM_BUCKETS + 1))
        folder = self.spill or Path(tempfile.gettempdir())
        with explain_os_errors("set keys aside", folder):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close()
            self._file.seek(self.spilled_bytes)
            self._file.write(keys.tobytes())
            self._file.flush()
        for bucket, (start, end) in enumerate(itertools.pairwise(starts)):
            if end > start:
                self._runs[bucket].append((self.spilled_bytes + int(start) * KEY.itemsize, int(end - start)))
        self.spilled_bytes += keys.nbytes
        self._held, self._held_bytes = [], 0

    def _read(self, start: int, count: int) -> Keys:
        assert self._file is not None
        self._file.seek(start)
        return np.frombuffer(self._file.read(count * KEY.itemsize), KEY)


def repeated(store: KeyStore, most: int) -> tuple[int, I64]:
    """Count the rows whose value an earlier row has; return also the first `most` of them."""
    count, rows = 0, np.empty(0, np.int64)
    for keys in store.buckets(whole=not store.spilled_bytes):
        order = np.lexsort((keys["row"], keys["low"], keys["high"]))
        high, low = keys["high"][order], keys["low"][order]
        again = order[1:][(high[1:] == high[:-1]) & (low[1:] == low[:-1])]
        count += len(again)
        rows = np.sort(np.concatenate([rows, keys["row"][again]]))[:most]
    return count, rows


def missing(store: KeyStore, known: KeyStore, most: int) -> tuple[int, I64]:
    """Count the rows of `store` whose value is not in `known`; return also the first `most` of them."""
    count, rows = 0, np.empty(0, np.int64)
    whole = not store.spilled_bytes and not known.spilled_bytes
    for keys, those in zip(store.buckets(whole=whole), known.buckets(whole=whole), strict=True):
        both = np.concatenate([those, keys])
        order = np.lexsort((both["low"], both["high"]))
        high, low = both["high"][order], both["low"][order]
        is_new = np.ones(len(both), bool)
        is_new[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        value_N = np.empty(len(both), np.int64)
        value_N[order] = np.cumsum(is_new) - 1
        is_known = np.zeros(len(both), bool)
        is_known[value_N[: len(those)]] = True
        lost = keys["row"][~is_known[value_N[len(those) :]]]
        count += len(lost)
        rows = np.sort(np.concatenate([rows, lost]))[:most]
    return count, rows


def _bucket_of(keys: Keys) -> NDArray[np.uint8]:
    buckets: NDArray[np.uint8] = (keys["high"] >> np.uint64(58)).astype(np.uint8)
    return buckets
