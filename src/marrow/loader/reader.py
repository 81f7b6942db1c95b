"""Reads packed rows from memory-mapped shards, without a copy until rows are picked.

A shard's columns become numpy views on the mapped file when a row of it is first wanted; its
xxh3 is checked then, once for each reader. What is wrong with the folder as a whole (a file that
is missing or cut short) is found at the start, since that costs nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from marrow.core.errors import DataError, explain_os_errors
from marrow.core.hashes import check_file
from marrow.data.manifest import Manifest, ShardEntry

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed rows, as arrays that own their memory.

    tokens: uint16 or uint32 [N, T+1]. starts: int64, where documents begin, row after row, with
    starts_of: int64 [N+1], so that row n has starts[starts_of[n]:starts_of[n+1]].
    num_tokens: int64 [N], without padding.
    """

    tokens: NDArray[Any]
    starts: Int64Array
    starts_of: Int64Array
    num_tokens: Int64Array


@dataclass(frozen=True, slots=True)
class _Shard:
    """Views on a mapped file; `map` keeps it open."""

    tokens: NDArray[Any]
    starts: NDArray[np.int32]
    starts_of: NDArray[np.int32]
    document_ids: Int64Array
    document_offsets: Int64Array
    num_tokens: NDArray[np.int32]
    map: pa.MemoryMappedFile


class ShardReader:
    """All shards of a folder as one array of rows. Closing twice is fine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._first_row = np.cumsum([0, *(shard.num_rows for shard in self.manifest.shards)])
        self._open: dict[int, _Shard] = {}
        for entry in self.manifest.shards:
            path = folder / entry.name
            with explain_os_errors("open a shard", path):
                num_bytes = path.stat().st_size
            if num_bytes != entry.num_bytes:
                raise _damaged(path, f"it has {num_bytes} bytes, the manifest says {entry.num_bytes}")

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the mapped files go."""
        self._open.clear()

    def take(self, rows_N: Int64Array) -> Rows:
        """Copy rows, in the order asked for.

        Args: rows_N: int64 [N], 0 <= row < manifest.num_rows.
        Raises: DataError naming the shard if its bytes are not those that were written.
        Cost: one gather per shard touched, no loop over rows.
        """
        shard_N = np.searchsorted(self._first_row, rows_N, side="right") - 1
        tokens = np.empty((len(rows_N), self.manifest.context + 1), dtype=self.manifest.dtype)
        num_tokens = np.empty(len(rows_N), dtype=np.int64)
        counts = np.empty(len(rows_N), dtype=np.int64)
        parts: list[tuple[_Shard, Int64Array, Int64Array]] = []
        for index in np.unique(shard_N):
            shard = self._shard(int(index))
            here = np.flatnonzero(shard_N == index)
            local = rows_N[here] - self._first_row[index]
            tokens[here] = shard.tokens[local]
            num_tokens[here] = shard.num_tokens[local]
            counts[here] = shard.starts_of[local + 1] - shard.starts_of[local]
            parts.append((shard, here, local))
        starts_of = np.concatenate(([0], np.cumsum(counts)))
        starts = np.empty(starts_of[-1], dtype=np.int64)
        for shard, here, local in parts:
            starts[_ragged(starts_of[here], counts[here])] = shard.starts[
                _ragged(shard.starts_of[local], counts[here])
            ]
        return Rows(tokens, starts, starts_of, num_tokens)

    def documents(self, row: int) -> list[tuple[int, int, int, int]]:
        """List a row's pieces as (document id, offset in the document, start, end in the row)."""
        index = int(np.searchsorted(self._first_row, row, side="right")) - 1
        shard = self._shard(index)
        local = row - int(self._first_row[index])
        span = slice(int(shard.starts_of[local]), int(shard.starts_of[local + 1]))
        starts = shard.starts[span].tolist()
        ends = [*starts[1:], int(shard.num_tokens[local])]
        ids, offsets = shard.document_ids[span].tolist(), shard.document_offsets[span].tolist()
        return list(zip(ids, offsets, starts, ends, strict=True))

    def _shard(self, index: int) -> _Shard:
        if index not in self._open:
            self._open[index] = self._map(self.manifest.shards[index])
        return self._open[index]

    def _map(self, entry: ShardEntry) -> _Shard:
        path = self.folder / entry.name
        with explain_os_errors("read a shard", path):
            found = check_file(path)
            if found != entry.xxh3:
                raise _damaged(path, f"its xxh3 is {found}, the manifest says {entry.xxh3}")
            mapped = pa.memory_map(str(path))
        batch = pa.ipc.open_file(mapped).get_batch(0)
        tokens = batch.column("tokens")
        context = tokens.type.list_size - 1
        if context != self.manifest.context or batch.num_rows != entry.num_rows:
            raise _damaged(path, f"it holds {batch.num_rows} rows of {context} + 1 tokens")
        starts = batch.column("document_starts")
        return _Shard(
            tokens=tokens.flatten().to_numpy().reshape(batch.num_rows, context + 1),
            starts=starts.flatten().to_numpy(),
            starts_of=starts.offsets.to_numpy(),
            document_ids=batch.column("document_ids").flatten().to_numpy(),
            document_offsets=batch.column("document_offsets").flatten().to_numpy(),
            num_tokens=batch.column("num_tokens").to_numpy(),
            map=mapped,
        )


def _ragged(first_N: NDArray[Any], counts_N: Int64Array) -> Int64Array:
    """Return the indices first[n], first[n] + 1, ... (counts[n] of them) for each n, end to end."""
    ends_N = np.cumsum(counts_N)
    shift_N = first_N - (ends_N - counts_N)
    indices: Int64Array = np.arange(ends_N[-1] if len(ends_N) else 0) + np.repeat(shift_N, counts_N)
    return indices


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"shard {path} is damaged: {why}",
        hint="run the shards step again (delete the damaged artifact first, if the store keeps it)",
    )
