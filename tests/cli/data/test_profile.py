"""`marrow data profile`, `drift` and `sql`: targets, outputs and refusals."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ordinary import ordinary_user

from marrow.cli.main import VERBS, run
from marrow.store.store import Store

TABLE = pa.table({"kind": ["a", "b", "a", None], "size": [1, 2, 3, 4], "t": [float("nan"), 1.5, 2.0, None]})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with one table in two files and another one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(VERBS, "data", ("marrow.cli.data.group", "Keep, compare and check datasets."))
    monkeypatch.setenv("MARROW_HOME", str(tmp_path / "home"))
    (tmp_path / "set").mkdir()
    pq.write_table(TABLE, tmp_path / "set" / "rows-00000.parquet")
    pq.write_table(TABLE.slice(0, 1), tmp_path / "set" / "rows-00001.parquet")
    (tmp_path / "set" / "other.csv").write_text("x\n1\n")
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert run(["data", *arguments]) == code
    shown = capsys.readouterr()
    return shown.out, shown.err


@pytest.mark.parametrize("target", ["set", "set/rows-*.parquet"])
def test_a_profile_is_shown_printed_and_written(folder, capsys, target):
    out, _ = told(capsys, "profile", target)
    assert out.splitlines()[0] == "5 rows, 3 columns"
    assert out.splitlines()[2].split() == [
        "kind",
        "string",
        "20.0%",
        "2",
        "a",
        "1",
        "characters",
        "b",
        "a",
        "(3)",
    ]
    out, err = told(capsys, "profile", target, "--json", "--out", "made/here")
    assert json.loads(out)["rows"] == 5
    assert "profile.html" in err
    assert json.loads((folder / "made/here/profile.json").read_text()) == json.loads(out)
    assert (folder / "made/here/profile.html").read_text().startswith("<!doctype html>")


def test_broken_rows_of_a_text_are_told_beside_the_answer(folder, capsys):
    (folder / "odd.csv").write_bytes("n;t\n1;a\n2;b\n3;c;d\n".encode("utf-16"))
    out, err = told(capsys, "profile", "odd.csv")
    assert out.splitlines()[0] == "2 rows, 2 columns"
    assert "warning: 1 broken row is left out" in err and "line 4 of odd.csv" in err
    out, err = told(capsys, "sql", "odd.csv", "select max(n) s from data", "--json")
    assert json.loads(out) == {"s": 2}
    assert "warning: 1 broken row is left out" in err


def test_one_of_several_tables_is_chosen(folder, capsys):
    assert told(capsys, "profile", "set", "--table", "other")[0].startswith("1 rows, 1 columns")
    _, err = told(capsys, "profile", "set", "--table", "nope", code=2)
    assert "set has no table 'nope'" in err
    assert "hint: tables: other, rows" in err
    (folder / "set" / "rows-00000.parquet").rename(folder / "set" / "a.parquet")
    (folder / "set" / "rows-00001.parquet").rename(folder / "set" / "b.parquet")
    _, err = told(capsys, "profile", "set", code=2)
    assert "choose one with --table: a, b, other" in err


def test_drift_is_told_and_may_end_with_a_status(folder, capsys):
    for name, kinds in (("old", ["a"] * 300 + ["b"] * 100), ("new", ["a"] * 100 + ["b"] * 300)):
        pq.write_table(pa.table({"kind": kinds, "n": list(range(400))}), f"{name}.parquet")
    out, _ = told(capsys, "drift", "old.parquet", "new.parquet")
    assert out.startswith("drift: 400 rows before, 400 now")
    assert out.splitlines()[2].split()[:2] == ["kind", "drift"]
    assert out.splitlines()[3].split()[:2] == ["n", "same"]
    told(capsys, "profile", "old.parquet", "--out", "p")
    out, _ = told(capsys, "drift", "p/profile.json", "new.parquet", "--json", "--check", "--out", "d", code=1)
    assert json.loads(out) == json.loads((folder / "d/drift.json").read_text())
    assert (folder / "d/drift.html").is_file()
    told(capsys, "drift", "old.parquet", "old.parquet", "--check")
    assert told(capsys, "drift", "old.parquet", "new.parquet", "--psi", "9")[0].startswith("same")


def test_sql_answers_in_every_form(folder, capsys):
    question = "select kind, count(*) n, max(t) t from data group by kind order by n desc, kind"
    out, _ = told(capsys, "sql", "set", question)
    assert [line.split() for line in out.splitlines()] == [
        ["kind", "n", "t"],
        ["a", "3", "nan"],
        ["b", "1", "1.5"],
        ["1"],
    ]
    out, _ = told(capsys, "sql", "set", question, "--json")
    assert [json.loads(line) for line in out.splitlines()] == [
        {"kind": "a", "n": 3, "t": None},
        {"kind": "b", "n": 1, "t": 1.5},
        {"kind": None, "n": 1, "t": None},
    ]
    for name in ("a.parquet", "a.csv", "a.jsonl", "a.arrow"):
        _, err = told(capsys, "sql", "set", question, "--out", name)
        assert f"wrote 3 rows to {name}" in err
        assert told(capsys, "sql", name, "select sum(n) from data")[0].split()[1] == "5"


def test_sql_prints_csv(folder, capfdbinary):
    assert run(["data", "sql", "set", "select size from rows order by size", "--csv"]) == 0
    assert capfdbinary.readouterr().out.splitlines() == [b'"size"', b"1", b"1", b"2", b"3", b"4"]


def test_a_large_answer_is_cut_on_the_terminal_alone(folder, capsys):
    out, err = told(capsys, "sql", "set", "select * from range(100) r(i)")
    assert len(out.splitlines()) == 41
    assert "100 rows, the first 40 are shown" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("sql", "set", "drop table rows"), 2, "only one SELECT is run, not DROP"),
        (("sql", "set", "select * from nothing"), 2, "tables: other, rows, data"),
        (("sql", "set", "select * from '/etc/hosts.csv'"), 2, "may not do that"),
        (("sql", "set", "select 1", "--out", "x.txt"), 2, "end it in one of .parquet"),
        (("sql", "set", "select 1", "--csv", "--json"), 2, "exclude each other"),
        (("sql", "nowhere", "select 1"), 1, "nowhere"),
        (("profile", "nowhere.parquet"), 1, "nowhere.parquet"),
        (("drift", "set", "set", "--psi", "-1"), 2, "psi"),
        (("profile", "home"), 1, "home"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_hint(folder, capsys, arguments, code, words):
    _, err = told(capsys, *arguments, code=code)
    assert words in err
    assert not (folder / "x.txt").exists()


def test_controls_in_values_do_not_reach_the_terminal(folder, capsys):
    pq.write_table(pa.table({"\x1b[31m": ["\x1b[2J", "\x1b[2J", "\x07"]}), "evil.parquet")
    for arguments in (("profile", "evil.parquet"), ("sql", "evil.parquet", "select * from data")):
        assert "\x1b" not in told(capsys, *arguments)[0]


def test_an_engine_gives_the_same_profile(folder, capsys):
    target = next(str(path) for path in sorted(folder.rglob("*.parquet")))
    inline, _ = told(capsys, "profile", target, "--json")
    assert told(capsys, "profile", target, "--json", "--engine", "threads", "--workers", "2")[0] == inline
    _, err = told(capsys, "profile", target, "--engine", "magic", code=2)
    assert "there is no engine 'magic'" in err


def test_a_file_that_is_not_there_is_called_a_file(folder, capsys):
    Store.open(folder / "home").close()
    _, err = told(capsys, "profile", "none.csv", code=1)
    assert "there is no file none.csv" in err
    assert "hint: " in err


@pytest.mark.parametrize("verb", [("profile",), ("sql", "select 1 from data")])
def test_a_table_that_may_not_be_read_is_said(folder, capsys, verb):
    (folder / "set").chmod(0)
    with ordinary_user():
        _, err = told(capsys, verb[0], "set/other.csv", *verb[1:], code=1)
    (folder / "set").chmod(0o700)
    assert "no permission at set/other.csv" in err
    assert "readable" in err


def test_hidden_files_are_no_tables(folder, capsys):
    (folder / "set" / ".hidden.csv").write_text("x\n1\n")
    (folder / "set" / ".cache").mkdir()
    (folder / "set" / ".cache" / "more.csv").write_text("x\n1\n")
    _, err = told(capsys, "sql", "set", "select * from nothing", code=2)
    assert "tables: other, rows" in err.replace(", data", "")
