"""The C versions of operators: `csrc/NAME.c`, compiled at first use (`core/native.py`).

`MARROW_KERNELS` set to a path without C switches them off, as `dispatch` does for operators on
tensors. Needs no torch: `data` and `loader` call kernels on numpy and Arrow memory.
"""

import ctypes
import os
from pathlib import Path

from marrow.core import native

_FOLDER = Path(__file__).parent / "csrc"


def load(name: str) -> ctypes.CDLL | None:
    """Return the library of `csrc/NAME.c`; None where it is switched off or cannot be compiled."""
    if os.environ.get("MARROW_KERNELS", "auto") not in ("", "auto", "cpu"):
        return None
    return native.load(_FOLDER / f"{name}.c")
