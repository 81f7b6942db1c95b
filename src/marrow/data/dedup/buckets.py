"""Texts that share a key, and the pairs that come of it, for more keys than memory holds.

Keys lie in files, one 64-bit number a text. Where they are too many to be sorted at once, they are
dealt out to files by their upper bits, which are evenly spread, and each file is sorted alone.
Pairs are kept as numbers (later text * N + earlier text), sorted, without repeats; what exceeds
the memory goes to disk as a sorted run, and the runs are merged in pieces. The order of what comes out
is the order of the numbers, whatever the memory.
"""

from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marrow.core.errors import explain_os_errors

LEADERS = PREDECESSORS = 8
ROW_BYTES = 48  # of memory for each key that is sorted: key, text, order, sorted key, masks
_MIN_CHUNK, _MAX_CHUNK = 1 << 12, 1 << 20
_MAX_BITS = 9  # files at a time

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]


def equal_keys(
    keys: Sequence[U64], folder: Path, memory_bytes: int, wanted_N: Bools | None = None
) -> Iterator[tuple[I64, I64]]:
    """Yield the texts whose keys are equal, group after group.

    Args: keys: columns uint64 [N], mapped from files; texts are equal if all columns are. The first
        one's values must be spread evenly. folder: for files of 16 bytes a text where memory does
        not do; nothing stays. wanted_N: which texts count; all by default.
    Yields: (members, begins): texts by group and within a group rising; where the groups
        begin, ending with len(members). Groups have two members or more.
    Raises: DiskFull. Cost: a read of the keys, and a write and a read of 16 bytes a text; 48 bytes of
        memory for each text that is sorted at once. Only where a large share of all keys are equal
        are more of them sorted at once.
    """
    bits = min(_MAX_BITS, max(0, (len(keys[0]) * ROW_BYTES - 1) // memory_bytes).bit_length())
    chunk = min(_MAX_CHUNK, max(_MIN_CHUNK, memory_bytes // ROW_BYTES))
    for texts, first in _ranges(keys[0], folder, bits, chunk, wanted_N):
        members, begins = _groups(keys, texts, first)
        if len(members):
            yield members, begins


def _ranges(
    keys_N: U64, folder: Path, bits: int, chunk: int, wanted_N: Bools | None
) -> Iterator[tuple[I64, U64]]:
    """Yield the wanted texts, rising, and their keys; by the upper bits of the keys."""
    if bits == 0:
        texts = np.arange(len(keys_N)) if wanted_N is None else np.flatnonzero(wanted_N)
        yield texts, keys_N[texts]
        return
    paths = [folder / f"range-{number:03}" for number in range(1 << bits)]
    with explain_os_errors("sort signatures", folder):
        for start in range(0, len(keys_N), chunk):
            stop = min(start + chunk, len(keys_N))
            texts = (
                np.arange(start, stop) if wanted_N is None else np.flatnonzero(wanted_N[start:stop]) + start
            )
            chosen = keys_N[texts]
            owners = (chosen >> np.uint64(64 - bits)).astype(np.int16)
            order = np.argsort(owners, kind="stable")
            pairs = np.stack([texts[order].view(np.uint64), chosen[order]], axis=1)
            ends = np.searchsorted(owners[order], np.arange(len(paths) + 1))
            for path, begin, end in zip(paths, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
                with path.open("ab", buffering=0) as file:
                    write_all(file, pairs[begin:end])
    for path in paths:
        pairs = np.fromfile(path, np.uint64).reshape(-1, 2) if path.exists() else np.empty((0, 2), np.uint64)
        path.unlink(missing_ok=True)
        yield pairs[:, 0].astype(np.int64), np.ascontiguousarray(pairs[:, 1])


def write_all(file: FileIO, values: NDArray[Any]) -> None:
    """Write an array to an unbuffered file, so that closing it has nothing left to fail with."""
    rest = memoryview(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)
    while len(rest):
        rest = rest[file.write(rest) :]


def _groups(keys: Sequence[U64], texts: I64, first: U64) -> tuple[I64, I64]:
    """Return the groups of equal keys among some texts."""
    if len(texts) < 2:
        return texts[:0], np.zeros(1, np.int64)
    order = np.argsort(first)
    ordered = first[order]
    same = ordered[1:] == ordered[:-1]
    repeated = np.concatenate([same, [False]]) | np.concatenate([[False], same])
    few = texts[order[repeated]]  # the rest is done for these alone
    columns = [np.asarray(column[few]) for column in keys]
    order = np.lexsort((few, *columns[::-1]))
    few, columns = few[order], [column[order] for column in columns]
    differs = np.zeros(max(0, len(few) - 1), bool)
    for column in columns:
        differs |= column[1:] != column[:-1]
    begins = np.concatenate([[0], np.flatnonzero(differs) + 1, [len(few)]]).astype(np.int64)
    sizes = np.diff(begins)
    members = few[np.repeat(sizes > 1, sizes)]
    begins = np.concatenate([[0], np.cumsum(sizes[sizes > 1])])
    return members, begins


def pairs_of(members: I64, begins: I64) -> tuple[I64, I64]:
    """Return the pairs to compare in groups: each text with 8 before it and the first 8 of its group.

    A group of many texts is of copies, mostly: the first ones stand for it, so that a text finds the
    one that is kept, and the chain ties all into one cluster. Cost: at most 16 pairs a text.
    """
    starts = np.repeat(begins[:-1], np.diff(begins))
    places = np.arange(len(members)) - starts
    earlier, later = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for distance in range(1, PREDECESSORS + 1):
        at = np.flatnonzero(places >= distance)
        earlier.append(members[at - distance])
        later.append(members[at])
    for leader in range(LEADERS):
        at = np.flatnonzero(places > leader + PREDECESSORS)
        earlier.append(members[starts[at] + leader])
        later.append(members[at])
    return np.concatenate(earlier), np.concatenate(later)


class Pairs:
    """A set of pairs, in memory up to a limit and in sorted runs on disk beyond it."""

    def __init__(self, folder: Path, num_texts: int, memory_bytes: int) -> None:
        assert num_texts < 3_000_000_000, "a pair of numbers must fit in 63 bits"
        self._folder = folder
        self._num_texts = max(1, num_texts)
        self._limit = max(1024, memory_bytes // 32)  # sorting and joining take copies
        self._parts: list[I64] = []
        self._pending = 0
        self._runs: list[Path] = []

    def add(self, earlier: I64, later: I64) -> None:
        """Add pairs; earlier < later in each."""
        self._parts.append(later * self._num_texts + earlier)
        self._pending += len(earlier)
        if self._pending > self._limit:
            self._settle()

    def __iter__(self) -> Iterator[tuple[I64, I64]]:
        """Yield all pairs once, as (earlier, later), sorted by (later, earlier), in pieces."""
        self._settle(always=True)
        runs: list[I64] = [np.memmap(path, np.int64, "r") for path in self._runs]
        runs += [part for part in self._parts if len(part)]
        cursors = [0] * len(runs)
        while any(cursor < len(run) for cursor, run in zip(cursors, runs, strict=True)):
            step = max(1, self._limit // len(runs))
            # Up to the least of the values that the runs reach in one step: no run has to give more.
            reached = [int(run[min(c + step, len(run)) - 1]) for c, run in zip(cursors, runs, strict=True)]
            ends = [reach for reach, c, run in zip(reached, cursors, runs, strict=True) if c < len(run)]
            pieces = []
            for i, run in enumerate(runs):
                window = run[cursors[i] : cursors[i] + step]
                taken = int(np.searchsorted(window, min(ends), "right"))
                pieces.append(window[:taken])
                cursors[i] += taken
            codes = np.unique(np.concatenate(pieces))
            yield codes % self._num_texts, codes // self._num_texts

    def _settle(self, *, always: bool = False) -> None:
        """Sort what is pending; write it out as a run if it is still too much."""
        codes = np.unique(np.concatenate([np.empty(0, np.int64), *self._parts]))
        if len(codes) > self._limit // 2 and not always:
            path = self._folder / f"pairs-{len(self._runs):05}"
            with explain_os_errors("keep the pairs to compare", path), path.open("wb", buffering=0) as file:
                write_all(file, codes)
            self._runs.append(path)
            codes = codes[:0]
        self._parts, self._pending = [codes], len(codes)
