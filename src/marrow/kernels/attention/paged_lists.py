"""Whether the lists of `paged_attention` lead to memory that there is.

Kernels read where they are told to: a block that the cache has not is somebody else's memory. C asks the same
by itself, at no cost, and this then says what is wrong. Axes: as in `paged_attention`.
"""

from typing import NoReturn

import torch
from torch import Tensor

from marrow.core.errors import UsageError


def check_lists(
    q_NHD: Tensor, keys_PSKD: Tensor, blocks_BM: Tensor, starts_B: Tensor, ends_B: Tensor
) -> None:
    """Refuse lists that lead out of the queries, of themselves or of the cache.

    On a GPU nothing is asked: the answer would stop the host. Raises: UsageError naming the sequence.
    Cost: O(B M).
    """
    if q_NHD.device.type != "cpu":
        return
    (queries, most), (cached, size) = (q_NHD.shape[0], blocks_BM.shape[1]), keys_PSKD.shape[:2]
    at_M = torch.arange(most) * size
    outside_BM = (at_M < ends_B[:, None]) & ((blocks_BM < 0) | (blocks_BM >= cached))
    wrong_B = (starts_B.diff() < 0) | (ends_B < 0) | (ends_B > most * size) | outside_BM.any(1)
    if int(starts_B[0]) != 0 or int(starts_B[-1]) != queries:
        _refuse(
            f"starts_B goes from {int(starts_B[0])} to {int(starts_B[-1])}, must go from 0 to {queries}",
            "every query belongs to one sequence",
        )
    if not bool(wrong_B.any()):
        return
    sequence = int(wrong_B.int().argmax())
    start, stop, end = int(starts_B[sequence]), int(starts_B[sequence + 1]), int(ends_B[sequence])
    if stop < start:
        _refuse(f"sequence {sequence} begins at query {start} and stops at {stop}", "starts_B must not fall")
    if not 0 <= end <= most * size:
        hint = f"its list has {most} blocks of {size} tokens"
        _refuse(f"sequence {sequence} has {end} keys, must be 0 to {most * size}", hint)
    place = int(outside_BM[sequence].int().argmax())
    hint = f"the cache has {cached} blocks"
    what = f"block {int(blocks_BM[sequence, place])} in place {place} of its list"
    _refuse(f"sequence {sequence} has {what}, must be 0 to {cached - 1}", hint)


def _refuse(what: str, hint: str) -> NoReturn:
    raise UsageError(f"paged_attention: {what}", hint=hint)
