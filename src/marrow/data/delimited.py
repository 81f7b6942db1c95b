"""CSV and TSV: records as columns of text, with the line on which each begins.

The fast path is pyarrow's streaming reader over bytes columns; it hands over rows with a wrong
number of columns, and the newlines inside quotes are counted to know every record's line. It cannot
go on after a quote that is opened and never closed, or a record larger than a block: there the slow
path (data/resync.py) takes over at that record's line.

The first record that is not blank is the header. Blank records (no characters, or only empty
fields) are left out and counted. A record is broken if it has another number of fields than the
header, is no UTF-8, never closes a quote, or is larger than 4 MiB. Values stay text here.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from marrow.core.errors import SourceError
from marrow.data.dialect import Dialect, sniff
from marrow.data.resync import Report, records_from
from marrow.data.sources import BLOCK_BYTES, Broken, SourceFile, open_bytes, peek

SLOW_ROWS = 1024
_TAIL_BYTES = 64

I64 = NDArray[np.int64]


@dataclass(slots=True)
class Tally:
    """What happened in one file."""

    num_rows: int = 0
    num_blank: int = 0
    num_broken: int = 0


def read_delimited(
    file: SourceFile, tally: Tally, broken: Callable[[Broken], None]
) -> Iterator[tuple[pa.RecordBatch, I64]]:
    """Yield batches of string columns with the line of each row.

    Args: tally, broken: receive counts and the rows that are broken.
    Raises: SourceError if the file has more broken rows than whole ones.
    """
    with open_bytes(file) as stream:
        dialect = sniff(file, stream)
    if dialect is None:  # nothing but white space: no rows, and no header to miss
        return

    def report(line: int, reason: str, text: bytes | str) -> None:
        tally.num_broken += 1
        broken(Broken(file.name, line, reason, peek(text)))

    fast = _FastReader(file, dialect, tally, report)
    for batch, lines_N in itertools.chain(fast.read(), _slow_rest(fast, tally, report)):
        tally.num_rows += batch.num_rows
        yield batch, lines_N
    if tally.num_broken > tally.num_rows:
        raise SourceError(
            f"{file.path}: {tally.num_broken} of {tally.num_broken + tally.num_rows} rows are broken "
            f"(read with delimiter {dialect.delimiter!r}, {len(dialect.names)} columns)",
            hint="check the delimiter, the quotes and the encoding (UTF-8); the first line is the header",
        )


@dataclass(slots=True)
class _FastReader:
    """Reads as far as pyarrow can; `resume_line` then says where the slow path goes on, None if nowhere."""

    file: SourceFile
    dialect: Dialect
    tally: Tally
    report: Report
    resume_line: int | None = None
    _line: int = 1
    _number: int = 1  # of the next record, as pyarrow counts
    _needs_header: bool = True
    _tail: bytes = b""  # of the file, once it is read
    _invalid: list[tuple[int, str]] = field(default_factory=list)

    def read(self) -> Iterator[tuple[pa.RecordBatch, I64]]:
        """Yield what the fast path can read."""
        with open_bytes(self.file) as raw:
            stream = _Tail(raw)
            held: pa.RecordBatch | None = None
            try:
                for batch in self._open(stream):
                    if held is not None:
                        yield from self._take(held, is_last=False)
                    held = batch
                    if self.resume_line is not None:
                        return
            except pa.ArrowInvalid:  # a record larger than a block, or a quote that is never closed
                if held is not None:
                    yield from self._take(held, is_last=False)
                self.resume_line = self.resume_line or self._line
                return
            self._tail = stream.last
            if held is not None and self.resume_line is None:
                yield from self._take(held, is_last=True)
            if self.resume_line is None:
                self._skip_invalid(None)

    @property
    def needs_header(self) -> bool:
        """Whether the header is still to come where the slow path goes on."""
        return self._needs_header

    def _open(self, stream: "_Tail") -> pacsv.CSVStreamingReader:
        names = list(self.dialect.names)

        def invalid(row: pacsv.InvalidRow) -> str:
            self._invalid.append((row.number, row.text))
            return "skip"

        return pacsv.open_csv(
            pa.PythonFile(stream, mode="r"),
            pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=names),
            pacsv.ParseOptions(
                delimiter=self.dialect.delimiter,
                escape_char=self.dialect.escape or False,
                double_quote=self.dialect.escape is None,
                newlines_in_values=True,
                ignore_empty_lines=False,
                invalid_row_handler=invalid,
            ),
            pacsv.ConvertOptions(check_utf8=False, column_types=dict.fromkeys(names, pa.binary())),
        )

    def _take(self, batch: pa.RecordBatch, *, is_last: bool) -> Iterator[tuple[pa.RecordBatch, I64]]:
        """Find the lines of a batch's records, drop header and blanks, check the text of the rest."""
        newlines_N = _newlines(batch)
        if is_last and batch.num_rows and newlines_N[-1] and not self._closes(batch):
            # The last field runs over several lines to the end of the file: the slow path decides
            # whether its quote was ever closed.
            batch, newlines_N = batch.slice(0, batch.num_rows - 1), newlines_N[:-1]
            self.resume_line = -1
        lines_N = np.empty(batch.num_rows, np.int64)
        start = 0
        while True:
            before = self._invalid[0][0] - self._number if self._invalid else batch.num_rows
            end = min(start + before, batch.num_rows)
            ends_N = self._line + np.cumsum(1 + newlines_N[start:end])
            lines_N[start:end] = ends_N - 1 - newlines_N[start:end]
            self._line = int(ends_N[-1]) if end > start else self._line
            self._number += end - start
            start = end
            if start == batch.num_rows:
                break
            if not self._skip_invalid(1):
                batch, lines_N = batch.slice(0, start), lines_N[:start]
                break
        if self.resume_line == -1:
            self.resume_line = self._line
            self._invalid.clear()  # the slow path reads them again
        yield from self._checked(batch, lines_N)

    def _closes(self, batch: pa.RecordBatch) -> bool:
        """Tell whether the last value surely is over: as it is, or in quotes, it ends the file."""
        text = self._tail.rstrip(b"\r\n")
        plain = batch.column(batch.num_columns - 1)[-1].as_py()
        if b'"' not in plain and text.endswith(self.dialect.delimiter.encode() + plain):
            return True
        value = b'"' + plain.replace(b'"', b'""') + b'"'
        num_quotes = len(text) - len(text.rstrip(b'"'))
        return text.endswith(value[-_TAIL_BYTES // 2 :]) and (num_quotes % 2 == 1 or text.endswith(value))

    def _skip_invalid(self, count: int | None) -> bool:
        """Report rows of the wrong width; stop, and say False, at one over several lines.

        Such a row may be an unclosed quote that swallowed good rows: the slow path takes it apart.
        """
        while self._invalid and count != 0:
            _, text = self._invalid[0]
            if {"\n", "\r"} & set(text.removesuffix("\r")):
                self.resume_line = self._line
                return False
            self._invalid.pop(0)
            if any(next(self.dialect.records([text]), [])) or text.count('"') % 2:
                self.report(self._line, f"not {len(self.dialect.names)} fields", text)
            else:
                self.tally.num_blank += 1
            self._line += 1
            self._number += 1
            count = None if count is None else count - 1
        return True

    def _checked(self, batch: pa.RecordBatch, lines_N: I64) -> Iterator[tuple[pa.RecordBatch, I64]]:
        filled_N = np.ones(batch.num_rows, bool)
        if batch.num_rows and pc.any(pc.equal(pc.binary_length(batch.column(0)), 0)).as_py():
            lengths = [pc.binary_length(column).to_numpy(zero_copy_only=False) for column in batch.columns]
            filled_N = np.sum(lengths, axis=0) > 0
            self.tally.num_blank += int((~filled_N).sum())
        if self._needs_header and filled_N.any():
            filled_N[int(np.argmax(filled_N))] = False
            self._needs_header = False
        for index in _not_utf8(batch.columns):
            if filled_N[index]:
                filled_N[index] = False
                text = self.dialect.delimiter.encode().join(column[index].as_py() for column in batch.columns)
                self.report(int(lines_N[index]), "not UTF-8", text)
        if not filled_N.all():
            batch, lines_N = batch.filter(pa.array(filled_N)), lines_N[filled_N]
        if batch.num_rows:
            columns = [column.cast(pa.string()) for column in batch.columns]
            yield pa.RecordBatch.from_arrays(columns, names=list(self.dialect.names)), lines_N


class _Tail:
    """Passes a stream's bytes on and remembers the last ones.

    No block but the last ends with CR: pyarrow drops a LF that begins the next one, in quotes as well.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._held = b""
        self.last = b""
        self.closed = False

    def read(self, size: int) -> bytes:
        """Read as the stream does."""
        block = self._held + self._stream.read(size - len(self._held))
        self._held = b""
        if len(block) > 1 and block.endswith(b"\r"):
            block, self._held = block[:-1], b"\r"
        if block:
            self.last = (self.last + block[-_TAIL_BYTES:])[-_TAIL_BYTES:]
        return block


def _newlines(batch: pa.RecordBatch) -> I64:
    """Count the newlines inside each record: LF, CR LF, or CR alone, as both parsers end lines.

    PERF: 0.5 ns a byte; pyarrow's count_substring takes 2, as much as parsing.
    """
    total_N = np.zeros(batch.num_rows, np.int64)
    for column in batch.columns:
        offsets_N1 = np.frombuffer(column.buffers()[1], np.int32)[column.offset :][: len(column) + 1]
        data = column.buffers()[2]
        if data is not None and batch.num_rows:
            used = np.frombuffer(data, np.uint8)[offsets_N1[0] : offsets_N1[-1]]
            ends = used == ord("\n")
            if (returns := used == ord("\r")).any():
                returns[:-1] &= ~ends[1:]
                ends |= returns
            places = np.flatnonzero(ends)
            if len(places):
                total_N += np.diff(np.searchsorted(places, offsets_N1 - offsets_N1[0]))
    return total_N


def _not_utf8(columns: Sequence[pa.Array]) -> list[int]:
    """Return the rows in which a value of some binary columns is no UTF-8."""
    bad: set[int] = set()
    for column in columns:
        try:
            column.cast(pa.string())
        except pa.ArrowInvalid:
            bad.update(
                i for i, value in enumerate(column.to_pylist()) if value is not None and not _is_utf8(value)
            )
    return sorted(bad)


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _slow_rest(fast: _FastReader, tally: Tally, report: Report) -> Iterator[tuple[pa.RecordBatch, I64]]:
    """Read on from where the fast path could not."""
    if fast.resume_line is None:
        return
    names = list(fast.dialect.names)
    rows: list[list[str]] = []
    lines: list[int] = []

    def batch() -> tuple[pa.RecordBatch, I64]:
        columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
        return pa.RecordBatch.from_arrays(columns, names=names), np.array(lines, np.int64)

    needs_header = fast.needs_header
    with open_bytes(fast.file) as stream:
        for line, record in records_from(stream, fast.resume_line, fast.dialect, report):
            if not any(record):
                tally.num_blank += 1
            elif needs_header:
                needs_header = False
            elif len(record) != len(names):
                report(line, f"not {len(names)} fields", fast.dialect.delimiter.join(record))
            else:
                rows.append(record)
                lines.append(line)
                if len(rows) == SLOW_ROWS:
                    yield batch()
                    rows, lines = [], []
    if rows:
        yield batch()
