"""One pass over tables in files: batches of columns with the place that each row came from.

Parquet and Arrow IPC files are read as they are, CSV and JSON lines as `ingest` reads them
(`text_tables.py`): broken rows are left out and counted. Batches come in plain types: no
dictionaries, views or large strings.
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from marrow.core.errors import DataError, SourceError, explain_os_errors
from marrow.data.table_files import COLUMNAR, TABLES, is_text, suffix_of
from marrow.data.tables import plain_type
from marrow.data.text_tables import Texts, read_texts

BATCH_ROWS = 1 << 15
BATCH_BYTES = 32 << 20  # of one batch, about; rows of long texts come fewer at a time
MIN_BATCH_ROWS = 64
_PLACES = (("_file", "_row"), ("file", "line"))  # of rows that ingest wrote; of the documentation


@dataclass(frozen=True, slots=True)
class Scan:
    """Rows of one file that stand after each other; `row` counts from 0 over the whole file."""

    path: Path
    row: int
    batch: pa.RecordBatch


@dataclass(frozen=True, slots=True)
class Tables:
    """Files that hold one table: its columns and types, how many rows, and those of them in text."""

    paths: tuple[Path, ...]
    schema: pa.Schema
    num_rows: int | None
    texts: Texts | None = None

    @property
    def told(self) -> str:
        """What is to be said of broken rows; nothing if there are none."""
        return "" if self.texts is None else self.texts.told()

    @property
    def is_columnar(self) -> bool:
        """Tell whether another process can read a column without reading the others: not so of text."""
        return all(suffix_of(path) in COLUMNAR for path in self.paths)

    def column(self, name: str) -> pa.Field | None:
        """Return a column, or None."""
        index = self.schema.get_field_index(name)
        return None if index < 0 else self.schema.field(index)

    def place_columns(self) -> tuple[str, str] | None:
        """Return the columns that name the source file and line of a row, if there are any."""
        return next((pair for pair in _PLACES if set(pair) <= set(self.schema.names)), None)

    def scan(self, columns: Sequence[str] | None = None) -> Iterator[Scan]:
        """Yield the rows of all files in order, with the asked columns in plain types."""
        names = self.schema.names if columns is None else list(columns)
        wanted = pa.schema([self.schema.field(name) for name in names])
        for path in self.paths:
            row = 0
            rows = path if self.texts is None else self.texts.paths.get(path, path)
            with explain_os_errors("read the table", path), _explained(path):
                for batch in _batches(rows, names):
                    for piece in _pieces(_fit(batch, wanted, path)):
                        yield Scan(path, row, piece)
                        row += piece.num_rows


def open_tables(paths: Sequence[Path]) -> Tables:
    """Look at the columns of files that hold one table.

    Raises: SourceError if there is none or one cannot be read; DataError if columns differ in a
        way that does not go together.
    Cost: text files are read, and their rows set aside as Parquet for as long as the tables are held.
    """
    if not paths:
        raise SourceError("no file with rows", hint=f"give files that end in {', '.join(TABLES)}")
    schema: pa.Schema | None = None
    num_rows: int | None = 0
    in_text = list(dict.fromkeys(path for path in paths if is_text(path)))
    texts = read_texts(in_text) if in_text else None
    for path in paths:
        with explain_os_errors("read the table", path):
            found, rows = _look(path if texts is None else texts.paths.get(path, path))
        num_rows = None if num_rows is None or rows is None else num_rows + rows
        repeated = {name for name in found.names if found.names.count(name) > 1}
        if repeated:
            raise DataError(
                f"{path}: more than one column is named {sorted(repeated)[0]!r}", hint="rename one of them"
            )
        schema = found if schema is None else _join(schema, found, path)
    assert schema is not None
    return Tables(tuple(paths), schema, num_rows, texts)


def open_arrow(source: Any) -> Any:
    """Open an Arrow file or stream, whichever it is."""
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source)


def nearest(name: str, known: Sequence[str]) -> str:
    """Say which column was probably meant."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(known[:20])
    return f"columns: {shown}" + (f" and {len(known) - 20:,} more" if len(known) > 20 else "")


def _look(path: Path) -> tuple[pa.Schema, int | None]:
    with _explained(path):
        if suffix_of(path) == ".parquet":
            with pq.ParquetFile(path) as file:
                return _plain(file.schema_arrow), file.metadata.num_rows
        with pa.memory_map(str(path)) as source, open_arrow(source) as reader:
            return _plain(reader.schema), None


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's; Arrow's have no number
            raise
        kind = suffix_of(path) if suffix_of(path) in TABLES else "no known kind"
        raise SourceError(
            f"{path} cannot be read as a table ({kind}): {error}",
            hint=f"files with rows end in {', '.join(TABLES)}",
        ) from error


def _batches(path: Path, names: list[str]) -> Iterator[pa.RecordBatch]:
    if suffix_of(path) == ".parquet":
        with pq.ParquetFile(path) as file:
            found = set(file.schema_arrow.names)
            here = [name for name in names if name in found]
            if not here:  # nothing asked for is in this file, but its rows count
                yield from _empty(file.metadata.num_rows)
                return
            per_row = 1 + sum(
                file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)
            ) // max(1, file.metadata.num_rows)
            rows = max(MIN_BATCH_ROWS, min(BATCH_ROWS, BATCH_BYTES // per_row))
            yield from file.iter_batches(rows, columns=here)
    else:
        with pa.memory_map(str(path)) as source, open_arrow(source) as reader:
            if isinstance(reader, pa.RecordBatchFileReader):
                for index in range(reader.num_record_batches):
                    yield reader.get_batch(index)
            else:
                yield from reader


def _empty(num_rows: int) -> Iterator[pa.RecordBatch]:
    for start in range(0, num_rows, BATCH_ROWS):
        yield pa.record_batch({"": pa.nulls(min(BATCH_ROWS, num_rows - start))})


def _plain(schema: pa.Schema) -> pa.Schema:
    return pa.schema([pa.field(field.name, plain_type(field.type)) for field in schema])


def _join(one: pa.Schema, other: pa.Schema, path: Path) -> pa.Schema:
    """Join the columns of two files: a column may be missing, its types must go together."""
    try:
        return pa.unify_schemas([one, other], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"{path}: its columns do not fit those of the files before: {error}",
            hint="give files of one table; `marrow data sql` can cast columns",
        ) from error


def _fit(batch: pa.RecordBatch, wanted: pa.Schema, path: Path) -> pa.RecordBatch:
    columns = []
    for field in wanted:
        index = batch.schema.get_field_index(field.name)
        if index < 0:
            columns.append(pa.nulls(batch.num_rows, field.type))
            continue
        column = batch.column(index)
        if column.type != field.type:
            try:
                column = column.cast(field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(
                    f"{path}: column {field.name!r} does not fit {field.type}: {error}",
                    hint="give files of one table",
                ) from error
        columns.append(column)
    if not columns:
        return pa.record_batch({"": pa.nulls(batch.num_rows)})
    return pa.RecordBatch.from_arrays(columns, schema=wanted)


def _pieces(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for start in range(0, batch.num_rows, BATCH_ROWS):
        yield batch.slice(start, BATCH_ROWS)
