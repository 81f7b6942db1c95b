"""Cross entropy of rows of logits, with its log-sum-exp in fp32, label smoothing and z-loss.

    lse = log(sum(e^x)),  p = e^(x - lse)
    loss = lse - (1 - s) x[target] - s mean(x) + z lse^2
    dx = p (1 + 2 z lse) - s / V - (1 - s) [at the target]

Bound by memory: a row is read once from memory and once from the cache, the logits' gradient is all
that backward writes, and the only thing kept for it besides the logits is one lse a row. `in_place` makes
losses and gradient in one pass over logits that nobody needs any more, for `linear_cross_entropy`.

Axes: N rows, V vocabulary. s: label smoothing (Szegedy et al. 2016). z: z-loss (Chowdhery et al. 2022).
"""

import torch
from torch import Tensor

from marrow.kernels import native, tile
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
    Cost: forward reads N V elements, backward reads and writes them.
    """
    losses_N, lse_N = OPERATOR(logits_NV, targets_N, label_smoothing, z_loss)
    return losses_N, lse_N


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
def row_lse(x, columns, scale, BLOCK: tl.constexpr, EXPECTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return log(sum(e^y)) of a row, y = x scale, and sum(p y) where EXPECTED; online, one read."""
    at = tl.arange(0, BLOCK)
    most = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    product = tl.zeros([], tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + at < columns
        y = tl.load(x + start + at, mask=inside, other=float("-inf")).to(tl.float32) * scale
        after = tl.maximum(most, tl.max(y, 0))
        shift = tl.where(after == float("-inf"), 0.0, after)  # nothing but -inf so far
        e = tl.exp(y - shift)
        keep = tl.exp(most - shift)
        total = total * keep + tl.sum(e, 0)
        if EXPECTED:
            product = product * keep + tl.sum(tl.where(e > 0.0, e * y, 0.0), 0)
        most = after
    return tl.log(total) + tl.where(most == float("-inf"), 0.0, most), product / total


@tile.jit
def row_gradient(x, out, columns, scale, lse, a, b, c, target, d, BLOCK: tl.constexpr, HAS_B: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write p (a + b y) + c, and d more at the target. `out` may be `x`."""
    at = tl.arange(0, BLOCK)
    for start in range(0, columns, BLOCK):
        inside = start + at < columns
        y = tl.load(x + start + at, mask=inside, other=float("-inf")).to(tl.float32) * scale
        p = tl.exp(y - lse)
        grad = p * a + c
        if HAS_B:
            grad += tl.where(p > 0.0, p * y, 0.0) * b
        grad += tl.where(start + at == target, d, 0.0)
        tl.store(out + start + at, grad.to(out.dtype.element_ty), mask=inside)


@tile.jit
def _row_loss(x, target, columns, smoothing, z, BLOCK: tl.constexpr, SMOOTHED: tl.constexpr):  # type: ignore[no-untyped-def]
    lse, _ = row_lse(x, columns, 1.0, BLOCK, False)
    is_inside = (target >= 0) & (target < columns)
    picked = tl.load(x + target, mask=is_inside, other=float("nan")).to(tl.float32)
    loss = lse - (1.0 - smoothing) * picked + z * lse * lse
    if SMOOTHED:
        at = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            total += tl.load(x + start + at, mask=start + at < columns, other=0.0).to(tl.float32)
        loss -= smoothing * tl.sum(total, 0) / columns
    return tl.where(target == -100, 0.0, loss), lse


@tile.jit
def _forward(
    logits, targets, losses, lses, columns, smoothing, z, BLOCK: tl.constexpr, SMOOTHED: tl.constexpr
):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    loss, lse = _row_loss(logits + row * columns, target, columns, smoothing, z, BLOCK, SMOOTHED)
    tl.store(losses + row, loss)
    tl.store(lses + row, lse)


@tile.jit
def _row_backward(x, out, target, lse, grad, lse_grad, columns, smoothing, z, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    is_inside = (target >= 0) & (target < columns)
    grad = tl.where(target == -100, 0.0, tl.where(is_inside, grad, float("nan")))
    a = grad * (1.0 + 2.0 * z * lse) + lse_grad
    c = -grad * smoothing / columns
    row_gradient(x, out, columns, 1.0, lse, a, 0.0, c, target, -grad * (1.0 - smoothing), BLOCK, False)


@tile.jit
def _backward(grads, lse_grads, logits, targets, lses, out, columns, smoothing, z, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    x, to = logits + row * columns, out + row * columns
    grad, lse_grad = tl.load(grads + row), tl.load(lse_grads + row)
    target, lse = tl.load(targets + row), tl.load(lses + row)
    _row_backward(x, to, target, lse, grad, lse_grad, columns, smoothing, z, BLOCK)


@tile.jit
def _in_place(
    logits, targets, losses, lses, columns, smoothing, z, BLOCK: tl.constexpr, SMOOTHED: tl.constexpr
):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * columns
    target = tl.load(targets + row)
    loss, lse = _row_loss(x, target, columns, smoothing, z, BLOCK, SMOOTHED)
    tl.store(losses + row, loss)
    tl.store(lses + row, lse)
    tl.debug_barrier()  # all of the row is read, the target's logit too, before its gradient takes its place
    _row_backward(x, x, target, lse, 1.0, 0.0, columns, smoothing, z, BLOCK)


def row_options(columns: int) -> dict[str, int]:
    """Return BLOCK and num_warps for programs that walk a row: 16 elements a thread, several programs an SM."""
    block = max(128, min(4096, 1 << (columns - 1).bit_length()))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 512))}


def forward_triton(
    logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """One program a row, which walks it in blocks."""
    logits_NV, columns = logits_NV.contiguous(), logits_NV.shape[1]
    losses_N, lse_N = _empty(logits_NV, targets_N, label_smoothing, z_loss)
    arguments = (logits_NV, targets_N.contiguous(), losses_N, lse_N, columns, label_smoothing, z_loss)
    tile.launch(
        _forward, (len(logits_NV),), *arguments, SMOOTHED=label_smoothing != 0, **row_options(columns)
    )
    return losses_N, lse_N


def backward_triton(
    loss_grad_N: Tensor,
    lse_grad_N: Tensor,
    logits_NV: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """One program a row; the lse is known."""
    logits_NV, columns = logits_NV.contiguous(), logits_NV.shape[1]
    out_NV = torch.empty_like(logits_NV)
    arguments = (
        *(loss_grad_N.contiguous(), lse_grad_N.contiguous(), logits_NV, targets_N.contiguous(), lse_N),
        *(out_NV, columns, label_smoothing, z_loss),
    )
    tile.launch(_backward, (len(logits_NV),), *arguments, **row_options(columns))
    return out_NV


def in_place_triton(
    logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Return losses and lses; the logits become the gradient of the summed loss."""
    columns = logits_NV.shape[1]
    losses_N, lse_N = _empty(logits_NV, targets_N, label_smoothing, z_loss)
    arguments = (logits_NV, targets_N.contiguous(), losses_N, lse_N, columns, label_smoothing, z_loss)
    tile.launch(
        _in_place, (len(logits_NV),), *arguments, SMOOTHED=label_smoothing != 0, **row_options(columns)
    )
    return losses_N, lse_N


# CPU


def forward_cpu(
    logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Rows in C, shared among torch's threads."""
    return _rows_cpu("cross_entropy_forward", logits_NV.contiguous(), targets_N, label_smoothing, z_loss)


def backward_cpu(
    loss_grad_N: Tensor,
    lse_grad_N: Tensor,
    logits_NV: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Rows in C; the lse is known."""
    logits_NV, targets_N = logits_NV.contiguous(), targets_N.contiguous()
    loss_grad_N, lse_grad_N = loss_grad_N.contiguous(), lse_grad_N.contiguous()
    out_NV = torch.empty_like(logits_NV)
    native.function("cross_entropy", "cross_entropy_backward", "ppppppllffii")(
        *native.pointers(loss_grad_N, lse_grad_N, logits_NV, targets_N, lse_N, out_NV),
        *(*logits_NV.shape, label_smoothing, z_loss, torch.get_num_threads(), native.type_of(logits_NV)),
    )
    return out_NV


def in_place_cpu(
    logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Return losses and lses; the logits become the gradient of the summed loss."""
    return _rows_cpu("cross_entropy_in_place", logits_NV, targets_N, label_smoothing, z_loss)


def _rows_cpu(
    symbol: str, logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    targets_N = targets_N.contiguous()
    losses_N, lse_N = _empty(logits_NV, targets_N, label_smoothing, z_loss)
    native.function("cross_entropy", symbol, "ppppllffii")(
        *native.pointers(logits_NV, targets_N, losses_N, lse_N),
        *(*logits_NV.shape, label_smoothing, z_loss, torch.get_num_threads(), native.type_of(logits_NV)),
    )
    return losses_N, lse_N


# What all paths share


def _empty(
    logits_NV: Tensor, targets_N: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Allocate a loss and an lse a row."""
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    return logits_NV.new_empty(len(logits_NV), dtype=wide), logits_NV.new_empty(len(logits_NV), dtype=wide)


def _empty_gradient(
    loss_grad_N: Tensor,
    lse_grad_N: Tensor,
    logits_NV: Tensor,
    targets_N: Tensor,
    lse_N: Tensor,
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
        saves=lambda inputs, outputs: (*inputs[:2], outputs[1], *inputs[2:]),
        fake=_empty_gradient,
    ),
    examples=_examples,
)
OPERATOR.add("cpu", forward_cpu, backward_cpu, **native.path("cross_entropy"))
OPERATOR.add("triton", forward_triton, backward_triton, **tile.path())
