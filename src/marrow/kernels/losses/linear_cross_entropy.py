"""The head and the loss in one: cross entropy of hidden @ weight^T, without all the logits.

Rows go through in chunks; each chunk's logits become its loss and, in the same pass, its
gradients, so that memory is one chunk of logits instead of N V numbers twice.

Axes: N rows, M rows of a chunk, C channels, V vocabulary.
Source: the chunked form of Hsu et al. 2024 (Liger Kernel), written anew.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.kernels import dispatch

IGNORE = -100
# Logits in memory at once: 16 MiB of fp32.
# PERF: loss and gradients of 8192 rows, C 256, V 4096, bf16, one core: 617 ms reference; in chunks
# of 2^18 338 ms, 2^20 227 ms, 2^22 204 ms, 2^23 242 ms.
CHUNK_LOGITS = 1 << 22


def linear_cross_entropy(hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the cross entropy of each row's target.

    Args: hidden_NC: [N, C]. weight_VC: [V, C] of the same dtype. targets_N: int64 [N], in [0, V)
        or -100 for rows that have none.
    Returns: (loss, count): fp32 scalar in nats (fp64 for fp64 input), summed over the rows that
        have a target; int64 scalar, how many those are.
    Cost: 2 N C V FLOPs forward, 4 N C V for the gradients, made in forward.
    """
    function = dispatch.choose("linear_cross_entropy", hidden_NC.device.type)
    return function(hidden_NC, weight_VC, targets_N), (targets_N != IGNORE).sum()


def linear_cross_entropy_reference(hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    """Compute the loss of `linear_cross_entropy` in plain torch, all logits at once."""
    wide = torch.promote_types(hidden_NC.dtype, torch.float32)
    logits_NV = F.linear(hidden_NC.to(wide), weight_VC.to(wide))
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum")


def linear_cross_entropy_torch(hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
    """Compute the loss of `linear_cross_entropy` in chunks."""
    loss: Tensor = ChunkedLoss.apply(hidden_NC, weight_VC, targets_N)  # type: ignore[no-untyped-call]
    return loss


class ChunkedLoss(torch.autograd.Function):
    """Forward makes the loss and both gradients; backward only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor) -> Tensor:
        """Return the summed loss."""
        wide = torch.promote_types(hidden_NC.dtype, torch.float32)
        need_hidden, need_weight, _ = ctx.needs_input_grad
        rows = max(1, CHUNK_LOGITS // weight_VC.shape[0])
        loss = torch.zeros((), dtype=wide, device=hidden_NC.device)
        hidden_grads: list[Tensor] = []
        # Summed in fp32: in bf16 the sum over chunks would lose the small ones.
        weight_grad_VC = (
            torch.zeros(weight_VC.shape, dtype=wide, device=weight_VC.device) if need_weight else None
        )
        for hidden_MC, targets_M in zip(
            torch.split(hidden_NC, rows), torch.split(targets_N, rows), strict=True
        ):
            # The scores become log probabilities and then, in place, the gradient.
            scores_MV = torch.log_softmax(F.linear(hidden_MC, weight_VC), -1, dtype=wide)
            valid_M1 = (targets_M != IGNORE)[:, None]
            index_M1 = targets_M.clamp(min=0)[:, None]
            loss = loss - scores_MV.gather(1, index_M1).masked_fill(~valid_M1, 0.0).sum()
            if not (need_hidden or need_weight):
                continue
            scores_MV.exp_().scatter_add_(1, index_M1, torch.full_like(valid_M1, -1.0, dtype=wide))
            grad_MV = scores_MV.to(hidden_NC.dtype)
            # Rows without a target are taken out where they are narrow.
            if need_hidden:
                hidden_grads.append((grad_MV @ weight_VC).masked_fill_(~valid_M1, 0.0))
            if weight_grad_VC is not None:
                weight_grad_VC += grad_MV.T @ hidden_MC.masked_fill(~valid_M1, 0.0)
        ctx.hidden_grad_NC = torch.cat(hidden_grads) if need_hidden else None
        ctx.weight_grad_VC = weight_grad_VC.to(weight_VC.dtype) if weight_grad_VC is not None else None
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        """Scale the stored gradients by the loss's own."""
        (grad,) = grads
        hidden, weight = ctx.hidden_grad_NC, ctx.weight_grad_VC
        return (
            None if hidden is None else hidden * grad.to(hidden.dtype),
            None if weight is None else weight * grad.to(weight.dtype),
            None,
        )


def cost(num_rows: int, num_channels: int, vocab_size: int, dtype_bytes: int) -> dict[str, Any]:
    """Return the bytes moved and FLOPs done by forward and gradients."""
    weights, hidden = vocab_size * num_channels, num_rows * num_channels
    return {"bytes": 3 * (weights + hidden) * dtype_bytes, "flops": 6 * num_rows * weights}


dispatch.register("linear_cross_entropy", "reference", linear_cross_entropy_reference)
dispatch.register("linear_cross_entropy", "torch", linear_cross_entropy_torch)
