"""Which files are tables, by their names: the one list for all that read them."""

from pathlib import Path

ARROW = (".arrow", ".feather", ".ipc")
COLUMNAR = (".parquet", *ARROW)  # they say themselves what type a column has, and give it alone
DELIMITED = (".csv", ".tsv")
JSON_LINES = (".jsonl", ".ndjson")
PACKED = (".gz", ".zst", ".zstd")  # of texts; the other kinds pack their columns themselves
TABLES = (*COLUMNAR, *DELIMITED, *JSON_LINES)


def suffix_of(name: Path) -> str:
    """Return the suffix that says what a file holds, in small letters: `.csv` of Prices.CSV.gz."""
    suffix = name.suffix.lower()
    if suffix in PACKED and (inner := Path(name.stem).suffix.lower()) in (*DELIMITED, *JSON_LINES):
        return inner
    return suffix


def is_text(name: Path) -> bool:
    """Tell whether a file is a table in text, which the readers of sources read (`text_tables.py`)."""
    return suffix_of(name) in (*DELIMITED, *JSON_LINES)


def is_table(name: Path) -> bool:
    """Tell whether a file is a table, by its name; nothing hidden, nor in a hidden folder, is one."""
    return suffix_of(name) in TABLES and not any(part.startswith(".") for part in name.parts)


def table_files(where: str) -> list[Path]:
    """Return the files with tables that a path, folder or glob means, in the order of their names."""
    path = Path(where)
    if path.is_dir():
        return sorted(p for p in path.iterdir() if is_table(Path(p.name)))
    if path.exists() or not any(letter in where for letter in "*?["):
        return [path] if path.exists() else []
    pattern = path.relative_to(path.anchor).as_posix()
    found = Path(path.anchor).glob(pattern)
    return sorted(p for p in found if is_table(Path(p.name)))
