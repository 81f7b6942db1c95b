"""CSV read record by record: slow, but it finds its way after a quote that is never closed.

A record goes on over lines while a quote is open. If none closes it before the end of the file, or
the record grows above 4 MiB, its first line alone is broken, and the next line begins a record anew.
"""

import csv
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import IO

from marrow.data.dialect import Dialect
from marrow.data.sources import lines_of

MAX_RECORD_BYTES = 4 << 20

Report = Callable[[int, str, bytes | str], None]  # line, reason, how the record begins


def records_from(
    stream: IO[bytes], first_line: int, dialect: Dialect, report: Report
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, record); a line whose quote never closes is broken, and the next is tried anew."""
    source = itertools.islice(lines_of(stream, MAX_RECORD_BYTES), first_line - 1, None)
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


def _slow_record(
    waiting: deque[tuple[bytes, bool]], source: Iterator[tuple[bytes, bool]], dialect: Dialect
) -> tuple[int, list[str] | None, str]:
    """Parse the record that begins with the first waiting line, reading on as needed.

    Returns: lines taken, the record or None, and why it is broken.
    """
    pieces: list[bytes] = []
    size = num_quotes = taken = 0
    while True:
        if taken == len(waiting):
            following = next(source, None)
            if following is None:
                return 1, None, "a quote is never closed"
            waiting.append(following)
        line, is_whole = waiting[taken]
        pieces.append(line)
        size += len(line)
        num_quotes += line.count(b'"')
        taken += 1
        if not is_whole or size > MAX_RECORD_BYTES:
            return 1, None, f"a quote is never closed, or the record is above {MAX_RECORD_BYTES >> 20} MiB"
        if taken > 1 and dialect.escape is None and num_quotes % 2:
            continue  # PERF: only whole records have an even number; spares a parse per line
        try:
            record = _parse(b"".join(pieces).decode(), dialect)
        except UnicodeDecodeError:
            return 1, None, "not UTF-8"
        if record is not None:
            return taken, record, ""


def _parse(text: str, dialect: Dialect) -> list[str] | None:
    """Parse one record; None if it goes on in the next line."""
    before = csv.field_size_limit(2 * MAX_RECORD_BYTES)
    try:
        try:
            return next(dialect.records(text, strict=True), [])
        except csv.Error as error:
            if "unexpected end" in str(error):
                return None
        return next(dialect.records(text), [])
    except csv.Error:
        return []
    finally:
        csv.field_size_limit(before)
