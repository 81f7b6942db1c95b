"""Readers of the formats: a file becomes batches of columns and the line or row of each.

csv      data/sources/delimited.py; columns of text, typed later
jsonl    an object per line; a line that is none is broken
parquet  as it is, batch by batch
arrow    IPC file or stream, as it is
text     a column `text`; a file is cut at blank lines into rows of about 64 KiB
"""

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from marrow.core.errors import SourceError, explain_os_errors
from marrow.data.sources.columns import Misfit, column_of, fit, fit_asked
from marrow.data.sources.delimited import Records, Tally, check_share, read_delimited
from marrow.data.sources.dialect import unique_names
from marrow.data.sources.file import SourceFile
from marrow.data.sources.streams import Broken, encoding_of, lines_of, open_bytes, open_seekable, peek
from marrow.data.tables import plain_type
from marrow.kernels.rows.scan_csv import I64

BATCH_ROWS = 4096
BATCH_BYTES = 1 << 20
MAX_LINE_BYTES = 64 << 20
TEXT_ROW_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a file. lines: int64 [N], line (text formats) or row (others), from 1."""

    batch: pa.RecordBatch
    lines: I64

    @property
    def num_bytes(self) -> int:
        """Bytes of these rows, about those that they take in the file."""
        return int(self.batch.nbytes)

    def schema(self) -> pa.Schema:
        """Return the columns with the types that the values of this chunk have."""
        return self.batch.schema

    def fit(self, schema: pa.Schema, asked: Collection[str] = ()) -> tuple[pa.RecordBatch, I64, list[Misfit]]:
        """Give the rows the columns and types of a schema; see `Records.fit`."""
        batch, bad_N, blamed = fit_asked(self.batch, schema, asked)
        batch = fit(batch, schema, is_text=False)
        rows = [(i, self.batch.slice(i, 1).to_pylist()[0]) for i in np.flatnonzero(bad_N).tolist()]
        return batch, self.lines[~bad_N], [Misfit(int(self.lines[i]), blamed, peek(row)) for i, row in rows]


def read_file(file: SourceFile, tally: Tally, broken: Callable[[Broken], None]) -> Iterator[Chunk | Records]:
    """Yield the rows of a file, or of its range, in order; broken ones go to `broken` and the tally.

    Raises: SourceError if the file is damaged, mostly broken, or not of its format; NotPermitted.
    """

    def noted(one: Broken) -> None:
        tally.first = tally.first or f"{one.reason}, in line {one.line} of {file.where}"
        broken(one)

    if file.format == "csv":
        yield from read_delimited(file, tally, noted)
    else:
        reader = {"jsonl": _read_jsonl, "parquet": _read_parquet, "arrow": _read_arrow, "text": _read_text}
        for chunk in reader[file.format](file, tally, noted):
            tally.num_rows += chunk.batch.num_rows
            yield chunk
    # Of a range, whoever reads the others knows; of a text, a row of which may be all, whoever reads all.
    if file.is_whole and file.format != "text":
        check_share(file, tally)


def _read_jsonl(file: SourceFile, tally: Tally, broken: Callable[[Broken], None]) -> Iterator[Chunk]:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    size = 0
    with open_bytes(file) as stream:
        for number, (line, is_whole) in enumerate(lines_of(stream, MAX_LINE_BYTES), file.line):
            if line.isspace():
                tally.num_blank += 1
                continue
            row, reason = _object(line) if is_whole else (None, f"line above {MAX_LINE_BYTES >> 20} MiB")
            if row is None:
                if number == 1 and line.lstrip().startswith(b"["):
                    raise SourceError(
                        f"{file.where} is one JSON array, not an object per line",
                        hint="convert it to JSON lines, as with jq -c '.[]'",
                    )
                tally.num_broken += 1
                reason = reason.replace("UTF-8", encoding_of(stream))
                broken(Broken(file.name, number, reason, peek(line)))
                continue
            if not row:
                tally.num_blank += 1
                continue
            rows.append(row)
            lines.append(number)
            size += len(line)
            if len(rows) == BATCH_ROWS or size >= BATCH_BYTES:
                yield _chunk_of(rows, lines)
                rows, lines, size = [], [], 0
    if rows:
        yield _chunk_of(rows, lines)


def _object(line: bytes) -> tuple[dict[str, Any] | None, str]:
    try:
        value = json.loads(line)
        str(line, "utf-8")  # json guesses other encodings, and lets surrogates pass
        json.dumps(value, ensure_ascii=False).encode() if b"\\u" in line else None
    except UnicodeError:
        return None, "not UTF-8"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    return (value, "") if isinstance(value, dict) else (None, "not a JSON object")


def _chunk_of(rows: list[dict[str, Any]], lines: list[int]) -> Chunk:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [column_of([row.get(name) for row in rows]) for name in names]
    return Chunk(pa.RecordBatch.from_arrays(columns, names=list(names)), np.array(lines, np.int64))


def _read_parquet(file: SourceFile, tally: Tally, broken: Callable[[Broken], None]) -> Iterator[Chunk]:
    with (
        _explain_arrow(file),
        open_seekable(file) as stream,
        # Not all makers write check sums; where they are, a page that was damaged is found.
        pq.ParquetFile(stream, page_checksum_verification=True) as parquet,
    ):
        groups = range(file.start, parquet.num_row_groups if file.end == -1 else file.end)
        yield from _numbered(file, parquet.iter_batches(BATCH_ROWS, row_groups=list(groups)), tally, broken)


def _read_arrow(file: SourceFile, tally: Tally, broken: Callable[[Broken], None]) -> Iterator[Chunk]:
    with _explain_arrow(file), open_seekable(file) as stream:
        try:
            reader = pa.ipc.open_file(stream)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            stream.seek(0)
            reader = pa.ipc.open_stream(stream)
            batches = iter(reader)
        pq.ParquetWriter(pa.BufferOutputStream(), reader.schema).close()  # refuses types it has no form for
        yield from _numbered(file, batches, tally, broken)


def _numbered(
    file: SourceFile, batches: Iterator[pa.RecordBatch], tally: Tally, broken: Callable[[Broken], None]
) -> Iterator[Chunk]:
    """Give plain types and row numbers to batches of another maker, cut to a bounded size.

    Other makers may have written text that is not UTF-8, which Arrow trusts: such rows are broken.
    """
    row = file.line
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            piece = batch.slice(start, BATCH_ROWS)
            lines = np.arange(row, row + piece.num_rows, dtype=np.int64)
            row += piece.num_rows
            if bad := _not_text(piece):
                for index in bad:
                    tally.num_broken += 1
                    broken(Broken(file.name, int(lines[index]), "text that is not UTF-8", ""))
                good = np.isin(np.arange(len(lines)), bad, invert=True)
                piece, lines = piece.filter(pa.array(good)), lines[good]
            schema = pa.schema([(field.name, plain_type(field.type)) for field in piece.schema])
            piece = pa.RecordBatch.from_arrays(piece.cast(schema).columns, names=unique_names(schema.names))
            yield Chunk(piece, lines)


def _not_text(batch: pa.RecordBatch) -> list[int]:
    """Return the rows with text that is not UTF-8, however deep; ArrowInvalid if a column is damaged."""
    bad: set[int] = set()
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise
            bad.update(i for i, value in enumerate(column) if not _is_text(value))
    return sorted(bad)


def _is_text(value: pa.Scalar) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _read_text(file: SourceFile, tally: Tally, broken: Callable[[Broken], None]) -> Iterator[Chunk]:
    with open_bytes(file) as stream:
        encoding = encoding_of(stream)
        piece: list[bytes] = []
        size, first, number = 0, 1, 0
        for number, (line, is_whole) in enumerate(lines_of(stream, MAX_LINE_BYTES), 1):
            if not is_whole:
                tally.num_broken += 1
                broken(Broken(file.name, number, f"line above {MAX_LINE_BYTES >> 20} MiB", peek(line)))
                continue
            piece.append(line)
            size += len(line)
            # At a blank line from 64 KiB on; where there is none, at any line from twice that on.
            if size >= TEXT_ROW_BYTES and (line.isspace() or size >= 2 * TEXT_ROW_BYTES):
                yield from _text_chunk(file, encoding, piece, first, tally, broken)
                piece, size, first = [], 0, number + 1
        if piece:
            yield from _text_chunk(file, encoding, piece, first, tally, broken)


def _text_chunk(
    file: SourceFile,
    encoding: str,
    piece: list[bytes],
    first: int,
    tally: Tally,
    broken: Callable[[Broken], None],
) -> Iterator[Chunk]:
    data = b"".join(piece)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        tally.num_broken += 1
        line = first + data.count(b"\n", 0, error.start)
        broken(Broken(file.name, line, f"not {encoding}", peek(data[max(0, error.start - 20) :])))
        return
    batch = pa.RecordBatch.from_arrays([pa.array([text], pa.string())], names=["text"])
    yield Chunk(batch, np.array([first], np.int64))


@contextmanager
def _explain_arrow(file: SourceFile) -> Iterator[None]:
    with explain_os_errors("read the source", file.where):
        try:
            yield
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # one without an errno is how pyarrow tells of damage
            raise SourceError(
                f"{file.where} is no readable {file.format} file: {error}",
                hint="copy or write the file again; is its name's ending right?",
            ) from error
