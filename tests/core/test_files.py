"""Atomic files and folders: killed at any moment, the target is the old one or the new one, whole."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from marrow.core.files import (
    TEMPORARY,
    atomic_file,
    atomic_folder,
    is_running,
    sweep,
    temporary_beside,
)

# Writes generation after generation until it is killed; a generation is one letter, 200 kB of it.
WRITE_FILES = """
import sys
from pathlib import Path
from marrow.core.files import atomic_file
target = Path(sys.argv[1])
print("ready", flush=True)
while True:
    for letter in "abcdefgh":
        with atomic_file(target, "w") as file:
            for _ in range(20):
                file.write(letter * 10_000)
"""
WRITE_FOLDERS = """
import sys
from pathlib import Path
from marrow.core.files import atomic_folder
target = Path(sys.argv[1])
print("ready", flush=True)
while True:
    for letter in "abcdefgh":
        with atomic_folder(target) as folder:
            (folder / "sub").mkdir()
            for name in ("one", "two", "sub/three"):
                (folder / name).write_text(letter * 20_000)
"""


def killed_at_random(script: str, target: Path, seed: int, within_s: float = 0.03) -> int:
    """Start a writer, kill -9 it somewhere in its work, return its pid."""
    process = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(random.Random(seed).uniform(0, within_s))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    return process.pid


def test_a_file_is_old_or_new_and_whole_wherever_its_writer_is_killed(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    seen = set()
    for seed in range(12):
        killed_at_random(WRITE_FILES, target, seed)
        text = target.read_text()
        assert text == "old" or (len(text) == 200_000 and len(set(text)) == 1), f"torn: {len(text)} bytes"
        seen.add(text[:1])
        sweep(tmp_path)
        assert os.listdir(tmp_path) == ["file"]
    assert len(seen) > 1  # the kills did hit the work


@pytest.mark.slow
def test_a_folder_is_whole_or_absent_wherever_its_writer_is_killed(tmp_path):
    target = tmp_path / "folder"
    seen = set()
    for seed in range(12):
        killed_at_random(WRITE_FOLDERS, target, seed, within_s=0.15)
        if target.exists():
            files = sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file())
            assert files == ["one", "sub/three", "two"]
            texts = {(target / name).read_text() for name in files}
            assert len(texts) == 1
            assert len(texts.pop()) == 20_000
            seen.add((target / "one").read_text()[0])
        sweep(tmp_path)
        assert os.listdir(tmp_path) in ([], ["folder"])
    assert len(seen) > 1


def test_a_block_that_raises_leaves_the_old_file_and_no_leftovers(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def write() -> None:
        with atomic_file(target) as file:
            file.write(b"new")
            file.flush()
            assert target.read_bytes() == b"old"
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_block_that_raises_leaves_the_old_folder_and_no_leftovers(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").write_text("x")

    def write() -> None:
        with atomic_folder(target) as folder:
            (folder / "new").write_text("x")
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert [p.name for p in target.iterdir()] == ["old"]
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_appears_only_at_the_end_with_its_text_and_its_folders(tmp_path):
    target = tmp_path / "deep" / "er" / "file"
    with atomic_file(target, "w") as file:
        file.write("größe\n")
        assert not target.exists()
    assert target.read_bytes() == "größe\n".encode()
    assert os.listdir(target.parent) == ["file"]


def test_a_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "deep" / "folder"
    for name in ("first", "second"):
        with atomic_folder(target) as folder:
            (folder / name).write_text(name)
            (folder / "link").symlink_to("nowhere")  # a dangling link has nothing to flush
    assert sorted(p.name for p in target.iterdir()) == ["link", "second"]
    assert os.listdir(target.parent) == ["folder"]


def test_files_have_the_permissions_that_the_umask_gives(tmp_path):
    """Others of the same machine may read what is published, as with any file that is opened."""
    with atomic_file(tmp_path / "file") as file:
        file.write(b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_writers_at_once_leave_one_of_their_files(tmp_path):
    target = tmp_path / "file"
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITE_FILES, str(target)], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        until = time.monotonic() + 5
        while not target.exists() and time.monotonic() < until:
            time.sleep(0.01)
        for _ in range(20):
            text = target.read_text()
            assert len(text) == 200_000
            assert len(set(text)) == 1
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def test_sweep_removes_what_dead_writers_left_and_nothing_else(tmp_path):
    dead = killed_at_random("print('ready', flush=True); import time; time.sleep(60)", tmp_path / "x", 0)
    (tmp_path / f"{TEMPORARY}{dead}-aaa").write_text("x")
    (tmp_path / f"{TEMPORARY}{dead}-bbb").mkdir()
    (tmp_path / f"{TEMPORARY}{dead}-bbb" / "file").write_text("x")
    (tmp_path / f"{TEMPORARY}noone-ccc").write_text("x")
    (tmp_path / f"{TEMPORARY}{dead}-link").symlink_to(tmp_path / "kept-folder")
    kept = {"kept", "kept-folder", "tmp-1-x", f"{TEMPORARY}{os.getppid()}-theirs"}
    (tmp_path / "kept-folder").mkdir()
    (tmp_path / "kept-folder" / "file").write_text("x")
    for name in kept - {"kept-folder"}:
        (tmp_path / name).write_text("x")
    mine = temporary_beside(tmp_path / "kept")
    mine.write_text("x")
    assert sweep(tmp_path) == 4
    assert set(os.listdir(tmp_path)) == kept | {mine.name}
    assert (tmp_path / "kept-folder" / "file").exists()
    assert sweep(tmp_path) == 0
    assert sweep(tmp_path / "not there") == 0


def test_sweep_knows_a_process_of_another_user_as_alive(tmp_path):
    assert is_running(1)
    assert is_running(os.getpid())
    assert not is_running(2**22 + 1)  # above the kernel's largest pid
    (tmp_path / f"{TEMPORARY}1-x").write_text("x")
    assert sweep(tmp_path) == 0


@pytest.mark.parametrize("pid", ["0", "9" * 30])
def test_sweep_takes_a_name_with_an_impossible_pid_for_a_leftover(tmp_path, pid):
    """kill(0) asks for the whole process group and always answers; a huge number overflows."""
    (tmp_path / f"{TEMPORARY}{pid}-x").write_text("x")
    assert sweep(tmp_path) == 1
