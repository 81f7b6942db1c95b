"""SQL: the right answers, and no way to anything that was not given."""

import gc
import gzip
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from marrow.core.errors import DataError, SourceError, UsageError
from marrow.data.sql import query, table_name, tables_in

duckdb = pytest.importorskip("duckdb")

TABLE = pa.table({"a": [3, 1, 2, None], "b": ["x", "y", "x", "ü"], "l": [[1], [], None, [2, 3]]})


def ask(sql, **tables):
    return query(sql, tables).read_all()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    pq.write_table(TABLE, tmp_path / "rows-00000.parquet")
    pq.write_table(TABLE.slice(0, 2), tmp_path / "rows-00001.parquet")
    pyarrow.csv.write_csv(TABLE.select(["a", "b"]), tmp_path / "small.csv")
    with pa.ipc.new_file(tmp_path / "mapped.arrow", TABLE.schema) as writer:
        writer.write_table(TABLE)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", TABLE.schema) as writer:
        writer.write_table(TABLE)
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    return tmp_path


def test_a_question_is_answered_from_every_kind_of_table(files):
    found = ask(
        """select (select count(*) from p) p, (select sum(a) from m) m, (select sum(a) from s) s,
                  (select max(b) from c) c, (select sum(a) from j) j, (select count(*) from t) t""",
        p=[files / "rows-00000.parquet", files / "rows-00001.parquet"],
        m=files / "mapped.arrow",
        s=files / "stream.arrow",
        c=files / "small.csv",
        j=files / "lines.jsonl",
        t=TABLE,
    )
    assert found.to_pylist() == [{"p": 6, "m": 6, "s": 6, "c": "ü", "j": 3, "t": 4}]


def test_texts_are_read_as_a_run_reads_them_and_broken_rows_are_told(tmp_path):
    (tmp_path / "a.csv").write_bytes("id;name\r\n007;ä\r\n1;2;3\r\n".encode("utf-16"))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"id,size\n8,1.5\n"))
    said: list[str] = []
    tables = {"t": [tmp_path / "a.csv", tmp_path / "b.csv.gz"], "unasked": tmp_path / "a.csv"}
    found = query("select * from t union all select * from t", tables, say=said.append).read_all()
    assert found.to_pylist() == 2 * [
        {"id": "007", "name": "ä", "size": None},
        {"id": "8", "name": None, "size": 1.5},
    ]
    [told] = said
    assert told.startswith("1 broken row is left out; the first: ") and f"line 3 of {tmp_path}" in told


def test_a_text_that_the_question_does_not_name_is_not_read(tmp_path):
    (tmp_path / "bad.csv").write_text("a,b\n" + "1,2,3\n" * 9)
    tables = {"bad": tmp_path / "bad.csv", 'q"q': tmp_path / "bad.csv"}
    assert ask("select 1 as x", **tables).to_pylist() == [{"x": 1}]
    for name in ("BAD", '"q""q"'):
        with pytest.raises(SourceError, match=r"9 of 9 rows"):
            ask(f"select * from {name}", **tables)


def test_what_is_set_aside_goes_with_the_answer(tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("a\n1\n")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    with query("select * from t", {"t": tmp_path / "t.csv"}) as reader:
        assert reader.read_all().num_rows == 1
    with pytest.raises(UsageError):
        ask("select nothing from t", t=tmp_path / "t.csv")
    gc.collect()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_answer_holds_the_types_and_values_of_the_table(files):
    for source in (TABLE, files / "mapped.arrow", files / "rows-00000.parquet"):
        assert ask("select * from t order by a", t=source).to_pylist() == TABLE.sort_by("a").to_pylist()


def test_columns_of_an_arrow_table_are_not_copied():
    numbers = pa.table({"a": pa.array(range(2_000_000))})
    before = pa.total_allocated_bytes()
    reader = query("select a from t where a % 1000 = 7", {"t": numbers})
    assert sum(batch.num_rows for batch in reader) == 2000
    assert pa.total_allocated_bytes() - before < numbers.nbytes / 4


def test_a_large_answer_is_streamed(files):
    reader = query("select * from range(1000000) r(i)", {})
    first = next(iter(reader))
    assert 0 < first.num_rows < 100_000
    reader.close()


@pytest.mark.parametrize("name", ["a b", 'q"q', "select", "größe", "🦴", "x'; drop table y; --"])
def test_tables_and_columns_may_have_any_name(tmp_path, name):
    pq.write_table(pa.table({name: [1, 2]}), tmp_path / "t.parquet")
    quoted = '"' + name.replace('"', '""') + '"'
    assert ask(f"select sum({quoted}) s from {quoted}", **{name: tmp_path / "t.parquet"}).to_pylist() == [
        {"s": 3}
    ]


def test_a_path_may_have_any_name(tmp_path):
    path = tmp_path / "it's [a] *.parquet"
    pq.write_table(TABLE, path)
    pq.write_table(TABLE, tmp_path / "it's a x.parquet")
    assert ask("select count(*) n from t", t=path).to_pylist() == [{"n": 4}]


# No way out


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    pq.write_table(pa.table({"secret": [1]}), tmp_path / "secret.parquet")
    (tmp_path / "secret.csv").write_text("secret\n1\n")
    return tmp_path


@pytest.mark.parametrize(
    "sql",
    [
        "select * from '{0}/secret.parquet'",
        "select * from read_parquet('{0}/secret.parquet')",
        "select * from read_parquet('{0}/*.parquet')",
        "select * from read_csv('{0}/secret.csv')",
        "select * from read_text('/etc/hosts')",
        "select * from read_blob('/etc/hosts')",
        "select * from read_json('{0}/secret.csv')",
        "select * from glob('{0}/*')",
        "select * from 'http://127.0.0.1:9/x.parquet'",
        "select * from read_csv('https://example.org/x.csv')",
        "select * from read_parquet('s3://bucket/x.parquet')",
        "select * from parquet_metadata('{0}/secret.parquet')",
        "select * from sniff_csv('{0}/secret.csv')",
        "select * from duckdb_extensions()",
        "select * from query('select * from ''{0}/secret.parquet''')",
        "select * from query_table('{0}/secret.parquet')",
        "select getenv('HOME')",
        "select * from TABLE",
        "select * from secret_variable",
        "select * from which_secret('s3://x', 's3')",
    ],
)
def test_a_question_reads_nothing_but_its_tables(files, secret, sql):
    secret_variable = TABLE  # noqa: F841 - DuckDB could see the caller's variables
    with pytest.raises((UsageError, DataError)) as caught:
        ask(sql.format(secret), t=files / "rows-00000.parquet")
    assert caught.value.hint
    assert "secret: int64" not in str(caught.value)


@pytest.mark.parametrize(
    "sql",
    [
        "copy t to '{0}/out.csv'",
        "copy (select 1) to '{0}/t.parquet'",
        "explain analyze copy t to '{0}/t.parquet'",
        "export database '{0}/out'",
        "attach '{0}/out.db'",
        "create table x as select 1",
        "insert into t values (1)",
        "delete from t",
        "drop view t",
        "update t set a = 1",
        "install httpfs",
        "load httpfs",
        "set enable_external_access = true",
        "set allowed_paths = ['/']",
        "pragma enable_profiling",
        "call pragma_version()",
        "select 1; select 2",
        "select 1; copy t to '{0}/out.csv'",
        "",
        "selec 1",
        "prepare x as select 1",
        "create secret (type s3)",
        "vacuum",
    ],
)
def test_a_question_changes_nothing(files, sql):
    path = files / "t.parquet"
    pq.write_table(TABLE, path)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files.iterdir()}
    with pytest.raises(UsageError) as caught:
        ask(sql.format(files), t=path)
    assert caught.value.hint
    assert caught.value.exit_code == 2
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files.iterdir()} == before


def test_names_that_are_not_there_are_told_with_the_tables(files):
    with pytest.raises(UsageError, match="nothing") as caught:
        ask("select * from nothing", rows=files / "rows-00000.parquet")
    assert "tables: rows" in str(caught.value.hint)
    with pytest.raises(UsageError, match="aa"):
        ask("select aa from t", t=TABLE)


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        ("reviws", "did you mean 'reviews'? tables: reviews, movies"),
        ("data", "tables: reviews, movies"),
        ("pg_databas", "tables: reviews, movies"),
    ],
)
def test_only_our_own_tables_are_proposed(asked, hint):
    with pytest.raises(UsageError) as caught:
        ask(f"select * from {asked}", reviews=TABLE, movies=TABLE)
    assert caught.value.message == f"the question does not fit the tables: there is no table {asked!r}"
    assert caught.value.hint == hint


def test_a_question_that_fails_on_the_rows_says_so(files):
    with pytest.raises(DataError, match="the question failed"):
        ask("select cast(b as int) from t", t=TABLE)


def test_tables_that_cannot_be_read_are_refused(tmp_path, files):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    for source in (tmp_path / "bad.parquet", tmp_path / "gone.parquet", [], tmp_path / "x.txt"):
        with pytest.raises(SourceError) as caught:
            ask("select 1", t=source)
        assert caught.value.hint
    with pytest.raises(SourceError, match="cannot be read from") as caught:
        ask("select 1", t=[files / "small.csv", files / "rows-00000.parquet"])
    assert "one kind" in str(caught.value.hint)


def test_nothing_is_left_behind(files, monkeypatch, tmp_path):
    spill = tmp_path / "spill"
    spill.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spill))
    ask("select * from t", t=files / "rows-00000.parquet")
    with pytest.raises(UsageError):
        ask("drop table x")
    assert list(spill.iterdir()) == []


# Names of tables


def test_files_of_one_name_are_one_table(files):
    (files / "notes.txt").write_text("no table")
    found = {name: [path.name for path in paths] for name, paths in tables_in(files).items()}
    assert found == {
        "lines": ["lines.jsonl"],
        "mapped": ["mapped.arrow"],
        "rows": ["rows-00000.parquet", "rows-00001.parquet"],
        "small": ["small.csv"],
        "stream": ["stream.arrow"],
        "data": ["rows-00000.parquet", "rows-00001.parquet"],
    }
    assert table_name(Path("a-b-007.x.csv")) == "a-b-007.x"
    assert list(tables_in(files / "small.csv")) == ["small", "data"]
    with pytest.raises(SourceError, match="holds no table"):
        tables_in(files / "notes.txt")
    (files / "empty").mkdir()
    with pytest.raises(SourceError, match="holds no table"):
        tables_in(files / "empty")


def test_the_missing_extra_is_named():
    code = (
        "import sys; sys.modules['duckdb'] = None\n"
        "from marrow.core.errors import MarrowError\nfrom marrow.data.sql import query\n"
        "try:\n    query('select 1', {})\nexcept MarrowError as error:\n    print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 'pip install "marrow[sql]"' in told
