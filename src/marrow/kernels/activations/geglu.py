"""GeGLU: gelu(gate) * up, on the fused output of the gate and up projections.

gelu(x) = x P(x), with P the normal distribution ("none": exact) or sigmoid(2u), u = sqrt(2 / pi)
(x + 0.044715 x^3) ("tanh", since (1 + tanh u) / 2 = sigmoid(2u)). Its derivative is P + x P'; backward needs
the input alone. Bound by memory.

Axes: N tokens (any leading axes), F intermediate size; the input holds gate in its first F channels, up in
its last. Source: Shazeer 2020 (GLU variants); Hendrycks and Gimpel 2016 (GELU).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.activations.gated import gated_shape, gated_tiles
from marrow.kernels.arguments import Expects
from marrow.kernels.dispatch import Example, Gradient, Operator
from marrow.kernels.tile import tl

APPROXIMATE = ("tanh", "none")


def geglu(gate_up_NG: Tensor, approximate: str = "tanh") -> Tensor:
    """Gate one half of the channels by the GELU of the other.

    Args: gate_up_NG: [..., 2F], any float dtype. approximate: "tanh" (Gemma) or "none", as in F.gelu.
    Returns: [..., F] of the same dtype.
    Raises: ValueError if the last axis is odd, or for another approximation.
    Cost: reads 2 N F and writes N F elements; about 10 N F FLOPs; bound by memory.
    """
    if gate_up_NG.shape[-1] % 2:
        raise ValueError(f"{gate_up_NG.shape[-1]} channels: gate and up need an even number")
    if approximate not in APPROXIMATE:
        raise ValueError(f"approximate = {approximate!r}: allowed are {', '.join(APPROXIMATE)}")
    result: Tensor = OPERATOR(gate_up_NG, approximate == "tanh")
    return result


def geglu_reference(gate_up_NG: Tensor, is_tanh: bool) -> Tensor:
    """Compute `geglu` in plain torch."""
    gate_NF, up_NF = gate_up_NG.chunk(2, dim=-1)
    return F.gelu(gate_NF, approximate="tanh" if is_tanh else "none") * up_NF


# Triton


@tile.jit
def _share(x, IS_TANH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return P(x) and P'(x); 1.596 = 2 sqrt(2 / pi), 0.214 = 3 x 0.044715 of it, 0.399 = 1 / sqrt(2 pi)."""
    if IS_TANH:
        steep = 1.5957691216057308 * x * (1 + 0.044715 * x * x)
        small = tl.exp(-tl.abs(steep))  # both sides of the sigmoid without cancellation
        once = 1 / (1 + small)
        share = tl.where(steep > 0, once, small * once)
        slope = small * once * once * (1.5957691216057308 + 0.21406444 * x * x)
    else:
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return share, slope


@tile.jit
def _forward(  # type: ignore[no-untyped-def]
    gate_up, y, rows, size, IS_TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < size)
    place = row * (2 * size) + at
    gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + size, mask=inside, other=0.0).to(tl.float32)
    share, _ = _share(gate, IS_TANH)
    tl.store(y + row * size + at, (gate * share * up).to(y.dtype.element_ty), mask=inside)


@tile.jit
def _backward(  # type: ignore[no-untyped-def]
    dy, gate_up, dgate_up, rows, size, IS_TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < size)
    place = row * (2 * size) + at
    gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + size, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * size + at, mask=inside, other=0.0).to(tl.float32)
    share, slope = _share(gate, IS_TANH)
    dgate = grad * up * (share + gate * slope)
    tl.store(dgate_up + place, dgate.to(dgate_up.dtype.element_ty), mask=inside)
    tl.store(dgate_up + place + size, (grad * gate * share).to(dgate_up.dtype.element_ty), mask=inside)


def forward_triton(gate_up_NG: Tensor, is_tanh: bool) -> Tensor:
    """Give each program a piece of a row, or several short rows."""
    gate_up_NG, y_NF = gate_up_NG.contiguous(), _empty(gate_up_NG, is_tanh)
    rows, size = gated_shape(gate_up_NG)
    grid, options = gated_tiles("geglu", rows, size, gate_up_NG.dtype)
    tile.launch(_forward, grid, gate_up_NG, y_NF, rows, size, IS_TANH=is_tanh, **options)
    return y_NF


def backward_triton(dy_NF: Tensor, gate_up_NG: Tensor, is_tanh: bool) -> Tensor:
    """As forward."""
    gate_up_NG, result_NG = gate_up_NG.contiguous(), _empty_gradient(dy_NF, gate_up_NG, is_tanh)
    rows, size = gated_shape(gate_up_NG)
    grid, options = gated_tiles("geglu_backward", rows, size, gate_up_NG.dtype)
    arguments = (dy_NF.contiguous(), gate_up_NG, result_NG, rows, size)
    tile.launch(_backward, grid, *arguments, IS_TANH=is_tanh, **options)
    return result_NG


# CPU


def forward_cpu(gate_up_NG: Tensor, is_tanh: bool) -> Tensor:
    """Rows in C, shared among torch's threads."""
    gate_up_NG, y_NF = gate_up_NG.contiguous(), _empty(gate_up_NG, is_tanh)
    native.function("geglu", "geglu_forward", "pplliii")(
        *native.pointers(gate_up_NG, y_NF),
        *gated_shape(gate_up_NG),
        *(is_tanh, torch.get_num_threads(), native.type_of(y_NF)),
    )
    return y_NF


def backward_cpu(dy_NF: Tensor, gate_up_NG: Tensor, is_tanh: bool) -> Tensor:
    """As forward."""
    dy_NF, gate_up_NG = dy_NF.contiguous(), gate_up_NG.contiguous()
    result_NG = torch.empty_like(gate_up_NG)
    native.function("geglu", "geglu_backward", "ppplliii")(
        *native.pointers(dy_NF, gate_up_NG, result_NG),
        *gated_shape(gate_up_NG),
        *(is_tanh, torch.get_num_threads(), native.type_of(dy_NF)),
    )
    return result_NG


# What all paths share


def _empty(gate_up_NG: Tensor, is_tanh: bool) -> Tensor:
    return gate_up_NG.new_empty((*gate_up_NG.shape[:-1], gate_up_NG.shape[-1] // 2))


def _empty_gradient(dy_NF: Tensor, gate_up_NG: Tensor, is_tanh: bool) -> Tensor:
    return torch.empty_like(gate_up_NG, memory_format=torch.contiguous_format)


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Return a small model in both forms, and a 9B model."""
    examples = []
    for rows, size, is_tanh in ((8192, 768, True), (8192, 768, False), (4096, 14336, True)):
        gate_up_NG = torch.randn(rows, 2 * size, device=device, dtype=dtype)
        label, elements = f"{rows}x{size} {'tanh' if is_tanh else 'erf'}", rows * size
        cost = (3 * elements * dtype.itemsize, 10 * elements)
        examples.append(Example(label, (gate_up_NG, is_tanh), *cost))
    return examples


OPERATOR = Operator(
    "geglu",
    geglu_reference,
    fake=_empty,
    gradient=Gradient(inputs=(0,), saves=lambda inputs, outputs: inputs, fake=_empty_gradient),
    examples=_examples,
    expects=Expects(leading=True),
)
OPERATOR.add("cpu", forward_cpu, backward_cpu, **native.path("geglu"))
OPERATOR.add("triton", forward_triton, backward_triton, **tile.path())
