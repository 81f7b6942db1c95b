"""The interpreter's own documentation as rows: what `data.source = "python"` reads."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from marrow.core.progress import Progress
from marrow.core.span import span
from marrow.data.config import PYTHON, DataRecipe
from marrow.data.sources.stdlib import SCHEMA, StdlibRow, read_stdlib, stdlib_files, stdlib_folder
from marrow.data.tables import ParquetFile

_BATCH_ROWS = 1024


def ingest_stdlib(recipe: DataRecipe, out: Path, progress: Progress) -> dict[str, Any]:
    """Write rows-00000.parquet; return facts, as `ingest` does."""
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
            if len(pending) >= _BATCH_ROWS or index == len(files) - 1:
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
