import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from marrow.cli.data.group import VERBS
from marrow.cli.main import VERBS as MAIN
from marrow.cli.main import run

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARROW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MARROW_AUTHOR", "ada")
    monkeypatch.delenv("MARROW_CATALOG", raising=False)
    monkeypatch.setitem(MAIN, "data", ("marrow.cli.data.group", "Keep, compare and check datasets."))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "prices.csv").write_text("id,price\n1,2\n2,3\n")
    (folder / "notes.txt").write_text("first\n")


def data(*arguments: str) -> int:
    return run(["data", *arguments])


def told(capsys: Capture, *arguments: str) -> Any:
    assert data(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def two_versions(capsys: Capture) -> None:
    assert data("commit", "folder", "--to", "d", "-m", "first") == 0
    Path("folder/prices.csv").write_text("id,price\n1,2\n2,4\n3,5\n")
    Path("folder/notes.txt").rename("folder/more.txt")
    assert data("commit", "folder", "--to", "d", "-m", "second") == 0
    capsys.readouterr()


def test_help_lists_every_verb_and_imports_none(capsys: Capture) -> None:
    assert data("--help") == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in VERBS)


@pytest.mark.parametrize("verb", [v for v in VERBS if v not in ("profile", "drift", "sql")])
def test_every_verb_has_help(capsys: Capture, verb: str) -> None:
    assert data(verb, "--help") == 0
    assert "Usage:" in capsys.readouterr().out


def test_a_commit_prints_the_version_and_talks_on_stderr(capsys: Capture) -> None:
    assert data("commit", "folder", "--to", "d", "-m", "first") == 0
    shown = capsys.readouterr()
    assert shown.out == "d@1\n"
    assert "d@1: 2 files, 23 B (+2 ~0 -0)" in shown.err
    assert data("commit", "folder", "--to", "d") == 0
    assert "nothing changed since d@1" in capsys.readouterr().err


def test_log_show_and_status(capsys: Capture) -> None:
    two_versions(capsys)
    log = told(capsys, "log", "d")
    assert [(v["version"], v["message"], v["author"]) for v in log] == [
        ("d@2", "second", "ada"),
        ("d@1", "first", "ada"),
    ]
    assert data("log", "d") == 0
    assert "2 files, 27 B (+0 ~1 -0 1 renamed)  second" in capsys.readouterr().out
    assert {e["name"] for e in told(capsys, "show", "d~1")["entries"]} == {"prices.csv", "notes.txt"}
    assert told(capsys, "status", "folder", "--to", "d") == []
    Path("folder/new").write_text("new")
    assert [c["change"] for c in told(capsys, "status", "folder", "--to", "d")] == ["A"]


def test_diff_shows_files_and_rows(capsys: Capture) -> None:
    two_versions(capsys)
    found = told(capsys, "diff", "d@1", "d@2", "--key", "id")
    assert [(c["change"], c["name"]) for c in found["changes"]] == [("R", "more.txt"), ("M", "prices.csv")]
    rows = found["changes"][1]["rows"]
    assert (rows["added"], rows["removed"], rows["changed"]) == (1, 0, 1)
    assert data("diff", "d~1", "d", "--key", "id") == 0
    shown = capsys.readouterr().out
    assert "+1  -0  ~1  rows (2 -> 3)" in shown
    assert "~ id=2  price=3\n       price=4" in shown
    assert data("diff", "d~1", "d", "--key", "nothing") == 0
    assert "rows not compared: no column 'nothing'" in capsys.readouterr().out
    assert data("diff", "d@1", "d@2", "--files") == 0
    assert "rows (" not in capsys.readouterr().out


def test_branch_merge_and_gate(capsys: Capture) -> None:
    two_versions(capsys)
    assert data("branch", "d@1", "work") == 0
    assert data("checkout", "work", "out") == 0
    Path("out/prices.csv").write_text("id,price\n1,-2\n")
    assert data("commit", "out", "--to", "work", "-m", "wrong") == 0
    capsys.readouterr()
    assert data("merge", "work", "d") == 1
    assert ["--take ours", "theirs"][0] in capsys.readouterr().err
    Path("gate.toml").write_text("[data.expect.price]\nmin = 0\n")
    assert data("merge", "work", "d", "--take", "theirs", "--expect", "gate.toml") == 1
    shown = capsys.readouterr()
    assert "price.range" in shown.err
    assert "-2" in shown.err
    assert shown.out == ""
    assert len(told(capsys, "log", "d")) == 2
    assert data("merge", "work", "d", "--take", "ours", "--expect", "gate.toml") == 0
    assert capsys.readouterr().out == "d@3\n"
    assert data("tag", "d@2", "paper") == 0
    capsys.readouterr()
    assert {(r["name"], r["kind"]) for r in told(capsys, "branch")} == {
        ("d", "branch"),
        ("work", "branch"),
        ("paper", "tag"),
    }
    assert data("branch", "--delete", "paper") == 0
    assert {r["name"] for r in told(capsys, "branch")} == {"d", "work"}


def test_a_version_is_shown_by_the_name_that_was_asked_for(capsys: Capture) -> None:
    """After a merge that only moved the branch, a version has the names of both."""
    told(capsys, "commit", "folder", "--to", "d")
    assert data("branch", "d", "trial") == 0
    capsys.readouterr()
    Path("folder/more.csv").write_text("id\n1\n")
    told(capsys, "commit", "folder", "--to", "trial")
    assert told(capsys, "merge", "trial", "d")["version"] == "d@2"
    assert data("tag", "d", "v1") == 0
    capsys.readouterr()
    for asked, shown in [
        ("d", "d@2"),
        ("trial", "trial@2"),
        ("d~1", "d@1"),
        ("trial@1", "trial@1"),
        ("v1", "v1"),
    ]:
        assert told(capsys, "show", asked)["version"] == shown
    assert told(capsys, "merge", "trial", "d")["version"] == "d@2"
    found = told(capsys, "show", "d")["id"]
    assert told(capsys, "show", found[:10])["version"] in ("d@2", "trial@2", "v1")


def test_a_gate_reads_csv_as_a_run_would(capsys: Capture) -> None:
    """Another dialect, a broken row, no other file beside: Arrow's own reader would refuse it."""
    Path("folder/notes.txt").unlink()
    rows = "".join(f"{n};{n}\n" for n in range(50))
    Path("folder/prices.csv").write_text(f"id;price\n{rows}50;1;2;3\n")
    Path("gate.toml").write_text("[data.expect.price]\nmin = 0\nmax = 60\n")
    assert data("commit", "folder", "--to", "d") == 0
    assert data("branch", "d", "work") == 0
    Path("folder/prices.csv").write_text(f"id;price\n{rows}50;1;2;3\n51;59\n")
    assert data("commit", "folder", "--to", "work") == 0
    capsys.readouterr()
    assert data("merge", "work", "d", "--expect", "gate.toml") == 0
    assert "warning: 1 rows are broken" in capsys.readouterr().err
    Path("folder/prices.csv").write_text(f"id;price\n{rows}51;61\n")
    assert data("commit", "folder", "--to", "work") == 0
    capsys.readouterr()
    assert data("merge", "work", "d", "--expect", "gate.toml") == 1
    assert "price.range" in capsys.readouterr().err


def test_a_commit_to_a_tag_is_refused_even_if_nothing_changed(capsys: Capture) -> None:
    assert data("commit", "folder", "--to", "d") == 0
    assert data("tag", "d", "paper") == 0
    capsys.readouterr()
    assert data("commit", "folder", "--to", "paper") == 1
    assert "'paper' is a tag: it never moves" in capsys.readouterr().err


def test_a_gate_that_expects_nothing_is_a_wrong_command(capsys: Capture) -> None:
    two_versions(capsys)
    Path("empty.toml").write_text("")
    assert data("branch", "d", "work") == 0
    assert data("merge", "work", "d", "--expect", "empty.toml") == 2
    assert "has no expectations" in capsys.readouterr().err


def test_checkout_refuses_to_lose_a_change(capsys: Capture) -> None:
    two_versions(capsys)
    assert told(capsys, "checkout", "d@1", "out")["written"] == 2
    Path("out/prices.csv").write_text("mine")
    assert data("checkout", "d@2", "out") == 1
    shown = capsys.readouterr().err
    assert "prices.csv" in shown
    assert "hint: commit the folder first" in shown
    assert Path("out/prices.csv").read_text() == "mine"
    assert data("checkout", "d@2", "out", "--force") == 0


def test_push_pull_verify_and_gc(capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    two_versions(capsys)
    assert told(capsys, "push", "d", "remote")["versions"] == ["d@1", "d@2"]
    home = tmp_path / "home"
    for path in (home / "packs").iterdir():
        path.chmod(0o644)
        path.write_bytes(b"X" + path.read_bytes()[1:])
    assert data("verify") == 1
    shown = capsys.readouterr()
    assert "d@1: " in shown.out
    assert "marrow data pull" in shown.err
    assert data("pull", "d", "remote") == 0
    assert data("verify") == 0
    capsys.readouterr()
    assert told(capsys, "gc") == {"files": 0, "bytes": 0}
    monkeypatch.setenv("MARROW_HOME", str(tmp_path / "second"))
    assert data("pull", "d", "remote") == 0
    assert capsys.readouterr().out == "d@1\nd@2\n"
    assert data("checkout", "d", "pulled") == 0
    assert Path("pulled/prices.csv").read_bytes() == Path("folder/prices.csv").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["log", "nothing"], 1, "no artifact is called 'nothing'"),
        (["comit", "x"], 2, "Did you mean 'commit'?"),
        (["commit", "absent", "--to", "d"], 1, "does not exist"),
        (["branch", "d"], 2, "needs a beginning and a name"),
        (["push", "d", "ftp://x"], 2, "ftp://"),
    ],
)
def test_what_goes_wrong_is_said_with_a_hint(
    capsys: Capture, arguments: list[str], status: int, said: str
) -> None:
    two_versions(capsys)
    assert data(*arguments) == status
    shown = capsys.readouterr()
    assert said in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_names_that_do_not_print_are_escaped(capsys: Capture) -> None:
    Path("folder/new\nline").write_text("x")
    Path("folder/\udcff").write_text("y")
    assert data("commit", "folder", "--to", "d") == 0
    capsys.readouterr()
    assert data("show", "d") == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 4
    assert "new\\nline" in shown


@pytest.mark.slow
def test_the_verbs_load_neither_torch_nor_arrow(capsys: Capture) -> None:
    two_versions(capsys)
    code = """
import sys
from marrow.cli import main
main.VERBS.setdefault("data", ("marrow.cli.data.group", ""))
status = main.run(["data", *sys.argv[1:]])
heavy = {"torch", "numpy", "pyarrow", "obstore", "rich"}
print(status, "loads", *sorted(heavy & sys.modules.keys()))
"""
    for arguments in (["log", "d"], ["commit", "folder", "--to", "d"], ["checkout", "d", "out"], ["gc"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        assert done.stdout.splitlines()[-1:] == ["0 loads"], done.stderr
