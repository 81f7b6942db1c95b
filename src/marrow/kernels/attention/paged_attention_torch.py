"""`paged_attention` in plain torch: the reference, and torch's fused kernels on gathered keys and values.

Axes: as in `paged_attention`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.kernels.attention.paged_lists import check_lists


def paged_attention_reference(
    q_NHD: Tensor,
    keys_PSKD: Tensor,
    values_PSKD: Tensor,
    key_scales_PSK: Tensor | None,
    value_scales_PSK: Tensor | None,
    blocks_BM: Tensor,
    starts_B: Tensor,
    ends_B: Tensor,
    max_queries: int = 0,
    max_keys: int = 0,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Compute `paged_attention` in plain torch: sequence by sequence, gather and softmax."""
    check_lists(q_NHD, keys_PSKD, blocks_BM, starts_B, ends_B)
    wide = torch.promote_types(q_NHD.dtype, torch.float32)
    groups = q_NHD.shape[1] // keys_PSKD.shape[2]
    starts, outputs = starts_B.tolist(), [q_NHD[:0].to(wide)]
    for blocks_M, begin, end, length in zip(blocks_BM, starts[:-1], starts[1:], ends_B.tolist(), strict=True):
        hidden = _hidden(end - begin, length, window)
        k_LKD, v_LKD = (
            _wide(cache, scales, blocks_M.long(), wide)[hidden:length]
            for cache, scales in ((keys_PSKD, key_scales_PSK), (values_PSKD, value_scales_PSK))
        )
        k_HLD, v_HLD = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k_LKD, v_LKD))
        q_HXD = q_NHD[begin:end].to(wide).transpose(0, 1)
        scores_HXL = (q_HXD @ k_HLD.mT) * q_NHD.shape[-1] ** -0.5
        if softcap:
            scores_HXL = torch.tanh(scores_HXL / softcap) * softcap
        seen_XL = seen_by(end - begin, length, window, q_NHD.device)[:, hidden:]
        p_HXL = scores_HXL.masked_fill(~seen_XL, float("-inf")).softmax(-1)
        p_HXL = p_HXL.masked_fill(~seen_XL, 0.0)  # NaN where a query sees nothing
        outputs.append((p_HXL @ v_HLD).transpose(0, 1))
    return torch.cat(outputs).to(q_NHD.dtype)


def _wide(cache: Tensor, scales: Tensor | None, blocks_M: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather a sequence's blocks, dequantised: [M S, K, D]."""
    picked_LKD = (
        cache.view(torch.uint8)[blocks_M].view(cache.dtype) if scales is not None else cache[blocks_M]
    )
    wide_LKD = picked_LKD.to(dtype).flatten(0, 1)
    return wide_LKD if scales is None else wide_LKD * scales[blocks_M].flatten(0, 1)[..., None]


def forward_torch(
    q_NHD: Tensor,
    keys_PSKD: Tensor,
    values_PSKD: Tensor,
    key_scales_PSK: Tensor | None,
    value_scales_PSK: Tensor | None,
    blocks_BM: Tensor,
    starts_B: Tensor,
    ends_B: Tensor,
    max_queries: int,
    max_keys: int,
    window: int,
    softcap: float,
) -> Tensor:
    """Torch's fused kernels: decoding batched, prompts one by one. Reads the lengths on the host."""
    caches = (keys_PSKD, values_PSKD)
    if softcap or key_scales_PSK is not None or not q_NHD.numel():
        given = (q_NHD, *caches, key_scales_PSK, value_scales_PSK, blocks_BM, starts_B, ends_B)
        return paged_attention_reference(*given, max_queries, max_keys, window, softcap)
    check_lists(q_NHD, keys_PSKD, blocks_BM, starts_B, ends_B)
    starts, ends = starts_B.tolist(), ends_B.tolist()
    single = [i for i in range(len(ends)) if starts[i + 1] - starts[i] == 1]
    buckets = list(_buckets(single, ends))
    if len(single) == len(ends) and len(buckets) == 1:
        return _decode(q_NHD, *caches, blocks_BM, ends_B, max(ends), window)
    o_NHD = torch.empty_like(q_NHD, memory_format=torch.contiguous_format)
    for some in buckets:
        some_B = torch.tensor(some, device=q_NHD.device)
        rows_B, longest = starts_B[some_B].long(), max(ends[i] for i in some)
        o_BHD = _decode(q_NHD[rows_B], *caches, blocks_BM[some_B], ends_B[some_B], longest, window)
        o_NHD.index_copy_(0, rows_B, o_BHD)
    for i in sorted(set(range(len(ends))) - set(single)):
        begin, end = starts[i], starts[i + 1]
        o_NHD[begin:end] = _prefill(q_NHD[begin:end], *caches, blocks_BM[i], ends[i], window)
    return o_NHD


def _decode(
    q_BHD: Tensor,
    keys_PSKD: Tensor,
    values_PSKD: Tensor,
    blocks_BM: Tensor,
    ends_B: Tensor,
    longest: int,
    window: int,
) -> Tensor:
    """Attend from one query a sequence. Queries that share a kv head are folded into one axis."""
    size, kv_heads = keys_PSKD.shape[1:3]
    blocks_BM = blocks_BM[:, : max(1, -(-longest // size))]
    k_BKLD, v_BKLD = (_gather(cache, blocks_BM) for cache in (keys_PSKD, values_PSKD))
    at_L = torch.arange(k_BKLD.shape[2], device=q_BHD.device)
    seen_BL = at_L < ends_B[:, None]
    seen_BL = seen_BL & (at_L >= ends_B[:, None] - window) if window else seen_BL
    for x_BKLD in (k_BKLD, v_BKLD):  # a NaN there would outlive its mask
        x_BKLD.masked_fill_(~seen_BL[:, None, :, None], 0.0)
    q_BKGD = q_BHD.reshape(q_BHD.shape[0], kv_heads, -1, q_BHD.shape[2])
    o_BKGD = F.scaled_dot_product_attention(q_BKGD, k_BKLD, v_BKLD, attn_mask=seen_BL[:, None, None])
    return o_BKGD.flatten(1, 2).masked_fill_(~(ends_B > 0)[:, None, None], 0.0)


def _prefill(
    q_XHD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, blocks_M: Tensor, length: int, window: int
) -> Tensor:
    """Attend from several queries of one sequence."""
    queries, size = q_XHD.shape[0], keys_PSKD.shape[1]
    if not queries or not length:
        return torch.zeros_like(q_XHD)
    blocks_1M, hidden = blocks_M[None, : -(-length // size)], _hidden(queries, length, window)
    k_1KLD, v_1KLD = (_gather(cache, blocks_1M)[:, :, hidden:length] for cache in (keys_PSKD, values_PSKD))
    is_whole = queries == length and not window
    o_1HXD = F.scaled_dot_product_attention(
        q_XHD.transpose(0, 1)[None],
        k_1KLD,
        v_1KLD,
        attn_mask=None if is_whole else seen_by(queries, length, window, q_XHD.device)[:, hidden:],
        is_causal=is_whole,
        enable_gqa=True,
    )
    o_XHD = o_1HXD[0].transpose(0, 1)
    if queries > length:  # the first ones see nothing
        o_XHD[: queries - length] = 0.0
    return o_XHD


def _gather(cache_PSKD: Tensor, blocks_BM: Tensor) -> Tensor:
    """Copy some sequences' blocks out of the cache: [B, K, M S, D], a view of [B, M S, K, D]."""
    rows = blocks_BM.shape[0]
    picked_NSKD = cache_PSKD.index_select(0, blocks_BM.flatten())
    return picked_NSKD.view(rows, -1, *cache_PSKD.shape[2:]).transpose(1, 2)


def _hidden(queries: int, length: int, window: int) -> int:
    """Return how many keys come before the first query's window: they may be anything."""
    return max(0, length - queries - window + 1) if window else 0


def seen_by(queries: int, length: int, window: int, device: torch.device) -> Tensor:
    """Return the causal mask aligned at the ends: [X, L], True where a query sees a key."""
    seen_XL = torch.ones(queries, length, dtype=torch.bool, device=device).tril(length - queries)
    return seen_XL.triu(length - queries - window + 1) if window else seen_XL


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
        groups.setdefault(max(0, ends[i] - 1).bit_length(), []).append(i)
    yield from groups.values()
