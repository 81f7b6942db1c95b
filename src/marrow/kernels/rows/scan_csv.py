"""CSV: the records of a block of bytes, found at memory speed, and their columns as Arrow's buffers.

    scan = scan_csv(data, is_last, Layout(delimiter=",", escape=None, width=8), line=1)
    offsets, text = scan.text(0)
    values, valid, num_nulls, unsure = scan.values(3, "float64")

A scan knows where each field lies; a column is made only when it is asked for, in its type. Records
are those of Python's `csv` module, but for quotes that never close: such a line is broken alone, and
the next one begins a record anew. So is a line whose quote only a later record closes: there is text
behind the closing quote then, and the number of fields is wrong, or the text is no UTF-8. A record
ends with LF, CR LF or CR alone.

The C version is `csrc/scan_csv.c`. `scan_csv_reference` finds the same with regular expressions, at
about a hundredth of the speed; it is the oracle, and serves where there is no compiler. Types are
read by C alone: `values` is None without it, and the caller parses `text`.
"""

import ctypes
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from marrow.kernels import native

Kind = Literal["int64", "float64", "date32", "timestamp", "bool", "null"]
REASONS = (
    "not {width} fields",
    "a quote is never closed",
    "a quote is never closed, or the record is above {megabytes} MiB",
    "a quote is never closed, or only by a later row's",
    "not UTF-8",
)
MAX_RECORD_BYTES = 4 << 20
MAX_FIELDS = 1 << 19  # of one scan
MAX_BROKEN = 1 << 12  # of one scan
_PLAIN, _DOUBLED, _RAW = 0, 1, 2
_WIDTH, _UNCLOSED, _UNCLOSED_OR_LARGE, _CLOSED_LATE, _NOT_UTF8 = range(5)
_DTYPES = {"int64": np.int64, "float64": np.float64, "date32": np.int32, "timestamp": np.int64}

I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Layout:
    """How records are written. escape: None where quotes are doubled; width: fields of a record."""

    delimiter: str
    escape: str | None
    width: int


@dataclass(frozen=True, slots=True)
class BrokenRecord:
    """A record that is none: where its text lies in the block, its line, and why."""

    start: int
    end: int
    line: int
    reason: str


@dataclass(slots=True)
class Scan:
    """The records found in a block.

    data: the block. starts_NW, lengths_NW, kinds_NW: where each field lies and how it is written.
    lines_N: the line of each record. consumed: bytes of the block that are done with. line: that of
    the next record. is_long_line: the last broken line goes on beyond the block.
    """

    layout: Layout
    data: U8
    starts_NW: I32
    lengths_NW: I32
    kinds_NW: U8
    lines_N: I64
    broken: list[BrokenRecord]
    num_blank: int
    consumed: int
    line: int
    needs_header: bool
    is_long_line: bool

    def __len__(self) -> int:
        return len(self.lines_N)

    def keep(self, good_N: NDArray[np.bool_]) -> None:
        """Leave out the records that are not good."""
        self.starts_NW, self.lengths_NW = self.starts_NW[good_N], self.lengths_NW[good_N]
        self.kinds_NW, self.lines_N = self.kinds_NW[good_N], self.lines_N[good_N]

    def text(self, column: int) -> tuple[I32, U8]:
        """Return a column's values one behind the other: offsets int32 [N + 1], and the bytes."""
        library = _library()
        if library is None:
            return _text_reference(self, column)
        offsets = np.empty(len(self) + 1, np.int32)
        out = np.empty(int(self.lengths_NW[:, column].sum(dtype=np.int64)), np.uint8)
        escape = -1 if self.layout.escape is None else ord(self.layout.escape)
        used = library.to_text(*self._fields(column), escape, _at(offsets), _at(out))
        return offsets, out[:used]

    def values(self, column: int, kind: Kind) -> tuple[NDArray[Any], U8, int, U8] | None:
        """Return a column's values, the bits of those that are not null, their number and doubts.

        Returns: values [N] (bits for bool, none for null), valid bits, number of nulls, and a byte
            for each row, 1 where the field is not plainly of this type. None without the C version.
        """
        library = _library()
        if library is None:
            return None
        num_bits = (len(self) + 7) // 8
        values = (
            np.empty(len(self), _DTYPES[kind])
            if kind in _DTYPES
            else np.zeros(num_bits * (kind == "bool"), np.uint8)
        )
        valid, unsure = np.zeros(num_bits, np.uint8), np.zeros(len(self), np.uint8)
        num_nulls = ctypes.c_int64()
        convert = getattr(library, "to_timestamp_us" if kind == "timestamp" else f"to_{kind}")
        convert(*self._fields(column), _at(values), _at(valid), _at(unsure), ctypes.byref(num_nulls))
        return values, valid, num_nulls.value, unsure

    def _fields(self, column: int) -> tuple[int, ...]:
        arrays = (self.data, self.starts_NW, self.lengths_NW, self.kinds_NW)
        return (*[_at(array) for array in arrays], len(self), self.layout.width, column)


def scan_csv(
    data: U8,
    layout: Layout,
    *,
    is_last: bool,
    line: int = 1,
    needs_header: bool = False,
    max_record: int = MAX_RECORD_BYTES,
) -> Scan:
    """Find the records of a block that begins with one.

    Args: data: uint8 [N], below 2 GiB. is_last: the file ends with it; otherwise a record that is
        not over is left for the next block. line: of the first record. needs_header: leave out the
        first record that is not blank. max_record: bytes above which a record is broken.
    Returns: the records; at most about half a million fields and 4096 broken lines, so that
        `consumed` may be less than could be.
    Cost: about a nanosecond a byte; no copy.
    """
    library = _library()
    if library is None:
        return scan_csv_reference(data, layout, is_last, line, needs_header, max_record)
    # A record has a byte for each field, its line end included, but for the last one of a file.
    max_rows = max(1, min(MAX_FIELDS, len(data) + 1) // layout.width)
    starts, lengths = (np.empty((max_rows, layout.width), np.int32) for _ in range(2))
    kinds, lines = np.empty((max_rows, layout.width), np.uint8), np.empty(max_rows, np.int64)
    broken, state = np.empty((MAX_BROKEN, 4), np.int64), np.zeros(7, np.int64)
    state[1], state[5] = line, needs_header
    library.scan_csv(
        _at(data),
        len(data),
        is_last,
        ord(layout.delimiter),
        -1 if layout.escape is None else ord(layout.escape),
        layout.width,
        max_record,
        max_rows,
        MAX_BROKEN,
        *[_at(array) for array in (starts, lengths, kinds, lines, broken, state)],
    )
    consumed, line, rows, num_blank, num_broken, header, is_long = state.tolist()
    found = [
        BrokenRecord(start, end, at, _reason(why, layout, max_record))
        for start, end, at, why in broken[:num_broken].tolist()
    ]
    return Scan(
        layout, data, starts[:rows], lengths[:rows], kinds[:rows], lines[:rows], found, num_blank, consumed,
        line, bool(header), bool(is_long),
    )  # fmt: skip


def scan_csv_reference(
    data: U8, layout: Layout, is_last: bool, line: int, needs_header: bool, max_record: int
) -> Scan:
    """Find what `scan_csv` finds, with regular expressions."""
    block, size = data.tobytes(), len(data)
    fields: list[list[tuple[int, int, int]]] = []
    lines: list[int] = []
    broken: list[BrokenRecord] = []
    num_blank = position = 0
    is_long_line = False
    max_rows = max(1, min(MAX_FIELDS, size + 1) // layout.width)

    def report(end: int, reason: int) -> None:
        broken.append(BrokenRecord(position, end, line, _reason(reason, layout, max_record)))

    while position < size and len(fields) < max_rows and len(broken) < MAX_BROKEN:
        record = _record(block, position, layout, is_last)
        reason = None
        if (size if record.end < 0 else record.end) - position > max_record:
            reason = _UNCLOSED_OR_LARGE
        elif record.is_open and is_last:
            reason = _UNCLOSED
        elif record.end < 0:
            break
        elif (
            record.newlines
            and not record.is_strict
            and (len(record.fields) != layout.width or not _is_utf8(block[position : record.content]))
        ):
            reason = _CLOSED_LATE
        if reason is not None:
            ending = _ENDING.search(block, position)
            if ending is None or (ending[0] == b"\r" and ending.end() == size and not is_last):
                is_long_line = not is_last
                report(size, reason)
                line, position = line + 1, size
                break
            report(ending.end(), reason)
            line, position = line + 1, ending.end()
            continue
        if record.is_blank:
            num_blank += 1
        elif needs_header:
            needs_header = False
        elif len(record.fields) != layout.width:
            report(record.content, _WIDTH)
        elif not _is_utf8(block[position : record.content]):
            report(record.content, _NOT_UTF8)
        else:
            fields.append(record.fields)
            lines.append(line)
        line += 1 + record.newlines
        position = record.end
    found = np.array(fields, np.int32).reshape(-1, layout.width, 3)
    return Scan(
        layout, data, found[:, :, 0].copy(), found[:, :, 1].copy(), found[:, :, 2].astype(np.uint8),
        np.array(lines, np.int64), broken, num_blank, position, line, needs_header, is_long_line,
    )  # fmt: skip


def cut_csv(data: U8, delimiter: str, target: int, max_record: int = MAX_RECORD_BYTES) -> tuple[int, int]:
    """Find the end of a record at or after byte `target` of data that begins with a record.

    Returns: that byte, at least `target`, and the number of line ends before it; (-1, 0) if none is
        found within `max_record` bytes. Broken quotes are judged by themselves, so that what comes
        before the cut never depends on what comes after it.
    Cost: a search for quotes and a count of line ends, both at memory speed.
    """
    library = _library()
    if library is None:
        return cut_csv_reference(data, delimiter, target, max_record)
    result = np.zeros(2, np.int64)
    library.cut_csv(_at(data), len(data), ord(delimiter), target, max_record, _at(result))
    return int(result[0]), int(result[1]) if result[0] >= 0 else 0


def cut_csv_reference(data: U8, delimiter: str, target: int, max_record: int) -> tuple[int, int]:
    """Find what `cut_csv` finds, with regular expressions."""
    block, position = data.tobytes(), 0
    opening = re.compile(rb'(?:\A|(?<=[\r\n%s]))"' % re.escape(delimiter.encode()))
    while True:
        found = opening.search(block, position)
        quote = len(block) if found is None else found.start()
        ending = _ENDING.search(block, max(position, target - 1, 0))
        if ending is not None and ending.start() < quote:
            if ending.start() - target > max_record or (ending[0] == b"\r" and ending.end() == len(block)):
                return -1, 0
            return ending.end(), len(_ENDING.findall(block, 0, ending.end()))
        if found is None or quote - target > max_record:
            return -1, 0
        closing = _CLOSING.match(block, quote)
        if closing is None and len(block) - quote <= max_record:
            return -1, 0  # it may be closed further on
        position = -1 if closing is None else closing.end()
        if closing is None or position - 1 - quote > max_record:
            skipped = _ENDING.search(block, quote)
            if skipped is None or (skipped[0] == b"\r" and skipped.end() == len(block)):
                return -1, 0
            position = skipped.end()


_ENDING = re.compile(rb"\r\n|\n|\r")
_CLOSING = re.compile(rb'"(?:[^"]++|"")*+"')


@dataclass(slots=True)
class _Record:
    """A record of the reference; end: -1 if it is not over."""

    fields: list[tuple[int, int, int]]
    end: int = -1
    content: int = -1
    newlines: int = 0
    is_open: bool = False
    is_strict: bool = True
    is_blank: bool = True


@cache
def _patterns(delimiter: str, escape: str | None) -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """Return what a field in quotes looks like, and one without."""
    stop = rb"\r\n" + re.escape(delimiter.encode())
    if escape is None:
        return re.compile(rb'"((?:[^"]++|"")*+)"([^%s]*+)' % stop), re.compile(rb"[^%s]*+" % stop)
    mark = re.escape(escape.encode())
    rest = rb"(?:[^%s%s]++|%s[\s\S])*+" % (mark, stop, mark)
    return re.compile(rb'"((?:[^"%s]++|%s[\s\S])*+)"(%s)' % (mark, mark, rest)), re.compile(rest)


def _record(block: bytes, position: int, layout: Layout, is_last: bool) -> _Record:
    """Read one record."""
    quoted, plain = _patterns(layout.delimiter, layout.escape)
    record, size, first = _Record([]), len(block), position
    while True:
        kind, start = _PLAIN, position
        if block[position : position + 1] == b'"':
            field = quoted.match(block, position)
            if field is None:
                record.is_open = True
                return record
            start, end = field.span(1)
            if layout.escape is None and not field[2]:
                kind = _DOUBLED if b'"' in field[1] else _PLAIN
                if field.end() == size and not is_last:
                    return record  # the quote may be the first of two
            else:
                kind, (start, end) = _RAW, field.span()
                record.is_strict = layout.escape is not None
            value = field[1] + field[2]
        else:
            field = plain.match(block, position)
            assert field is not None  # it matches nothing as well
            start, end = field.span()
            value = field[0]
            if layout.escape is not None and layout.escape.encode() in value:
                kind = _RAW
        position = field.end()
        if layout.escape is not None and block[position : position + 1] == layout.escape.encode():
            record.is_open = True  # an escape at the very end
            return record
        record.fields.append((start, end - start, kind))
        record.is_blank = record.is_blank and not value
        if position == size:
            if is_last:
                record.content = record.end = size
                break
            return record
        if block[position : position + 1] == layout.delimiter.encode():
            position += 1
            continue
        ending = _ENDING.match(block, position)
        assert ending is not None  # fields stop nowhere else
        if ending[0] == b"\r" and ending.end() == size and not is_last:
            return record
        record.content, record.end = ending.span()
        break
    text = block[first : record.content]
    record.newlines = len(_ENDING.findall(text))
    if text.endswith(b"\r") and block[record.content : record.end] == b"\n":
        record.newlines -= 1  # an escaped CR, whose LF ends the record
    return record


def _text_reference(scan: Scan, column: int) -> tuple[I32, U8]:
    block, escape = scan.data, scan.layout.escape
    values: list[bytes] = []
    fields_N3 = np.stack([scan.starts_NW[:, column], scan.lengths_NW[:, column], scan.kinds_NW[:, column]], 1)
    for start, length, kind in fields_N3.tolist():
        value = block[start : start + length].tobytes()
        if kind == _DOUBLED:
            value = value.replace(b'""', b'"')
        elif kind == _RAW:
            value = _unescaped(value, scan.layout.delimiter, escape)
        values.append(value)
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    return offsets, np.frombuffer(b"".join(values), np.uint8)


def _unescaped(value: bytes, delimiter: str, escape: str | None) -> bytes:
    field = _patterns(delimiter, escape)[0].match(value)
    inside, rest = (field[1], field[2]) if field is not None else (b"", value)
    if escape is None:
        return inside.replace(b'""', b'"') + rest
    return re.sub(re.escape(escape.encode()) + rb"([\s\S])", rb"\1", inside + rest)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _reason(number: int, layout: Layout, max_record: int) -> str:
    return REASONS[number].format(width=layout.width, megabytes=max_record >> 20)


def _at(array: NDArray[Any]) -> int:
    return array.ctypes.data


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load("scan_csv")
    if library is not None:
        address, integer, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        fields = [address] * 4 + [integer] * 3
        library.scan_csv.argtypes = [address, integer, small, small, small, *[integer] * 4, *[address] * 6]
        library.scan_csv.restype = None
        library.cut_csv.argtypes = [address, integer, small, integer, integer, address]
        library.cut_csv.restype = None
        library.to_text.argtypes = [*fields, small, address, address]
        library.to_text.restype = integer
        for name in ("int64", "float64", "date32", "timestamp_us", "bool", "null"):
            convert = getattr(library, f"to_{name}")
            convert.argtypes = [*fields, *[address] * 4]
            convert.restype = integer
    return library
