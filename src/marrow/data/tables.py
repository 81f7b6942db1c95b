"""Parquet files as the steps of this layer write and read them.

One writer for all: zstd, row groups cut by uncompressed bytes, equal bytes for equal rows.
Readers stream batches that never cross a row group, so that a row's place (file, row group, row)
stays known: that is what lineage points to.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from marrow.core.errors import DataError, explain_os_errors

COMPRESSION = "zstd"
MAX_GROUP_ROWS = 1 << 16
READ_ROWS = 4096


class ParquetFile:
    """Writes record batches to one Parquet file, a row group per `group_bytes`."""

    def __init__(self, path: Path, schema: pa.Schema, group_bytes: int) -> None:
        self.path = path
        self.num_rows = 0
        self.num_row_groups = 0
        self._schema = schema
        self._group_bytes = group_bytes
        self._pending: list[pa.RecordBatch] = []
        self._pending_bytes = 0
        self._pending_rows = 0
        with explain_os_errors("write rows", path):
            self._writer = pq.ParquetWriter(
                path, schema, compression=COMPRESSION, use_dictionary=_worth_a_dictionary(schema)
            )

    def __enter__(self) -> "ParquetFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(keep=error is None)

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows; a row group goes to disk when it is full."""
        per_group = batch.num_rows * self._group_bytes // max(1, batch.nbytes)
        step = max(1, min(MAX_GROUP_ROWS, per_group))
        for start in range(0, batch.num_rows, step):
            piece = batch.slice(start, step)
            if self._pending_rows + piece.num_rows > MAX_GROUP_ROWS:
                self._flush()
            self._pending.append(piece)
            self._pending_rows += piece.num_rows
            self._pending_bytes += piece.nbytes
            self.num_rows += piece.num_rows
            if self._pending_bytes >= self._group_bytes:
                self._flush()

    def close(self, *, keep: bool = True) -> None:
        """Finish the file; with keep false, what is pending is let go. Closing twice is fine."""
        if not keep:
            self._pending = []
        with explain_os_errors("write rows", self.path):
            self._flush()
            self._writer.close()

    def _flush(self) -> None:
        if self._pending:
            with explain_os_errors("write rows", self.path):
                table = pa.Table.from_batches(self._pending, self._schema)
                self._writer.write_table(table, row_group_size=MAX_GROUP_ROWS)
            self.num_row_groups += 1
        self._pending, self._pending_bytes, self._pending_rows = [], 0, 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a batch of rows lies: file name, row group, first row within the row group."""

    part: str
    row_group: int
    row: int


def open_table(path: Path) -> pq.ParquetFile:
    """Open a Parquet file that an earlier step wrote.

    Raises: DataError if it is not there or no Parquet file.
    """
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", hint="run the step that writes it again"
        ) from error


def parts(folder: Path, pattern: str) -> list[Path]:
    """List the Parquet files of an earlier step in the order of their names.

    Raises: DataError if there are none.
    """
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise DataError(f"no {pattern} in {folder}", hint="run the step that writes it first")
    return paths


def stream(
    paths: Sequence[Path], columns: Sequence[str] | None = None
) -> Iterator[tuple[Place, pa.RecordBatch]]:
    """Yield batches of at most 4096 rows with their place; none crosses a row group."""
    for path in paths:
        with open_table(path) as file:
            for group in range(file.num_row_groups):
                row = 0
                for batch in file.iter_batches(
                    READ_ROWS, row_groups=[group], columns=list(columns) if columns is not None else None
                ):
                    yield Place(path.name, group, row), batch
                    row += batch.num_rows


def described(name: str, kind: pa.DataType, description: str) -> pa.Field:
    """Make a column that says what it holds."""
    return pa.field(name, kind, metadata={"description": description})


def _worth_a_dictionary(schema: pa.Schema) -> list[str] | bool:
    """Choose dictionary columns: names repeat, long texts do not.

    PERF: hashing a text column to find that it does not repeat costs as much as writing it.
    """
    repeating = {"module", "kind", "license", "source_hash", "file", "_file", "group", "source_part"}
    return [field.name for field in schema if field.name in repeating] or False


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the plain form of a type: no dictionaries, no large or view strings."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind
