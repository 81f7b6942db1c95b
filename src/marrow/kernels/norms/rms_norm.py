"""RMS normalisation: y = x / sqrt(mean(x^2) + eps) * weight, over the last axis, in fp32.

With n = x * scale, scale = 1 / sqrt(mean(x^2) + eps) and g = dy * weight, the gradients are
dx = scale * (g - n * mean(g n)) and dweight = sum over rows of dy n: one scale a row is all that
backward needs besides x. Bound by memory: each path reads a row once and keeps it near.

Axes: N tokens (any leading axes), C channels. Source: Zhang and Sennrich 2019.
"""

import torch
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.arguments import FLOATS, Expects
from marrow.kernels.dispatch import Example, Gradient, Operator
from marrow.kernels.norms.rows import (
    PART,
    backward_tiles,
    count_rows,
    in_dtype_of,
    parts,
    row_tiles,
)
from marrow.kernels.tile import tl


def rms_norm(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Scale each row to unit root mean square, then by `weight_C`.

    Args: x_NC: [..., C], any float dtype. weight_C: [C]. eps: > 0, added to the mean square.
    Returns: [..., C] of x's dtype; statistics in fp32 (fp64 for fp64).
    Raises: UsageError for what does not fit.
    Cost: reads and writes N C elements; 4 N C FLOPs; bound by memory.
    """
    result: Tensor = OPERATOR(x_NC, weight_C, eps)
    return result


def rms_norm_reference(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Compute `rms_norm` in plain torch."""
    wide_NC = x_NC.to(torch.promote_types(x_NC.dtype, torch.float32))
    scale_N1 = torch.rsqrt(wide_NC.square().mean(-1, keepdim=True) + eps)
    return (wide_NC * scale_N1 * weight_C).to(x_NC.dtype)


# Triton


@tile.jit
def _forward(  # type: ignore[no-untyped-def]
    x, weight, y, scales, rows, columns, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (at < columns)
    values = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1)[:, None] / columns + eps)
    tl.store(scales + row, scale, mask=row < rows)
    weights = tl.load(weight + at, mask=at < columns, other=0.0).to(tl.float32)
    tl.store(y + row * columns + at, (values * scale * weights).to(y.dtype.element_ty), mask=inside)


@tile.jit
def _backward(  # type: ignore[no-untyped-def]
    dy, x, weight, scales, dx, partial, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
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
        normed = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale
        grad = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        dweight += grad * normed
        grad *= weights
        mean = tl.sum(grad * normed, 1)[:, None] / columns
        tl.store(dx + place, ((grad - normed * mean) * scale).to(dx.dtype.element_ty), mask=inside)
        row += step * ROWS
    sums = tl.sum(dweight, 0)[None, :]
    tl.store(partial + first.to(tl.int64) * columns + at, sums, mask=at < columns)


def forward_triton(x_NC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Give each program one row, or several short ones."""
    x_NC, (y_NC, scale_N) = x_NC.contiguous(), _empty(x_NC, weight_C, eps)
    rows, columns = scale_N.numel(), x_NC.shape[-1]
    tiles, options = row_tiles("rms_norm", rows, columns, x_NC.dtype)
    arguments = (x_NC, weight_C.contiguous(), y_NC, scale_N, rows, columns, eps)
    tile.launch(_forward, (tiles,), *arguments, **options)
    return y_NC, scale_N


def backward_triton(dy_NC: Tensor, x_NC: Tensor, weight_C: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """Start a few programs a multiprocessor, each over many rows; torch adds their sums."""
    dy_NC, x_NC, (rows, columns) = dy_NC.contiguous(), x_NC.contiguous(), (scale_N.numel(), x_NC.shape[-1])
    programs, options = backward_tiles("rms_norm", x_NC, rows, columns)
    dx_NC, partial_PC = torch.empty_like(x_NC), scale_N.new_empty(programs, columns)
    arguments = (dy_NC, x_NC, weight_C.contiguous(), scale_N, dx_NC, partial_PC, rows, columns)
    tile.launch(_backward, (programs,), *arguments, **options)
    return dx_NC, partial_PC.sum(0).to(weight_C.dtype)


# CPU


def forward_cpu(x_NC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows in C, shared among torch's threads."""
    x_NC, weight_C = x_NC.contiguous(), in_dtype_of(x_NC, weight_C)
    y_NC, scale_N = _empty(x_NC, weight_C, eps)
    native.function("rms_norm", "rms_norm_forward", "ppppllfii")(
        *native.pointers(x_NC, weight_C, y_NC, scale_N),
        *(scale_N.numel(), x_NC.shape[-1], eps, torch.get_num_threads(), native.type_of(x_NC)),
    )
    return y_NC, scale_N


def backward_cpu(dy_NC: Tensor, x_NC: Tensor, weight_C: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of PART rows in C; torch adds their sums of the weight's gradient."""
    dy_NC, x_NC, like_C = dy_NC.contiguous(), x_NC.contiguous(), in_dtype_of(x_NC, weight_C)
    columns, threads = x_NC.shape[-1], torch.get_num_threads()
    dx_NC, partial_PC = torch.empty_like(x_NC), scale_N.new_empty(parts(scale_N), columns)
    native.function("rms_norm", "rms_norm_backward", "pppppplllii")(
        *native.pointers(dy_NC, x_NC, like_C, scale_N, dx_NC, partial_PC),
        *(scale_N.numel(), columns, PART, threads, native.type_of(x_NC)),
    )
    return dx_NC, partial_PC.sum(0).to(weight_C.dtype)


# What all paths share


def _empty(x_NC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Allocate y and one scale a row."""
    y_NC = torch.empty_like(x_NC, memory_format=torch.contiguous_format)
    return y_NC, x_NC.new_empty(count_rows(x_NC), dtype=torch.float32)


def _empty_gradients(dy_NC: Tensor, x_NC: Tensor, weight_C: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_NC, memory_format=torch.contiguous_format), torch.empty_like(weight_C)


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Rows of a small model, of a 7B model, and rows of a head."""
    examples = []
    for rows, columns in ((8192, 256), (8192, 4096), (65536, 128)):
        x_NC = torch.randn(rows, columns, device=device, dtype=dtype)
        weight_C = torch.randn(columns, device=device, dtype=dtype)
        cost = (2 * x_NC.numel() * dtype.itemsize, 4 * x_NC.numel())
        examples.append(Example(f"{rows}x{columns}", (x_NC, weight_C, 1e-5), *cost))
    return examples


OPERATOR = Operator(
    "rms_norm",
    rms_norm_reference,
    fake=_empty,
    gradient=Gradient(
        inputs=(0, 1),
        saves=lambda inputs, outputs: (*inputs[:2], outputs[1]),
        fake=_empty_gradients,
    ),
    examples=_examples,
    expects=Expects(dtypes={"weight_C": FLOATS}, leading=True),
)
OPERATOR.add("cpu", forward_cpu, backward_cpu, **native.path("rms_norm"))
OPERATOR.add("triton", forward_triton, backward_triton, **tile.path())
