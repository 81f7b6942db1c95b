"""Sources become rows: one Parquet dataset, whatever the files were.

rows-00000.parquet, rows-00001.parquet, ... hold the rows in the order of the sources; a row that
was broken is in quarantine.jsonl with its file and line, never silently gone. Equal sources give
equal bytes.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from marrow.core.errors import SourceError, explain_os_errors
from marrow.core.progress import Progress, silent
from marrow.core.span import span
from marrow.data.columns import SchemaGrewError, fit, join_schemas
from marrow.data.config import PYTHON, DataRecipe
from marrow.data.delimited import Tally
from marrow.data.formats import Chunk, read_file
from marrow.data.sources import Broken, Found, SourceFile, find_files
from marrow.data.stdlib import SCHEMA, StdlibRow, read_stdlib, stdlib_files, stdlib_folder
from marrow.data.tables import ParquetFile, described
from marrow.data.template import PROVENANCE

BATCH_ROWS = 1024
MAX_FILE_BYTES = 1 << 30  # uncompressed bytes of rows after which a new rows file is begun
QUARANTINE = "quarantine.jsonl"
_PROVENANCE_FIELDS = (
    described(PROVENANCE[0], pa.string(), "source file, below the source's folder"),
    described(
        PROVENANCE[1],
        pa.int64(),
        "line at which the row begins (text, CSV, JSONL) or its number (Parquet, Arrow), from 1",
    ),
)


def ingest(recipe: DataRecipe, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Read the source of a recipe into rows-*.parquet in `out`.

    Returns: facts: files, rows, bytes read and written, columns, broken rows.
    Raises: SourceError if the source is missing, empty, unreadable or mostly broken.
    Cost: one pass, two if a later row does not fit the types of the first, one more for each column
    in which types that go together have values that do not; bounded memory.
    """
    if recipe.source == PYTHON:
        return _ingest_stdlib(recipe, out, progress)
    return _ingest_files(recipe, out, progress)


@dataclass(slots=True)
class _Reading:
    """One pass over the files of a source: counts, and the broken rows with their place."""

    found: Found
    progress: Progress
    tally: Tally = field(default_factory=Tally)
    num_empty: int = 0

    def chunks(
        self, keep: Callable[[Broken], None], limit: int | None = None
    ) -> Iterator[tuple[SourceFile, Chunk]]:
        """Yield the rows of all files in order; with a limit, only so many chunks of each."""
        done = 0
        total = sum(file.num_bytes for file in self.found.files)
        for file in self.found.files:
            tally = Tally()
            if file.num_bytes:
                read = 0  # in bytes of rows, which tell well enough how far the file is read
                for index, chunk in enumerate(read_file(file, tally, keep)):
                    yield file, chunk
                    read = min(read + chunk.batch.nbytes, file.num_bytes)
                    rows = self.tally.num_rows + tally.num_rows
                    self.progress(done + read, total, "bytes", {"rows": f"{rows:,}"})
                    if limit is not None and index + 1 >= limit:
                        break
            self.num_empty += tally.num_rows + tally.num_broken == 0
            self.tally.num_rows += tally.num_rows
            self.tally.num_blank += tally.num_blank
            self.tally.num_broken += tally.num_broken
            done += file.num_bytes
        self.progress(done, total, "bytes", {"rows": f"{self.tally.num_rows:,}"})

    def schema(self, limit: int | None) -> pa.Schema:
        """Join the columns and types of the files."""
        schema = pa.schema([])
        for _, chunk in self.chunks(lambda _: None, limit):
            schema = join_schemas(schema, chunk.schema())
        return schema


def _ingest_files(recipe: DataRecipe, out: Path, progress: Progress) -> dict[str, Any]:
    found = find_files(recipe.source, recipe.format)
    with span("survey"):
        schema = _Reading(found, silent).schema(limit=1)
    is_whole_survey = False
    while True:
        try:
            return _write_rows(recipe, found, schema, out, progress)
        except SchemaGrewError as grew:
            for path in out.glob("rows-*.parquet"):
                path.unlink()
            if is_whole_survey:  # no type holds all values, as of 0.5 and a key of 16 digits: text does
                index = schema.get_field_index(grew.args[0])
                schema = schema.set(index, pa.field(grew.args[0], pa.string()))
            else:  # a later row does not fit the types of the first ones: look at all of them
                with span("survey"):
                    schema = _Reading(found, silent).schema(limit=None)
                is_whole_survey = True


def _write_rows(
    recipe: DataRecipe, found: Found, schema: pa.Schema, out: Path, progress: Progress
) -> dict[str, Any]:
    """Write all rows in one pass.

    Raises: SchemaGrewError if one does not fit; SourceError if there is no row.
    """
    reading = _Reading(found, progress)
    target, renamed = _target(schema, len(found.files))
    paths: list[Path] = []
    quarantine = out / QUARANTINE
    with explain_os_errors("write rows", out), ExitStack() as stack:
        broken_file = None
        files: list[ParquetFile] = []

        def keep(broken: Broken) -> None:
            nonlocal broken_file
            if broken_file is None:
                broken_file = stack.enter_context(quarantine.open("w", encoding="utf-8"))
            broken_file.write(json.dumps(asdict(broken), ensure_ascii=False) + "\n")

        num_bytes = MAX_FILE_BYTES
        for source, chunk in reading.chunks(keep):
            with span("types"):
                batch = _with_provenance(
                    fit(chunk.batch, schema, is_text=chunk.is_text), target, source, chunk
                )
            if num_bytes >= MAX_FILE_BYTES:
                if files:
                    files[-1].close()
                paths.append(out / f"rows-{len(paths):05d}.parquet")
                files.append(stack.enter_context(ParquetFile(paths[-1], target, recipe.row_group_bytes)))
                num_bytes = 0
            with span("write rows"):
                files[-1].write(batch)
            num_bytes += batch.nbytes
    if not paths:
        raise SourceError(
            f"data.source: {recipe.source} has no row: {len(found.files)} files without data",
            hint="check how the files were written",
        )
    return {
        "source": recipe.source,
        "files": len(found.files),
        "skipped_files": found.skipped,
        "empty_files": reading.num_empty,
        "rows": reading.tally.num_rows,
        "broken_rows": reading.tally.num_broken,
        "blank_rows": reading.tally.num_blank,
        "source_bytes": sum(file.num_bytes for file in found.files),
        "bytes_written": sum(path.stat().st_size for path in paths),
        "columns": {name: str(kind) for name, kind in zip(schema.names, schema.types, strict=True)},
        "renamed_columns": renamed,
    }


def _target(schema: pa.Schema, num_files: int) -> tuple[pa.Schema, dict[str, str]]:
    """Add the provenance columns; a user's column of such a name gets another one."""
    renamed = {name: f"{name.strip('_')}_original" for name in schema.names if name in PROVENANCE}
    fields = [field.with_name(renamed.get(field.name, field.name)) for field in schema]
    metadata = {"marrow.source": "files", "marrow.num_files": str(num_files)}
    return pa.schema([*fields, *_PROVENANCE_FIELDS], metadata=metadata), renamed


def _with_provenance(
    batch: pa.RecordBatch, target: pa.Schema, source: SourceFile, chunk: Chunk
) -> pa.RecordBatch:
    names = pa.repeat(pa.scalar(source.name, pa.string()), batch.num_rows)
    return pa.RecordBatch.from_arrays([*batch.columns, names, pa.array(chunk.lines)], schema=target)


def _ingest_stdlib(recipe: DataRecipe, out: Path, progress: Progress) -> dict[str, Any]:
    folder = stdlib_folder()
    files = stdlib_files(folder)
    schema = SCHEMA.with_metadata({"marrow.source": PYTHON, "marrow.num_files": str(len(files))})
    kinds: dict[str, int] = {}
    num_bytes = doc_bytes = topic_bytes = 0
    path = out / "rows-00000.parquet"
    with ParquetFile(path, schema, recipe.row_group_bytes) as file:
        pending: list[StdlibRow] = []
        for index, source in enumerate(files):
            with span("parse"):
                pending += read_stdlib(source, folder)
            if len(pending) >= BATCH_ROWS or index == len(files) - 1:
                for row in pending:
                    kinds[row.kind] = kinds.get(row.kind, 0) + 1
                    num_bytes += len((row.source or "").encode()) if row.kind == "module" else 0
                    topic_bytes += len((row.source or "").encode()) if row.kind == "topic" else 0
                    doc_bytes += len((row.doc or "").encode())
                with span("write rows"):
                    file.write(_batch(pending, schema))
                pending = []
            progress(index + 1, len(files), "files")
    return {
        "source": PYTHON,
        "files": len(files),
        "rows": file.num_rows,
        "rows_by_kind": dict(sorted(kinds.items())),
        "source_bytes": num_bytes,
        "docstring_bytes": doc_bytes,
        "topic_bytes": topic_bytes,
        "broken_rows": 0,
        "bytes_written": path.stat().st_size,
    }


def _batch(rows: list[StdlibRow], schema: pa.Schema) -> pa.RecordBatch:
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
