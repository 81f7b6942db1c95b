"""kill -9 at random moments of commit, merge, gc, push, pull and checkout; `make soak` does it 200 times."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marrow.store.store import Store
from marrow.store.versions.versions import Versions

DRIVER = Path(__file__).parents[1] / "support" / "dataset_faults.py"


def kill(times: int) -> str:
    memory = Path("/dev/shm")  # a kill, unlike a power cut, forgets no write
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as base:
        done = subprocess.run(
            [sys.executable, "-W", "error", DRIVER, Path(base) / "faults", str(times)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_killed_twice_both_stores_are_whole() -> None:
    assert kill(2).startswith("2 kills")


@pytest.mark.slow
def test_killed_40_times_both_stores_are_whole() -> None:
    assert kill(40).startswith("40 kills")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_killed_200_times_both_stores_are_whole() -> None:
    assert kill(200).startswith("200 kills")


GC = """
import sys
from pathlib import Path
from marrow.store.store import Store
with Store.open(Path(sys.argv[1])) as store:
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(6):
        store.collect()
"""


def test_two_collections_and_a_commit_at_once_lose_nothing(
    home: Path, folder: Path, spawn: Callable[..., Any]
) -> None:
    with Store.open(home) as store:
        versions = Versions(store)
        versions.commit(folder, "d", "0")
        collectors = [spawn(GC, home) for _ in range(2)]
        for collector in collectors:
            assert collector.line() == "ready"
            collector.go()
        for number in range(6):
            (folder / "changing").write_text(f"{number}" * 100)
            versions.commit(folder, "d", f"{number + 1}")
        for collector in collectors:
            collector.result()
        assert [v.facts["message"] for v in versions.log("d")] == [str(n) for n in range(6, -1, -1)]
        assert versions.verify().missing == {}
        assert store.collect().num_blobs == 0


MANY = """
import resource, sys
from pathlib import Path
from marrow.store.store import Store
from marrow.store.versions.versions import Versions
import marrow.store.version, marrow.store.versions.transfer
with Store.open(Path(sys.argv[1])) as store:
    versions = Versions(store)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = versions.commit(Path(sys.argv[2]), "many")
    print(done.version.facts["files"], (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.slow
def test_100k_files_are_committed_in_bounded_memory(spawn: Callable[..., Any], tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as base:
        folder = Path(base) / "folder"
        for number in range(100_000):
            if number % 1000 == 0:
                (folder / f"{number // 1000:03d}").mkdir(parents=True)
            (folder / f"{number // 1000:03d}" / f"{number:06d}.json").write_bytes(b"%d" % number)
        (line,) = spawn(MANY, Path(base) / "home", folder).result()
    files, mib = map(int, line.split())
    assert files == 100_000
    # About 1 KiB a file: its entry, stamp and line, and where it lies in a pack.
    assert mib < 150
