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

from marrow.core.errors import UsageError

ENVIRONMENT = "MARROW_KERNELS"
ORDER = ("triton", "cpu", "torch", "reference")  # fastest first
MODES = ("auto", *ORDER)
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Path:
    """One way to compute an op. `unusable()` says why not here, or None."""

    name: str
    function: Callable[..., Any]
    devices: tuple[str, ...]
    unusable: Callable[[], str | None]


@dataclass(frozen=True, slots=True)
class Choice:
    """What an op uses on a device type; `reason` is empty when it is the path that was wanted."""

    op: str
    device: str
    path: str
    function: Callable[..., Any]
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
) -> None:
    """Add a path to an op. Called once per path, at the end of the op's file."""
    assert name in ORDER, name
    _paths.setdefault(op, {})[name] = Path(name, function, devices, unusable)


def choose(op: str, device: str) -> Callable[..., Any]:
    """Return the function that computes `op` on a device type ("cpu", "cuda")."""
    key = (op, device)
    if key not in _choices:
        _choices[key] = _resolve(op, device)
    return _choices[key].function


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
    if mode == "reference":
        return Choice(op, device, mode, _paths[op]["reference"].function)
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
            return Choice(op, device, name, known[name].function, reason)
        reason = reason or f"{name}: {why_not}"
    raise AssertionError(f"{op} has no reference")
