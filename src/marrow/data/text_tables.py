"""Tables in text (CSV, TSV, JSON lines, also packed) as Parquet files in a folder of their own.

    read = read_texts(paths)           # broken rows are left out, and counted
    read.paths[paths[0]]               # its rows, until `read` goes

Whoever asks a question of a file shall get the rows that a run would get of it: the readers,
dialects, encodings and types are those of `ingest`. A type may only turn out to be too narrow at the
last row, and some questions need several passes, so the rows are set aside on disk, not in memory.
"""

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from marrow.core.errors import SourceError, explain_os_errors
from marrow.data.engine import INLINE
from marrow.data.sources.columns import SchemaGrewError
from marrow.data.sources.delimited import Tally
from marrow.data.sources.file import FileList, SourceFile, format_of
from marrow.data.sources.formats import read_file
from marrow.data.sources.listing import Found, found
from marrow.data.sources.survey import grown, survey
from marrow.data.tables import ParquetFile

ROW_GROUP_BYTES = 8 << 20


class Scratch:
    """A folder in the system's temporary one that goes with whoever holds it."""

    def __init__(self, prefix: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self.remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Texts:
    """The rows of some text files.

    paths: file -> Parquet file with its rows. tally: of all of them. scratch: keeps the files there.
    """

    paths: Mapping[Path, Path]
    schema: pa.Schema
    tally: Tally
    scratch: Scratch

    def told(self) -> str:
        """Say how many rows are left out, and the first of them; nothing if there is none."""
        count = self.tally.num_broken
        rows = "1 broken row is" if count == 1 else f"{count:,} broken rows are"
        return f"{rows} left out; the first: {self.tally.first}" if count else ""


def read_texts(paths: Sequence[Path]) -> Texts:
    """Read text files of one table, with the types that `ingest` would give their columns.

    Raises: SourceError if one is missing, mostly broken, damaged or of no known format, or all are
        empty; NotPermitted; DiskFull.
    Cost: as `ingest` without a second worker: memory for a row group, disk for the rows as Parquet.
    """
    for path in paths:
        if format_of(path) is None:
            raise SourceError(f"{path} is no file of rows", hint="its name must say what it is")
        with explain_os_errors("read the table", path):
            path.open("rb").close()
    files = FileList((str(path), path.stat().st_size, "") for path in paths)
    source = found(", ".join(map(str, paths[:3])), files)
    scratch = Scratch("marrow-rows-")
    types = survey(source)
    while True:
        try:
            return _write(source, types.schema, scratch)
        except SchemaGrewError as grew:
            types = grown(types, grew, source, INLINE)


def _write(source: Found, schema: pa.Schema, scratch: Scratch) -> Texts:
    """Write the rows of each file. Raises: SchemaGrewError if one does not fit."""
    total = Tally()
    made: dict[Path, Path] = {}
    for number, file in enumerate(source.files):
        target = scratch.path / f"{number:05d}.parquet"
        total.add(_write_one(file, schema, target))
        made[Path(file.path)] = target
    if not schema.names:
        raise SourceError(
            f"{source.files[0].where}: the table has no row", hint="check how the file was written"
        )
    return Texts(made, schema, total, scratch)


def _write_one(file: SourceFile, schema: pa.Schema, target: Path) -> Tally:
    tally = Tally()
    with ParquetFile(target, schema, ROW_GROUP_BYTES) as writer:
        for chunk in read_file(file, tally, lambda _: None) if file.num_bytes else ():
            batch, _, _ = chunk.fit(schema)
            writer.write(batch)
    return tally
