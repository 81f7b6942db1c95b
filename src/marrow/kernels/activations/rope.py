"""Rotary position embedding, in Hugging Face's half-rotation layout.

Channel i of a head is paired with channel i + D/2, and each pair is rotated by position * theta^(-2i/D).
Angles are computed once per forward from the positions and shared by all layers. The gradient of a rotation
is the rotation back. Bound by memory.

Axes: N tokens, H heads, D head size, E = D/2. Source: Su et al. 2021 (RoFormer).
"""

import torch
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.activations.rope_frequencies import frequencies
from marrow.kernels.activations.rope_scaling import RopeScaling
from marrow.kernels.arguments import FLOATS, Expects
from marrow.kernels.dispatch import Example, Gradient, Operator
from marrow.kernels.tile import tl


def rope_angles(
    positions_N: Tensor,
    head_size: int,
    theta: float,
    dtype: torch.dtype,
    *,
    scaling: RopeScaling | None = None,
    length: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotation angles.

    Args: positions_N: int64 [N], >= 0. head_size: even. dtype: of the result; angles are fp32.
        scaling: how the context is stretched. length: tokens of the longest text, for dynamic scaling.
    Returns: cos_NE, sin_NE: [N, D/2].
    """
    turn_E, factor = frequencies(head_size, theta, scaling, length=length, device=positions_N.device)
    angles_NE = positions_N.to(torch.float32)[:, None] * turn_E[None, :]
    cos_NE, sin_NE = angles_NE.cos(), angles_NE.sin()
    if factor != 1.0:
        cos_NE, sin_NE = cos_NE * factor, sin_NE * factor
    return cos_NE.to(dtype), sin_NE.to(dtype)


def rope(x_NHD: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Rotate each head by its token's angles.

    Args: x_NHD: [N, H, D], D even. cos_NE, sin_NE: [N, D/2], from `rope_angles`; no gradient.
    Returns: [N, H, D] of x's dtype.
    Raises: UsageError if the angles do not fit the heads.
    Cost: reads and writes N H D elements; 3 N H D FLOPs; bound by memory.
    """
    result: Tensor = OPERATOR(x_NHD, cos_NE, sin_NE)
    return result


def rope_reference(x_NHD: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Compute `rope` in plain torch."""
    first_NHE, second_NHE = x_NHD.chunk(2, dim=-1)
    cos_N1E, sin_N1E = cos_NE[:, None], sin_NE[:, None]
    return torch.cat(
        (first_NHE * cos_N1E - second_NHE * sin_N1E, second_NHE * cos_N1E + first_NHE * sin_N1E), dim=-1
    ).to(x_NHD.dtype)


# Triton


@tile.jit
def _rotate(  # type: ignore[no-untyped-def]
    x,
    cos,
    sin,
    y,
    rows,
    heads,
    token_step,
    head_step,
    sign,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate ROWS pairs of (token, head); SIZE is D/2."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = row // heads, row % heads
    at = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < SIZE)
    c = tl.load(cos + token * SIZE + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + token * SIZE + at, mask=inside, other=0.0).to(tl.float32) * sign
    place = x + token * token_step + head * head_step + at
    a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(place + SIZE, mask=inside, other=0.0).to(tl.float32)
    target = y + row * (2 * SIZE) + at
    tl.store(target, (a * c - b * s).to(y.dtype.element_ty), mask=inside)
    tl.store(target + SIZE, (b * c + a * s).to(y.dtype.element_ty), mask=inside)


def _rotate_triton(x_NHD: Tensor, cos_NE: Tensor, sin_NE: Tensor, sign: float) -> Tensor:
    """Give each program a few heads of one token or of neighbours, 2048 pairs in all."""
    x_NHD, y_NHD = _rows(x_NHD), _empty(x_NHD, cos_NE, sin_NE)
    rows, heads, size = x_NHD.shape[0] * x_NHD.shape[1], x_NHD.shape[1], x_NHD.shape[2] // 2
    block = max(16, 1 << (size - 1).bit_length())
    default = {"ROWS": max(1, 2048 // block), "BLOCK": block, "num_warps": 4}
    candidates = [{"num_warps": 8}, {"ROWS": max(1, 1024 // block)}, {"ROWS": 4096 // block, "num_warps": 8}]
    options = tile.config("rope", (block, str(x_NHD.dtype)), default, candidates)
    tile.launch(
        _rotate,
        (-(-rows // options["ROWS"]),),
        *(x_NHD, cos_NE.contiguous(), sin_NE.contiguous(), y_NHD),
        *(rows, heads, x_NHD.stride(0), x_NHD.stride(1), sign),
        SIZE=size,
        **options,
    )
    return y_NHD


def forward_triton(x_NHD: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Rotate."""
    return _rotate_triton(x_NHD, cos_NE, sin_NE, 1.0)


def backward_triton(dy_NHD: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Rotate back."""
    return _rotate_triton(dy_NHD, cos_NE, sin_NE, -1.0)


# CPU


def _rotate_cpu(x_NHD: Tensor, cos_NE: Tensor, sin_NE: Tensor, sign: float) -> Tensor:
    """Tokens in C, shared among torch's threads."""
    x_NHD, y_NHD = _rows(x_NHD), _empty(x_NHD, cos_NE, sin_NE)
    if cos_NE.dtype not in (torch.float32, x_NHD.dtype) or sin_NE.dtype != cos_NE.dtype:
        cos_NE, sin_NE = cos_NE.float(), sin_NE.float()
    cos_NE, sin_NE = cos_NE.contiguous(), sin_NE.contiguous()
    tokens, heads, channels = x_NHD.shape
    native.function("rope", "rope", "pppplllllfiii")(
        *native.pointers(x_NHD, cos_NE, sin_NE, y_NHD),
        *(tokens, heads, channels // 2, x_NHD.stride(0), x_NHD.stride(1), sign),
        *(torch.get_num_threads(), native.type_of(x_NHD), native.type_of(cos_NE)),
    )
    return y_NHD


def forward_cpu(x_NHD: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Rotate."""
    return _rotate_cpu(x_NHD, cos_NE, sin_NE, 1.0)


def backward_cpu(dy_NHD: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Rotate back."""
    return _rotate_cpu(dy_NHD, cos_NE, sin_NE, -1.0)


# What all paths share


def _rows(x_NHD: Tensor) -> Tensor:
    """Return x as it is where its heads are whole, as in a slice of fused projections; else a copy."""
    return x_NHD if x_NHD.stride(-1) == 1 else x_NHD.contiguous()


def _empty(x_NHD: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    return torch.empty_like(x_NHD, memory_format=torch.contiguous_format)


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Return queries of a small and a 7B model, and keys of the latter in a fused projection."""
    examples = []
    for tokens, heads, channels, fused in ((8192, 4, 64, 4), (4096, 32, 128, 32), (4096, 8, 128, 48)):
        x_NHD = torch.randn(tokens, fused, channels, device=device, dtype=dtype)[:, :heads]
        angles = rope_angles(torch.arange(tokens, device=device), channels, 1e4, dtype)
        elements = tokens * heads * channels
        cost = ((2 * elements + 2 * angles[0].numel()) * dtype.itemsize, 3 * elements)
        examples.append(Example(f"{tokens}x{heads}x{channels}", (x_NHD, *angles), *cost))
    return examples


def _misfit(x_NHD: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> tuple[str, str] | None:
    """Say what does not fit, beyond what the names of the inputs say."""
    if x_NHD.shape[2] != 2 * cos_NE.shape[1]:
        what = f"angles of shape {list(cos_NE.shape)} for heads of {x_NHD.shape[2]} channels"
        return what, "two channels an angle"
    return None


OPERATOR = Operator(
    "rope",
    rope_reference,
    fake=_empty,
    gradient=Gradient(inputs=(0,), saves=lambda inputs, outputs: inputs[1:], fake=_empty),
    examples=_examples,
    expects=Expects(dtypes={"cos_NE": FLOATS, "sin_NE": FLOATS}, also=_misfit),
)
OPERATOR.add("cpu", forward_cpu, backward_cpu, **native.path("rope"))
OPERATOR.add("triton", forward_triton, backward_triton, **tile.path())
