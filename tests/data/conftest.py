import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from marrow.data.config import DataRecipe
from marrow.data.ingest import ingest
from marrow.store.lock import FileLock


@pytest.fixture
def read_rows(tmp_path: Path) -> Callable[..., tuple[pa.Table, dict[str, Any]]]:
    """Ingest a source and give the rows and the facts."""

    def read(source: Path | str, **settings: Any) -> tuple[pa.Table, dict[str, Any]]:
        out = tmp_path / f"rows-{len(list(tmp_path.glob('rows-*')))}"
        out.mkdir()
        facts = ingest(DataRecipe(source=str(source), **settings), out)
        return pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("rows-*.parquet"))]), facts

    return read


@pytest.fixture(scope="session")
def stdlib_rows(shared: Path) -> Path:
    """The running interpreter's documentation, ingested once for all test processes."""
    out, making = shared / "stdlib-rows", shared / "stdlib-rows-making"
    with FileLock(shared / "stdlib-rows.lock"):
        if not out.exists():
            making.mkdir()
            ingest(DataRecipe(), making)
            making.rename(out)
    return out
