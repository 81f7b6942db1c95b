"""Sums of gradients over the ranks that hold the same weights, in buckets that travel side by side.

    gradients of a step -> flat buckets in fp32 -> all-reduce, all at once -> back to their places

Which ranks hold the same weights: the dp copies; under tensor parallelism also the tp ranks, for
weights that it does not cut; under pipelining the first and the last stage, for a tied embedding. FSDP sums
over copies and shards by itself. Sums are made in fp32, in one order for all ranks, so copies stay equal to
the bit.

They begin when the backward is done. Source: Li et al. 2020 (PyTorch Distributed: buckets).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 25 << 20  # as torch's own; small models fit into one


def sum_over(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Replace each tensor by its sum over the ranks of a group.

    Args: tensors: fp32 or narrower, equal shapes on all ranks; narrower ones are summed in fp32.
    Raises: RuntimeError if a rank of the group is gone; the tensors are then not to be used.
    """
    if group is None or not tensors:
        return
    waiting = [_start(bucket, group) for bucket in _buckets(tensors)]
    for bucket, flat, work in waiting:
        work.wait()
        offset = 0
        for tensor in bucket:
            tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
            offset += tensor.numel()


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    size = BUCKET_BYTES
    for tensor in tensors:
        if size >= BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += 4 * tensor.numel()
    return buckets


def _start(bucket: list[Tensor], group: dist.ProcessGroup) -> tuple[list[Tensor], Tensor, dist.Work]:
    flat = torch.cat([tensor.reshape(-1).float() for tensor in bucket])
    work = dist.all_reduce(flat, group=group, async_op=True)
    assert work is not None
    return bucket, flat, work
