"""How a CSV is written: delimiter, escape and column names, found from its first 64 KiB.

The delimiter is the one of `, ; tab |` that splits the most records into as many fields as the header,
wider tables first; quotes are `"`, doubled inside quotes or, if the file does so, escaped by a
backslash. The first record that is not blank is the header.
"""

import csv
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from marrow.core.errors import SourceError
from marrow.data.sources.file import SourceFile

DELIMITERS = ",;\t|"
_DOUBLED = re.compile(r'(?<![\\,;\t|\r\n])""')  # not an empty field, nor an escaped quote that ends one
_SNIFF_BYTES = 1 << 16
_SNIFF_RECORDS = 50


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a file is written. `escape` is None where quotes are doubled."""

    delimiter: str
    escape: str | None
    names: tuple[str, ...] = ()

    def records(self, lines: Iterable[str], *, strict: bool = False) -> Iterator[list[str]]:
        """Parse lines with the standard library; strict refuses quotes that are not in order."""
        return csv.reader(
            lines,
            delimiter=self.delimiter,
            escapechar=self.escape,
            doublequote=self.escape is None,
            strict=strict,
        )


def sniff(file: SourceFile, stream: IO[bytes]) -> Dialect | None:
    """Find delimiter, escape and column names from the beginning of a file; None if it is blank.

    Raises: SourceError if a quote in the header is never closed.
    """
    head = stream.read(_SNIFF_BYTES).decode("utf-8", "replace")
    if not head.strip():
        return None
    escape = "\\" if head.count('\\"') > len(_DOUBLED.findall(head)) else None
    by_name = "\t" if ".tsv" in Path(file.path.lower()).suffixes else ""
    candidates = by_name or DELIMITERS
    delimiter = max(candidates, key=lambda d: (_consistency(head, Dialect(d, escape)), -candidates.index(d)))
    records = _readable(Dialect(delimiter, escape).records(_lines(head)))
    names = next((record for record in records if any(record)), [])
    if _is_open(head, Dialect(delimiter, escape)):
        raise SourceError(
            f"{file.where}: a quote in the header is never closed (read with delimiter {delimiter!r})",
            hint="mend the first line; it names the columns",
        )
    return Dialect(delimiter, escape, tuple(unique_names(names))) if names else None


def unique_names(names: list[str]) -> list[str]:
    """Give empty and repeated column names a name of their own."""
    taken: set[str] = set()
    result = []
    for index, name in enumerate(names, 1):
        stem = candidate = name.strip() or f"column_{index}"
        number = 2
        while candidate in taken:
            candidate = f"{stem}_{number}"
            number += 1
        taken.add(candidate)
        result.append(candidate)
    return result


def _consistency(head: str, dialect: Dialect) -> float:
    """Score a dialect: the share of records as wide as the header; of equals, the wider."""
    records = itertools.islice(_readable(dialect.records(_lines(head))), _SNIFF_RECORDS)
    widths = [len(record) for record in records if any(record)]
    if not widths or widths[0] < 2:
        return 0.0
    return sum(width == widths[0] for width in widths) / len(widths) * (1 + min(widths[0], 100) / 1000)


def _lines(text: str) -> io.StringIO:
    return io.StringIO(text, newline="")


def _is_open(head: str, dialect: Dialect) -> bool:
    """Tell whether the header goes on to the end of the text, for a quote in it."""
    try:
        next(filter(any, dialect.records(_lines(head), strict=True)), None)
    except csv.Error as error:
        return "unexpected end" in str(error)
    return False


def _readable(records: Iterator[list[str]]) -> Iterator[list[str]]:
    """Yield records up to the first that `csv` refuses: the head may end inside of one."""
    try:
        yield from records
    except csv.Error:
        return
