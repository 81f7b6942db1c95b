"""How long functions take on a GPU, or a CPU, and what the device can do at best.

On a GPU: events around each run, the L2 written over before it, and a sleep of the GPU before that, behind
which the host queues the launches, so that the time of launching does not count. Functions that are
compared take turns.
"""

import contextlib
import functools
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"

Function = Callable[[], Any]

L2_BYTES = 256 << 20  # written between runs: more than the L2 of any GPU
MIN_REPEATS, MAX_REPEATS, REPEATS_S = 10, 100, 0.4
_CYCLES_PER_S = 2e9


class TooLateError(Exception):
    """The time that was allowed is over."""


def called(direction: str, inputs: tuple[Any, ...], function: Callable[..., Any]) -> Function:
    """Return a call of forward, or of forward and backward with random gradients of the results."""
    if direction == FORWARD:
        return functools.partial(without_gradients, function, inputs)
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = tuple(torch.randn_like(x) for x in outputs)
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]

    def run() -> Any:
        again = function(*inputs)
        return torch.autograd.grad(again if isinstance(again, tuple) else (again,), leaves, grads)

    return run


def without_gradients(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """Call a function as serving does."""
    with torch.no_grad():
        return function(*inputs)


def times(functions: dict[str, Function], device: str) -> dict[str, list[float]]:
    """Run functions in turns; return the seconds of each run, by name."""
    return _cuda_times(functions) if device.startswith("cuda") else _cpu_times(functions)


def _cpu_times(functions: dict[str, Function]) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(3):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            took[name].append(time.perf_counter() - start)
    return took


def _cuda_times(functions: dict[str, Function]) -> dict[str, list[float]]:
    """Time by events; the L2 is written over first, and launches are queued behind a sleep of the GPU."""
    event: Any = functools.partial(torch.cuda.Event, enable_timing=True)
    sleep: Any = torch.cuda._sleep
    cold = torch.empty(L2_BYTES // 4, dtype=torch.int32, device="cuda")
    took: dict[str, list[float]] = {name: [] for name in functions}
    launch_s, run_s = {}, {}
    for name, function in functions.items():
        for _ in range(2):
            function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        launch_s[name] = time.perf_counter() - start
        torch.cuda.synchronize()
        run_s[name] = time.perf_counter() - start
    rounds = int(REPEATS_S / max(run_s.values()))
    for _ in range(min(MAX_REPEATS, max(MIN_REPEATS, rounds))):
        marks = {}
        for name, function in functions.items():
            before, after = event(), event()
            sleep(int(min(0.02, 2 * launch_s[name]) * _CYCLES_PER_S))
            cold.zero_()
            before.record()
            function()
            after.record()
            marks[name] = before, after
        torch.cuda.synchronize()
        for name, (before, after) in marks.items():
            took[name].append(before.elapsed_time(after) / 1e3)
    return took


def roofs(device: str, *, is_tiny: bool = False) -> Iterator[tuple[str, float]]:
    """Measure the device: copy and read in GB/s, matrix products in TFLOP/s by type."""
    yield from _bandwidths(device, (1 << 20) if is_tiny else (2 << 30))
    n = 32 if is_tiny else 8192
    for name, make in _products(n, device).items():
        try:
            took = times({name: make()}, device)[name]
        except Exception:  # noqa: BLE001 (a type that this device or build lacks has no roof)
            continue
        yield name, 2 * n**3 / statistics.median(took) / 1e12


def _bandwidths(device: str, size: int) -> Iterator[tuple[str, float]]:
    """Copy one tensor to another; read one, by the faster of two reductions."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    took = times({"copy": lambda: target.copy_(source), "sum": source.sum, "largest": source.amax}, device)
    best = {name: statistics.median(runs) for name, runs in took.items()}
    yield "copy", 2 * size / best["copy"] / 1e9
    yield "read", size / min(best["sum"], best["largest"]) / 1e9


def _products(n: int, device: str) -> dict[str, Callable[[], Function]]:
    """Return what prepares a square matrix product, by type."""

    def of(dtype: torch.dtype) -> Function:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return lambda: a @ b

    def fp8() -> Function:
        a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)

    def int8() -> Function:
        a, b = (torch.randint(-9, 9, (n, n), device=device, dtype=torch.int8) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    makers: dict[str, Callable[[], Function]] = {
        name: functools.partial(of, dtype) for name, dtype in dtypes.items()
    }
    return makers | {"fp8": fp8, "int8": int8}


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TooLateError in this block after some seconds, where signals can (the main thread, not Windows).

    An inner limit leaves the rest of the outer one in force.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TooLateError

    before, started = signal.signal(signal.SIGALRM, stop), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    if 0 < left < seconds:  # the outer limit comes first
        signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left > 0:
            signal.setitimer(signal.ITIMER_REAL, max(0.01, left - (time.monotonic() - started)))
