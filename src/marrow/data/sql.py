"""SQL over tables in files or in memory, by DuckDB: one question, read only, no way out.

    for batch in query("select kind, count(*) from rows group by kind", {"rows": paths}):
        ...

Parquet is read by DuckDB itself, column by column and filters first; Arrow tables and memory-mapped
Arrow files are read in place, without a copy, and the answer is a stream of Arrow batches. CSV and
JSON lines are read as `ingest` reads them and set aside as Parquet first (`text_tables.py`), those
that the question names: dialects, encodings, types and broken rows are the same everywhere.

The question is a text from somewhere: it may be a SELECT and nothing else, over the tables that are
given and nothing else. DuckDB's access to files and network ends before it is asked (only the given
files stay readable, and a spill folder of its own), extensions are neither installed nor loaded,
Python's variables are no tables, and the settings are locked.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa

from marrow.core.errors import DataError, MarrowError, SourceError, UsageError
from marrow.data.scan import open_arrow
from marrow.data.table_files import ARROW, TABLES, is_table, is_text, suffix_of
from marrow.data.text_tables import Scratch, Texts, read_texts

if TYPE_CHECKING:
    import duckdb

Source: TypeAlias = "Path | Sequence[Path] | pa.Table"
BATCH_ROWS = 1 << 14
_NO_TABLE = re.compile(r"Catalog Error: Table with name (.+?) does not exist!")


def query(
    sql: str,
    tables: Mapping[str, Source],
    *,
    threads: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> pa.RecordBatchReader:
    """Ask one question of some tables.

    Args: tables: name -> a file, files of one table (of one kind), or an Arrow table. threads: that
        DuckDB may use; the order of rows without ORDER BY holds for one thread. say: is told of
        broken rows that are left out.
    Returns: a stream of batches; closing it, or reading to its end, ends the connection.
    Raises: UsageError if the question is no SELECT or names what is not there; SourceError for a
        table that cannot be read; DataError if the question fails on the rows.
    """
    duckdb = _duckdb()
    spill = Scratch("marrow-sql-")
    connection = duckdb.connect(
        ":memory:",
        config={
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "allow_community_extensions": "false",
            "python_enable_replacements": "false",
            "temp_directory": str(spill.path),
            "threads": str(threads),
        },
    )
    try:
        _check(connection, sql)
        texts = _give(connection, sql, tables, spill.path)
        for text in texts:
            if told := text.told():
                say(told)
        _lock(connection)
        with _explained(tables):
            reader = connection.sql(sql).to_arrow_reader(BATCH_ROWS)
        return pa.RecordBatchReader.from_batches(
            reader.schema, _stream(reader, connection, [spill, *(text.scratch for text in texts)], tables)
        )
    except BaseException:
        connection.close()
        spill.remove()
        raise


def table_name(path: Path) -> str:
    """Return what a file's table is called: rows-00003.parquet is a part of `rows`."""
    stem = path.name.removesuffix(path.suffix)
    if suffix_of(path) != path.suffix.lower():  # packed
        stem = stem[: -len(suffix_of(path))]
    head, dash, number = stem.rpartition("-")
    return head if dash and number.isdigit() else stem


def tables_in(path: Path) -> dict[str, list[Path]]:
    """Return the tables of a file or folder by name; the files of one name and kind are one table.

    `data` names the only table, or in a folder the first of these that is there: documents, rows, train.
    Raises: SourceError if there is none.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if is_table(p.relative_to(path)))
    if not files or suffix_of(files[0]) not in TABLES:
        raise SourceError(f"{path} holds no table", hint=f"tables are files that end in {', '.join(TABLES)}")
    found: dict[str, list[Path]] = {}
    for file in files:
        name = table_name(file)
        if name in found and suffix_of(found[name][0]) != suffix_of(file):
            name = file.name
        found.setdefault(name, []).append(file)
    first: str | None = next((name for name in ("documents", "rows", "train") if name in found), None)
    if len(found) == 1:
        [first] = found
    if first is not None and "data" not in found:
        found["data"] = found[first]
    return found


def _give(
    connection: "duckdb.DuckDBPyConnection", sql: str, tables: Mapping[str, Source], spill: Path
) -> list[Texts]:
    """Make the tables views, and the files readable after the lock; return what was read of texts."""
    import duckdb

    allowed: list[str] = []
    texts: dict[tuple[Path, ...], Texts] = {}
    for name, source in tables.items():
        if isinstance(source, pa.Table):
            connection.register(name, source)
            continue
        paths = [source] if isinstance(source, Path) else list(source)
        kinds = {suffix_of(path) for path in paths}
        missing = [path for path in paths if not path.is_file()]
        if missing or len(kinds) != 1 or not kinds <= set(TABLES):
            named = ", ".join(map(str, missing or paths[:3])) or "no file"
            raise SourceError(
                f"the table {name!r} cannot be read from {named}",
                hint=f"give files of one kind that are there, of {', '.join(TABLES)}",
            )
        if is_text(paths[0]):
            if name.lower().replace('"', '""') not in sql.lower():
                continue  # to read it would be for nothing
            key = tuple(paths)
            texts[key] = texts.get(key) or read_texts(paths)
            paths = [texts[key].paths[path] for path in paths]
        try:
            if kinds <= set(ARROW):
                connection.register(name, pa.concat_tables(map(_mapped, paths), promote_options="default"))
                continue
            names = [_plain_name(path.resolve(), spill) for path in paths]
            allowed += names
            listed = "[" + ", ".join(map(_literal, names)) + "]"
            reader = f"read_parquet({listed}, union_by_name = true)"
            connection.execute(f"create view {_quoted(name)} as select * from {reader}")
        except (duckdb.Error, pa.ArrowInvalid) as error:
            raise SourceError(
                f"the table {name!r} cannot be read: {_first_line(error)}",
                hint="the file may be damaged or of another kind than its name says",
            ) from error
    connection.execute(f"set allowed_paths = [{', '.join(map(_literal, allowed))}]")
    return list(texts.values())


def _lock(connection: "duckdb.DuckDBPyConnection") -> None:
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")


def _check(connection: "duckdb.DuckDBPyConnection", sql: str) -> None:
    """Refuse all but one SELECT: EXPLAIN ANALYZE runs what it explains, COPY writes files."""
    import duckdb

    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise UsageError(f"this is no SQL: {_first_line(error)}", hint="write one SELECT") from error
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        kinds = ", ".join(str(one.type).rpartition(".")[2] for one in statements) or "nothing"
        raise UsageError(
            f"only one SELECT is run, not {kinds}",
            hint="the tables are read-only; --out FILE keeps an answer",
        )


def _stream(
    reader: pa.RecordBatchReader,
    connection: "duckdb.DuckDBPyConnection",
    scratches: Sequence[Scratch],
    tables: Mapping[str, Source],
) -> Iterator[pa.RecordBatch]:
    try:
        with _explained(tables):
            yield from reader
    finally:
        connection.close()
        for scratch in scratches:
            scratch.remove()


@contextmanager
def _explained(tables: Mapping[str, Source]) -> Iterator[None]:
    """Turn DuckDB's errors into those of the tree."""
    import duckdb

    names = f"tables: {', '.join(list(tables)[:20]) or 'none'}"
    try:
        yield
    except duckdb.CatalogException as error:
        missing = _NO_TABLE.match(_first_line(error))
        told = _first_line(error)
        if missing is not None:  # what DuckDB proposes may be a table of its own
            told = f"there is no table {missing[1]!r}"
            close = difflib.get_close_matches(missing[1], list(tables), n=1)
            names = f"did you mean {close[0]!r}? {names}" if close else names
        raise UsageError(f"the question does not fit the tables: {told}", hint=names) from error
    except duckdb.PermissionException as error:
        raise UsageError(f"the question may not do that: {_first_line(error)}", hint=names) from error
    except (duckdb.BinderException, duckdb.ParserException) as error:
        raise UsageError(f"the question does not fit the tables: {_first_line(error)}", hint=names) from error
    except (duckdb.Error, pa.ArrowException) as error:
        raise DataError(
            f"the question failed: {_first_line(error)}",
            hint="a cast or a file may be wrong; try_cast gives null where a value does not fit",
        ) from error


def _mapped(path: Path) -> pa.Table:
    return open_arrow(pa.memory_map(str(path))).read_all()


def _plain_name(path: Path, spill: Path) -> str:
    """Return a path that DuckDB does not take for a pattern: itself, or a link to it."""
    if not any(letter in str(path) for letter in "*?[]{}"):
        return str(path)
    link = spill / f"table-{len(list(spill.iterdir()))}{path.suffix}"
    link.symlink_to(path)
    return str(link)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = " ".join(lines[:2]) if lines else type(error).__name__
    return told if len(told) <= 300 else told[:297] + "..."


def _duckdb() -> Any:
    try:
        import duckdb
    except ImportError as error:  # an extra, and 60 ms to import
        raise MarrowError(
            "SQL needs the package duckdb, which is not installed", hint='pip install "marrow[sql]"'
        ) from error
    return duckdb
