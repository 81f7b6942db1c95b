"""A source cut into pieces of about equal work, each read and written by itself.

A piece is some small files, one file, or a range of a large one. Where the cuts are depends on the
source alone, never on who does the work, so that any engine gives the same files of rows. Plain CSV
and JSON lines are cut at the end of a row, Parquet between row groups; packed, recoded and remote
text is one piece a file, since its middle cannot be reached without what comes before.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from marrow.data.sources.dialect import sniff
from marrow.data.sources.file import SourceFile
from marrow.data.sources.streams import is_plain, mark_bytes, open_bytes, open_seekable
from marrow.kernels.rows.scan_csv import cut_csv

PIECE_BYTES = 64 << 20
FILE_BYTES = 16 << 10  # what opening a file costs, in bytes read in the same time
_STEP_BYTES = 8 << 20  # looked at together when a file is cut
_SHORT_BYTES = 64 << 10  # beyond, in which the end of a row is looked for first


@dataclass(frozen=True, slots=True)
class Piece:
    """Some files or ranges, in the order of the source."""

    index: int
    files: tuple[SourceFile, ...]


def pieces_of(files: Iterator[SourceFile]) -> Iterator[Piece]:
    """Cut files, as they come, into pieces of about PIECE_BYTES.

    Cost: a search for quotes and line ends through large text files; memory of 16 MiB.
    """
    waiting: list[SourceFile] = []
    size = index = 0
    for file in files:
        for part in ranges_of(file):
            cost = FILE_BYTES + (part.num_bytes if part.end == -1 and part.start == 0 else PIECE_BYTES)
            if waiting and size + cost > PIECE_BYTES + FILE_BYTES:
                yield Piece(index, tuple(waiting))
                waiting, size, index = [], 0, index + 1
            waiting.append(part)
            size += cost
    if waiting:
        yield Piece(index, tuple(waiting))


def ranges_of(file: SourceFile) -> Iterator[SourceFile]:
    """Cut one file into ranges, if it is large and can be cut."""
    if file.num_bytes < 2 * PIECE_BYTES or file.compression:
        yield file
    elif file.format == "parquet":
        yield from _row_groups(file)
    elif file.format in ("csv", "jsonl") and not file.root:
        yield from _lines(file)
    else:
        yield file


def _row_groups(file: SourceFile) -> Iterator[SourceFile]:
    try:
        with open_seekable(file) as stream:
            metadata = pq.ParquetFile(stream).metadata
            sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
            rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError):
        yield file  # whoever reads it says what is wrong
        return
    start, line, size = 0, 1, 0
    for group in range(len(sizes)):
        size += sizes[group]
        if size >= PIECE_BYTES and group + 1 < len(sizes):
            yield replace(file, start=start, end=group + 1, line=line)
            line += sum(rows[start : group + 1])
            start, size = group + 1, 0
    yield replace(file, start=start, line=line)


def _lines(file: SourceFile) -> Iterator[SourceFile]:
    delimiter, is_quoted = "\n", file.format == "csv"
    if not is_plain(file):
        yield file
        return
    if is_quoted:
        with open_bytes(file) as stream:
            dialect = sniff(file, stream)
        if dialect is None or dialect.escape is not None:
            yield file
            return
        delimiter = dialect.delimiter
    yield from _cut(file, delimiter, is_quoted)


def _cut(file: SourceFile, delimiter: str, is_quoted: bool) -> Iterator[SourceFile]:
    """Yield ranges that end where a row does."""
    start, line, first_line = 0, 1, 1
    place = mark_bytes(file)  # of the next byte to look at
    window, filled = np.empty(2 * _STEP_BYTES, np.uint8), 0
    with open(file.path, "rb", buffering=0) as stream:
        stream.seek(place)
        while True:
            # A row mostly ends within a few KiB of a step; where it does not, look farther.
            for size in (_STEP_BYTES + _SHORT_BYTES, 2 * _STEP_BYTES):
                while filled < size and (got := stream.readinto(window[filled:size].data)):
                    filled += got
                end, lines = _end_of_row(window[:filled], delimiter, is_quoted)
                if end >= 0:
                    break
            else:  # the file is at its end, or has a row without one in sight: the rest is one range
                break
            filled -= end
            window[:filled] = window[end : end + filled].copy()
            place, line = place + end, line + lines
            if place - start >= PIECE_BYTES and file.num_bytes - place >= PIECE_BYTES // 2:
                yield replace(file, start=start, end=place, line=first_line)
                start, first_line = place, line
    yield replace(file, start=start, line=first_line)


def _end_of_row(window: NDArray[np.uint8], delimiter: str, is_quoted: bool) -> tuple[int, int]:
    """Find the first end of a row behind a step, and the line ends before it; (-1, 0) if there is none."""
    if len(window) <= _STEP_BYTES:
        return -1, 0
    if is_quoted:
        return cut_csv(window, delimiter, _STEP_BYTES)
    data = window.tobytes()
    end = data.find(b"\n", _STEP_BYTES) + 1
    return (end, data.count(b"\n", 0, end)) if end else (-1, 0)
