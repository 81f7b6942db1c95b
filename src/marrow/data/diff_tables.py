"""Any file of rows as columns that can be read again and again: what `diff.py` compares.

Parquet, Arrow IPC and CSV are tables (`scan.py`); JSON lines are tables of whatever keys they have,
their values as text; anything else is a table of lines. Nothing is held but a batch.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from marrow.core.errors import DataError, explain_os_errors
from marrow.data.scan import open_tables
from marrow.data.table_files import JSON_LINES, TABLES

TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".json", ".html", ".xml"),
    *(".yaml", ".yml", ".toml", ".py", ".log"),
)
_BATCH_LINES = 1 << 14
_MAX_LINE_CHARS = 4 << 20

Read = Callable[[Sequence[str]], Iterator[pa.RecordBatch]]


@dataclass(frozen=True, slots=True)
class Rows:
    """A file as columns: their types in words and in Arrow's, and a way to read some of them."""

    types: dict[str, str]
    arrow: dict[str, pa.DataType]
    read: Read


def can_compare(name: str) -> bool:
    """Tell by its name whether a file holds rows that can be compared."""
    return Path(name.lower()).suffix in (*TABLES, *TEXT_SUFFIXES)


def open_rows(path: Path) -> Rows:
    """Open a file as what its suffix says. Raises: SourceError, DataError if it is not that."""
    suffix = path.suffix.lower()
    if suffix in JSON_LINES:
        return _json_lines(path)
    if suffix not in TABLES:
        return open_lines(path)
    opened = open_tables([path])
    if opened.told:  # how many rows differ would not be true of the file
        raise DataError(f"{path.name}: {opened.told}", hint="mend it, or compare files only: --files")
    types = {field.name: str(field.type) for field in opened.schema}
    arrow = {field.name: field.type for field in opened.schema}
    return Rows(types, arrow, lambda names: (scan.batch for scan in opened.scan(names)))


def _json_lines(path: Path) -> Rows:
    """Read JSON lines as a table of texts: each value as JSON; the types are JSON's own words."""
    types: dict[str, str] = {}
    for _, row in _objects(path):
        for name, value in row.items():
            kind = _json_type(value)
            known = types.get(name, kind)
            if known in ("null", kind) or {known, kind} == {"integer", "number"}:
                types[name] = kind if known == "null" else "number" if known != kind else kind
            elif kind != "null":
                types[name] = "mixed"

    def read(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        rows: list[dict[str, Any]] = []
        for _, row in _objects(path):
            rows.append(row)
            if len(rows) == _BATCH_LINES:
                yield _json_batch(rows, names)
                rows = []
        if rows:
            yield _json_batch(rows, names)

    return Rows(types, dict.fromkeys(types, pa.string()), read)


def _json_batch(rows: list[dict[str, Any]], names: Sequence[str]) -> pa.RecordBatch:
    def text(value: Any) -> str | None:
        return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True)

    columns = [_texts([text(row.get(name)) for row in rows]) for name in names]
    if not columns:
        return pa.record_batch({"": pa.nulls(len(rows))})
    return pa.RecordBatch.from_arrays(columns, names=list(names))


def _texts(values: list[str | None]) -> pa.Array:
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape and UTF-8 cannot write
        return pa.array([v if v is None else v.encode("utf-8", "backslashreplace") for v in values]).cast(
            pa.string()
        )


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text_lines(path), 1):
        line = line.removeprefix("\ufeff") if number == 1 else line  # a byte order mark
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path.name}, line {number}, is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{path.name}, line {number}, is no JSON object")
            yield number, row


def _json_type(value: Any) -> str:
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def open_lines(path: Path) -> Rows:
    """Open a file as lines of text."""

    def read(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        lines: list[str] = []
        for line in _text_lines(path):
            lines.append(line)
            if len(lines) == _BATCH_LINES:
                yield pa.record_batch({"line": pa.array(lines, pa.string())})
                lines = []
        if lines:
            yield pa.record_batch({"line": pa.array(lines, pa.string())})

    return Rows({"line": "string"}, {"line": pa.string()}, read)


def _text_lines(path: Path) -> Iterator[str]:
    """Yield lines without their ends; one that is endless is cut into pieces of 4 Mi characters."""
    with (
        explain_os_errors("compare a file", path),
        path.open(encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        while line := file.readline(_MAX_LINE_CHARS):
            yield line.rstrip("\r\n")
