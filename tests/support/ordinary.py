"""Let root be refused as an ordinary owner of files is.

Root reads and writes what the permission bits forbid by two capabilities of Linux, and a thread may
put them down for a while. The owner stays root, so that files of the test stay its own; other
threads that live already and programs that are started keep the capabilities.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import pytest

VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: two words of 32 bits for each set
DAC = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Run the block under the permission bits of files; skip where root cannot do that."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root may read and write anywhere, and only Linux lets it put that down")
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(VERSION, 0)  # 0: this thread
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    if libc.capget(header, before):
        raise OSError(ctypes.get_errno(), "capget")
    put_down = (ctypes.c_uint32 * 6)(*before)
    put_down[0] &= ~DAC
    if libc.capset(header, put_down):
        raise OSError(ctypes.get_errno(), "capset")
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0
