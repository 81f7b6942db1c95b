"""Cross entropy of rows of logits, with its log-sum-exp in fp32, label smoothing and z-loss.

    lse = log(sum(e^x)),  p = e^(x - lse)
    loss = lse - (1 - s) x[target] - s mean(x) + z lse^2
    dx = p (1 + 2 z lse) - s / V - (1 - s) [at the target]

Bound by memory: a row is read once from memory and once from the cache, the logits' gradient is all
that backward writes, and all that is kept for it besides the logits is a row's largest logit and the rest of
its lse (apart, for their sum loses digits). `in_place` makes losses and gradient in one pass over logits that
nobody needs any more, for `linear_cross_entropy`.

Axes: N rows, V vocabulary. s: label smoothing (Szegedy et al. 2016). z: z-loss (Chowdhery et al. 2022).
"""

from typing import Any

import torch
from torch import Tensor

from marrow.core.errors import UsageError
from marrow.kernels import native, tile
from marrow.kernels.arguments import Expects
from marrow.kernels.dispatch import Example, Gradient, Operator
from marrow.kernels.tile import tl

IGNORE = -100  # the target of a row that has none


def cross_entropy(
    logits_NV: Tensor, targets_N: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return each row's cross entropy and log-sum-exp.

    Args: logits_NV: [N, V], any float dtype. targets_N: int64 [N], in [0, V) or -100 for rows that have
        none: their loss is 0. label_smoothing: in [0, 1), what the target gives to all equally.
        z_loss: factor of lse^2, which is added.
    Returns: (loss_N, lse_N): fp32 (fp64 for fp64), both differentiable. A target that is out of range makes
        its row's loss NaN (plain torch raises, where it can).
    Raises: UsageError if the targets do not fit the rows.
    Cost: forward reads N V elements, backward reads and writes them.
    """
    check_targets(logits_NV, targets_N)
    losses_N, lse_N = OPERATOR(logits_NV, targets_N, label_smoothing, z_loss)
    return losses_N, lse_N


def check_targets(rows_NX: Tensor, targets_N: Tensor) -> None:
    """Refuse targets that do not fit the rows: C would read behind their end.

    Raises: UsageError.
    """
    is_fit = rows_NX.ndim == 2 and targets_N.ndim == 1 and targets_N.shape[0] == rows_NX.shape[0]
    if not is_fit or targets_N.dtype != torch.int64:
        raise UsageError(
            f"targets {list(targets_N.shape)} of {targets_N.dtype} do not fit rows {list(rows_NX.shape)}",
            hint="give int64 [N] for rows [N, ...]",
        )


def cross_entropy_reference(
    logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Compute `cross_entropy` in plain torch."""
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    lse_N = wide_NV.logsumexp(-1)
    picked_N = wide_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]
    losses_N = lse_N - (1 - label_smoothing) * picked_N + z_loss * lse_N.square()
    if label_smoothing:
        losses_N = losses_N - label_smoothing * wide_NV.mean(-1)
    return losses_N.masked_fill(targets_N == IGNORE, 0.0), lse_N


# Triton


@tile.jit
def sum_row(x, columns, scale, BLOCK: tl.constexpr, EXPECTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a row's largest x, `rest` = log(sum(e^y)), y = (x - largest) scale, and sum(p y) if EXPECTED."""
    at = tl.arange(0, BLOCK)
    most = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    product = tl.zeros([], tl.float32)
    for start in range(0, columns, BLOCK):
        some = tl.load(x + start + at, mask=start + at < columns, other=float("-inf")).to(tl.float32)
        after = tl.maximum(most, tl.max(some, 0))
        shift = tl.where(after == float("-inf"), 0.0, after)  # nothing but -inf so far
        y = (some - shift) * scale
        e = tl.exp(y)
        change = tl.where(most == float("-inf"), 0.0, (most - shift) * scale)
        keep = tl.exp(change)
        if EXPECTED:
            product = (product + total * change) * keep + tl.sum(tl.where(e > 0.0, e * y, 0.0), 0)
        total = total * keep + tl.sum(e, 0)
        most = after
    return tl.where(most == float("-inf"), 0.0, most), tl.log(total), product / total


@tile.jit
def row_gradient(  # type: ignore[no-untyped-def]
    x, out, columns, scale, most, rest, a, b, c, target, d, BLOCK: tl.constexpr, HAS_B: tl.constexpr
):
    """Write p (a + b log p) + c, and d more at the target. `out` may be `x`."""
    at = tl.arange(0, BLOCK)
    for start in range(0, columns, BLOCK):
        inside = start + at < columns
        some = tl.load(x + start + at, mask=inside, other=float("-inf")).to(tl.float32)
        log_p = (some - most) * scale - rest
        p = tl.exp(log_p)
        grad = p * a + c
        if HAS_B:
            grad += tl.where(p > 0.0, p * log_p, 0.0) * b
        grad += tl.where(start + at == target, d, 0.0)
        tl.store(out + start + at, grad.to(out.dtype.element_ty), mask=inside)


@tile.jit
def _row_forward(  # type: ignore[no-untyped-def]
    x,
    row,
    targets,
    losses,
    lses,
    mosts,
    rests,
    columns,
    smoothing,
    z,
    BLOCK: tl.constexpr,
    SMOOTHED: tl.constexpr,
):
    target = tl.load(targets + row)
    most, rest, _ = sum_row(x, columns, 1.0, BLOCK, False)
    lse = most + rest
    is_inside = (target >= 0) & (target < columns)
    picked = tl.load(x + target, mask=is_inside, other=float("nan")).to(tl.float32)
    loss = rest + (1.0 - smoothing) * (most - picked) + z * lse * lse
    if SMOOTHED:
        at = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            total += tl.load(x + start + at, mask=start + at < columns, other=0.0).to(tl.float32)
        loss += smoothing * (most - tl.sum(total, 0) / columns)
    tl.store(losses + row, tl.where(target == -100, 0.0, loss))
    tl.store(lses + row, lse)
    tl.store(mosts + row, most)
    tl.store(rests + row, rest)
    return target, most, rest


@tile.jit
def _row_backward(  # type: ignore[no-untyped-def]
    x, out, target, most, rest, grad, lse_grad, columns, smoothing, z, BLOCK: tl.constexpr
):
    is_inside = (target >= 0) & (target < columns)
    grad = tl.where(target == -100, 0.0, tl.where(is_inside, grad, float("nan")))
    a = grad * (1.0 + 2.0 * z * (most + rest)) + lse_grad
    c, d = -grad * smoothing / columns, -grad * (1.0 - smoothing)
    row_gradient(x, out, columns, 1.0, most, rest, a, 0.0, c, target, d, BLOCK, False)


@tile.jit
def _forward(  # type: ignore[no-untyped-def]
    logits,
    targets,
    losses,
    lses,
    mosts,
    rests,
    columns,
    smoothing,
    z,
    BLOCK: tl.constexpr,
    SMOOTHED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * columns
    _row_forward(x, row, targets, losses, lses, mosts, rests, columns, smoothing, z, BLOCK, SMOOTHED)


@tile.jit
def _backward(  # type: ignore[no-untyped-def]
    grads, lse_grads, logits, targets, mosts, rests, out, columns, smoothing, z, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x, to = logits + row * columns, out + row * columns
    grad, lse_grad, target = tl.load(grads + row), tl.load(lse_grads + row), tl.load(targets + row)
    most, rest = tl.load(mosts + row), tl.load(rests + row)
    _row_backward(x, to, target, most, rest, grad, lse_grad, columns, smoothing, z, BLOCK)


@tile.jit
def _in_place(  # type: ignore[no-untyped-def]
    logits,
    targets,
    losses,
    lses,
    mosts,
    rests,
    columns,
    smoothing,
    z,
    BLOCK: tl.constexpr,
    SMOOTHED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * columns
    target, most, rest = _row_forward(
        x, row, targets, losses, lses, mosts, rests, columns, smoothing, z, BLOCK, SMOOTHED
    )
    tl.debug_barrier()  # all of the row is read, the target's logit too, before its gradient takes its place
    _row_backward(x, x, target, most, rest, 1.0, 0.0, columns, smoothing, z, BLOCK)


def row_options(op: str, logits_NV: Tensor) -> dict[str, int]:
    """Return BLOCK and num_warps for programs that walk a row: several of them on a multiprocessor."""
    block = max(128, min(4096, 1 << (logits_NV.shape[1] - 1).bit_length()))
    default = {"BLOCK": block, "num_warps": max(1, min(8, block // 512))}
    candidates = ({"num_warps": 4}, {"num_warps": 16}, {"BLOCK": 2048, "num_warps": 4}, {"BLOCK": 8192})
    return tile.config(op, (block, str(logits_NV.dtype)), default, candidates)


def forward_triton(
    logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One program a row, which walks it in blocks."""
    options = row_options("cross_entropy", logits_NV)
    return _rows_triton(_forward, logits_NV.contiguous(), targets_N, label_smoothing, z_loss, options)


def backward_triton(
    loss_grad_N: Tensor,
    lse_grad_N: Tensor,
    logits_NV: Tensor,
    targets_N: Tensor,
    sums_2N: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """One program a row, which is read once: its sums are known."""
    logits_NV, columns = logits_NV.contiguous(), logits_NV.shape[1]
    out_NV = torch.empty_like(logits_NV)
    arguments = (
        *(loss_grad_N.contiguous(), lse_grad_N.contiguous(), logits_NV, targets_N.contiguous(), *sums_2N),
        *(out_NV, columns, label_smoothing, z_loss),
    )
    options = row_options("cross_entropy_backward", logits_NV)
    tile.launch(_backward, (len(logits_NV),), *arguments, **options)
    return out_NV


def in_place_triton(
    logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, lses and sums; the logits become the gradient of the summed loss."""
    options = row_options("cross_entropy_in_place", logits_NV)
    return _rows_triton(_in_place, logits_NV, targets_N, label_smoothing, z_loss, options)


def _rows_triton(
    kernel: Any,
    logits_NV: Tensor,
    targets_N: Tensor,
    label_smoothing: float,
    z_loss: float,
    options: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor]:
    columns = logits_NV.shape[1]
    losses_N, lse_N, sums_2N = _empty(logits_NV, targets_N, label_smoothing, z_loss)
    arguments = (
        *(logits_NV, targets_N.contiguous(), losses_N, lse_N, *sums_2N),
        *(columns, label_smoothing, z_loss),
    )
    tile.launch(kernel, (len(logits_NV),), *arguments, SMOOTHED=label_smoothing != 0, **options)
    return losses_N, lse_N, sums_2N


# CPU


def forward_cpu(
    logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in C, shared among torch's threads."""
    return _rows_cpu("cross_entropy_forward", logits_NV.contiguous(), targets_N, label_smoothing, z_loss)


def backward_cpu(
    loss_grad_N: Tensor,
    lse_grad_N: Tensor,
    logits_NV: Tensor,
    targets_N: Tensor,
    sums_2N: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Rows in C; each is read once: its sums are known."""
    logits_NV, targets_N = logits_NV.contiguous(), targets_N.contiguous()
    loss_grad_N, lse_grad_N = loss_grad_N.contiguous(), lse_grad_N.contiguous()
    out_NV = torch.empty_like(logits_NV)
    native.function("cross_entropy", "cross_entropy_backward", "pppppppllffii")(
        *native.pointers(loss_grad_N, lse_grad_N, logits_NV, targets_N, *sums_2N, out_NV),
        *(*logits_NV.shape, label_smoothing, z_loss, torch.get_num_threads(), native.type_of(logits_NV)),
    )
    return out_NV


def in_place_cpu(
    logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, lses and sums; the logits become the gradient of the summed loss."""
    return _rows_cpu("cross_entropy_in_place", logits_NV, targets_N, label_smoothing, z_loss)


def _rows_cpu(
    symbol: str, logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    targets_N = targets_N.contiguous()
    losses_N, lse_N, sums_2N = _empty(logits_NV, targets_N, label_smoothing, z_loss)
    native.function("cross_entropy", symbol, "ppppppllffii")(
        *native.pointers(logits_NV, targets_N, losses_N, lse_N, *sums_2N),
        *(*logits_NV.shape, label_smoothing, z_loss, torch.get_num_threads(), native.type_of(logits_NV)),
    )
    return losses_N, lse_N, sums_2N


# What all paths share


def _empty(
    logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate a row's loss, its lse, and the lse's two parts: what is largest, and the rest."""
    # Not len(), here and in other fakes: a graph would be made anew for every number of rows.
    wide, rows = torch.promote_types(logits_NV.dtype, torch.float32), logits_NV.shape[0]
    losses_N, lse_N = (logits_NV.new_empty(rows, dtype=wide) for _ in range(2))
    return losses_N, lse_N, logits_NV.new_empty(2, rows, dtype=wide)


def _empty_gradient(
    loss_grad_N: Tensor,
    lse_grad_N: Tensor,
    logits_NV: Tensor,
    targets_N: Tensor,
    sums_2N: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    return torch.empty_like(logits_NV, memory_format=torch.contiguous_format)


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Logits of a small model, and a few rows of a large vocabulary."""
    examples = []
    for rows, vocab in ((2048, 2048), (256, 128256)):
        logits_NV = torch.randn(rows, vocab, device=device, dtype=dtype)
        targets_N = torch.randint(0, vocab, (rows,), device=device)
        cost = (logits_NV.numel() * dtype.itemsize, 4 * logits_NV.numel())
        examples.append(Example(f"{rows}x{vocab}", (logits_NV, targets_N, 0.0, 0.0), *cost))
    return examples


OPERATOR = Operator(
    "cross_entropy",
    cross_entropy_reference,
    fake=_empty,
    results=2,
    gradient=Gradient(
        inputs=(0,),
        saves=lambda inputs, outputs: (*inputs[:2], outputs[2], *inputs[2:]),
        fake=_empty_gradient,
    ),
    examples=_examples,
    expects=Expects(dtypes={"targets_N": torch.int64}),
)
OPERATOR.add("cpu", forward_cpu, backward_cpu, **native.path("cross_entropy"))
OPERATOR.add("triton", forward_triton, backward_triton, **tile.path())
