"""Sources become rows: one Parquet dataset, whatever the files were.

rows-00000.parquet, rows-00001.parquet, ... hold the rows in the order of the sources; a row that
was broken is in quarantine.jsonl with its file and line, never silently gone. Equal sources give
equal bytes.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa

from marrow.core.errors import SourceError
from marrow.core.progress import Progress, silent
from marrow.core.span import span
from marrow.data.config import PYTHON, DataRecipe
from marrow.data.stdlib import SCHEMA, StdlibRow, read_stdlib, stdlib_files, stdlib_folder
from marrow.data.tables import ParquetFile

BATCH_ROWS = 1024


def ingest(recipe: DataRecipe, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Read the source of a recipe into rows-*.parquet in `out`.

    Returns: facts: files, rows, bytes read and written, columns, broken rows.
    Raises: SourceError if the source is missing, empty, unreadable or mostly broken.
    """
    if recipe.source == PYTHON:
        return _ingest_stdlib(recipe, out, progress)
    raise SourceError("not yet")


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
