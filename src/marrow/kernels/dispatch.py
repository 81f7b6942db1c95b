"""Which path an operator takes: the only place that chooses.

    op        public function; looks its path up by (op, device type) and calls it
    path      one way to compute it: "reference" (plain torch, the oracle), "torch" (fast plain
              torch, any device), "cpu" (a C file), "triton"

`MARROW_KERNELS=auto|reference|torch|cpu|triton` asks for a path; auto takes the fastest that is
registered and usable. A path that was asked for, or that auto would take, and that is not usable
here gives one RuntimeWarning with the reason, and the next best is used. `choices()` lists what
is used (for `marrow doctor`); `reset()` forgets it all and reads the environment again.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from marrow.core.errors import UsageError

ENVIRONMENT = "MARROW_KERNELS"
ORDER = ("triton", "cpu", "torch", "reference")  # fastest first
MODES = ("auto", *ORDER)
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Path:
    """One way to compute an op.

    unusable: says why not here, or None. eager_only: inside torch.compile the reference is used
    instead, since the compiler fuses plain operators better than hand-made blocks.
    """

    name: str
    function: Callable[..., Any]
    devices: tuple[str, ...]
    unusable: Callable[[], str | None]
    eager_only: bool


@dataclass(frozen=True, slots=True)
class Choice:
    """What an op uses on a device type; `reason` is empty when it is the path that was wanted."""

    op: str
    device: str
    path: str
    function: Callable[..., Any]
    compiled: Callable[..., Any]
    reason: str = ""


_paths: dict[str, dict[str, Path]] = {}
_choices: dict[tuple[str, str], Choice] = {}
_mode: str | None = None


def register(
    op: str,
    name: str,
    function: Callable[..., Any],
    *,
    devices: tuple[str, ...] = DEVICES,
    unusable: Callable[[], str | None] = lambda: None,
    eager_only: bool = False,
) -> None:
    """Add a path to an op. Called once per path, at the end of the op's file."""
    assert name in ORDER, name
    _paths.setdefault(op, {})[name] = Path(name, function, devices, unusable, eager_only)


def choose(op: str, device: str) -> Callable[..., Any]:
    """Return the function that computes `op` on a device type ("cpu", "cuda")."""
    key = (op, device)
    if key not in _choices:
        _choices[key] = _resolve(op, device)
    choice = _choices[key]
    return choice.compiled if torch.compiler.is_compiling() else choice.function


def choices() -> list[Choice]:
    """List what every op of the loaded files uses on the CPU, and on CUDA where it was used."""
    for op in _paths:
        choose(op, "cpu")
    return sorted(_choices.values(), key=lambda choice: (choice.op, choice.device))


def paths(op: str) -> dict[str, Path]:
    """Return the registered paths of an op by name (tests and the roofline go through them all)."""
    return dict(_paths[op])


def reset(mode: str | None = None) -> None:
    """Forget all choices; the next ones follow `mode`, or the environment where that is None.

    Raises: UsageError for an unknown mode.
    """
    global _mode
    if mode is not None:
        _check(mode, "kernels mode")
    _mode = mode
    _choices.clear()


def wanted() -> str:
    """Return the mode in force.

    Raises: UsageError if the environment variable holds an unknown one.
    """
    if _mode is not None:
        return _mode
    mode = os.environ.get(ENVIRONMENT, "auto") or "auto"
    _check(mode, ENVIRONMENT)
    return mode


def _check(mode: str, what: str) -> None:
    if mode not in MODES:
        raise UsageError(f"{what} = {mode!r} is unknown", hint=f"allowed: {', '.join(MODES)}")


def _resolve(op: str, device: str) -> Choice:
    mode = wanted()
    reference = _paths[op]["reference"].function
    if mode == "reference":
        return Choice(op, device, mode, reference, reference)
    reason = ""
    known = {name: path for name, path in _paths[op].items() if device in path.devices}
    if mode != "auto" and mode not in known:
        reason = f"{mode} was asked for, {op} has no such path on {device}"
    for name in sorted(known, key=lambda name: (name != mode, ORDER.index(name))):
        why_not = known[name].unusable()
        if why_not is None:
            if reason:
                warnings.warn(
                    f"{op} on {device} takes its {name} path: {reason}", RuntimeWarning, stacklevel=3
                )
            path = known[name]
            compiled = reference if path.eager_only else path.function
            return Choice(op, device, name, path.function, compiled, reason)
        reason = reason or f"{name}: {why_not}"
    raise AssertionError(f"{op} has no reference")
