"""What a word on the command line means where tables are asked for: files, or an artifact's files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from marrow.core.errors import ArtifactNotFound, SourceError, StoreError, UsageError, explain_os_errors
from marrow.data.sql import tables_in
from marrow.data.table_files import table_files
from marrow.store.store import Store
from marrow.store.versions.versions import Versions


@contextmanager
def open_tables_of(target: str) -> Iterator[dict[str, list[Path]]]:
    """Give the tables of a target by name; `data` is the target itself, if it can be told.

    Args: target: a path or glob; else a name, name@version, version~n or id prefix of the store.
    Raises: SourceError if it holds no table; ArtifactNotFound; NotPermitted.
    """
    path = Path(target)
    with explain_os_errors("read the table", path):
        is_there = path.is_dir() or path.is_file()
        files = [] if is_there else table_files(target)
    if is_there:
        yield tables_in(path)
    elif files:
        yield {"data": files}
    else:
        with _store(target) as store:
            try:
                artifact = Versions(store).resolve(target) if "~" in target else store.resolve(target)
            except ArtifactNotFound as error:
                raise ArtifactNotFound(
                    f"there is no file {target}, and {error.message}", hint=error.hint
                ) from error
            yield tables_in(store.view(artifact))


def _store(target: str) -> Store:
    try:
        return Store.open(create=False, reading=True)
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
