"""Reads packed rows from memory-mapped shards, without a copy until rows become a batch.

A shard is mapped when a row of it is first wanted, and each row is checked when it is first read,
once for each process: a first batch of rows from anywhere does not wait for whole files to be
hashed. Shards whose rows carry no checks are checked as a whole, by their xxh3, when they are mapped.
What is wrong with the folder as a whole (a file that is missing or cut short) is found at the start,
since that costs nothing. Several folders with one tokenizer and context are one array
of rows, one folder after the other: what a mixture draws from.
"""

import mmap
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from marrow.core.errors import DataError, UsageError, explain_os_errors
from marrow.core.hashes import check_file, hash_value
from marrow.data.manifest import FILE_NAME as MANIFEST_FILE
from marrow.data.manifest import Manifest, ShardEntry
from marrow.kernels.rows.gather_rows import Columns, RowTable
from marrow.loader.far_folder import JoinedFiles, far_files
from marrow.loader.source import Files, LocalFiles
from marrow.loader.stages import stage

Int64Array = NDArray[np.int64]


class Rows:
    """Rows that were picked, still where they are stored: copied once, into what a batch is made of."""

    def __init__(self, table: RowTable, rows_B: Int64Array) -> None:
        self._table, self._rows_B = table, rows_B

    def __len__(self) -> int:
        return len(self._rows_B)

    @property
    def stored(self) -> int:
        """Return the tokens of a row, T + 1."""
        return self._table.stored

    def stack(self, out: Int64Array) -> None:
        """Write tokens, int64 [B, T+1]."""
        self._table.stack(self._rows_B, out)

    def lay(
        self,
        tokens_N: Int64Array,
        targets_N: Int64Array,
        positions_N: Int64Array,
        document_N: NDArray[np.int32],
        each: int,
    ) -> list[int]:
        """Lay the rows end to end, as batches of `each` (see `Batch`); return the targets in each."""
        return self._table.lay(self._rows_B, tokens_N, targets_N, positions_N, document_N, each)

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """Tokens as they are stored, uint16 or uint32 [B, T+1], a copy."""
        return self._table.tokens(self._rows_B)

    @cached_property
    def starts(self) -> Int64Array:
        """Where documents begin in their row, int64, row after row."""
        return self._table.starts(self._rows_B)[0]

    @cached_property
    def starts_of(self) -> Int64Array:
        """Row n has starts[starts_of[n]:starts_of[n+1]]; int64 [B+1]."""
        return self._table.starts(self._rows_B)[1]

    @cached_property
    def num_tokens(self) -> Int64Array:
        """Tokens without padding, int64 [B]."""
        return self._table.num_tokens(self._rows_B)


class ShardReader:
    """All shards of one or more folders as one array of rows: a `Reader[Rows]`. Closing twice is fine.

    Args: folders: with a manifest each. files: where the shards are, if not in the one folder.
    Raises: SourceError or DataError for a folder that cannot be read; UsageError for folders that
        do not go together.
    """

    def __init__(self, folders: Path | Sequence[Path], files: Files | None = None) -> None:
        self.folders = (folders,) if isinstance(folders, Path) else tuple(folders)
        self.manifests = tuple(Manifest.read(folder) for folder in self.folders)
        _check_alike(self.folders, self.manifests)
        self.manifest = self.manifests[0]
        self._given_files = files
        self._entries = [entry for manifest in self.manifests for entry in manifest.shards]
        self._files = files or _files_of(self.folders, self.manifests)
        self.rows_of_shards = np.array([entry.num_rows for entry in self._entries], dtype=np.int64)
        self._table = self._new_table()
        self._first_rows: list[int] = self._table.first_row.tolist()
        equal = set(self.rows_of_shards[:-1].tolist())
        self._rows_of_each = equal.pop() if len(equal) == 1 else 0  # 0: they differ
        self._open: OrderedDict[int, _Shard] = OrderedDict()  # the one used longest ago first
        self._ahead: list[int] = []
        self.num_rows = int(self.rows_of_shards.sum())
        # The shards are on this machine for good, so that nothing is fetched ahead.
        self.is_local = self._files.max_open is None

    def __reduce__(self) -> tuple[Any, ...]:  # a worker process maps the files anew
        return ShardReader, (self.folders, self._given_files)

    @property
    def folder(self) -> Path:
        """Return the folder, the first of several."""
        return self.folders[0]

    @cached_property
    def check(self) -> str:
        """Identify the data: the check of the manifest, of several folders a hash of all."""
        checks = [check_file(folder / MANIFEST_FILE) for folder in self.folders]
        return checks[0] if len(checks) == 1 else hash_value(checks)[:32]

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the mapped files go."""
        # A new table, not an emptied one: rows that are still held keep what they read from.
        self._table = self._new_table()
        for index in list(self._open):
            self._drop(index)
        self._files.close()

    def take(self, rows_N: Int64Array) -> Rows:
        """Pick rows, in the order asked for.

        Args: rows_N: int64 [N], 0 <= row < num_rows.
        Raises, here or when the rows are read: DataError naming the shard if its bytes are not those
            that were written; IndexError for a row out of range.
        Cost: nothing is read yet, but for shards that have to be fetched.
        """
        rows_N = np.ascontiguousarray(rows_N, dtype=np.int64)
        if self.is_local:
            return Rows(self._table, rows_N)
        return Rows(self._hold(rows_N), rows_N)

    def counters(self) -> dict[str, float]:
        """Return what happened with shards that are elsewhere; empty if there are none."""
        found: dict[str, float] = getattr(self._files, "counters", dict)()
        return found

    def ahead(self, rows_N: Int64Array) -> None:
        """Tell the files which shards come soon."""
        if self.is_local:
            return
        soon = self._shards_of(rows_N)
        if len(self._entries) <= (self._files.max_open or 0):  # all have room: no need to choose
            soon += range(len(self._entries))
        # PERF: without those that are open it is the same for many batches, and nobody need be told.
        soon = [index for index in dict.fromkeys(soon) if index not in self._open]
        if soon != self._ahead:
            self._ahead = soon
            self._files.ahead(soon)

    def documents(self, row: int) -> list[tuple[int, int, int, int]]:
        """List a row's pieces as (document id, offset in the document, start, end in the row).

        Cost: the first time for a shard, reading all of it: its ids have no check of their own.
        """
        picked = self.take(np.array([row]))
        starts = picked.starts.tolist()
        index = bisect_right(self._first_rows, row) - 1
        shard = self._open[index]
        shard.check()
        first = int(shard.columns.starts_of[row - self._first_rows[index]])
        span = slice(first, first + len(starts))
        ends = [*starts[1:], int(picked.num_tokens[0])]
        ids, offsets = shard.document_ids[span].tolist(), shard.document_offsets[span].tolist()
        return list(zip(ids, offsets, starts, ends, strict=True))

    def _hold(self, rows_N: Int64Array) -> RowTable:
        """Open the shards of these rows; forget those that were used longest ago and are not among them.

        Rows that were given out keep the table as it was, and with it what they read from.
        """
        used = set(self._shards_of(rows_N))
        for index in sorted(used):
            if not 0 <= index < len(self._entries):
                raise IndexError(f"there are {self.num_rows} rows, none of {rows_N.min()} to {rows_N.max()}")
            if not self._table.is_open(index):
                self._table.put(index, self._map(index))
            self._open.move_to_end(index)
        surplus = len(self._open) - max(self._files.max_open or 0, len(used))
        if surplus > 0:
            self._table = self._table.copy()
            for index in [*self._open][:surplus]:
                self._drop(index)
        return self._table

    def _shards_of(self, rows_N: Int64Array) -> list[int]:
        """Return the shard that each row is in.

        PERF: numpy's search lets go of Python's lock, and beside threads that fetch it waits to get it
        back, up to 190 us by cProfile. A division of few numbers does not; of 80 rows it takes 3 us.
        """
        if self._rows_of_each:
            shards: list[int] = (rows_N // self._rows_of_each).tolist()
            if max(shards, default=0) < len(self._entries):  # the last may be longer
                return shards
        return [bisect_right(self._first_rows, row) - 1 for row in rows_N.tolist()]

    def _new_table(self) -> RowTable:
        return RowTable(self.rows_of_shards.tolist(), self.manifest.context + 1, self._map)

    def _drop(self, index: int) -> None:
        self._table.drop(index)
        del self._open[index]
        self._files.release(index)

    def _map(self, index: int) -> Columns:
        entry = self._entries[index]
        with stage("fetch"):
            path = self._files.path(index)
        shard = _Shard(path, entry, is_verified=self._files.is_verified(index))
        if shard.columns.tokens.shape != (entry.num_rows, self._table.stored):
            rows, stored = shard.columns.tokens.shape
            raise _damaged(path, f"it holds {rows} rows of {stored - 1} + 1 tokens")
        self._open[index] = shard
        return shard.columns


class _Shard:
    """Views on a mapped file, which stays open as long as one of them is used.

    is_verified: its bytes are known to be those that were written.
    """

    def __init__(self, path: Path, entry: ShardEntry, *, is_verified: bool) -> None:
        with explain_os_errors("read a shard", path), path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_size != entry.num_bytes:
                raise _damaged(path, f"it has {found.st_size} bytes, the manifest says {entry.num_bytes}")
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._path, self._xxh3 = path, entry.xxh3
        self._state = _State(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, entry.xxh3)
        if is_verified:
            _verified.add(self._state)
        try:
            batch = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._mapped))).get_batch(0)
            batch.validate()  # its rows have checks, what says where they are has none
            has_checks = "row_xxh64" in batch.schema.names
            if not has_checks:
                self.check()
            columns = [
                batch.column(name)
                for name in ("tokens", "document_starts", "document_ids", "document_offsets", "num_tokens")
            ]
            tokens, starts, ids, offsets, num_tokens = columns
            stored = tokens.type.list_size
            if str(tokens.type.value_type) not in ("uint16", "uint32"):
                raise KeyError(f"tokens are {tokens.type.value_type}")
            checks = _view(batch.column("row_xxh64")) if has_checks and not self._is_verified else None
            self.columns = Columns(
                tokens=_view(tokens.values, batch.num_rows * stored).reshape(batch.num_rows, stored),
                starts=_view(starts.values),
                starts_of=_view(starts.offsets),
                num_tokens=_view(num_tokens),
                checks=checks,
                checked=None if checks is None else _checked_rows(self._state, entry.num_rows),
                name=f"shard {path}",
            )
            self.document_ids: Int64Array = _view(ids.values)
            self.document_offsets: Int64Array = _view(offsets.values)
        except _NO_SHARD as error:
            raise _damaged(path, f"it is no Arrow file of packed rows: {error}") from error

    @property
    def _is_verified(self) -> bool:
        return self._state in _verified

    def check(self) -> None:
        """Check all bytes, once for each process and state of the file.

        Raises: DataError naming the shard if they are not those that were written.
        """
        if self._is_verified:
            return
        with stage("verify"):
            # Of the mapping: nothing is copied, and its pages are there when rows are read.
            computed = xxh3_128_hexdigest(self._mapped)
        if computed != self._xxh3:
            raise _damaged(self._path, f"its xxh3 is {computed}, the manifest says {self._xxh3}")
        _verified.add(self._state)


# What is raised where the frame of a file lies: Arrow's own errors, of which some are an OSError, and
# what comes of names and types that are not there.
_NO_SHARD = (pa.ArrowException, OSError, KeyError, IndexError, AttributeError, ValueError, OverflowError)


def _view(array: Any, count: int | None = None) -> NDArray[Any]:
    """Return a column's memory as an array. Not `to_numpy`: that imports pandas where it is installed."""
    dtype = _DTYPES[str(array.type)]
    count = len(array) if count is None else count
    buffer = array.buffers()[1]
    if not count or buffer is None:
        return np.empty(0, dtype=dtype)
    return np.frombuffer(buffer, dtype=dtype, count=count, offset=array.offset * np.dtype(dtype).itemsize)


_DTYPES: dict[str, Any] = {
    "uint16": np.uint16,
    "uint32": np.uint32,
    "int32": np.int32,
    "int64": np.int64,
    "uint64": np.uint64,
}


class _State(NamedTuple):
    """A file as it is now, and what it should be."""

    device: int
    inode: int
    num_bytes: int
    modified_ns: int
    xxh3: str


def _checked_rows(state: _State, rows: int) -> NDArray[np.uint8]:
    """Return which rows of a file this process has checked, an array that whoever checks one writes to."""
    return _rows_checked.setdefault(state, np.zeros(rows, dtype=np.uint8))


def forget_verified() -> None:
    """Check every shard anew when it is next opened."""
    _verified.clear()
    _rows_checked.clear()


# Process-wide on purpose: two loaders of one process need not read a row twice to check it. Single
# operations on a set and a dict, which threads may share.
_verified: set[_State] = set()
_rows_checked: dict[_State, NDArray[np.uint8]] = {}


def _files_of(folders: Sequence[Path], manifests: Sequence[Manifest]) -> Files:
    """Find the shards in their folders, or where these say that they are."""
    far = [far_files(*pair) for pair in zip(folders, manifests, strict=True)]
    if not any(far):
        return _local(folders, manifests)
    each = zip(far, folders, manifests, strict=True)
    return JoinedFiles([(one or _local([folder], [its]), len(its.shards)) for one, folder, its in each])


def _local(folders: Sequence[Path], manifests: Sequence[Manifest]) -> LocalFiles:
    """Find the shards in their folders; their sizes are checked at once."""
    paths = []
    for folder, manifest in zip(folders, manifests, strict=True):
        for entry in manifest.shards:
            path = folder / entry.name
            with explain_os_errors("open a shard", path):
                num_bytes = path.stat().st_size
            if num_bytes != entry.num_bytes:
                raise _damaged(path, f"it has {num_bytes} bytes, the manifest says {entry.num_bytes}")
            paths.append(path)
    return LocalFiles(paths)


def _check_alike(folders: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    if not folders:
        raise UsageError("no folder of shards is named", hint="name at least one")
    first = manifests[0]
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.context != first.context or manifest.tokenizer_sha256 != first.tokenizer_sha256:
            raise UsageError(
                f"{folder} has context {manifest.context} and tokenizer {manifest.tokenizer_sha256[:12]}, "
                f"{folders[0]} {first.context} and {first.tokenizer_sha256[:12]}",
                hint="mix shards that were written with one tokenizer and context",
            )


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"shard {path} is damaged: {why}",
        hint="run the shards step again (delete the damaged artifact first, if the store keeps it)",
    )
