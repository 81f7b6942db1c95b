"""CSV and TSV: records as columns, with the line on which each begins.

The first record that is not blank is the header. Blank records (no characters, or only empty fields)
are left out and counted. A record is broken if it has another number of fields than the header, is
no UTF-8, never closes a quote, or is larger than 4 MiB; what follows it is read on. The records are
found by `kernels/rows/scan_csv.py`, a block at a time; columns are made when the types are known: those of
numbers and times straight from the bytes, what is not plainly written by `columns.py`.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from marrow.core.errors import SourceError
from marrow.data.sources.columns import Misfit, SchemaGrewError, as_asked, infer_text, parse
from marrow.data.sources.dialect import Dialect, sniff
from marrow.data.sources.file import SourceFile
from marrow.data.sources.streams import Broken, encoding_of, open_bytes, peek
from marrow.kernels.rows.scan_csv import I64, MAX_RECORD_BYTES, Kind, Layout, Scan, scan_csv

BLOCK_BYTES = 1 << 20
_ENDING = re.compile(rb"\r\n|\n|\r")
_KINDS: dict[pa.DataType, Kind] = {
    pa.int64(): "int64",
    pa.float64(): "float64",
    pa.date32(): "date32",
    pa.timestamp("us"): "timestamp",
    pa.bool_(): "bool",
    pa.null(): "null",
}


@dataclass(slots=True)
class Tally:
    """What happened in one file.

    num_misfits: rows that do not fit a type of the recipe; broken as well. first: what is wrong with
    the first broken row, and where.
    """

    num_rows: int = 0
    num_blank: int = 0
    num_broken: int = 0
    num_misfits: int = 0
    first: str = ""

    def add(self, other: "Tally") -> None:
        """Count another one's as well."""
        self.num_rows += other.num_rows
        self.num_blank += other.num_blank
        self.num_broken += other.num_broken
        self.num_misfits += other.num_misfits
        self.first = self.first or other.first


@dataclass(slots=True)
class Records:
    """Some records of a file whose columns are not made yet."""

    scan: Scan
    names: tuple[str, ...]

    @property
    def lines(self) -> I64:
        """The line of each record, from 1: int64 [N]."""
        return self.scan.lines_N

    @property
    def batch(self) -> pa.RecordBatch:
        """All columns, as text."""
        return pa.RecordBatch.from_arrays(
            [self._text(i) for i in range(len(self.names))], names=list(self.names)
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the file that these records take."""
        return self.scan.consumed

    def schema(self) -> pa.Schema:
        """Return the columns with the types that these values have."""
        return pa.schema([(name, infer_text(self._text(i))) for i, name in enumerate(self.names)])

    def fit(self, schema: pa.Schema, asked: Collection[str] = ()) -> tuple[pa.RecordBatch, I64, list[Misfit]]:
        """Give the records the columns and types of a schema.

        Args: asked: columns whose type the recipe gives: records that do not fit it are left out.
        Returns: the columns, the line of each row, and what was left out.
        Raises: SchemaGrewError if a value has no place in another column.
        """
        if set(self.names) - set(schema.names):
            raise SchemaGrewError
        misfits: list[Misfit] = []
        made: dict[str, pa.Array] = {}
        for name in asked:
            if name in self.names:
                made[name], bad_N = self._asked(self.names.index(name), schema.field(name).type)
                if bad_N.any():
                    rows = np.flatnonzero(bad_N)
                    misfits += [
                        Misfit(int(self.lines[i]), name, peek(self._record(i))) for i in rows.tolist()
                    ]
                    self.scan.keep(~bad_N)
                    made = {n: column.filter(pa.array(~bad_N)) for n, column in made.items()}
        columns = []
        for field in schema:
            if field.name in made:
                columns.append(made[field.name])
            elif field.name not in self.names:
                columns.append(pa.nulls(len(self.scan), field.type))
            else:
                try:
                    columns.append(self._typed(self.names.index(field.name), field.type))
                except SchemaGrewError:
                    raise SchemaGrewError(field.name) from None
        misfits.sort(key=lambda misfit: misfit.line)
        return pa.RecordBatch.from_arrays(columns, schema=schema), self.lines, misfits

    def _typed(self, column: int, kind: pa.DataType) -> pa.Array:
        """Make a column of an inferred type; a value that is none of it raises SchemaGrewError."""
        if pa.types.is_string(kind):
            return self._text(column)
        found = self._values(column, kind)
        if found is None:
            return parse(self._text(column), kind)
        values, doubtful = found
        if not doubtful.any():
            return values
        mask = pa.array(doubtful)
        return _replaced(values, doubtful, parse(self._text(column).filter(mask), kind))

    def _asked(self, column: int, kind: pa.DataType) -> tuple[pa.Array, NDArray[np.bool_]]:
        """Make a column of a type that was asked for, null where it does not fit; and where that is."""
        found = self._values(column, kind)
        if found is None:
            return as_asked(self._text(column), kind)
        values, doubtful = found
        if not doubtful.any():
            return values, doubtful
        parsed, bad = as_asked(self._text(column).filter(pa.array(doubtful)), kind)
        bad_N = np.zeros(len(values), bool)
        bad_N[np.flatnonzero(doubtful)] = bad
        return _replaced(values, doubtful, parsed), bad_N

    def _values(self, column: int, kind: pa.DataType) -> tuple[pa.Array, NDArray[np.bool_]] | None:
        """Read what is plainly written; and where the rest is."""
        if kind not in _KINDS:
            return None
        found = self.scan.values(column, _KINDS[kind])
        if found is None:
            return None
        values, valid, num_nulls, unsure = found
        if pa.types.is_null(kind):
            return pa.nulls(len(self.scan)), unsure.view(bool)
        num_nulls += int(unsure.sum())
        buffers = [pa.py_buffer(valid) if num_nulls else None, pa.py_buffer(values)]
        return pa.Array.from_buffers(kind, len(self.scan), buffers, num_nulls), unsure.view(bool)

    def _text(self, column: int) -> pa.Array:
        offsets, text = self.scan.text(column)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text)]
        return pa.Array.from_buffers(pa.string(), len(self.scan), buffers, 0)

    def _record(self, row: int) -> bytes:
        start = int(self.scan.starts_NW[row, 0])
        end = int(self.scan.starts_NW[row, -1] + self.scan.lengths_NW[row, -1])
        return self.scan.data[start:end].tobytes()


def _replaced(values: pa.Array, where: NDArray[np.bool_], others: pa.Array) -> pa.Array:
    if pa.types.is_null(values.type):
        return values
    return pc.replace_with_mask(values, pa.array(where), others)


def read_delimited(file: SourceFile, tally: Tally, broken: Callable[[Broken], None]) -> Iterator[Records]:
    """Yield the records of a file, or of its range.

    Args: tally, broken: receive counts and the records that are broken.
    Raises: SourceError if a quote in the header is never closed, or a packed file is damaged.
    """
    dialect = sniff_file(file)
    if dialect is None:  # nothing but white space: no rows, and no header to miss
        return
    layout = Layout(dialect.delimiter, dialect.escape, len(dialect.names))
    line, needs_header, is_skipping = file.line, file.start == 0, False
    rest = b""
    with open_bytes(file) as stream:
        is_last = False
        while not is_last:
            # Twice as much where a record, or a quote that is open, goes beyond the block.
            block = stream.read(max(BLOCK_BYTES, len(rest)))
            is_last = not block
            data = rest + block
            if is_skipping:
                data, is_skipping = _behind_line(data, is_last)
                if is_skipping:
                    rest = data
                    continue
            start = 0
            while start < len(data):
                view = np.frombuffer(data, np.uint8)[start:]
                scan = scan_csv(
                    view,
                    layout,
                    is_last=is_last,
                    line=line,
                    needs_header=needs_header,
                    max_record=MAX_RECORD_BYTES,
                )
                line, needs_header = scan.line, scan.needs_header
                start += scan.consumed
                is_skipping = scan.is_long_line
                tally.num_rows += len(scan)
                tally.num_blank += scan.num_blank
                tally.num_broken += len(scan.broken)
                for one in scan.broken:
                    text = view[one.start : min(one.end, one.start + 4096)].tobytes()
                    reason = one.reason.replace("UTF-8", encoding_of(stream))
                    broken(Broken(file.name, one.line, reason, peek(text)))
                if len(scan):
                    yield Records(scan, dialect.names)
                if not scan.consumed or is_skipping:
                    break
            rest = data[start:]


def check_share(file: SourceFile, tally: Tally) -> None:
    """Refuse a file with more broken rows than whole ones, types aside. Raises: SourceError."""
    if tally.num_broken - tally.num_misfits <= tally.num_rows + tally.num_misfits:
        return
    how, hint = "", f"is it really {file.format}? set data.format otherwise"
    if file.format == "csv" and (dialect := sniff_file(file)) is not None:
        how = f" (read with delimiter {dialect.delimiter!r}, {len(dialect.names)} columns)"
        hint = "check the delimiter and the quotes; the first line is the header"
    raise too_many_broken(f"{file.where}: {_share(tally)}{how}", tally, hint)


def check_texts(tally: Tally) -> None:
    """Refuse plain texts of which more are broken than whole, all files together. Raises: SourceError."""
    if tally.num_broken > tally.num_rows:
        raise too_many_broken(f"of the texts {_share(tally)}", tally, "set data.format if they are no texts")


def too_many_broken(what: str, tally: Tally, hint: str) -> SourceError:
    """Return the error, with the first broken row and what would mend it."""
    if tally.first.startswith("not UTF"):
        hint = 'set data.encoding to the one that was used, such as "latin-1" or "cp1252"'
    return SourceError(f"{what}; the first: {tally.first}" if tally.first else what, hint=hint)


def _share(tally: Tally) -> str:
    return f"{tally.num_broken} of {tally.num_broken + tally.num_rows} rows are broken"


def sniff_file(file: SourceFile) -> Dialect | None:
    """Find out how a file is written, from its beginning; None if it is blank."""
    with open_bytes(replace(file, start=0, end=-1)) as stream:
        return sniff(file, stream)


def _behind_line(data: bytes, is_last: bool) -> tuple[bytes, bool]:
    """Leave out the rest of a line; and tell whether it goes on."""
    ending = _ENDING.search(data)
    if ending is None or (ending[0] == b"\r" and ending.end() == len(data) and not is_last):
        return b"\r" * (ending is not None), True
    return data[ending.end() :], False
