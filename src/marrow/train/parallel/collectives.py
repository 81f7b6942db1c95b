"""Collectives along the token axis that autograd goes through.

    gather_tokens   forward: every rank gets all tokens                 backward: as scatter_sum's forward
    scatter_sum     forward: partial results are summed and dealt out   backward: as gather_tokens's forward

They are each other's gradient. Source: Korthikanti et al. 2022 (sequence parallelism).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_tokens(x_N: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate the ranks' tokens. Args: x_N: [N, ...], equal shapes. Returns: [N x ranks, ...]."""
    if group is None:
        return x_N
    result: Tensor = _Gather.apply(x_N, group)  # type: ignore[no-untyped-call]
    return result


def scatter_sum(x_M: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum the ranks' tensors and keep this rank's tokens. Args: x_M: [N x ranks, ...]. Returns: [N, ...]."""
    if group is None:
        return x_M
    result: Tensor = _Scatter.apply(x_M, group)  # type: ignore[no-untyped-call]
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_N: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x_N, group)

    @staticmethod
    def backward(ctx: Any, dy_M: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(dy_M, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_M: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter(x_M, group)

    @staticmethod
    def backward(ctx: Any, dy_N: Tensor) -> tuple[Tensor, None]:
        return all_gather(dy_N, ctx.group), None


def all_gather(x_N: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the ranks' tensors, equal in shape, along the first axis."""
    whole = x_N.new_empty(x_N.shape[0] * group.size(), *x_N.shape[1:])
    _all_gather_single(whole, x_N.contiguous(), group=group)
    return whole


def reduce_scatter(x_M: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the ranks' tensors and return this rank's part of the first axis."""
    own = x_M.new_empty(x_M.shape[0] // group.size(), *x_M.shape[1:])
    _reduce_scatter_single(own, x_M.contiguous(), group=group)
    return own


# torch 2.11 has only the older names, of which 2.13 warns.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
