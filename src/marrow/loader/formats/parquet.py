"""Reads rows of Parquet files by number: the reader behind a loader over a table.

    reader = ParquetReader("pages/*.parquet", columns=["text", "label"])
    reader.take(np.array([7, 1_000_003, 8]))       # Samples, in this order

Parquet has no cheap single row: a row costs its whole row group, read and decoded. So decoded
groups are kept, the last used first, up to `cache_bytes`; and the loader's window shuffle (windows
of row groups, `rows_of_shards`) has each group decoded once while its window lasts. A full shuffle over
more groups than the cache holds decodes a group for nearly every row: `decoded_groups` counts it.
"""

import glob
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from marrow.core.errors import DataError, SourceError, explain_os_errors
from marrow.core.hashes import hash_bytes, hash_value
from marrow.loader.samples import Samples
from marrow.loader.stages import stage

Int64Array = NDArray[np.int64]
Source = str | Path | Sequence[str | Path]

CACHE_BYTES = 256 << 20
_MAGIC = b"PAR1"


class ParquetReader:
    """All rows of some Parquet files, numbered file after file in the order of their names.

    Args: source: a file, a folder, a pattern, or a list of files. columns: which to read, None for
        all. cache_bytes: decoded row groups kept; one is always.
    Raises: SourceError if there is no file or row; DataError for a file that is no Parquet, or whose
        columns differ in type from the first file's.
    """

    def __init__(
        self, source: Source, columns: Sequence[str] | None = None, *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.paths = files_of(source, ".parquet")
        self.columns = None if columns is None else list(columns)
        self.cache_bytes = cache_bytes
        self.decoded_groups = 0
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: list[tuple[int, int]] = []  # (file, row group in it)
        self._file_rows: list[int] = []
        rows: list[int] = []
        footers: list[Any] = []
        schema: pa.Schema | None = None
        for number, path in enumerate(self.paths):
            metadata, footer = _footer(path)
            if metadata.num_rows:  # the types of a file without rows are often made up
                schema = self._checked(metadata.schema.to_arrow_schema(), schema, path)
            footers.append([path.name, path.stat().st_size, footer])
            self._file_rows.append(metadata.num_rows)
            for group in range(metadata.num_row_groups):
                if metadata.row_group(group).num_rows:
                    self._groups.append((number, group))
                    rows.append(metadata.row_group(group).num_rows)
        if schema is None:
            raise SourceError(f"the {len(self.paths)} Parquet files hold no rows", hint="check the source")
        self.schema = schema
        self.rows_of_shards = np.array(rows, dtype=np.int64)
        self._first = np.concatenate(([0], np.cumsum(self.rows_of_shards)))
        self._check = hash_value(footers)

    @property
    def num_rows(self) -> int:
        """Return how many rows there are."""
        return int(self._first[-1])

    @property
    def check(self) -> str:
        """Return a hash of the files' names, sizes and footers."""
        return self._check

    def take(self, rows_B: Int64Array) -> Samples:
        """Read rows, in the order asked for. Cost: a decode for each row group that is not kept."""
        if not len(rows_B):
            return Samples(self.schema.empty_table(), rows_B, self)
        group_B = np.searchsorted(self._first, rows_B, side="right") - 1
        parts: list[pa.Table] = []
        order: list[Int64Array] = []
        for group in np.unique(group_B).tolist():
            here = np.flatnonzero(group_B == group)
            table = self._group(group)
            with stage("decode"):
                parts.append(table.take(pa.array(rows_B[here] - self._first[group])))
            order.append(here)
        with stage("decode"):
            whole = pa.concat_tables(parts)
            if len(parts) > 1:
                whole = whole.take(pa.array(np.argsort(np.concatenate(order))))
        return Samples(whole, rows_B, self)

    def ahead(self, rows_N: Int64Array) -> None:
        """Do nothing: local files are read when they are wanted."""

    def where(self, row: int) -> str:
        """Name a row: file, row in the file, row group."""
        group = int(np.searchsorted(self._first, row, side="right")) - 1
        number, index = self._groups[group]
        in_file = row - sum(self._file_rows[:number])
        return f"row {in_file} of {self.paths[number]}, row group {index}"

    def close(self) -> None:
        """Let go of files and kept rows. Closing twice is fine."""
        self._cache.clear()
        while self._open:
            self._open.popitem()[1].close()

    def __reduce__(self) -> tuple[Any, ...]:  # a worker opens its own
        return _reopened, (self.paths, self.columns, self.cache_bytes, self._check)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _group(self, group: int) -> pa.Table:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        number, index = self._groups[group]
        path = self.paths[number]
        with stage("decode"), explain_os_errors("read rows", path):
            try:
                table = self._file(number).read_row_group(index, columns=self.columns, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise _damaged(path, f"row group {index}: {error}") from error
        self.decoded_groups += 1
        self._cache[group] = table
        kept = sum(one.nbytes for one in self._cache.values())
        while kept > self.cache_bytes and len(self._cache) > 1:
            kept -= self._cache.popitem(last=False)[1].nbytes
        return table

    def _file(self, number: int) -> pq.ParquetFile:
        if number not in self._open:
            self._open[number] = pq.ParquetFile(self.paths[number], memory_map=True)
            while len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]

    def _checked(self, found: pa.Schema, first: pa.Schema | None, path: Path) -> pa.Schema:
        if self.columns is not None:
            missing = [name for name in self.columns if name not in found.names]
            if missing:
                raise DataError(
                    f"{path} has no column {missing[0]!r}; it has {', '.join(map(repr, found.names))}",
                    hint="choose columns that all files have",
                )
            found = pa.schema([found.field(name) for name in self.columns])
        found = found.remove_metadata()
        if first is not None and not found.equals(first):
            raise DataError(
                f"the columns of {path} are not those of {self.paths[0]}: {_difference(first, found)}",
                hint="choose columns that all files share, or ingest the files to bring them to one schema",
            )
        return found


_MOST_OPEN = 128  # files; a process may have 1,024 descriptors


def files_of(source: Source, suffix: str) -> list[Path]:
    """List the files that a path, a folder, a pattern or a list means, in the order of their names."""
    if not isinstance(source, str | Path):
        return [path for one in source for path in files_of(one, suffix)]
    path = Path(source)
    if path.is_dir():
        found = sorted(path.rglob(f"*{suffix}"))
    elif path.exists():
        found = [path]
    else:
        found = sorted(Path(one) for one in glob.glob(str(source), recursive=True))
    if not found:
        raise SourceError(
            f"there is no {suffix} file at {source}",
            hint="give a file, a folder that holds some, or a pattern",
        )
    return found


def _footer(path: Path) -> tuple[pq.FileMetaData, str]:
    """Read a file's metadata, and hash its bytes."""
    with explain_os_errors("read a Parquet file", path), path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        tail = file.read(8)
        if size < 12 or tail[4:] != _MAGIC:
            if path.suffix != ".parquet":
                raise DataError(
                    f"{path} is no Parquet file",
                    hint="rows are read from Parquet, shards, MDS and litdata; `marrow run` ingests all else",
                )
            raise _damaged(path, "it does not end as a Parquet file does; it may be cut short")
        length = int.from_bytes(tail[:4], "little")
        file.seek(max(0, size - 8 - length))
        footer = hash_bytes(file.read(length))
        try:
            return pq.read_metadata(file), footer
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, str(error)) from error


def _reopened(paths: list[Path], columns: list[str] | None, cache_bytes: int, check: str) -> ParquetReader:
    reader = ParquetReader(paths, columns, cache_bytes=cache_bytes)
    if reader.check != check:
        raise DataError("the Parquet files changed while they were being read", hint="start again")
    return reader


def _difference(first: pa.Schema, found: pa.Schema) -> str:
    here, there = ({field.name: str(field.type) for field in schema} for schema in (first, found))
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            return f"{name!r} is {there.get(name, 'missing')}, not {here.get(name, 'missing')}"
    return "they stand in another order"


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path} cannot be read: {why}", hint="copy the file again from where it came from")
