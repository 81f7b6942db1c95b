"""Atomic publishing: a file or folder is either the old one or the new one, never in between.

Write beside the target, fsync, rename, fsync the parent. A crash leaves at most a name that
begins with `.tmp-`, which `sweep` removes when its writer is gone.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

TEMPORARY = ".tmp-"


def temporary_beside(target: Path) -> Path:
    """Name a temporary in the target's folder that tells which process made it."""
    return target.parent / f"{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex[:12]}"


@contextmanager
def atomic_file(target: Path, mode: Literal["w", "wb"] = "wb") -> Iterator[IO[Any]]:
    """Open a file for writing that appears at `target` only when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    try:
        with open(temporary, mode, encoding="utf-8" if mode == "w" else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill that appears at `target` only when the block ends well.

    An existing folder at `target` is replaced: it is first renamed away, so that a crash between
    the two renames leaves no folder rather than a mixed one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if not path.is_symlink():
                fsync(path)
        fsync(temporary)
        if target.exists():
            old = temporary_beside(target)
            target.rename(old)
            publish(temporary, target)
            shutil.rmtree(old)
        else:
            publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target` and make the new name durable."""
    temporary.rename(target)
    fsync(target.parent)


def fsync(path: Path) -> None:
    """Flush a file or folder to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> int:
    """Remove temporaries in `folder` whose writer no longer lives; return how many."""
    removed = 0
    for path in folder.glob(f"{TEMPORARY}*"):
        owner = path.name.removeprefix(TEMPORARY).split("-")[0]
        if owner.isdigit() and is_running(int(owner)):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed += 1
    return removed


def is_running(pid: int) -> bool:
    """Tell whether a process of this host is alive."""
    if pid <= 0:  # 0 would ask for our own process group
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
