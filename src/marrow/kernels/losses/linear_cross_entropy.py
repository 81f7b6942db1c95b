"""The head and the loss in one: cross entropy of hidden @ weight^T, without all the logits.

Rows go through in chunks; each chunk's logits become its loss and, in the same pass and the same memory,
its gradient, which two matrix products carry on to `hidden` and `weight`. So memory is one chunk of logits
instead of N V numbers twice, and forward has made the gradients when it ends: backward only scales them.

Axes: N rows, M rows of a chunk, C channels, V vocabulary.
Source: the chunked form of Hsu et al. 2024 (Liger Kernel), written anew.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.arguments import Expects
from marrow.kernels.dispatch import Example, Gradient, Operator
from marrow.kernels.losses.chunks import WeightGradient, chunks
from marrow.kernels.losses.cross_entropy import (
    IGNORE,
    check_targets,
    cross_entropy_reference,
    in_place_cpu,
    in_place_triton,
)

# (logits, targets, label smoothing, z-loss) -> losses and more; the logits become the gradient.
Step = Callable[[Tensor, Tensor, float, float], tuple[Tensor, ...]]
SCALED_ROWS = 8192  # whose fp32 copies stay small beside the gradient itself


def linear_cross_entropy(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sum the cross entropy of each row's target.

    Args: hidden_NC: [N, C]. weight_VC: [V, C] of the same dtype. targets_N: int64 [N], in [0, V)
        or -100 for rows that have none. label_smoothing, z_loss: as in `cross_entropy`.
    Returns: (loss, count): fp32 scalar in nats (fp64 for fp64 input), summed over the rows that
        have a target; int64 scalar, how many those are.
    Raises: UsageError if the targets do not fit the rows.
    Cost: 2 N C V FLOPs forward, 4 N C V for the gradients, made in forward where they are needed.
    """
    check_targets(hidden_NC, targets_N)
    learns = torch.is_grad_enabled()
    flags = (learns and hidden_NC.requires_grad, learns and weight_VC.requires_grad)
    loss: Tensor = OPERATOR(hidden_NC, weight_VC, targets_N, *flags, label_smoothing, z_loss)
    return loss, (targets_N != IGNORE).sum()


def linear_cross_entropy_reference(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """Compute the loss of `linear_cross_entropy` in plain torch, all logits at once."""
    wide = torch.promote_types(hidden_NC.dtype, torch.float32)
    logits_NV = F.linear(hidden_NC.to(wide), weight_VC.to(wide))
    return cross_entropy_reference(logits_NV, targets_N, label_smoothing, z_loss)[0].sum()


def forward_triton(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix products by torch, each chunk's softmax and gradient by one kernel."""
    flags = needs_hidden, needs_weight, label_smoothing, z_loss
    return _chunked(in_place_triton, hidden_NC, weight_VC, targets_N, *flags)


def forward_cpu(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix products by torch, each chunk's softmax and gradient in C."""
    # PERF: loss and gradients, bf16, one core: 1.8 times as fast as the same chunks by torch alone at
    # 2048 x 192 x 2048 and 8192 x 256 x 4096, 2.0 times as torch with all logits; two thirds of the rest are
    # the matrix products.
    flags = needs_hidden, needs_weight, label_smoothing, z_loss
    return _chunked(in_place_cpu, hidden_NC, weight_VC, targets_N, *flags)


def forward_torch(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """All by torch."""
    flags = needs_hidden, needs_weight, label_smoothing, z_loss
    return _chunked(_in_place_torch, hidden_NC, weight_VC, targets_N, *flags)


def _scaled(rows_RC: Tensor, factor: Tensor) -> Tensor:
    """Multiply in fp32: 1 / targets rounded to bf16 first would bend all gradients alike."""
    if rows_RC.is_cpu or rows_RC.dtype == factor.dtype:
        return rows_RC * factor  # torch takes a CPU's scalar as it is
    scaled_RC = torch.empty_like(rows_RC)
    for low in range(0, len(rows_RC), SCALED_ROWS):
        part = slice(low, low + SCALED_ROWS)
        torch.mul(rows_RC[part].float(), factor, out=scaled_RC[part])
    return scaled_RC


def backward(loss_grad: Tensor, hidden_grad_NC: Tensor, weight_grad_VC: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the gradients that forward made by the loss's own."""
    return (
        _scaled(hidden_grad_NC, loss_grad),
        _scaled(weight_grad_VC, loss_grad),
    )


def cost(num_rows: int, num_channels: int, vocab_size: int, dtype_bytes: int) -> dict[str, float]:
    """Return the bytes moved and FLOPs done by forward and gradients."""
    weights, hidden = vocab_size * num_channels, num_rows * num_channels
    return {"bytes": 3 * (weights + hidden) * dtype_bytes, "flops": 6 * num_rows * weights}


def _chunked(
    step: Step,
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make the loss and both gradients, chunk by chunk."""
    flags = needs_hidden, needs_weight, label_smoothing, z_loss
    loss, hidden_grad_NC, weight_grad_VC = _empty(hidden_NC, weight_VC, targets_N, *flags)
    parts = list(chunks(len(hidden_NC), len(weight_VC), hidden_NC.device))
    if not parts:
        return loss.zero_(), hidden_grad_NC, weight_grad_VC.zero_()
    buffer_MV = hidden_NC.new_empty(parts[0].stop, len(weight_VC))
    weight_sum, losses = WeightGradient(weight_grad_VC), []
    for part in parts:
        hidden_MC = hidden_NC[part]
        logits_MV = torch.mm(hidden_MC, weight_VC.T, out=buffer_MV[: part.stop - part.start])
        losses.append(step(logits_MV, targets_N[part], label_smoothing, z_loss)[0])
        if needs_hidden:
            torch.mm(logits_MV, weight_VC, out=hidden_grad_NC[part])
        if needs_weight:
            weight_sum.add(logits_MV, hidden_MC, is_only=len(parts) == 1)
    del buffer_MV, logits_MV  # before the sum is rounded: the peak of memory is there
    weight_sum.finish()
    torch.sum(torch.cat(losses), 0, out=loss)
    return loss, hidden_grad_NC, weight_grad_VC


def _in_place_torch(
    logits_MV: Tensor, targets_M: Tensor, label_smoothing: float, z_loss: float
) -> tuple[Tensor]:
    """Return losses; the logits become the gradient of their sum."""
    wide = torch.promote_types(logits_MV.dtype, torch.float32)
    is_none_M1, index_M1 = (targets_M == IGNORE)[:, None], targets_M.clamp(min=0)[:, None]
    scores_MV = torch.log_softmax(logits_MV, -1, dtype=wide)
    losses_M1 = (label_smoothing - 1) * scores_MV.gather(1, index_M1)
    if label_smoothing:
        losses_M1 -= label_smoothing * scores_MV.mean(-1, keepdim=True)
    grad_MV = scores_MV.exp_()
    if z_loss:
        lse_M1 = logits_MV.to(wide).logsumexp(-1, keepdim=True)
        losses_M1 += z_loss * lse_M1.square()
        grad_MV *= 1 + 2 * z_loss * lse_M1
    if label_smoothing:
        grad_MV -= label_smoothing / grad_MV.shape[1]
    grad_MV.scatter_add_(1, index_M1, grad_MV.new_full(index_M1.shape, label_smoothing - 1))
    logits_MV.copy_(grad_MV.masked_fill_(is_none_M1, 0.0))
    return (losses_M1.masked_fill(is_none_M1, 0.0)[:, 0],)


def _empty(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the loss and the gradients that are needed."""
    wide = torch.promote_types(hidden_NC.dtype, torch.float32)
    return (
        hidden_NC.new_empty((), dtype=wide),
        hidden_NC.new_empty(hidden_NC.shape if needs_hidden else (0,)),
        weight_VC.new_empty(weight_VC.shape if needs_weight else (0,)),
    )


def _empty_gradients(
    loss_grad: Tensor, hidden_grad_NC: Tensor, weight_grad_VC: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden_grad_NC), torch.empty_like(weight_grad_VC)


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Heads of small models, and that of an 8B model where there is a GPU for it."""
    shapes = [(2048, 192, 2048), (8192, 256, 4096)] + [(8192, 4096, 128256)] * (device != "cpu")
    examples = []
    for rows, channels, vocab in shapes:
        hidden_NC = torch.randn(rows, channels, device=device, dtype=dtype)
        weight_VC = torch.randn(vocab, channels, device=device, dtype=dtype) * channels**-0.5
        targets_N = torch.randint(0, vocab, (rows,), device=device)
        work = cost(rows, channels, vocab, dtype.itemsize)
        inputs = (hidden_NC, weight_VC, targets_N, True, True, 0.0, 0.0)
        examples.append(Example(f"{rows}x{channels}x{vocab}", inputs, work["bytes"], work["flops"]))
    return examples


OPERATOR = Operator(
    "linear_cross_entropy",
    linear_cross_entropy_reference,
    fake=_empty,
    gradient=Gradient(inputs=(0, 1), saves=lambda inputs, outputs: outputs[1:], fake=_empty_gradients),
    examples=_examples,
    expects=Expects(dtypes={"targets_N": torch.int64}),
)
OPERATOR.add("torch", forward_torch, backward)
OPERATOR.add("cpu", forward_cpu, backward, **native.path("cross_entropy"))
OPERATOR.add("triton", forward_triton, backward, **tile.path())
