import errno
import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marrow.core.errors import ResourceError
from marrow.store.lock import FileLock

HOLD = """
import sys
from pathlib import Path
from marrow.store.lock import FileLock
with FileLock(Path(sys.argv[1]), doing="building shards"):
    print("held")
    sys.stdin.readline()
"""

WAIT = """
import sys
from pathlib import Path
from marrow.store.lock import FileLock
with FileLock(Path(sys.argv[1]), say=print):
    print("mine")
"""

COUNT = """
import sys
from pathlib import Path
from marrow.store.lock import FileLock
lock, counter = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(100):
    with FileLock(lock):
        counter.write_text(str(int(counter.read_text()) + 1))
"""

Spawn = Callable[..., Any]


def test_a_held_lock_is_refused_and_a_released_one_is_free(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "a.lock"
    with FileLock(path):
        assert not FileLock(path).try_acquire()
    second = FileLock(path)
    assert second.try_acquire()
    second.release()
    second.release()


def test_who_waits_is_told_for_whom(tmp_path: Path, spawn: Spawn) -> None:
    path = tmp_path / "a.lock"
    holder = spawn(HOLD, path)
    assert holder.line() == "held"
    waiter = spawn(WAIT, path)
    assert waiter.line() == f"waiting for process {holder.process.pid}, which is building shards"
    holder.go()
    assert waiter.line() == "mine"


def test_kill_9_frees_the_lock(tmp_path: Path, spawn: Spawn) -> None:
    path = tmp_path / "a.lock"
    holder = spawn(HOLD, path)
    holder.line()
    waiter = spawn(WAIT, path)
    waiter.line()
    holder.kill()
    assert waiter.line() == "mine"


def test_who_waits_can_be_interrupted(tmp_path: Path, spawn: Spawn) -> None:
    path = tmp_path / "a.lock"
    with FileLock(path):
        waiter = spawn(WAIT, path)
        assert waiter.line().startswith("waiting for process")
        waiter.process.send_signal(signal.SIGINT)
        assert waiter.process.wait(timeout=20) != 0
        assert "KeyboardInterrupt" in waiter.errors()


def test_many_processes_never_hold_it_together(tmp_path: Path, spawn: Spawn) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    for child in [spawn(COUNT, tmp_path / "a.lock", counter) for _ in range(3)]:
        child.result()
    assert counter.read_text() == "300"


def test_shared_locks_go_together_and_keep_an_exclusive_one_out(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with FileLock(path, shared=True):
        other = FileLock(path, shared=True)
        assert other.try_acquire()
        assert not FileLock(path).try_acquire()
        other.release()
    with FileLock(path):
        assert not FileLock(path, shared=True).try_acquire()


def test_release_leaves_no_file_behind(tmp_path: Path) -> None:
    with FileLock(tmp_path / "a.lock"):
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shared", [False, True])
def test_release_frees_it_although_a_forked_child_has_the_file_open(
    shared: bool, tmp_path: Path, spawn: Spawn
) -> None:
    """Who waits has the file open from before: an exclusive holder removes its name."""
    fork = """
import fcntl, os, sys, time
from pathlib import Path
from marrow.store.lock import FileLock
path, shared = Path(sys.argv[1]), sys.argv[2] == "True"
lock = FileLock(path, shared=shared)
lock.try_acquire()
child = os.fork()
if child == 0:
    time.sleep(60)
waiting = os.open(path, os.O_RDWR)
def is_free():
    try:
        fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
print("before", is_free())
lock.release()
print("after", is_free())
os.kill(child, 9)
os.waitpid(child, 0)
"""
    assert spawn(fork, tmp_path / "a.lock", shared).result() == ["before False", "after True"]


def test_a_lock_file_left_by_a_killed_process_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    path.write_text(f"{os.getpid()} looking alive")
    said: list[str] = []
    with FileLock(path, say=said.append):
        assert said == []


def test_releasing_twice_and_what_was_never_taken_is_fine(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "a.lock")
    lock.release()
    assert lock.try_acquire()
    lock.release()
    lock.release()
    assert lock.try_acquire(), "and it can be taken again"
    lock.release()


def test_an_error_inside_frees_it(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with pytest.raises(ValueError, match="inside"), FileLock(path):
        raise ValueError("inside")
    assert FileLock(path).try_acquire()


def test_a_disk_that_takes_no_signature_stops_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    said: list[str] = []
    with FileLock(tmp_path / "a.lock", doing="building shards"):
        assert not FileLock(tmp_path / "a.lock", say=said.append).try_acquire()
    assert said == [], "only who waits is told"


@pytest.mark.parametrize("refused", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_takes_no_lock_is_an_error_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    def refuse(path: Path, *_: object) -> int:
        raise OSError(refused, os.strerror(refused), str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ResourceError, match="cannot lock the store") as caught:
        FileLock(tmp_path / "a.lock").try_acquire()
    assert "MARROW_HOME" in caught.value.hint


def test_an_interrupted_wait_leaves_no_descriptor_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes while the kernel is asked: the file is closed again, the next one gets the lock."""
    path = tmp_path / "a.lock"
    before = len(os.listdir("/proc/self/fd"))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", interrupt)
        with pytest.raises(KeyboardInterrupt):
            FileLock(path).try_acquire()
    assert len(os.listdir("/proc/self/fd")) == before
    with FileLock(path):
        assert not FileLock(path).try_acquire()


def test_a_lock_on_a_file_that_lost_its_name_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder removed it before this process got the lock: it must lock the file that is there now."""
    path = tmp_path / "a.lock"
    real, taken = fcntl.flock, []

    def flock(descriptor: int, mode: int) -> None:
        real(descriptor, mode)
        taken.append(os.fstat(descriptor).st_ino)
        if len(taken) == 1:
            path.rename(tmp_path / "away")  # keeps its inode, so that the next file has another

    monkeypatch.setattr(fcntl, "flock", flock)
    with FileLock(path):
        assert len(taken) == 2
        assert path.stat().st_ino == taken[1] != taken[0]
        assert not FileLock(path).try_acquire()
    assert not path.exists()


def test_the_file_says_who_holds_it_and_what_for(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.lock"
    with FileLock(path, doing="building shards"):
        assert path.read_text() == f"{os.getpid()} building shards"
    with FileLock(path, shared=True):
        assert path.read_text() == "", "one of many says nothing"
