"""Paged attention: queries of many sequences over keys and values kept in blocks.

    cache   block 0 | block 1 | block 2 | block 3        S tokens each, in one tensor a layer
    list of sequence 0: [2, 1]      its tokens 0..S-1 are in block 2, S..2S-1 in block 1
    list of sequence 1: [3, -]      a list is padded with any valid block

The last query of a sequence is its last token, so causality is aligned at the ends: query i of n
sees `length - n + i + 1` keys. Prompts, chunks of prompts and single tokens go in one call. The
keys and values of the queries themselves are in the cache already when it is called.

A cache of one byte a number (int8 or e4m3) has a scale for each token and kv head: a token is
quantised once, when it is written, and never again when its block fills up.

Axes: N queries of all sequences, B sequences, M blocks of a list, P blocks of the cache, S tokens
of a block, H query heads, K kv heads, G = H/K, D head size, L keys of a sequence, X queries of one.
Source: PagedAttention (Kwon et al. 2023); the arguments are FlashAttention's variable-length form.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.attention.paged_flash import forward_triton
from marrow.kernels.dispatch import Example, Operator

QUANTISED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # and the largest code
CODES = {torch.int8: 1, torch.float8_e4m3fn: 2}  # in C
SPLIT_KEYS = 1024  # of a sequence that one task reads on a CPU
Scales = tuple[Tensor, Tensor]


def paged_attention(
    q_NHD: Tensor,
    keys_PSKD: Tensor,
    values_PSKD: Tensor,
    blocks_BM: Tensor,
    starts_B: Tensor,
    ends_B: Tensor,
    *,
    scales: Scales | None = None,
    max_queries: int = 0,
    max_keys: int = 0,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attend from each sequence's queries to its own keys, causally, with scale D^-0.5.

    Args: q_NHD: [N, H, D]. keys_PSKD, values_PSKD: [P, S, K, D], one layer's cache, of q's dtype, or
        quantised. blocks_BM: integers [B, M], the blocks of each sequence in order. starts_B: integers
        [B + 1], where each sequence's queries begin in N; from 0 to N. ends_B: integers [B], keys of each
        sequence, its queries' own among them. Whatever a block holds past a sequence's end is not seen,
        NaN included. scales: of a quantised cache's keys and values, fp32 [P, S, K] each (`quantise_kv`).
        max_queries, max_keys: the most of one sequence, where the caller knows; 0: N and M S. A GPU starts
        programs for that many. window: a query sees that many keys at most; 0 for all. softcap: scores s
        become softcap tanh(s / softcap); 0 leaves them.
    Returns: o_NHD of q's dtype; softmax in fp32. A query that sees no key gets zeros.
    Cost: reads 2 L K D elements a sequence; 4 L H D FLOPs a query; decoding is bound by memory.
    """
    assert (scales is not None) == (keys_PSKD.dtype in QUANTISED), "a quantised cache has scales"
    max_queries = max_queries or q_NHD.shape[0]
    max_keys = max_keys or blocks_BM.shape[1] * keys_PSKD.shape[1]
    key_scales, value_scales = scales or (None, None)
    given = (q_NHD, keys_PSKD, values_PSKD, key_scales, value_scales, blocks_BM, starts_B, ends_B)
    result: Tensor = OPERATOR(*given, max_queries, max_keys, window, softcap)
    return result


def quantise_kv(x_NKD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise keys or values, a scale for each token and head: x = codes scale.

    Args: x_NKD: any float dtype, [..., D]. dtype: torch.int8 or torch.float8_e4m3fn.
    Returns: codes_NKD of `dtype`, scale_NK in fp32: the largest magnitude over 127 or 448.
    """
    wide_NKD = x_NKD.float()
    scale_NK = wide_NKD.abs().amax(-1) / QUANTISED[dtype]
    codes_NKD = wide_NKD / torch.where(scale_NK > 0, scale_NK, 1.0)[..., None]
    return (codes_NKD.round() if dtype == torch.int8 else codes_NKD).to(dtype), scale_NK


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
    wide = torch.promote_types(q_NHD.dtype, torch.float32)
    groups = q_NHD.shape[1] // keys_PSKD.shape[2]
    starts, outputs = starts_B.tolist(), [q_NHD[:0].to(wide)]
    for blocks_M, begin, end, length in zip(blocks_BM, starts[:-1], starts[1:], ends_B.tolist(), strict=True):
        k_LKD, v_LKD = (
            _wide(cache, scales, blocks_M.long(), wide)[:length]
            for cache, scales in ((keys_PSKD, key_scales_PSK), (values_PSKD, value_scales_PSK))
        )
        k_HLD, v_HLD = (x.repeat_interleave(groups, dim=1).transpose(0, 1) for x in (k_LKD, v_LKD))
        q_HXD = q_NHD[begin:end].to(wide).transpose(0, 1)
        scores_HXL = (q_HXD @ k_HLD.mT) * q_NHD.shape[-1] ** -0.5
        if softcap:
            scores_HXL = torch.tanh(scores_HXL / softcap) * softcap
        seen_XL = _seen(end - begin, length, window, q_NHD.device)
        p_HXL = scores_HXL.masked_fill(~seen_XL, float("-inf")).softmax(-1)
        p_HXL = p_HXL.masked_fill(~seen_XL, 0.0)  # NaN where a query sees nothing
        outputs.append((p_HXL @ v_HLD).transpose(0, 1))
    return torch.cat(outputs).to(q_NHD.dtype)


def _wide(cache: Tensor, scales: Tensor | None, blocks_M: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather a sequence's blocks, dequantised: [M S, K, D]."""
    picked_LKD = cache.view(torch.uint8)[blocks_M].view(cache.dtype) if scales is not None else cache[blocks_M]
    wide_LKD = picked_LKD.to(dtype).flatten(0, 1)
    return wide_LKD if scales is None else wide_LKD * scales[blocks_M].flatten(0, 1)[..., None]


# Plain torch


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
    for x_BKLD in (k_BKLD, v_BKLD):  # a NaN there would outlive its mask
        x_BKLD.masked_fill_(~seen_BL[:, None, :, None], 0.0)
    seen_BL = seen_BL & (at_L >= ends_B[:, None] - window) if window else seen_BL
    q_BKGD = q_BHD.unflatten(1, (kv_heads, -1))
    o_BKGD = F.scaled_dot_product_attention(q_BKGD, k_BKLD, v_BKLD, attn_mask=seen_BL[:, None, None])
    return o_BKGD.flatten(1, 2).masked_fill_(~(ends_B > 0)[:, None, None], 0.0)


def _prefill(
    q_XHD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, blocks_M: Tensor, length: int, window: int
) -> Tensor:
    """Attend from several queries of one sequence."""
    queries, size = q_XHD.shape[0], keys_PSKD.shape[1]
    if not queries or not length:
        return torch.zeros_like(q_XHD)
    blocks_1M = blocks_M[None, : -(-length // size)]
    k_1KLD, v_1KLD = (_gather(cache, blocks_1M)[:, :, :length] for cache in (keys_PSKD, values_PSKD))
    is_whole = queries == length and not window
    o_1HXD = F.scaled_dot_product_attention(
        q_XHD.transpose(0, 1)[None],
        k_1KLD,
        v_1KLD,
        attn_mask=None if is_whole else _seen(queries, length, window, q_XHD.device),
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


def _seen(queries: int, length: int, window: int, device: torch.device) -> Tensor:
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


# CPU


def forward_cpu(
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
    """In C: long sequences in splits, shared among torch's threads."""
    q_NHD, keys_PSKD, values_PSKD = (x.contiguous() for x in (q_NHD, keys_PSKD, values_PSKD))
    scales = [x.float().contiguous() for x in (key_scales_PSK, value_scales_PSK) if x is not None]
    tables = [x.int().contiguous() for x in (blocks_BM, starts_B, ends_B)]
    o_NHD = torch.empty_like(q_NHD)
    _, block_size, kv_heads, head_size = keys_PSKD.shape
    native.function("paged_attention", "paged_attention_forward", "pppppppppllllllllffiii")(
        *native.pointers(q_NHD, keys_PSKD, values_PSKD),
        *(native.pointers(*scales) or (None, None)),
        *native.pointers(*tables, o_NHD),
        *(*blocks_BM.shape, block_size, q_NHD.shape[1], kv_heads, head_size, window, SPLIT_KEYS),
        *(head_size**-0.5, softcap, torch.get_num_threads(), native.type_of(q_NHD)),
        CODES.get(keys_PSKD.dtype, 0),
    )
    return o_NHD


# What all paths share


def _empty(
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
    """Allocate o."""
    return torch.empty_like(q_NHD, memory_format=torch.contiguous_format)


def cost(lengths: list[int], heads: int, kv_heads: int, head_size: int, dtype_bytes: int) -> dict[str, Any]:
    """Return the bytes moved and FLOPs done by one decoding step over sequences of these lengths."""
    keys = sum(lengths)
    return {"bytes": 2 * keys * kv_heads * head_size * dtype_bytes, "flops": 4 * keys * heads * head_size}


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Decoding: 64 sequences of 4k keys, 8 of 32k, 256 of 1k, quantised ones, and chunks of prompts.

    32 heads of 128 over 8, blocks of 16.
    """
    examples = []
    for sequences, length, queries, codes in (
        (64, 4096, 1, None),
        (8, 32768, 1, None),
        (256, 1024, 1, None),
        (64, 4096, 1, torch.int8),
        (64, 4096, 1, torch.float8_e4m3fn),
        (4, 4096, 512, None),
    ):
        blocks = sequences * length // 16
        q_NHD = torch.randn(sequences * queries, 32, 128, device=device, dtype=dtype)
        cache = [torch.randn(blocks, 16, 8, 128, device=device, dtype=dtype) for _ in range(2)]
        scales: tuple[Tensor | None, ...] = (None, None)
        if codes is not None:
            cache, scales = zip(*(quantise_kv(x, codes) for x in cache), strict=True)  # type: ignore[assignment]
        blocks_BM = torch.randperm(blocks, device=device, dtype=torch.int32).view(sequences, -1)
        starts_B = torch.arange(sequences + 1, device=device, dtype=torch.int32) * queries
        ends_B = torch.full((sequences,), length, device=device, dtype=torch.int32)
        inputs = (q_NHD, *cache, *scales, blocks_BM, starts_B, ends_B, queries, length, 0, 0.0)
        label = f"{'decode' if queries == 1 else f'{queries} queries'} {sequences}x{length}"
        kind = "" if codes is None else f" {str(codes).removeprefix('torch.')}"
        price = cost([length] * sequences, 32, 8, 128, cache[0].element_size())
        examples.append(Example(label + kind, inputs, price["bytes"], price["flops"] * queries))
    return examples


OPERATOR = Operator("paged_attention", paged_attention_reference, fake=_empty, examples=_examples)
OPERATOR.add("torch", forward_torch, dtypes=(torch.float32, torch.bfloat16, torch.float16))
OPERATOR.add("cpu", forward_cpu, **native.path("paged_attention"))
OPERATOR.add("triton", forward_triton, **tile.path())
