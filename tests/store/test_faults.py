"""kill -9 at any moment: the store is the old one or the new one, never in between.

A driver process forks victims, so that forty of them cost less than forty Pythons. In the first
test a victim kills itself at its n-th operation on the file system, for every n there is; in the
second the driver kills it at random moments while it publishes in a loop.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from marrow.core.records import Artifact
from marrow.store.store import Store

DRIVER = """
import os, random, signal, sys, time
from pathlib import Path
from marrow.core.records import Parent
from marrow.store.steps import Step, run_step
from marrow.store.store import Store
import marrow.store.version
marrow.store.version.code_version()

home, how = Path(sys.argv[1]), sys.argv[2]

def build(workspace, number):
    checkpoint = workspace.work / "checkpoint"
    checkpoint.write_text("kept")
    for name in "abc":
        (workspace.out / name).write_text(f"{name} of {number} " * 500)
    (workspace.out / "shared").write_text("the same in all")
    return {"number": number}

def chain(store, first, count):
    parents = ()
    for number in range(first, first + count):
        step = Step("link", lambda w, n=number: build(w, n), parents=parents, config=number)
        artifact = run_step(store, step).artifact
        store.view(artifact)
        store.name(artifact, "latest")
        parents = (Parent("before", artifact.id),)

def victim(body):
    child = os.fork()
    if child == 0:
        try:
            body()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child

def at_operation(n):
    # Audit events are raised before the operation: n = 1, 2, ... is a kill before each of them.
    seen = 0
    watched = ("open", "os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir", "os.symlink",
               "os.truncate", "fcntl.flock", "shutil.rmtree", "sqlite3.connect")
    def hook(event, arguments):
        nonlocal seen
        ours = event == "fcntl.flock" or (arguments and str(arguments[0]).startswith(str(home)))
        if event in watched and ours:
            seen += 1
            if seen == n:
                os.kill(os.getpid(), signal.SIGKILL)
    def body():
        sys.addaudithook(hook)
        with Store.open(home / f"{n:03d}") as store:
            chain(store, 0, 1)
    return body

def forever():
    number = random.randrange(10**9)
    with Store.open(home) as store:
        chain(store, number, 10**9)

if how == "operations":
    n = 0
    while True:
        n += 1
        _, status = os.waitpid(victim(at_operation(n)), 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        def again():
            with Store.open(home / f"{n:03d}") as store:
                chain(store, 0, 1)
        _, status = os.waitpid(victim(again), 0)
        assert status == 0, n
    print(n)
else:
    kills = int(how)
    start_s = time.monotonic()
    def two():
        with Store.open(home) as store:
            chain(store, 0, 2)
    assert os.waitpid(victim(two), 0)[1] == 0
    two_s = time.monotonic() - start_s  # so that the moments scale with a slow machine
    for _ in range(kills):
        child = victim(forever)
        time.sleep(random.uniform(0.0, 2 * two_s))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), status
    print(kills)
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """Lie in memory where there is such a folder: a kill, unlike a power cut, forgets no write."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder) / "home"


def assert_whole(home: Path) -> list[Artifact]:
    """Check every promise that a store makes about its folder, after a sweep and a collection."""
    with Store.open(home) as store:
        store.collect()
        assert store.blobs.check() == []
        artifacts = store.catalog.latest(limit=10_000)
        assert set(store.blobs.digests()) == {file.sha256 for a in artifacts for file in a.files}
        for artifact in artifacts:
            assert store.verify(artifact) == ()
            view = store.view(artifact)
            assert sorted(path.name for path in view.iterdir()) == ["a", "b", "c", "shared"]
            assert (view / "b").read_text() == f"b of {artifact.facts['number']} " * 500
        for named in store.catalog.names():
            store.get(named.artifact_id)
        views = sorted(path.name for path in (home / "views").iterdir())
        assert views == sorted(artifact.id for artifact in artifacts)
    assert list((home / "staging").iterdir()) == []
    assert list(home.rglob(".tmp-*")) == []
    return artifacts


@pytest.mark.slow
def test_killed_before_any_file_operation_the_same_command_ends_whole(
    home: Path, spawn: Callable[..., Any]
) -> None:
    (count,) = spawn(DRIVER, home, "operations").result()
    assert int(count) > 30
    ids = set()
    for folder in sorted(home.iterdir()):
        (artifact,) = assert_whole(folder)
        assert list((folder / "work").iterdir()) == []
        ids.add(artifact.id)
    assert len(ids) == 1, "every unbroken and every resumed run gives the same artifact"


@pytest.mark.slow
def test_killed_40_times_at_random_nothing_half_looks_whole(home: Path, spawn: Callable[..., Any]) -> None:
    assert spawn(DRIVER, home, 40).result() == ["40"]
    # Work folders of keys that never come again stay until they have aged.
    for folder in (home / "work").iterdir():
        assert [path.read_text() for path in folder.iterdir()] in ([], ["kept"], [""])
    assert len(assert_whole(home)) > 10


@pytest.mark.slow
def test_killed_4_times_at_random_the_store_is_whole(home: Path, spawn: Callable[..., Any]) -> None:
    assert spawn(DRIVER, home, 4).result() == ["4"]
    assert_whole(home)
