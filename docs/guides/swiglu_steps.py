"""The steps of the guide the-memory-wall.md: SwiGLU from three operations to the limit of memory.

    python docs/guides/swiglu_steps.py [ROWS SIZE]

Prints, for each step, its traffic as a multiple of the least (input read once, output written once), and its
share of the bandwidth of a large copy in the same run. One thread, CPU time, medians of interleaved rounds.
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.core import native
from marrow.kernels import dispatch
from marrow.kernels.activations.swiglu import swiglu
from marrow.kernels.device import compiler_available, raise_malloc_thresholds

ROUNDS = 7
Work = Callable[[Tensor], Tensor]


def three_operations(gate_up: Tensor) -> Tensor:
    """As one writes it down: each line reads its inputs from memory and writes its result there."""
    gate, up = gate_up.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    return silu * up


def two_operations(gate_up: Tensor) -> Tensor:
    """As models write it."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def in_c(name: str) -> Work:
    """Return a step of swiglu_steps.c as a function of tensors."""
    library = native.load(Path(__file__).with_suffix(".c"))
    if library is None:
        raise SystemExit("this guide needs a C compiler")
    function = library[name]
    function.argtypes, function.restype = [ctypes.c_void_p] * 2 + [ctypes.c_long] * 2, None

    def work(gate_up: Tensor) -> Tensor:
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        y = gate_up.new_empty(rows, size)
        function(gate_up.data_ptr(), y.data_ptr(), rows, size)
        return y

    return work


def measure(works: dict[str, tuple[str, Work]], gate_up: Tensor, rounds: int) -> list[str]:
    """Return a line for each step, against a copy of the same number of bytes."""
    source = torch.ones(3 * gate_up.numel() // 4, dtype=gate_up.dtype)
    target = source.clone()
    few = gate_up[:64]
    exact = two_operations(few.double())
    times: dict[str, list[float]] = {name: [] for name in ("copy", *works)}
    for name, (_, work) in works.items():
        error = float((work(few).double() - exact).abs().max() / exact.abs().max())
        assert error < 2**-7, (name, error)  # two roundings to bf16
    for number in range(rounds + 1):
        for name in times:
            start = time.process_time()
            target.copy_(source) if name == "copy" else works[name][1](gate_up)
            if number:  # the first warms up
                times[name].append(time.process_time() - start)
    copy = statistics.median(times["copy"])
    return [
        f"{name:<34}{moved:>8}{copy / statistics.median(times[name]):>10.0%}\n"
        for name, (moved, _) in works.items()
    ]


@torch.no_grad()
def table(rows: int, size: int, rounds: int = 7) -> str:
    """Measure all steps."""
    gate_up = torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(0)).bfloat16()
    lines = [f"SwiGLU, bf16 {rows} x {size}, one thread\n{'step':<34}{'traffic':>8}{'of copy':>10}\n"]
    lines += measure({"1 three operations": ("3.7 x", three_operations)}, gate_up, rounds)
    raise_malloc_thresholds()
    works: dict[str, tuple[str, Work]] = {
        "2 memory kept (malloc)": ("3.7 x", three_operations),
        "3 two operations": ("2.3 x", two_operations),
    }
    if compiler_available():
        works["4 torch.compile"] = ("1.3 x", torch.compile(two_operations))
    works |= {
        "5 C, one number at a time": ("1.3 x", in_c("scalar")),
        "6 C, 16 numbers at a time": ("1.3 x", in_c("vectors")),
        "7 a sigmoid as exact as bf16": ("1.3 x", in_c("shorter")),
        "8 asking for lines ahead": ("1.3 x", in_c("ahead")),
        "9 results past the caches": ("1.0 x", in_c("streaming")),
        "  marrow.kernels, swiglu()": ("1.0 x", swiglu),
    }
    return "".join(lines + measure(works, gate_up, rounds))


def main() -> None:
    """Print the table for the shape on the command line."""
    given = [int(word) for word in sys.argv[1:]]
    torch.set_num_threads(1)
    dispatch.reset("cpu")
    sys.stdout.write(table(*(given or [4096, 11008])))


if __name__ == "__main__":
    main()
