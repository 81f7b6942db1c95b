"""Triton where it is wanted: the language, the launch, and what a launch would be.

Triton is loaded only where a kernel can run: on a build of torch with CUDA, in Triton's interpreter
(TRITON_INTERPRET=1, on the CPU), or inside `python -m marrow.kernels.compiled`. Everywhere else `jit` leaves
a function alone, and importing an operator costs nothing.

Operators start kernels by `launch` alone. On "meta" tensors nothing runs; inside `recording()` every launch
is noted instead, with all that a compiler needs, so that what is compiled ahead of time for sm_90 is exactly
what would run there.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IS_WANTED = IS_INTERPRETED or torch.version.cuda is not None or "MARROW_COMPILE" in os.environ

triton: Any = None
tl: Any
if IS_WANTED:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        IS_WANTED = False
if IS_INTERPRETED and triton is not None:
    from marrow.kernels import interpreter  # here: it needs Triton

    interpreter.mend()
if triton is None:

    class tl:  # noqa: N801 (stands in for triton.language, whose names the annotations of kernels mention)
        """What a kernel's signature needs to be defined."""

        constexpr = object
        dtype = object


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch that was recorded. arguments and constants: by parameter; options: num_warps and the like."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


def jit(function: F) -> F:
    """Make a function a Triton kernel, where Triton is loaded."""
    made: F = function if triton is None else triton.jit(function)
    return made


def unusable() -> str | None:
    """Say why Triton kernels cannot run in this process, or return None."""
    if triton is None:
        return "triton is not installed" if torch.version.cuda else "there is no CUDA device"
    if IS_INTERPRETED or torch.cuda.is_available():
        return None
    return "there is no CUDA device"


def path() -> dict[str, Any]:
    """Return what `Operator.add` takes for a Triton path: CUDA, and the interpreter on the CPU."""
    return {
        "devices": ("cuda", "cpu"),
        "dtypes": (torch.float32, torch.bfloat16, torch.float16),
        "unusable": unusable,
    }


def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has; 2 stand for it in the interpreter."""
    if device.type != "cuda":
        return 2 if device.type == "cpu" else 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def row_options(columns: int, dtype: torch.dtype) -> dict[str, int]:
    """Return BLOCK and num_warps for a kernel whose programs hold whole rows of `columns`."""
    block = max(16, 1 << (columns - 1).bit_length())
    # 16 bytes a thread and load, four of them in flight.
    num_warps = min(32, max(1, block * dtype.itemsize // (32 * 16 * 2)))
    return {"BLOCK": block, "num_warps": 1 << (num_warps - 1).bit_length()}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel on a grid of programs, each at least 1.

    Args: arguments: tensors, numbers or None, as the kernel's first parameters. constants: its constexprs,
    and num_warps, num_stages.
    """
    if 0 in grid:
        return
    recorded = _recorded.get()
    if recorded is not None:
        names = list(kernel.arg_names)
        options = {name: value for name, value in constants.items() if name not in names}
        given = dict(zip(names, arguments, strict=False))
        kept = {name: value for name, value in constants.items() if name in names}
        recorded.append(Launch(kernel, grid, given, kept, options))
    elif not any(isinstance(x, Tensor) and x.is_meta for x in arguments):
        # The interpreter computes with numpy, which warns of infinities; a GPU does not.
        with np.errstate(all="ignore") if IS_INTERPRETED else contextlib.nullcontext():
            kernel[grid](*arguments, **constants)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Note launches instead of running them; give them "meta" tensors."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)
