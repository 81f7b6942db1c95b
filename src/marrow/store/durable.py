"""Many files made durable at once.

One `fsync` waits for the disk; 2,500 of them wait 2,500 times. `syncfs` asks the file system to
write all that is dirty and waits once. Few files are still flushed one by one, so that a small
commit does not wait for what other programs have written meanwhile.
"""

import os
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from marrow.core.files import fsync

ONE_BY_ONE = 16  # up to that many files and folders


def make_durable(paths: Iterable[Path]) -> None:
    """Return once the files and folders of one file system are on the device.

    Raises: OSError if the device refused a write, as fsync does.
    """
    waiting = list(dict.fromkeys(paths))
    sync = _syncfs() if len(waiting) > ONE_BY_ONE else None
    if sync is None:
        for path in waiting:
            fsync(path)
        return
    descriptor = os.open(waiting[0], os.O_RDONLY)
    try:
        if sync(descriptor) != 0:
            import ctypes

            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(waiting[0]))
    finally:
        os.close(descriptor)


@cache
def _syncfs() -> Any:
    """Return libc's syncfs, None where there is none (macOS)."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes  # 10 ms that opening a store need not pay

    return getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
