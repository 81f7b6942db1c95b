"""The C versions of operators: `csrc/NAME.c`, compiled at first use (`core/native.py`).

`MARROW_KERNELS` set to a path without C switches them off, as `dispatch` does for operators on
tensors. Needs no torch: `data` and `loader` call kernels on numpy and Arrow memory. C files that share
their work among threads do it by OpenMP, whose threads are torch's own where torch is loaded.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from marrow.core import native

_FOLDER = Path(__file__).parent / "csrc"
_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "l": ctypes.c_long,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}


def load(name: str) -> ctypes.CDLL | None:
    """Return the library of `csrc/NAME.c`; None where it is switched off or cannot be compiled."""
    if os.environ.get("MARROW_KERNELS", "auto") not in ("", "auto", "cpu"):
        return None
    return native.load(_FOLDER / f"{name}.c")


def unusable(name: str) -> str | None:
    """Say why the C file of an operator cannot be used here, or return None. Compiles it."""
    if native.load(_FOLDER / f"{name}.c") is not None:
        return None
    if native.find_compiler() is None:
        return "there is no C compiler"
    return f"{name}.c cannot be compiled or loaded"


@cache
def function(file: str, name: str, signature: str) -> Callable[..., Any]:
    """Return a C function of `csrc/FILE.c` that returns nothing.

    Args: signature: a letter for each argument: p pointer (an integer: `Tensor.data_ptr()`), l long, i int,
    f float, d double. Raises: RuntimeError where the file cannot be compiled.
    """
    library = native.load(_FOLDER / f"{file}.c")
    if library is None:
        raise RuntimeError(unusable(file))
    found = library[name]
    found.argtypes, found.restype = [_TYPES[letter] for letter in signature], None
    return found


class _Address(int):
    """Where a tensor's memory begins; keeps the tensor while it is an argument of a call."""

    tensor: Any


def pointers(*tensors: Any) -> tuple[int, ...]:
    """Return where the memory of tensors begins; each address keeps its tensor alive, a temporary too."""
    found = []
    for tensor in tensors:
        address = _Address(tensor.data_ptr())
        address.tensor = tensor
        found.append(address)
    return tuple(found)


def type_of(tensor: Any) -> int:
    """Return lanes.h's number for the dtype of a tensor: 0 fp32, 1 bf16."""
    return 1 if tensor.element_size() == 2 else 0


def path(file: str) -> dict[str, Any]:
    """Return what `Operator.add` takes for a C path: CPU only, fp32 and bf16, where its file compiles."""
    import torch  # here: `data` and `loader` use this module without it

    return {
        "devices": ("cpu",),
        "dtypes": (torch.float32, torch.bfloat16),
        "unusable": lambda: unusable(file),
    }
