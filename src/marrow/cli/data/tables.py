"""What a word on the command line means where tables are asked for: files, or an artifact's files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from marrow.core.errors import SourceError, StoreError, UsageError
from marrow.data.quality_config import JSON_LINES, TABLE_SUFFIXES, table_files
from marrow.data.sql import tables_in
from marrow.store.store import Store
from marrow.store.versions.versions import Versions

SUFFIXES = TABLE_SUFFIXES + JSON_LINES


@contextmanager
def open_tables_of(target: str) -> Iterator[dict[str, list[Path]]]:
    """Give the tables of a target by name; `data` is the target itself, if it can be told.

    Args: target: a path or glob; else a name, name@version, version~n or id prefix of the store.
    Raises: SourceError if it holds no table; ArtifactNotFound.
    """
    path = Path(target)
    if path.is_dir() or path.is_file():
        yield tables_in(path)
    elif files := table_files(target):
        yield {"data": files}
    else:
        with _store(target) as store:
            artifact = Versions(store).resolve(target) if "~" in target else store.resolve(target)
            yield tables_in(store.view(artifact))


def _store(target: str) -> Store:
    try:
        return Store.open(create=False)
    except StoreError as error:
        raise SourceError(f"{target} is no file, and {error.message}", hint=error.hint) from error


def choose(tables: dict[str, list[Path]], name: str | None, target: str) -> list[Path]:
    """Return the files of one table: the named one, else the target's own. Raises: UsageError."""
    known = ", ".join(sorted(set(tables) - {"data"}) or tables)
    if name is not None and name not in tables:
        raise UsageError(f"{target} has no table {name!r}", hint=f"tables: {known}")
    if name is None and "data" not in tables:
        raise UsageError(f"{target} has several tables", hint=f"choose one with --table: {known}")
    return tables[name or "data"]
