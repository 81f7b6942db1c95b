"""Evicted files that the next fetches are written over.

Pages that are in use are filled several times as fast as pages that the kernel must first find, clear
or, in a virtual machine, get from its host; and a disk's blocks stay where they are. A file is
written over only if nobody can see its bytes: a reader may keep a mapping of a shard longer than its
pin. The kernel knows: it grants a write lease on a file (`man 2 fcntl`, F_SETLEASE) to the
only one who has it open. Where it grants none (another user's file, NFS), the file is removed.

All methods are called under the cache's lock.
"""

import contextlib
import fcntl
import os
import signal
import uuid
from pathlib import Path


class Spares:
    """The spare files of a folder, in the order they are taken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def sizes(self) -> dict[Path, int]:
        """List the files and their bytes."""
        found = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                with contextlib.suppress(FileNotFoundError):
                    found[self.folder / entry.name] = entry.stat(follow_symlinks=False).st_size
        return found

    def first_bytes(self) -> int:
        """Return the bytes of the one that `take` gives; 0 if there is none."""
        return next(iter(self.sizes().values()), 0)

    def add(self, path: Path) -> None:
        """Make a spare of a file; its old name goes."""
        path.rename(self.folder / uuid.uuid4().hex)

    def take(self, path: Path) -> int:
        """Give a spare this name and return it open, with old bytes; -1 if there is none."""
        for spare in self.sizes():
            spare.rename(path)
            descriptor = os.open(path, os.O_RDWR)
            if _is_unseen(descriptor):
                return descriptor
            os.close(descriptor)
            path.unlink()
        return -1

    def trim(self, most_bytes: int) -> int:
        """Remove files until all but the first have so few bytes; return the bytes left."""
        sizes = self.sizes()
        left = sum(sizes.values())
        most_bytes += next(iter(sizes.values()), 0)
        for path, size in reversed(list(sizes.items())[1:]):
            if left <= most_bytes:
                break
            path.unlink(missing_ok=True)
            left -= size
        return left

    def clear(self) -> int:
        """Remove all files; return their bytes."""
        sizes = self.sizes()
        for path in sizes:
            path.unlink(missing_ok=True)
        return sum(sizes.values())


def _is_unseen(descriptor: int) -> bool:
    """Tell whether this is the only open file or mapping of its file, in all processes."""
    if os.fstat(descriptor).st_nlink != 1 or not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        # Who opens a leased file makes the kernel signal its holder: by one that is ignored, not
        # by the usual one, which ends a process.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    return True
