"""Layer normalisation: y = (x - mean) / sqrt(variance + eps) * weight + bias, over the last axis, in fp32.

With n = (x - mean) * scale, scale = 1 / sqrt(variance + eps) and g = dy * weight, the gradients are
dx = scale * (g - mean(g) - n * mean(g n)), dweight = sum over rows of dy n and dbias = sum over rows of dy.
The variance is a mean of squares around the mean, not mean(x^2) - mean^2, which cancels. Bound by memory.

Axes: N tokens (any leading axes), C channels. Source: Ba, Kiros and Hinton 2016.
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


def layer_norm(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor | None, eps: float) -> Tensor:
    """Give each row mean 0 and variance 1, then scale it by `weight_C` and add `bias_C`.

    Args: x_NC: [..., C], any float dtype. weight_C: [C]. bias_C: [C], or None for none. eps: > 0.
    Returns: [..., C] of x's dtype; statistics in fp32 (fp64 for fp64).
    Raises: UsageError for what does not fit.
    Cost: reads and writes N C elements; 8 N C FLOPs; bound by memory.
    """
    if bias_C is None:
        bias_C = weight_C.new_empty(0)
    result: Tensor = OPERATOR(x_NC, weight_C, bias_C, eps)
    return result


def layer_norm_reference(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """Compute `layer_norm` in plain torch; an empty bias is none."""
    wide_NC = x_NC.to(torch.promote_types(x_NC.dtype, torch.float32))
    centred_NC = wide_NC - wide_NC.mean(-1, keepdim=True)
    scale_N1 = torch.rsqrt(centred_NC.square().mean(-1, keepdim=True) + eps)
    y_NC = centred_NC * scale_N1 * weight_C
    return (y_NC + bias_C if bias_C.numel() else y_NC + bias_C.sum()).to(x_NC.dtype)


# Triton


@tile.jit
def _forward(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    y,
    means,
    scales,
    rows,
    columns,
    eps,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    inside, place = (row < rows) & (at < columns), row * columns + at
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, 1)[:, None] / columns
    values = tl.where(inside, values - mean, 0.0)
    scale = tl.rsqrt(tl.sum(values * values, 1)[:, None] / columns + eps)
    tl.store(means + row, mean, mask=row < rows)
    tl.store(scales + row, scale, mask=row < rows)
    values *= scale * tl.load(weight + at, mask=at < columns, other=0.0).to(tl.float32)
    if HAS_BIAS:
        values += tl.load(bias + at, mask=at < columns, other=0.0).to(tl.float32)
    tl.store(y + place, values.to(y.dtype.element_ty), mask=inside)


@tile.jit
def _backward(  # type: ignore[no-untyped-def]
    dy, x, weight, means, scales, dx, partial, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Each program takes every so-many-th tile of rows and keeps its own sums for weight and bias."""
    first, step = tl.program_id(0), tl.num_programs(0)
    at = tl.arange(0, BLOCK)[None, :]
    weights = tl.load(weight + at, mask=at < columns, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    row = first.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    for _ in range(first * ROWS, rows, step * ROWS):
        inside, place = (row < rows) & (at < columns), row * columns + at
        scale = tl.load(scales + row, mask=row < rows, other=0.0)
        mean = tl.load(means + row, mask=row < rows, other=0.0)
        normed = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean) * scale
        grad = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
        dweight += grad * normed
        dbias += grad
        grad *= weights
        mean_grad = tl.sum(grad, 1)[:, None] / columns
        mean_dot = tl.sum(grad * normed, 1)[:, None] / columns
        result = (grad - mean_grad - normed * mean_dot) * scale
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=inside)
        row += step * ROWS
    target = partial + first.to(tl.int64) * (2 * columns) + at
    tl.store(target, tl.sum(dweight, 0)[None, :], mask=at < columns)
    tl.store(target + columns, tl.sum(dbias, 0)[None, :], mask=at < columns)


def forward_triton(
    x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Give each program one row, or several short ones."""
    x_NC, (y_NC, mean_N, scale_N) = x_NC.contiguous(), _empty(x_NC, weight_C, bias_C, eps)
    rows, columns = scale_N.numel(), x_NC.shape[-1]
    tiles, options = row_tiles("layer_norm", rows, columns, x_NC.dtype)
    arguments = (x_NC, weight_C.contiguous(), bias_C.contiguous(), y_NC, mean_N, scale_N, rows, columns, eps)
    tile.launch(_forward, (tiles,), *arguments, HAS_BIAS=bias_C.numel() > 0, **options)
    return y_NC, mean_N, scale_N


def backward_triton(
    dy_NC: Tensor, x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, mean_N: Tensor, scale_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Start a few programs a multiprocessor, each over many rows; torch adds their sums."""
    dy_NC, x_NC, (rows, columns) = dy_NC.contiguous(), x_NC.contiguous(), (scale_N.numel(), x_NC.shape[-1])
    programs, options = backward_tiles("layer_norm", x_NC, rows, columns)
    dx_NC, partial_P2C = torch.empty_like(x_NC), scale_N.new_empty(programs, 2, columns)
    arguments = (dy_NC, x_NC, weight_C.contiguous(), mean_N, scale_N, dx_NC, partial_P2C, rows, columns)
    tile.launch(_backward, (programs,), *arguments, **options)
    return dx_NC, *_sums(partial_P2C, weight_C, bias_C)


# CPU


def forward_cpu(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in C, shared among torch's threads."""
    x_NC, (y_NC, mean_N, scale_N) = x_NC.contiguous(), _empty(x_NC, weight_C, bias_C, eps)
    weight_C, bias_C = in_dtype_of(x_NC, weight_C), in_dtype_of(x_NC, bias_C)
    native.function("layer_norm", "layer_norm_forward", "ppppppllfii")(
        *native.pointers(x_NC, weight_C),
        bias_C.data_ptr() if bias_C.numel() else 0,
        *native.pointers(y_NC, mean_N, scale_N),
        *(scale_N.numel(), x_NC.shape[-1], eps, torch.get_num_threads(), native.type_of(x_NC)),
    )
    return y_NC, mean_N, scale_N


def backward_cpu(
    dy_NC: Tensor, x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, mean_N: Tensor, scale_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of PART rows in C; torch adds their sums of the gradients of weight and bias."""
    dy_NC, x_NC, threads = dy_NC.contiguous(), x_NC.contiguous(), torch.get_num_threads()
    columns, like_C = x_NC.shape[-1], in_dtype_of(x_NC, weight_C)
    dx_NC, partial_P2C = torch.empty_like(x_NC), scale_N.new_empty(parts(scale_N), 2, columns)
    native.function("layer_norm", "layer_norm_backward", "ppppppplllii")(
        *native.pointers(dy_NC, x_NC, like_C, mean_N, scale_N, dx_NC, partial_P2C),
        *(scale_N.numel(), columns, PART, threads, native.type_of(x_NC)),
    )
    return dx_NC, *_sums(partial_P2C, weight_C, bias_C)


# What all paths share


def _sums(partial_P2C: Tensor, weight_C: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor]:
    """Add what the programs or threads summed: the gradients of weight and bias."""
    dweight_C, dbias_C = partial_P2C.sum(0)
    return dweight_C.to(weight_C.dtype), dbias_C[: bias_C.numel()].to(bias_C.dtype)


def _empty(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate y, and one mean and scale a row."""
    y_NC = torch.empty_like(x_NC, memory_format=torch.contiguous_format)
    mean_N = x_NC.new_empty(count_rows(x_NC), dtype=torch.float32)
    return y_NC, mean_N, torch.empty_like(mean_N)


def _empty_gradients(
    dy_NC: Tensor, x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, mean_N: Tensor, scale_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx_NC = torch.empty_like(x_NC, memory_format=torch.contiguous_format)
    return dx_NC, torch.empty_like(weight_C), torch.empty_like(bias_C)


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Rows of an encoder and of a large model."""
    examples = []
    for rows, columns in ((8192, 768), (8192, 4096)):
        x_NC = torch.randn(rows, columns, device=device, dtype=dtype)
        weight_C, bias_C = (torch.randn(columns, device=device, dtype=dtype) for _ in range(2))
        cost = (2 * x_NC.numel() * dtype.itemsize, 8 * x_NC.numel())
        examples.append(Example(f"{rows}x{columns}", (x_NC, weight_C, bias_C, 1e-5), *cost))
    return examples


def _misfit(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> tuple[str, str] | None:
    """Say what does not fit, beyond what the names of the inputs say."""
    if bias_C.numel() and bias_C.shape != weight_C.shape:
        return f"bias_C has shape {list(bias_C.shape)}, weight_C {list(weight_C.shape)}", "both must be equal"
    return None


OPERATOR = Operator(
    "layer_norm",
    layer_norm_reference,
    fake=_empty,
    gradient=Gradient(
        inputs=(0, 1, 2),
        saves=lambda inputs, outputs: (*inputs[:3], *outputs[1:]),
        fake=_empty_gradients,
    ),
    examples=_examples,
    expects=Expects(
        dtypes={"weight_C": FLOATS, "bias_C": FLOATS},
        leading=True,
        axes={"bias_C": ""},  # empty for none
        also=_misfit,
    ),
)
OPERATOR.add("cpu", forward_cpu, backward_cpu, **native.path("layer_norm"))
OPERATOR.add("triton", forward_triton, backward_triton, **tile.path())
