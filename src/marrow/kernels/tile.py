"""Triton where it is wanted: the language, the launch, and what a launch would be.

Triton is loaded only where a kernel can run: on a build of torch with CUDA, in Triton's interpreter
(TRITON_INTERPRET=1, on the CPU), or inside `python -m marrow.kernels.compiled`. Everywhere else `jit` leaves
a function alone, and importing an operator costs nothing.

Operators start kernels by `launch` alone. On "meta" tensors nothing runs; inside `recording()` every launch
is noted instead, with all that a compiler needs, so that what is compiled ahead of time for sm_90 is exactly
what would run there. Sizes of tiles come from `config`: the operator's default, or what was measured on the
device (`configs/tables.py`).
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from marrow.kernels.configs import tables

F = TypeVar("F", bound=Callable[..., Any])

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IS_WANTED = IS_INTERPRETED or torch.version.cuda is not None or "MARROW_COMPILE" in os.environ

triton: Any = None


class _Language:
    """What a kernel's signature needs to be defined where Triton is not loaded."""

    constexpr = object
    dtype = object


tl: Any = _Language
if IS_WANTED:
    try:
        triton = importlib.import_module("triton")
        tl = importlib.import_module("triton.language")
    except ImportError:
        IS_WANTED = IS_INTERPRETED = False
if IS_INTERPRETED:
    from marrow.kernels import interpreter  # here: it needs Triton

    interpreter.mend()


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch that was recorded; arguments and constants by parameter, options: num_warps and the like."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A configuration that an operator asked for, and what it could be besides."""

    op: str
    shape_class: str
    default: dict[str, Any]
    candidates: tuple[dict[str, Any], ...]


# What a multiprocessor count and a compute capability are where there is no GPU.
_PLANNED = {80: 108, 90: 132, 100: 148}

_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)
_capability: ContextVar[int] = ContextVar("capability", default=90)
# Not a ContextVar: on a GPU backward asks in autograd's own thread.
_answers: dict[str, Any] = {"asked": None, "forced": {}}


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


PATH = " path"  # ends the name of a question that asks which path to take


def path() -> dict[str, Any]:
    """Return what `Operator.add` takes for a Triton path: CUDA, and the interpreter on the CPU."""
    return {
        "devices": ("cuda", "cpu"),
        "dtypes": (torch.float32, torch.bfloat16, torch.float16),
        "unusable": unusable,
    }


def slower(op: str, other: str) -> Callable[[Any], str | None]:
    """Return a path's `loses`: whether `other`, another path, was faster on this GPU when it was tuned.

    It is a question as those for tiles are, asked for each `dispatch.Case` that has a shape class.
    """

    def loses(case: Any) -> str | None:
        if case.device != "cuda" or case.shape is None:
            return None
        key = (case.shape, str(case.dtype))
        found = config(f"{op}{PATH}", key, {"path": "triton"}, [{"path": other}])["path"]
        return None if found == "triton" else f"{found} was faster when this device was tuned"

    return loses


def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has; 2 stand for it in the interpreter."""
    if device.type != "cuda":
        return 2 if device.type == "cpu" else _PLANNED[_capability.get()]
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def capability(device: torch.device) -> int:
    """Return the compute capability of a device, such as 90; without a GPU, the one that is planned for."""
    if device.type != "cuda":
        return _capability.get()
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def config(
    op: str,
    shape_class: Hashable,
    default: dict[str, Any],
    candidates: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Return the constants and options of a kernel: what was measured on this device, else the default.

    Args: op: the operator's name, with a suffix where it has several kernels ("attention_backward").
    shape_class: what the best choice depends on; its text is the key. candidates: what `tune` tries besides
    the default. Entries of the table win over those of the default, one by one.
    """
    key = (op, str(shape_class))
    if _answers["asked"] is not None:
        _answers["asked"].append(Asked(*key, dict(default), tuple(map(dict, candidates))))
    if key in _answers["forced"]:
        return default | dict(_answers["forced"][key])
    if IS_INTERPRETED or _recorded.get() is not None or not torch.cuda.is_available():
        return dict(default)
    measured = tables.load(torch.cuda.get_device_name())
    return default | measured.get(op, {}).get(key[1], {})


@contextlib.contextmanager
def configuring(forced: dict[tuple[str, str], dict[str, Any]] | None = None) -> Iterator[list[Asked]]:
    """Note which configurations are asked for, and answer with `forced`: (op, shape class) -> entries."""
    asked: list[Asked] = []
    before = dict(_answers)
    _answers.update(asked=asked, forced=forced or {})
    try:
        yield asked
    finally:
        _answers.update(before)


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
    elif IS_INTERPRETED and not any(isinstance(x, Tensor) and x.is_cuda for x in arguments):
        interpreter.run(kernel, grid, arguments, constants)
    elif not any(isinstance(x, Tensor) and x.is_meta for x in arguments):
        kernel[grid](*arguments, **constants)


@contextlib.contextmanager
def recording(capability: int = 90) -> Iterator[list[Launch]]:
    """Note launches instead of running them, as on a GPU of a capability; give them "meta" tensors."""
    launches: list[Launch] = []
    tokens = _recorded.set(launches), _capability.set(capability)
    try:
        yield launches
    finally:
        _recorded.reset(tokens[0])
        _capability.reset(tokens[1])
