"""A finished miniature run, made once per test process, and a way to call the command line."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from marrow_process import TINY, Marrow, command, environment, write_csv

from marrow.store.lock import FileLock


@pytest.fixture(scope="session")
def csv_source(shared: Path) -> Path:
    """A folder with a CSV file of 400 different rows of text."""
    folder = shared / "cli-source"
    with FileLock(shared / "cli.lock"):
        if not folder.exists():
            folder.mkdir()
            write_csv(folder / "notes.csv", 400)
    return folder


@pytest.fixture
def marrow(tmp_path: Path) -> Marrow:
    """Call `marrow` in a process of its own, with a store in the test's folder."""

    def call(*arguments: str | Path, home: Path | None = None, text: str | None = None) -> Any:
        return subprocess.run(
            command(*arguments),
            capture_output=True,
            text=True,
            input="" if text is None else text,
            env=environment(home or tmp_path / "home"),
            cwd=tmp_path,
            timeout=200,
            check=False,
        )

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, shared: Path, csv_source: Path) -> Path:
    """The store of a finished run of the miniature recipe; tests that change it take `home`.

    One test process makes it, each has a copy of its own.
    """
    made = shared / "cli-finished"
    with FileLock(shared / "cli.lock"):
        if not made.exists():
            done = subprocess.run(
                command("run", TINY, "--set", f"data.source={csv_source}"),
                capture_output=True,
                text=True,
                env=environment(shared / "cli-making"),
                timeout=200,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            (shared / "cli-making").rename(made)
    home = tmp_path_factory.mktemp("finished") / "home"
    shutil.copytree(made, home, symlinks=True)
    return home


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished run's store."""
    copy = tmp_path / "home"
    shutil.copytree(finished, copy, symlinks=True)
    yield copy
    shutil.rmtree(copy)


@pytest.fixture
def tiny() -> Path:
    """The miniature recipe."""
    return TINY
