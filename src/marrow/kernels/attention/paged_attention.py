"""Paged attention: queries of many sequences over keys and values kept in blocks.

    cache   block 0 | block 1 | block 2 | block 3        S tokens each, in one tensor a layer
    list of sequence 0: [2, 1]      its tokens 0..S-1 are in block 2, S..2S-1 in block 1
    list of sequence 1: [3, -]      a list is padded with any valid block

The last query of a sequence is its last token, so causality is aligned at the ends: query i of n
sees `length - n + i + 1` keys. Prompts, chunks of prompts and single tokens go in one call. The
keys and values of the queries themselves are in the cache already when it is called.

Axes: N queries of all sequences, B sequences, M blocks of a list, P blocks of the cache, S tokens
of a block, H query heads, K kv heads, G = H/K, D head size, L keys of a sequence.
Source: PagedAttention (Kwon et al. 2023); the arguments are FlashAttention's variable-length form.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.kernels import dispatch


def paged_attention(
    q_NHD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, blocks_BM: Tensor, starts_B: Tensor, ends_B: Tensor
) -> Tensor:
    """Attend from each sequence's queries to its own keys, causally, with scale D^-0.5.

    Args: q_NHD: [N, H, D]. keys_PSKD, values_PSKD: [P, S, K, D], one layer's cache. blocks_BM:
        integers [B, M], the blocks of each sequence in order. starts_B: integers [B + 1], where
        each sequence's queries begin in N; every sequence has one at least. ends_B: integers [B],
        keys of each sequence, its queries' own among them. What a block holds past a sequence's
        end may be any finite number.
    Returns: o_NHD of q's dtype; softmax in fp32.
    Cost: reads 2 L K D elements a sequence; 4 L H D FLOPs a query; decoding is bound by memory.
    """
    function = dispatch.choose("paged_attention", q_NHD.device.type)
    result: Tensor = function(q_NHD, keys_PSKD, values_PSKD, blocks_BM, starts_B, ends_B)
    return result


def paged_attention_reference(
    q_NHD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, blocks_BM: Tensor, starts_B: Tensor, ends_B: Tensor
) -> Tensor:
    """Compute `paged_attention` in plain torch: sequence by sequence, gather and softmax."""
    wide = torch.promote_types(q_NHD.dtype, torch.float32)
    groups = q_NHD.shape[1] // keys_PSKD.shape[2]
    starts, outputs = starts_B.tolist(), []
    for blocks_M, begin, end, length in zip(blocks_BM, starts[:-1], starts[1:], ends_B.tolist(), strict=True):
        k_LKD, v_LKD = (
            cache[blocks_M.long()].flatten(0, 1)[:length].to(wide) for cache in (keys_PSKD, values_PSKD)
        )
        k_HLD, v_HLD = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k_LKD, v_LKD))
        q_HXD = q_NHD[begin:end].to(wide).transpose(0, 1)
        scores_HXL = (q_HXD @ k_HLD.mT) * q_NHD.shape[-1] ** -0.5
        scores_HXL = scores_HXL.masked_fill(~_seen(end - begin, length, q_NHD.device), float("-inf"))
        outputs.append((scores_HXL.softmax(-1) @ v_HLD).transpose(0, 1))
    return torch.cat(outputs).to(q_NHD.dtype)


def paged_attention_torch(
    q_NHD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, blocks_BM: Tensor, starts_B: Tensor, ends_B: Tensor
) -> Tensor:
    """Compute `paged_attention` with torch's fused kernels: decoding batched, prompts one by one."""
    starts, ends = starts_B.tolist(), ends_B.tolist()
    single = [i for i in range(len(ends)) if starts[i + 1] - starts[i] == 1]
    buckets = list(_buckets(single, ends))
    if len(single) == len(ends) and len(buckets) == 1:
        return _decode(q_NHD, keys_PSKD, values_PSKD, blocks_BM, ends_B, max(ends))
    o_NHD = torch.empty_like(q_NHD)
    for some in buckets:
        some_B = torch.tensor(some, device=q_NHD.device)
        rows_B = starts_B[some_B].long()
        o_BHD = _decode(
            q_NHD[rows_B],
            keys_PSKD,
            values_PSKD,
            blocks_BM[some_B],
            ends_B[some_B],
            max(ends[i] for i in some),
        )
        o_NHD.index_copy_(0, rows_B, o_BHD)
    for i in sorted(set(range(len(ends))) - set(single)):
        begin, end = starts[i], starts[i + 1]
        o_NHD[begin:end] = _prefill(q_NHD[begin:end], keys_PSKD, values_PSKD, blocks_BM[i], ends[i])
    return o_NHD


def _decode(
    q_BHD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, blocks_BM: Tensor, ends_B: Tensor, longest: int
) -> Tensor:
    """Attend from one query a sequence. Queries that share a kv head are folded into one axis."""
    size, kv_heads = keys_PSKD.shape[1:3]
    blocks_BM = blocks_BM[:, : -(-longest // size)]
    k_BKLD, v_BKLD = (_gather(cache, blocks_BM) for cache in (keys_PSKD, values_PSKD))
    at_L = torch.arange(k_BKLD.shape[2], device=q_BHD.device)
    seen_B11L = (at_L < ends_B[:, None])[:, None, None]
    q_BKGD = q_BHD.view(q_BHD.shape[0], kv_heads, -1, q_BHD.shape[-1])
    return F.scaled_dot_product_attention(q_BKGD, k_BKLD, v_BKLD, attn_mask=seen_B11L).flatten(1, 2)


def _prefill(q_XHD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, blocks_M: Tensor, length: int) -> Tensor:
    """Attend from several queries of one sequence."""
    queries, size = q_XHD.shape[0], keys_PSKD.shape[1]
    blocks_1M = blocks_M[None, : -(-length // size)]
    k_1KLD, v_1KLD = (_gather(cache, blocks_1M)[:, :, :length] for cache in (keys_PSKD, values_PSKD))
    whole = queries == length
    o_1HXD = F.scaled_dot_product_attention(
        q_XHD.transpose(0, 1)[None],
        k_1KLD,
        v_1KLD,
        attn_mask=None if whole else _seen(queries, length, q_XHD.device),
        is_causal=whole,
        enable_gqa=True,
    )
    return o_1HXD[0].transpose(0, 1)


def _gather(cache_PSKD: Tensor, blocks_BM: Tensor) -> Tensor:
    """Copy some sequences' blocks out of the cache: [B, K, M S, D], a view of [B, M S, K, D]."""
    rows = blocks_BM.shape[0]
    picked_NSKD = cache_PSKD.index_select(0, blocks_BM.flatten())
    return picked_NSKD.view(rows, -1, *cache_PSKD.shape[2:]).transpose(1, 2)


def _seen(queries: int, length: int, device: torch.device) -> Tensor:
    """Return the causal mask aligned at the ends: [X, L], True where a query sees a key."""
    return torch.ones(queries, length, dtype=torch.bool, device=device).tril(length - queries)


def _buckets(some: list[int], ends: list[int]) -> Iterator[list[int]]:
    """Group sequences of like length, so that padding at most doubles the keys read.

    One group where that holds already: every further group costs some 50 microseconds.
    """
    if not some:
        return
    lengths = [ends[i] for i in some]
    if max(lengths) * len(some) <= 2 * sum(lengths) + 2048:
        yield some
        return
    groups: dict[int, list[int]] = {}
    for i in some:
        groups.setdefault((ends[i] - 1).bit_length(), []).append(i)
    yield from groups.values()


def cost(lengths: list[int], heads: int, kv_heads: int, head_size: int, dtype_bytes: int) -> dict[str, Any]:
    """Return the bytes moved and FLOPs done by one decoding step over sequences of these lengths."""
    keys = sum(lengths)
    return {"bytes": 2 * keys * kv_heads * head_size * dtype_bytes, "flops": 4 * keys * heads * head_size}


dispatch.register("paged_attention", "reference", paged_attention_reference)
dispatch.register("paged_attention", "torch", paged_attention_torch)
