"""Kernels to compile ahead of time, good and bad ones; as a program it prints their rows as JSON.

Runs in a process of its own: Triton compiles only where it was not loaded for its interpreter.
"""

import json
import os
import sys
from dataclasses import asdict

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["MARROW_COMPILE"] = "1"

import torch

from marrow.kernels import compiled, tile
from marrow.kernels.compiled_table import Row
from marrow.kernels.tile import tl


@tile.jit
def copy(source, target, count, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """With a step of 2, neighbours do not lie together: no wide loads."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    tl.store(target + at, tl.load(source + at * STEP, mask=inside), mask=inside)


@tile.jit
def multiply(a, b, out, K, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    at, inner = tl.arange(0, SIZE), tl.arange(0, 32)
    sums = tl.zeros([SIZE, SIZE], tl.float32)
    for start in range(0, K, 32):
        x = tl.load(a + at[:, None] * K + start + inner[None, :])
        y = tl.load(b + (start + inner)[:, None] * SIZE + at[None, :])
        sums = tl.dot(x, y, sums, input_precision=PRECISION)
    tl.store(out + at[:, None] * SIZE + at[None, :], sums)


@tile.jit
def widen(source, target, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at).to(tl.float32))


@tile.jit
def shift(source, target, count, BLOCK: tl.constexpr):
    """Does not compile where count is 1: such an argument becomes a plain number."""
    at = tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at + count.to(tl.int64)))


def tensor(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launched(name, arch):
    """Record one launch by its name."""
    vector = tensor(1 << 20)
    matrices = tensor(128, 512), tensor(512, 128), tensor(128, 128, dtype=torch.float32), 512
    plain = (*(tensor(64, 64, dtype=torch.float32) for _ in range(3)), 64)
    wide = {"STEP": 1, "BLOCK": 1024, "num_warps": 4}
    square = {"PRECISION": "ieee", "SIZE": 128, "num_warps": 8}
    small = square | {"SIZE": 64}
    fp8, fp32 = (tensor(1024, dtype=dtype) for dtype in (torch.float8_e4m3fn, torch.float32))
    calls = {
        "good copy": (copy, vector, vector, 1 << 20, wide),
        "strided copy": (copy, vector, vector, 1 << 19, wide | {"STEP": 2}),
        "unaligned copy": (copy, tensor((1 << 20) + 1)[1:], vector, 1 << 20, wide),
        "a single row": (copy, vector, vector, 1, wide),
        "good product": (multiply, *matrices, square),
        "spilling product": (multiply, *matrices, square | {"num_warps": 2}),
        "greedy product": (multiply, *matrices, square | {"num_stages": 14}),
        "fp32 product": (multiply, *plain, small),
        "tf32 product": (multiply, *plain, small | {"PRECISION": "tf32"}),
        "a shift by one": (shift, vector, vector, 1, {"BLOCK": 1024}),
        "fp8": (widen, fp8, fp32, {"BLOCK": 1024}),
    }
    kernel, *arguments, constants = calls[name]
    with tile.recording(arch) as recorded:
        tile.launch(kernel, (1,), *arguments, **constants)
    return recorded[0]


def main():
    wanted = json.loads(sys.argv[1])
    tasks = [
        compiled.Task(Row("planted", name, "", "bf16", arch, ""), launched(name, arch))
        for name, arch in wanted
    ]
    rows, complaints = compiled.compile_all(tasks, processes=1)
    print(json.dumps({"rows": [asdict(row) for row in rows], "complaints": complaints}))


if __name__ == "__main__":
    main()
