"""A lock between processes that the kernel releases, however its holder ends.

`flock` on a small file: kill -9 frees it, no clean-up is needed, and it works between containers
that share a folder, where process ids mean nothing. The holder writes its pid and what it does
into the file, so that whoever waits can say for whom.

The exclusive holder removes the file before it lets go, so a waiter may wake up with a lock on
a file that has no name any more; it notices (the inode differs) and tries again.
"""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from marrow.core.errors import explain_os_errors

Say = Callable[[str], None]


class FileLock:
    """An exclusive (or shared) lock on a path; a context manager that waits.

    Two locks on one path exclude each other even inside one process. Not re-entrant.
    Args: doing: what the holder does, told to those who wait, as in "building shards".
        say: called once with a sentence if the lock must be waited for.
    """

    def __init__(self, path: Path, *, doing: str = "", shared: bool = False, say: Say | None = None) -> None:
        self.path = path
        self._doing = doing
        self._mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._say = say
        self._descriptor: int | None = None

    def __enter__(self) -> "FileLock":
        self._take(wait=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def try_acquire(self) -> bool:
        """Take the lock if it is free now; tell whether it was."""
        return self._take(wait=False)

    def release(self) -> None:
        """Let go; releasing twice is fine."""
        if self._descriptor is None:
            return
        if self._mode == fcntl.LOCK_EX:
            self.path.unlink(missing_ok=True)
        # Explicitly, not by close alone: a forked child may still hold the same open file.
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)
        self._descriptor = None

    def _take(self, *, wait: bool) -> bool:
        assert self._descriptor is None, "a FileLock is not re-entrant"
        say = self._say
        while True:
            with explain_os_errors("lock the store", self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                try:
                    fcntl.flock(descriptor, self._mode | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not wait:
                        os.close(descriptor)
                        return False
                    if say is not None:
                        say(f"waiting for {_holder(descriptor)}")
                        say = None
                    fcntl.flock(descriptor, self._mode)
                if _still_named(descriptor, self.path):
                    self._sign(descriptor)
                    self._descriptor = descriptor
                    return True
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _sign(self, descriptor: int) -> None:
        """Write who holds the lock, for those who wait. Only talk: a full disk must not stop it."""
        if self._mode == fcntl.LOCK_SH:
            return
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()} {self._doing}".encode(), 0)
        except OSError:
            return


def _holder(descriptor: int) -> str:
    pid, _, doing = os.pread(descriptor, 500, 0).decode(errors="replace").partition(" ")
    return f"process {pid or 'unknown'}" + (f", which is {doing}" if doing else "")


def _still_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
