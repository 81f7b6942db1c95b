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

import ctypes
from typing import Any

import torch
from torch import Tensor

from marrow.core.errors import UsageError
from marrow.kernels import native, tile
from marrow.kernels.arguments import FLOATS, INTEGERS, Expects
from marrow.kernels.attention.paged_attention_torch import forward_torch, paged_attention_reference
from marrow.kernels.attention.paged_flash import forward_triton
from marrow.kernels.attention.paged_lists import check_lists
from marrow.kernels.dispatch import Example, Operator

CACHED = (*FLOATS, torch.int8, torch.float8_e4m3fn)
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
    Raises: UsageError for what does not fit, and on a CPU for a sequence with more keys than its list has
        room for, or a block that the cache has not. On a GPU the host reads no list: they must be right.
    Cost: reads 2 L K D elements a sequence; 4 L H D FLOPs a query; decoding is bound by memory.
    """
    if window < 0:
        raise UsageError(f"paged_attention: window = {window}", hint="0 for all keys, or how many")
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


def _misfit(q_NHD: Tensor, keys_PSKD: Tensor, values_PSKD: Tensor, *more: Any) -> tuple[str, str] | None:
    """Say what does not fit, beyond what the names of the inputs say."""
    key_scales, value_scales, blocks_BM, starts_B = more[:4]
    if q_NHD.shape[1] % max(1, keys_PSKD.shape[2]):
        return (
            f"{q_NHD.shape[1]} query heads for {keys_PSKD.shape[2]} kv heads",
            "a multiple, for equal groups",
        )
    if values_PSKD.dtype != keys_PSKD.dtype or keys_PSKD.dtype not in (q_NHD.dtype, *QUANTISED):
        dtypes = f"queries {q_NHD.dtype}, keys {keys_PSKD.dtype}, values {values_PSKD.dtype}"
        return dtypes, "keep the cache in the queries' dtype, or both keys and values quantised"
    if ((key_scales is None) or (value_scales is None)) == (keys_PSKD.dtype in QUANTISED):
        return (
            f"a cache of {keys_PSKD.dtype} with or without scales",
            "scales belong to a quantised cache alone",
        )
    if starts_B.shape[0] != blocks_BM.shape[0] + 1:
        return f"{starts_B.shape[0]} starts for {blocks_BM.shape[0]} sequences", "one more than sequences"
    return None


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
    # PERF: decoding 8 sequences of 4096 keys, 32 heads of 128 over 8, bf16, one core with AMX, interleaved:
    # 5.6 to 6.9x gathering and torch's fused kernel, 11 to 13x that on repeated heads, 1.6 to 2.0x the kernel
    # on dense copies with the group folded; it is bound by memory: 60 to 75 % of what a loop that only reads
    # reaches, which itself would be 10x gathering; with blocks that stay in cache a third of the time. int8
    # 1.03x and e4m3 1.09x of bf16's speed. fp32: 1.8x gathering with the group folded, 0.7x dense copies.
    q_NHD, keys_PSKD, values_PSKD = (x.contiguous() for x in (q_NHD, keys_PSKD, values_PSKD))
    scales = [x.float().contiguous() for x in (key_scales_PSK, value_scales_PSK) if x is not None]
    tables = [x.int().contiguous() for x in (blocks_BM, starts_B, ends_B)]
    o_NHD, is_sound = torch.empty_like(q_NHD), ctypes.c_int()
    cached, block_size, kv_heads, head_size = keys_PSKD.shape
    native.function("paged_attention", "paged_attention_forward", "pppppppppp" + "l" * 10 + "ffiii")(
        *native.pointers(q_NHD, keys_PSKD, values_PSKD),
        *(native.pointers(*scales) or (None, None)),
        *(*native.pointers(*tables, o_NHD), ctypes.byref(is_sound), q_NHD.shape[0], cached),
        *(*blocks_BM.shape, block_size, q_NHD.shape[1], kv_heads, head_size, window, SPLIT_KEYS),
        *(head_size**-0.5, softcap, torch.get_num_threads(), native.type_of(q_NHD)),
        CODES.get(keys_PSKD.dtype, 0),
    )
    if not is_sound.value:
        check_lists(q_NHD, keys_PSKD, blocks_BM, starts_B, ends_B)
        raise AssertionError("C refuses lists that Python finds sound")
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
    """Make decoding of 64 sequences of 4k keys, 8 of 32k, 256 of 1k, quantised ones, chunks of prompts.

    32 heads of 128 over 8, blocks of 16. Fewer sequences and shorter chunks on a CPU.
    """
    many, chunk = (8, 64) if device == "cpu" else (64, 512)
    shapes: list[tuple[int, int, int, torch.dtype | None]] = [
        (many, 4096, 1, None),
        (many, 4096, 1, torch.int8),
        (many, 4096, 1, torch.float8_e4m3fn),
        (many // 16 or 1, 4096, chunk, None),
    ]
    if device != "cpu":
        shapes += [(8, 32768, 1, None), (256, 1024, 1, None)]
    examples = []
    for sequences, length, queries, codes in shapes:
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


OPERATOR = Operator(
    "paged_attention",
    paged_attention_reference,
    fake=_empty,
    examples=_examples,
    expects=Expects(
        dtypes={
            "keys_PSKD": CACHED,
            "values_PSKD": CACHED,
            "key_scales_PSK": FLOATS,
            "value_scales_PSK": FLOATS,
            "blocks_BM": INTEGERS,
            "starts_B": INTEGERS,
            "ends_B": INTEGERS,
        },
        axes={"starts_B": "Z"},
        also=_misfit,
    ),
)
OPERATOR.add("torch", forward_torch, dtypes=(torch.float32, torch.bfloat16, torch.float16))
OPERATOR.add("cpu", forward_cpu, **native.path("paged_attention"))
OPERATOR.add("triton", forward_triton, **tile.path())
