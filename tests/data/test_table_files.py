"""What a word means where tables are asked for: a file, the tables of a folder, or a glob."""

from pathlib import Path

import pytest

from marrow.data.table_files import TABLES, is_table, is_text, table_files


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "b.csv",
        "a.parquet",
        "c.txt",
        ".hidden.csv",
        "sub/d.jsonl",
        "sub/e.arrow",
        ".h/f.csv",
        "[x].csv",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("n\n1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("suffix", TABLES)
def test_tables_are_known_by_their_last_suffix(suffix: str) -> None:
    assert is_table(Path(f"rows{suffix}"))
    assert is_table(Path(f"deep/rows.old{suffix}"))
    assert not is_table(Path(f"rows{suffix}.bak"))
    assert not is_table(Path(f".rows{suffix}"))
    assert not is_table(Path(f".git/rows{suffix}"))


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.zst", "A.CSV", "a.tsv.GZ", "a.ndjson.zstd"])
def test_texts_are_known_also_packed_and_in_capitals(name: str) -> None:
    assert is_table(Path(name)) and is_text(Path(name))


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.gz", "a.txt.gz", "csv.gz", "a.csv.bz2"])
def test_what_is_packed_otherwise_is_no_table(name: str) -> None:
    assert not is_table(Path(name))


def names(found: list[Path], folder: Path) -> list[str]:
    return [path.resolve().relative_to(folder.resolve()).as_posix() for path in found]


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (".", ["[x].csv", "a.parquet", "b.csv"]),
        ("sub", ["sub/d.jsonl", "sub/e.arrow"]),
        ("*.csv", ["[x].csv", "b.csv"]),
        ("*", ["[x].csv", "a.parquet", "b.csv"]),
        ("s?b/*", ["sub/d.jsonl", "sub/e.arrow"]),
        ("[ab].*", ["a.parquet", "b.csv"]),
        ("**/*.jsonl", ["sub/d.jsonl"]),
        ("nothing*.csv", []),
    ],
)
def test_folders_and_globs_give_their_tables_in_order(
    folder: Path, where: str, expected: list[str], absolute: bool
) -> None:
    asked = str(folder / where) if absolute else where
    assert names(table_files(asked), folder) == expected


@pytest.mark.parametrize("name", ["b.csv", "c.txt", ".hidden.csv", "[x].csv"])
def test_a_file_that_is_named_is_meant_whatever_it_is_called(folder: Path, name: str) -> None:
    assert names(table_files(name), folder) == [name]


def test_what_is_not_there_is_no_file(folder: Path) -> None:
    assert table_files("gone.csv") == []
    assert table_files("gone/deeper") == []
