"""Verbs that only read work on a store that may not be written, and leave it as it was."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from marrow.cli.main import run
from marrow.core.errors import NotPermitted
from marrow.store.store import Store
from marrow.store.versions.versions import Versions

NOBODY = 65534


@pytest.fixture
def sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Two versions of a dataset in a store; calling it takes the right to write away."""
    home = tmp_path / "home"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARROW_HOME", str(home))
    (scratch := tmp_path / "tmp").mkdir()
    scratch.chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    folder = tmp_path / "ds"
    folder.mkdir()
    (folder / "a.csv").write_text("n\n1\n2\n")
    with Store.open(home) as store:
        Versions(store).commit(folder, "d")
        (folder / "a.csv").write_text("n\n1\n3\n")
        Versions(store).commit(folder, "d")
    for path in [tmp_path, *tmp_path.parents]:  # others must be able to come here
        if path.stat().st_uid == os.getuid() and path != Path("/"):
            path.chmod(path.stat().st_mode | 0o055)
    modes = {path: path.stat().st_mode for path in [home, *home.rglob("*")]}

    def seal() -> None:
        for path in modes:
            path.chmod(0o555 if path.is_dir() else 0o444)
        if os.geteuid() == 0:  # who may do everything
            os.seteuid(NOBODY)

    yield seal
    if os.getuid() == 0:
        os.seteuid(0)
    for path, mode in modes.items():
        path.chmod(mode)


VERBS = [
    ("data", "log", "d", "--json"),
    ("data", "show", "d", "--json"),
    ("data", "diff", "d@1", "d@2", "--json"),
    ("data", "profile", "d@1", "--json"),
    ("data", "sql", "d@1", "select max(n) m from data", "--json"),
    ("lineage", "d", "--json"),
    ("lineage", "--file", "ds/a.csv", "--json"),
]


def test_reading_verbs_say_the_same(sealed: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> None:
    def answers() -> list[object]:
        found = []
        for verb in VERBS:
            status = run(list(verb))
            shown = capsys.readouterr()
            assert status == 0, shown.err
            found.append(json.loads(shown.out))
        return found

    wanted = answers()
    home = Path(os.environ["MARROW_HOME"])
    before = {path: path.lstat().st_mtime_ns for path in [home, *home.rglob("*")]}
    sealed()
    assert answers() == wanted
    assert {path: path.lstat().st_mtime_ns for path in [home, *home.rglob("*")]} == before
    assert list((home.parent / "tmp").iterdir()) == []


def test_a_writing_verb_is_refused_with_a_hint(
    sealed: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    sealed()
    for verb in (("data", "commit", "ds", "--to", "d"), ("data", "tag", "d", "v1")):
        assert run(list(verb)) == NotPermitted.exit_code
        assert "permission" in capsys.readouterr().err


def test_what_is_only_in_the_log_of_the_catalog_is_read_too(sealed: Callable[[], None]) -> None:
    """A killed writer leaves the log behind; without it the last version would be missing."""
    home = Path(os.environ["MARROW_HOME"])
    with Store.open(home) as writer:
        Path("ds/a.csv").write_text("n\n7\n")
        Versions(writer).commit(Path("ds"), "d")
        assert (home / "catalog.sqlite-wal").stat().st_size
        own = os.geteuid()
        sealed()
        try:
            with Store.open(home, create=False, reading=True) as store:
                assert Versions(store).label(Versions(store).resolve("d")) == "d@3"
        finally:
            os.seteuid(own)
            for path in (home / "staging", home / "locks"):  # the writer's own, as it closes
                path.chmod(0o755)
