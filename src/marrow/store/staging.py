"""Where unfinished things lie until they are published: one folder per open store.

The owner holds a `FileLock` beside its folder for as long as it lives, so `sweep` can tell a
leftover of a killed process (its lock is free) from work in progress, also in another container.
Everything is on one file system with the blobs, so publishing is a rename.
"""

import shutil
import threading
import uuid
from pathlib import Path

from marrow.core.errors import explain_os_errors
from marrow.store.lock import FileLock

_LOCK = ".lock"


class Staging:
    """Gives fresh paths under a folder that only this owner writes. Made at first use; safe from threads."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder: Path | None = None
        self._lock: FileLock | None = None
        self._next = 0
        self._mutex = threading.Lock()

    def new(self) -> Path:
        """Return a path that does not exist yet, in this owner's folder."""
        with self._mutex:
            return self._new()

    def _new(self) -> Path:
        if self._folder is None:
            folder = self._root / uuid.uuid4().hex[:16]
            lock = FileLock(folder.with_suffix(_LOCK), doing="writing to the store")
            # Lock first: a folder without a held lock is a leftover.
            if not lock.try_acquire():
                raise AssertionError("a fresh name cannot be locked")
            self._lock = lock
            with explain_os_errors("write to the store", folder):
                folder.mkdir()
            self._folder = folder
        self._next += 1
        return self._folder / f"{self._next:06d}"

    def close(self) -> None:
        """Remove what is left of this owner; closing twice is fine."""
        if self._lock is not None:
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._lock.release()
        self._folder = self._lock = None

    def sweep(self) -> int:
        """Remove the folders of owners that no longer live; return how many."""
        if not self._root.is_dir():
            return 0
        removed = 0
        for path in sorted(self._root.glob(f"*{_LOCK}")):
            lock = FileLock(path)
            if lock.try_acquire():
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                lock.release()
                removed += 1
        return removed
