"""Scanning tables: every row once, in order, with its place, in plain types."""

import gc
import gzip
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from marrow.core.errors import DataError, NotPermitted, SourceError
from marrow.data.config import DataRecipe
from marrow.data.ingest import ingest
from marrow.data.scan import BATCH_ROWS, open_tables
from marrow.data.table_files import table_files

TABLE = pa.table({"a": list(range(10)), "b": [f"s{i}" for i in range(10)]})


def rows_of(*paths: Path) -> list[tuple[str, int, int]]:
    return [
        (scan.path.name, scan.row + i, value)
        for scan in open_tables(paths).scan(["a"])
        for i, value in enumerate(scan.batch.column(0).to_pylist())
    ]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """The same ten rows in every format."""
    pq.write_table(TABLE, tmp_path / "t.parquet", row_group_size=3)
    with pa.ipc.new_file(tmp_path / "t.arrow", TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=4)
    with pa.ipc.new_stream(tmp_path / "t.ipc", TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=4)
    lines = [f"{i},s{i}" for i in range(10)]
    (tmp_path / "t.csv").write_text("\n".join(["a,b", *lines]) + "\n")
    (tmp_path / "t.tsv").write_text("\n".join(["a,b", *lines]).replace(",", "\t") + "\n")
    (tmp_path / "t.jsonl").write_text("".join(f'{{"a": {i}, "b": "s{i}"}}\n' for i in range(10)))
    return [tmp_path / f"t.{kind}" for kind in ("parquet", "arrow", "ipc", "csv", "tsv", "jsonl")]


def test_every_format_gives_every_row_once_with_its_place(files):
    for path in files:
        assert rows_of(path) == [(path.name, i, i) for i in range(10)], path.name
    assert len(rows_of(*files)) == 60


@pytest.mark.slow
def test_batches_are_bounded_whatever_the_file_holds(tmp_path):
    table = pa.table({"a": pa.array(range(100_000)), "text": ["x" * 20] * 100_000})
    pq.write_table(table, tmp_path / "long.parquet", row_group_size=100_000)
    with pa.ipc.new_file(tmp_path / "long.arrow", table.schema) as writer:
        writer.write_table(table)
    for path in (tmp_path / "long.parquet", tmp_path / "long.arrow"):
        sizes = [scan.batch.num_rows for scan in open_tables([path]).scan()]
        assert sum(sizes) == 100_000
        assert max(sizes) <= BATCH_ROWS
    heavy = pa.table({"text": ["y" * 200_000] * 400})
    pq.write_table(heavy, tmp_path / "heavy.parquet", use_dictionary=False, compression="none")
    batches = [scan.batch.nbytes for scan in open_tables([tmp_path / "heavy.parquet"]).scan()]
    assert max(batches) < 64 << 20


def test_types_are_plain(tmp_path):
    table = pa.table(
        {
            "d": pa.array(["a", "b"]).dictionary_encode(),
            "l": pa.array(["a", "b"], pa.large_string()),
            "v": pa.array(["a", "b"], pa.string_view()),
        }
    )
    with pa.ipc.new_file(tmp_path / "t.arrow", table.schema) as writer:
        writer.write_table(table)
    tables = open_tables([tmp_path / "t.arrow"])
    assert {field.type for field in tables.schema} == {pa.string()}
    [scan] = tables.scan()
    assert scan.batch.to_pydict() == {name: ["a", "b"] for name in "dlv"}


def test_columns_join_over_files_and_types_widen(tmp_path):
    pq.write_table(pa.table({"a": pa.array([1], pa.int32())}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"a": [2.5], "b": ["x"]}), tmp_path / "2.parquet")
    tables = open_tables(sorted(tmp_path.glob("*.parquet")))
    found = pa.Table.from_batches([scan.batch for scan in tables.scan()])
    assert found.to_pydict() == {"a": [1.0, 2.5], "b": [None, "x"]}


def test_no_column_asked_for_still_counts_the_rows(files):
    for path in files:
        assert sum(scan.batch.num_rows for scan in open_tables([path]).scan([])) == 10


def test_a_file_cut_short_is_an_error_with_its_name(files):
    for path in files[:3]:
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises((SourceError, DataError), match=path.name):
            rows_of(path)


def test_a_broken_row_is_left_out_and_told_with_its_file_and_line(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "1,2\n" * 10 + "x,y,z\n")
    assert [value for _, _, value in rows_of(path)] == [1] * 10
    assert "1 broken row is left out" in (told := open_tables([path]).told)
    assert f"in line 12 of {path}" in told
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"a": 1}\n{"a": \n')
    assert [value for _, _, value in rows_of(lines)] == [1]
    assert f"in line 2 of {lines}" in open_tables([lines]).told


def test_a_file_of_which_most_is_broken_is_an_error_with_its_name(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n" + "x,y,z\n" * 5)
    with pytest.raises(SourceError, match=r"t\.csv: 5 of 6 rows"):
        open_tables([path])


@pytest.mark.parametrize("name", ["t.csv", "T.CSV.gz", "t.tsv.zst", "t.jsonl.gz"])
def test_a_text_means_what_a_run_reads_of_it(tmp_path, name):
    """One file, read by `ingest` and here: the same columns, types and rows, whatever its dialect."""
    rows = [f"{i};x{i};{i / 2 if i > 40_000 else i}" for i in range(50_000)]  # a type that grows late
    text = "\r\n".join(["id;name;size", *rows, "1;2;3;4", ""])
    data = (text.replace(";", "\t") if ".tsv" in name else text).encode("utf-16")
    if ".jsonl" in name:
        data = "".join(f'{{"id": {i}, "name": null}}\n' for i in range(9)).encode() + b'{"id": "k"}\n{\n'
    packed = {"gz": partial(gzip.compress, compresslevel=1), "zst": zstandard.compress}.get(
        name.rpartition(".")[2]
    )
    path = tmp_path / name
    path.write_bytes(data if packed is None else packed(data))
    (out := tmp_path / "out").mkdir()
    facts = ingest(DataRecipe(source=str(path)), out)
    tables = open_tables([path])
    found = pa.Table.from_batches([scan.batch for scan in tables.scan()], tables.schema)
    made = pa.concat_tables(pq.read_table(part) for part in sorted(out.glob("*.parquet")))
    assert found.equals(made.drop_columns(["_file", "_row"]).replace_schema_metadata(None))
    assert facts["broken_rows"] == tables.texts.tally.num_broken == 1
    assert "in line" in tables.told


def test_the_rows_set_aside_go_with_the_tables(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a\n1\n")
    tables = open_tables([path])
    folder = tables.texts.scratch.path
    assert folder.is_dir()
    del tables
    gc.collect()
    assert not folder.exists()


def test_a_file_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    pq.write_table(TABLE, path)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pyarrow.parquet.ParquetFile.__init__", refuse)
    with pytest.raises(NotPermitted, match="no permission"):
        rows_of(path)


def test_paths_folders_and_globs_name_tables(files, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("")
    assert table_files(str(tmp_path)) == sorted(files)
    assert table_files(str(tmp_path / "*.c*")) == [tmp_path / "t.csv"]
    assert table_files(str(files[0])) == [files[0]]
    assert table_files(str(tmp_path / "none")) == []
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in table_files("*.csv")] == ["t.csv"]
    odd = tmp_path / "odd [1].csv"
    odd.write_text("a\n1\n")
    assert table_files(str(odd)) == [odd]
