"""Softcap: y = cap * tanh(x / cap), which keeps logits within (-cap, cap) and leaves small ones alone.

dx = dy * sech^2(x / cap), from x again: near the cap 1 - tanh^2 of a rounded y would lose all digits.
Bound by memory. Axes: any. Source: Gemma team 2024 (Gemma 2).
"""

import torch
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.dispatch import Example, Gradient, Operator
from marrow.kernels.tile import tl

_BLOCK = 2048


def softcap(x: Tensor, cap: float) -> Tensor:
    """Bend `x` smoothly to stay within `cap`.

    Args: x: any shape and float dtype. cap: > 0.
    Returns: as x.
    Raises: ValueError if the cap is not positive.
    Cost: reads and writes each element once; about 10 FLOPs each; bound by memory.
    """
    if not cap > 0:
        raise ValueError(f"cap = {cap}: must be > 0")
    result: Tensor = OPERATOR(x, cap)
    return result


def softcap_reference(x: Tensor, cap: float) -> Tensor:
    """Compute `softcap` in plain torch."""
    return cap * torch.tanh(x / cap)


# Triton


@tile.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """2 sigmoid(2x) - 1 cancels near 0, where an odd polynomial takes over."""
    square = x * x
    p = -5.90586476e-3 * square + 2.08053812e-2
    p = p * square - 5.37866838e-2
    p = p * square + 1.33319587e-1
    p = p * square - 3.33332986e-1
    return tl.where(square < 0.36, x + x * square * p, 2 * tl.sigmoid(2 * x) - 1)


@tile.jit
def _forward(x, y, count, cap, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    bent = cap * _tanh(values / cap)  # type: ignore[no-untyped-call]
    tl.store(y + at, bent.to(y.dtype.element_ty), mask=at < count)


@tile.jit
def _backward(dy, x, dx, count, cap, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    grad = tl.load(dy + at, mask=at < count, other=0.0).to(tl.float32)
    small = tl.exp(-2 * tl.abs(values / cap))  # sech^2 = 4 e / (1 + e)^2, e = e^(-2 |u|)
    tl.store(
        dx + at, (grad * 4 * small / ((1 + small) * (1 + small))).to(dx.dtype.element_ty), mask=at < count
    )


def forward_triton(x: Tensor, cap: float) -> Tensor:
    """Give each program 2048 elements."""
    x, y, options = x.contiguous(), _empty(x, cap), _options("softcap", x)
    tile.launch(_forward, (-(-x.numel() // options["BLOCK"]),), x, y, x.numel(), cap, **options)
    return y


def backward_triton(dy: Tensor, x: Tensor, cap: float) -> Tensor:
    """As forward."""
    dy, x, dx, options = dy.contiguous(), x.contiguous(), _empty(x, cap), _options("softcap_backward", x)
    tile.launch(_backward, (-(-x.numel() // options["BLOCK"]),), dy, x, dx, x.numel(), cap, **options)
    return dx


def _options(op: str, x: Tensor) -> dict[str, int]:
    others = ({"num_warps": 8}, {"BLOCK": 1024}, {"BLOCK": 4096, "num_warps": 8})
    return tile.config(op, x.dtype, {"BLOCK": _BLOCK, "num_warps": 4}, others)


# CPU


def forward_cpu(x: Tensor, cap: float) -> Tensor:
    """Blocks in C, shared among torch's threads."""
    x, y = x.contiguous(), _empty(x, cap)
    native.function("softcap", "softcap_forward", "pplfii")(
        *native.pointers(x, y), *(x.numel(), cap, torch.get_num_threads(), native.type_of(x))
    )
    return y


def backward_cpu(dy: Tensor, x: Tensor, cap: float) -> Tensor:
    """As forward."""
    dy, x, dx = dy.contiguous(), x.contiguous(), _empty(x, cap)
    native.function("softcap", "softcap_backward", "ppplfii")(
        *native.pointers(dy, x, dx), *(x.numel(), cap, torch.get_num_threads(), native.type_of(x))
    )
    return dx


# What all paths share


def _empty(x: Tensor, cap: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _empty_gradient(dy: Tensor, x: Tensor, cap: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Logits of a small batch over a large vocabulary, and scores of attention."""
    examples = []
    for rows, columns, cap in ((256, 32000, 30.0), (2048, 2048, 50.0)):
        x = torch.randn(rows, columns, device=device, dtype=dtype) * cap
        cost = (2 * x.numel() * dtype.itemsize, 10 * x.numel())
        examples.append(Example(f"{rows}x{columns}", (x, cap), *cost))
    return examples


OPERATOR = Operator(
    "softcap",
    softcap_reference,
    fake=_empty,
    gradient=Gradient(inputs=(0,), saves=lambda inputs, outputs: inputs, fake=_empty_gradient),
    examples=_examples,
)
OPERATOR.add("cpu", forward_cpu, backward_cpu, **native.path("softcap"))
OPERATOR.add("triton", forward_triton, backward_triton, **tile.path())
