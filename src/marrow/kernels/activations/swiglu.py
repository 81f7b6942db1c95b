"""SwiGLU: silu(gate) * up, on the fused output of the gate and up projections.

With s = sigmoid(gate), the gradients are dup = dy gate s and dgate = dy up s (1 + gate (1 - s)): all that
backward needs is the input, so nothing else is kept. Bound by memory.

Axes: N tokens (any leading axes), F intermediate size; the input holds gate in its first F channels, up in
its last. Source: Shazeer 2020 (GLU variants).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.activations.gated import gated_shape, gated_tiles
from marrow.kernels.arguments import Expects
from marrow.kernels.dispatch import Example, Gradient, Operator
from marrow.kernels.tile import tl


def swiglu(gate_up_NG: Tensor) -> Tensor:
    """Gate one half of the channels by the other.

    Args: gate_up_NG: [..., 2F], any float dtype.
    Returns: [..., F] of the same dtype.
    Raises: ValueError if the last axis is odd.
    Cost: reads 2 N F and writes N F elements; about 5 N F FLOPs; bound by memory.
    """
    if gate_up_NG.shape[-1] % 2:
        raise ValueError(f"{gate_up_NG.shape[-1]} channels: gate and up need an even number")
    result: Tensor = OPERATOR(gate_up_NG)
    return result


def swiglu_reference(gate_up_NG: Tensor) -> Tensor:
    """Compute `swiglu` in plain torch."""
    gate_NF, up_NF = gate_up_NG.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


# Triton


@tile.jit
def _forward(gate_up, y, rows, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < size)
    place = row * (2 * size) + at
    gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + size, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + at, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=inside)


@tile.jit
def _backward(  # type: ignore[no-untyped-def]
    dy, gate_up, dgate_up, rows, size, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < size)
    place = row * (2 * size) + at
    gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + size, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * size + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(dgate_up + place, dgate.to(dgate_up.dtype.element_ty), mask=inside)
    tl.store(dgate_up + place + size, (grad * gate * sigmoid).to(dgate_up.dtype.element_ty), mask=inside)


def forward_triton(gate_up_NG: Tensor) -> Tensor:
    """Give each program a piece of a row, or several short rows."""
    gate_up_NG, y_NF = gate_up_NG.contiguous(), _empty(gate_up_NG)
    rows, size = gated_shape(gate_up_NG)
    grid, options = gated_tiles("swiglu", rows, size, gate_up_NG.dtype)
    tile.launch(_forward, grid, gate_up_NG, y_NF, rows, size, **options)
    return y_NF


def backward_triton(dy_NF: Tensor, gate_up_NG: Tensor) -> Tensor:
    """As forward."""
    gate_up_NG, result_NG = gate_up_NG.contiguous(), _empty_gradient(dy_NF, gate_up_NG)
    rows, size = gated_shape(gate_up_NG)
    grid, options = gated_tiles("swiglu_backward", rows, size, gate_up_NG.dtype)
    tile.launch(_backward, grid, dy_NF.contiguous(), gate_up_NG, result_NG, rows, size, **options)
    return result_NG


# CPU


def forward_cpu(gate_up_NG: Tensor) -> Tensor:
    """Rows in C, shared among torch's threads."""
    gate_up_NG, y_NF = gate_up_NG.contiguous(), _empty(gate_up_NG)
    native.function("swiglu", "swiglu_forward", "ppllii")(
        *native.pointers(gate_up_NG, y_NF),
        *gated_shape(gate_up_NG),
        *(torch.get_num_threads(), native.type_of(y_NF)),
    )
    return y_NF


def backward_cpu(dy_NF: Tensor, gate_up_NG: Tensor) -> Tensor:
    """As forward."""
    dy_NF, gate_up_NG = dy_NF.contiguous(), gate_up_NG.contiguous()
    result_NG = torch.empty_like(gate_up_NG)
    native.function("swiglu", "swiglu_backward", "pppllii")(
        *native.pointers(dy_NF, gate_up_NG, result_NG),
        *gated_shape(gate_up_NG),
        *(torch.get_num_threads(), native.type_of(dy_NF)),
    )
    return result_NG


# What all paths share


def _empty(gate_up_NG: Tensor) -> Tensor:
    return gate_up_NG.new_empty((*gate_up_NG.shape[:-1], gate_up_NG.shape[-1] // 2))


def _empty_gradient(dy_NF: Tensor, gate_up_NG: Tensor) -> Tensor:
    return torch.empty_like(gate_up_NG, memory_format=torch.contiguous_format)


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Return a small model, a 7B model, and one token of it."""
    examples = []
    for rows, size in ((8192, 768), (4096, 11008), (1, 11008)):
        gate_up_NG = torch.randn(rows, 2 * size, device=device, dtype=dtype)
        elements = rows * size
        examples.append(Example(f"{rows}x{size}", (gate_up_NG,), 3 * elements * dtype.itemsize, 5 * elements))
    return examples


OPERATOR = Operator(
    "swiglu",
    swiglu_reference,
    fake=_empty,
    gradient=Gradient(inputs=(0,), saves=lambda inputs, outputs: inputs, fake=_empty_gradient),
    examples=_examples,
    expects=Expects(leading=True),
)
OPERATOR.add("cpu", forward_cpu, backward_cpu, **native.path("swiglu"))
OPERATOR.add("triton", forward_triton, backward_triton, **tile.path())
