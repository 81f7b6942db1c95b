"""CSV read record by record: slow, but it finds its way after a quote that is never closed.

A record goes on over lines while a quote is open. If none closes it before the end of the file, or
the record grows above 4 MiB, its first line alone is broken, and the next line begins a record anew.
So it is with a record of the wrong width over several lines whose quotes are not in order: there a
later row's quote closed it. Lines end as Python's text mode sees it: LF, CR LF or CR alone.
"""

import csv
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import IO

from marrow.data.dialect import Dialect
from marrow.data.sources import lines_of

MAX_RECORD_BYTES = 4 << 20
_LONE_CR = re.compile(rb"(?<=\r)(?!\n|\Z)")

Report = Callable[[int, str, bytes | str], None]  # line, reason, how the record begins


def records_from(
    stream: IO[bytes], first_line: int, dialect: Dialect, report: Report
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, record); a line whose quote never closes is broken, and the next is tried anew."""
    source = itertools.islice(_lines(stream), first_line - 1, None)
    waiting: deque[tuple[bytes, bool]] = deque()  # lines read in vain for a quote that never closed
    number = first_line
    while True:
        if not waiting:
            waiting.extend(itertools.islice(source, 1))
            if not waiting:
                return
        taken, record, reason = _slow_record(waiting, source, dialect)
        if record is None:
            report(number, reason, waiting[0][0])
        else:
            yield number, record
        for _ in range(taken):
            waiting.popleft()
        number += taken


def _lines(stream: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    for line, is_whole in lines_of(stream, MAX_RECORD_BYTES):
        for piece in _LONE_CR.split(line) if b"\r" in line.removesuffix(b"\r\n") else (line,):
            yield piece, is_whole


def _slow_record(
    waiting: deque[tuple[bytes, bool]], source: Iterator[tuple[bytes, bool]], dialect: Dialect
) -> tuple[int, list[str] | None, str]:
    """Parse the record that begins with the first waiting line, reading on as needed.

    Returns: lines taken, the record or None, and why it is broken.
    """
    lines = _Lines(waiting, source)
    try:
        record = _parse(lines, dialect, strict=False)
    except UnicodeDecodeError:
        return 1, None, "not UTF-8"
    except _TooLargeError:
        return 1, None, f"a quote is never closed, or the record is above {MAX_RECORD_BYTES >> 20} MiB"
    if lines.is_over:
        return 1, None, "a quote is never closed"
    if lines.taken > 1 and len(record) != len(dialect.names):
        try:
            _parse(_Lines(waiting, source), dialect, strict=True)
        except csv.Error:
            return 1, None, "a quote is never closed, or only by a later row's"
    return lines.taken, record, ""


class _TooLargeError(Exception):
    """A record goes on above the limit."""


class _Lines:
    """Hands lines to the parser, which asks for one more while a quote is open."""

    def __init__(self, waiting: deque[tuple[bytes, bool]], source: Iterator[tuple[bytes, bool]]) -> None:
        self._waiting = waiting
        self._source = source
        self._size = 0
        self.taken = 0
        self.is_over = False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self.taken == len(self._waiting):
            self._waiting.extend(itertools.islice(self._source, 1))
        if self.taken == len(self._waiting):
            self.is_over = True
            raise StopIteration
        line, is_whole = self._waiting[self.taken]
        self._size += len(line)
        if not is_whole or self._size > MAX_RECORD_BYTES:
            raise _TooLargeError
        self.taken += 1
        return line.decode()


def _parse(lines: _Lines, dialect: Dialect, *, strict: bool) -> list[str]:
    """Parse one record; strict refuses quotes that are not in order."""
    before = csv.field_size_limit(2 * MAX_RECORD_BYTES)
    try:
        return next(dialect.records(lines, strict=strict), [])
    finally:
        csv.field_size_limit(before)
