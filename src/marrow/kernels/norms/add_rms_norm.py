"""Residual add and RMS normalisation in one pass: t = residual + x, y = t / sqrt(mean(t^2) + eps) * weight.

What every transformer block does twice. Apart, the sum goes to memory and comes back; together, it is normed
while it is in registers or in the nearest cache. The sum is rounded to its dtype before it is normed, so that
backward, which reads the rounded one, sees the same numbers.

With n = t * scale and g = dy * weight, both inputs have the gradient dt + scale * (g - n * mean(g n)).
Axes: N tokens (any leading axes), C channels. Source: Zhang and Sennrich 2019; the fusion is vLLM's.
"""

import torch
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.arguments import FLOATS, Expects
from marrow.kernels.dispatch import Example, Gradient, Operator
from marrow.kernels.norms.rms_norm import rms_norm_reference
from marrow.kernels.norms.rows import (
    PART,
    backward_tiles,
    count_rows,
    in_dtype_of,
    parts,
    row_tiles,
)
from marrow.kernels.tile import tl


def add_rms_norm(residual_NC: Tensor, x_NC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add `x_NC` to the residual stream and norm the sum.

    Args: residual_NC, x_NC: [..., C], of one dtype. weight_C: [C]. eps: > 0, added to the mean square.
    Returns: the normed sum, and the sum: the new residual stream. Both [..., C] of x's dtype.
    Raises: ValueError if shapes or dtypes do not fit.
    Cost: reads and writes 2 N C elements each; 5 N C FLOPs; bound by memory.
    """
    if residual_NC.shape != x_NC.shape or residual_NC.dtype != x_NC.dtype:
        found = f"{list(residual_NC.shape)} {residual_NC.dtype} and {list(x_NC.shape)} {x_NC.dtype}"
        raise ValueError(f"residual and x are {found}: must be equal")
    y_NC, total_NC = OPERATOR(residual_NC, x_NC, weight_C, eps)
    return y_NC, total_NC


def add_rms_norm_reference(
    residual_NC: Tensor, x_NC: Tensor, weight_C: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute `add_rms_norm` in plain torch."""
    total_NC = residual_NC + x_NC
    return rms_norm_reference(total_NC, weight_C, eps), total_NC


# Triton


@tile.jit
def _forward(  # type: ignore[no-untyped-def]
    residual, x, weight, y, total, scales, rows, columns, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside, place = (row < rows) & (at < columns), row * columns + at
    values = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    rounded = values.to(total.dtype.element_ty)
    tl.store(total + place, rounded, mask=inside)
    values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1)[:, None] / columns + eps)
    tl.store(scales + row, scale, mask=row < rows)
    weights = tl.load(weight + at, mask=at < columns, other=0.0).to(tl.float32)
    tl.store(y + place, (values * scale * weights).to(y.dtype.element_ty), mask=inside)


@tile.jit
def _backward(  # type: ignore[no-untyped-def]
    dy, dtotal, total, weight, scales, dx, partial, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Each program takes every so-many-th tile of rows and keeps its own sum of the weight's gradient."""
    first, step = tl.program_id(0), tl.num_programs(0)
    at = tl.arange(0, BLOCK)[None, :]
    weights = tl.load(weight + at, mask=at < columns, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    row = first.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    for _ in range(first * ROWS, rows, step * ROWS):
        inside, place = (row < rows) & (at < columns), row * columns + at
        scale = tl.load(scales + row, mask=row < rows, other=0.0)
        normed = tl.load(total + place, mask=inside, other=0.0).to(tl.float32) * scale
        grad = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        passed = tl.load(dtotal + place, mask=inside, other=0.0).to(tl.float32)
        dweight += grad * normed
        grad *= weights
        mean = tl.sum(grad * normed, 1)[:, None] / columns
        tl.store(dx + place, (passed + (grad - normed * mean) * scale).to(dx.dtype.element_ty), mask=inside)
        row += step * ROWS
    sums = tl.sum(dweight, 0)[None, :]
    tl.store(partial + first.to(tl.int64) * columns + at, sums, mask=at < columns)


def forward_triton(
    residual_NC: Tensor, x_NC: Tensor, weight_C: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Give each program one row, or several short ones."""
    y_NC, total_NC, scale_N = _empty(residual_NC, x_NC, weight_C, eps)
    rows, columns = scale_N.numel(), x_NC.shape[-1]
    tiles, options = row_tiles("add_rms_norm", rows, columns, x_NC.dtype)
    tile.launch(
        _forward,
        (tiles,),
        *(residual_NC.contiguous(), x_NC.contiguous(), weight_C.contiguous(), y_NC, total_NC, scale_N),
        *(rows, columns, eps),
        **options,
    )
    return y_NC, total_NC, scale_N


def backward_triton(
    dy_NC: Tensor, dtotal_NC: Tensor, total_NC: Tensor, weight_C: Tensor, scale_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Start a few programs a multiprocessor, each over many rows; torch adds their sums."""
    rows, columns = scale_N.numel(), total_NC.shape[-1]
    programs, options = backward_tiles("add_rms_norm", total_NC, rows, columns)
    dx_NC, partial_PC = torch.empty_like(total_NC), scale_N.new_empty(programs, columns)
    tile.launch(
        _backward,
        (programs,),
        *(dy_NC.contiguous(), dtotal_NC.contiguous(), total_NC, weight_C.contiguous(), scale_N),
        *(dx_NC, partial_PC, rows, columns),
        **options,
    )
    return dx_NC, partial_PC.sum(0).to(weight_C.dtype)


# CPU


def forward_cpu(
    residual_NC: Tensor, x_NC: Tensor, weight_C: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in C, shared among torch's threads."""
    residual_NC, x_NC, weight_C = residual_NC.contiguous(), x_NC.contiguous(), in_dtype_of(x_NC, weight_C)
    y_NC, total_NC, scale_N = _empty(residual_NC, x_NC, weight_C, eps)
    native.function("add_rms_norm", "add_rms_norm_forward", "ppppppllfii")(
        *native.pointers(residual_NC, x_NC, weight_C, y_NC, total_NC, scale_N),
        *(scale_N.numel(), x_NC.shape[-1], eps, torch.get_num_threads(), native.type_of(x_NC)),
    )
    return y_NC, total_NC, scale_N


def backward_cpu(
    dy_NC: Tensor, dtotal_NC: Tensor, total_NC: Tensor, weight_C: Tensor, scale_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Parts of PART rows in C; torch adds their sums of the weight's gradient."""
    dy_NC, dtotal_NC, threads = dy_NC.contiguous(), dtotal_NC.contiguous(), torch.get_num_threads()
    columns, like_C = total_NC.shape[-1], in_dtype_of(total_NC, weight_C)
    dx_NC, partial_PC = torch.empty_like(total_NC), scale_N.new_empty(parts(scale_N), columns)
    native.function("add_rms_norm", "add_rms_norm_backward", "ppppppplllii")(
        *native.pointers(dy_NC, dtotal_NC, total_NC, like_C, scale_N, dx_NC, partial_PC),
        *(scale_N.numel(), columns, PART, threads, native.type_of(total_NC)),
    )
    return dx_NC, partial_PC.sum(0).to(weight_C.dtype)


# What all paths share


def _empty(residual_NC: Tensor, x_NC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the normed sum, the sum, and one scale a row."""
    y_NC = torch.empty_like(x_NC, memory_format=torch.contiguous_format)
    return y_NC, torch.empty_like(y_NC), x_NC.new_empty(count_rows(x_NC), dtype=torch.float32)


def _empty_gradients(
    dy_NC: Tensor, dtotal_NC: Tensor, total_NC: Tensor, weight_C: Tensor, scale_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Allocate the gradient that both terms of the sum share, and the weight's."""
    return torch.empty_like(total_NC), torch.empty_like(weight_C)


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Rows of a small model, of a 7B model, and one token of it."""
    examples = []
    for rows, columns in ((8192, 256), (8192, 4096), (1, 4096)):
        residual_NC, x_NC = (torch.randn(rows, columns, device=device, dtype=dtype) for _ in range(2))
        weight_C = torch.randn(columns, device=device, dtype=dtype)
        cost = (4 * x_NC.numel() * dtype.itemsize, 5 * x_NC.numel())
        examples.append(Example(f"{rows}x{columns}", (residual_NC, x_NC, weight_C, 1e-5), *cost))
    return examples


OPERATOR = Operator(
    "add_rms_norm",
    add_rms_norm_reference,
    fake=_empty,
    results=2,
    gradient=Gradient(
        inputs=((0, 1), 2),
        saves=lambda inputs, outputs: (outputs[1], inputs[2], outputs[2]),
        fake=_empty_gradients,
    ),
    examples=_examples,
    expects=Expects(dtypes={"weight_C": FLOATS}, leading=True),
)
OPERATOR.add("cpu", forward_cpu, backward_cpu, **native.path("add_rms_norm"))
OPERATOR.add("triton", forward_triton, backward_triton, **tile.path())
