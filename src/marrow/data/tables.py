"""Parquet files as the steps of this layer write and read them.

One writer for all: zstd, row groups cut by uncompressed bytes, equal bytes for equal rows.
Readers stream batches that never cross a row group, so that a row's place (file, row group, row)
stays known: that is what lineage points to.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from marrow.core.errors import DataError, explain_os_errors

COMPRESSION, LEVEL = "zstd", 1  # docs/decisions/0004-row-groups-and-codecs.md
# PERF: hashing a text column to find that it does not repeat costs as much as writing it.
REPEATING = {"module", "kind", "license", "source_hash", "file", "_file", "group", "source_part"}
COUNTING = {"_row"}  # grows by little: differences take a tenth of the room
MAX_GROUP_ROWS = 1 << 16
READ_ROWS = 4096


class ParquetFile:
    """Writes record batches to one Parquet file, a row group per `group_bytes`."""

    def __init__(
        self, path: Path, schema: pa.Schema, group_bytes: int, repeating: Collection[str] = ()
    ) -> None:
        """Open the file. repeating: columns worth a dictionary, beside those whose names say so."""
        self.path = path
        self.num_rows = 0
        self.num_row_groups = 0
        self._schema = schema
        self._group_bytes = group_bytes
        self._pending: list[pa.RecordBatch] = []
        self._pending_bytes = 0
        self._pending_rows = 0
        with explain_os_errors("write rows", path):
            dictionaries = [field.name for field in schema if field.name in {*REPEATING, *repeating}]
            self._writer = pq.ParquetWriter(
                path,
                schema,
                compression=COMPRESSION,
                compression_level=LEVEL,
                use_dictionary=dictionaries or False,
                column_encoding={name: "DELTA_BINARY_PACKED" for name in COUNTING if name in schema.names}
                or None,
            )

    def __enter__(self) -> "ParquetFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(keep=error is None)

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows; a row group goes to disk when no more fits into it."""
        start = 0
        while start < batch.num_rows:
            rows = self._room(batch, start)
            if not rows:
                self._flush()
                continue
            piece = batch.slice(start, rows)
            self._pending.append(piece)
            self._pending_rows += rows
            self._pending_bytes += piece.nbytes
            self.num_rows += rows
            start += rows

    def _room(self, batch: pa.RecordBatch, start: int) -> int:
        """Return how many rows of a batch still fit; into an empty row group at least one."""
        left = self._group_bytes - self._pending_bytes
        rows: int = min(batch.num_rows - start, MAX_GROUP_ROWS - self._pending_rows)
        while rows > 1 and (size := batch.slice(start, rows).nbytes) > left:
            rows = max(1, min(rows - 1, rows * max(0, left) // size))
        if self._pending and (rows < 1 or batch.slice(start, rows).nbytes > left):
            return 0
        return rows

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


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the plain form of a type: no dictionaries, no large or view strings."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind
