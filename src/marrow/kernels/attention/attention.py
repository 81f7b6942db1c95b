"""Packed attention: causal, over rows of T tokens, within documents.

    document   0 0 0 1 1 1 1 2        a query sees the keys of its own document
    first      0 0 0 3 3 3 3 7        that are not after it: from first[query] to query
    query 5          x x x

A document is a run of equal numbers in a row, so two numbers a token, where its document begins and
ends, say all that a mask of T x T would. `pack` computes them once for a batch; all layers share them.

Axes: N = B T tokens, B rows, T tokens a row, H query heads, K kv heads, G = H/K, D head size, S keys,
M = H B. Source: FlashAttention (Dao et al. 2022; Dao 2023).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.attention.flash import backward_triton, forward_triton
from marrow.kernels.dispatch import Example, Gradient, Operator

LONGEST_PRODUCTS = 1024  # tokens of a row; T T scores a head at once, 2 MiB in bf16 at this length


@dataclass(frozen=True, slots=True)
class Packing:
    """Which tokens of a batch may see each other.

    first_N, last_N: int32, the numbers of the tokens that begin and end each token's document.
    row_tokens: T. is_whole: no row holds two documents.
    """

    first_N: Tensor
    last_N: Tensor
    row_tokens: int
    is_whole: bool


def pack(
    document_N: Tensor,
    row_tokens: int,
    dtype: torch.dtype | None = None,
    *,
    is_whole: bool | None = None,
) -> Packing:
    """Describe a batch, once for all layers.

    Args: document_N: integers [B T]; a run of equal numbers in a row is one document. Padding may have
        any number, such as its predecessor's: causality keeps it from being seen. row_tokens: T, divides
        B T. dtype: is not used. is_whole: no row holds two documents; found out where it is None, but not
        on a GPU, where asking would stop the host: there None is False.
    Cost: O(B T).
    """
    document_BT = document_N.view(-1, row_tokens)
    at_BT = torch.arange(document_N.numel(), device=document_N.device).view_as(document_BT)
    differs_BT = document_BT[:, 1:] != document_BT[:, :-1]
    if is_whole is None:
        is_whole = document_N.device.type == "cpu" and not bool(differs_BT.any())
    begins_BT = F.pad(differs_BT, (1, 0), value=True)
    ends_BT = F.pad(differs_BT, (0, 1), value=True)
    first_BT = torch.where(begins_BT, at_BT, 0).cummax(1).values
    last_BT = torch.where(ends_BT, at_BT, document_N.numel()).flip(1).cummin(1).values.flip(1)
    return Packing(first_BT.flatten().int(), last_BT.flatten().int(), row_tokens, is_whole)


def attention(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, packing: Packing, *, window: int = 0, softcap: float = 0.0
) -> Tensor:
    """Attend within documents, causally, with scale D^-0.5.

    Args: q_NHD: [B T, H, D]; k_NKD, v_NKD: [B T, K, D], H a multiple of K (grouped queries).
        window: a query sees that many keys at most, its own and those before it; 0 for all.
        softcap: scores s become softcap tanh(s / softcap); 0 leaves them.
    Returns: o_NHD of q's dtype; softmax in fp32.
    Cost: reads N (H + 2K) D, writes N H D elements; 2 N (T + 1) H D FLOPs; backward 2.5x.
    """
    result: Tensor = OPERATOR(q_NHD, k_NKD, v_NKD, *_plain(packing), window, softcap)
    return result


def attention_reference(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, packing: Packing, *, window: int = 0, softcap: float = 0.0
) -> Tensor:
    """Compute `attention` in plain torch: all scores, one mask, one softmax."""
    return _reference(q_NHD, k_NKD, v_NKD, *_plain(packing), window, softcap)


def _plain(packing: Packing) -> tuple[Tensor, Tensor, int, bool]:
    return packing.first_N, packing.last_N, packing.row_tokens, packing.is_whole


def _reference(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    row_tokens: int,
    is_whole: bool,
    window: int,
    softcap: float,
) -> Tensor:
    groups = q_NHD.shape[1] // k_NKD.shape[1]
    wide = torch.promote_types(q_NHD.dtype, torch.float32)
    q_BHTD = _rows(q_NHD, row_tokens).to(wide)
    k_BHSD = _rows(k_NKD, row_tokens).to(wide).repeat_interleave(groups, dim=1)
    v_BHSD = _rows(v_NKD, row_tokens).to(wide).repeat_interleave(groups, dim=1)
    scores_BHTS = (q_BHTD @ k_BHSD.mT) * q_NHD.shape[-1] ** -0.5
    if softcap:
        scores_BHTS = torch.tanh(scores_BHTS / softcap) * softcap
    scores_BHTS = scores_BHTS.masked_fill(~_seen(first_N, row_tokens, window), float("-inf"))
    return _tokens(scores_BHTS.softmax(-1) @ v_BHSD).to(q_NHD.dtype)


# Plain torch


def forward_torch(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    row_tokens: int,
    is_whole: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Torch's fused kernels where they can, or products of all queries with all keys."""
    if not q_NHD.numel():
        return _empty(q_NHD, k_NKD, v_NKD, first_N, last_N, row_tokens, is_whole, window, softcap)
    q_BHTD, k_BKSD, v_BKSD = (_rows(x, row_tokens) for x in (q_NHD, k_NKD, v_NKD))
    is_plain = is_whole and not window
    if softcap or (q_NHD.is_cuda and not (is_plain and _is_half(q_NHD))):
        return _products(q_NHD, k_NKD, v_NKD, first_N, row_tokens, window, softcap)
    # PERF: 16 rows of 512, half of them with two documents, 4 heads of 64 over 2, one core,
    # interleaved, forward + backward in bf16 / fp32: mask made once 98 / 131 ms, boolean mask
    # 101 / 132, a loop over documents 96 / 108 (but a graph for each batch), causal alone 92 / 121;
    # the CPU kernel's own causal flag on top of a mask changes nothing.
    if q_NHD.is_cuda:
        o_BHTD, lse_BHT = torch.ops.aten._scaled_dot_product_flash_attention(
            q_BHTD, k_BKSD, v_BKSD, 0.0, is_causal=True
        )[:2]
    else:
        mask_B1TS = None if is_plain else _mask(first_N, row_tokens, window, q_NHD.dtype)
        o_BHTD, lse_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHTD, k_BKSD, v_BKSD, 0.0, is_plain, attn_mask=mask_B1TS
        )
    return _tokens(o_BHTD), lse_BHT.transpose(0, 1).flatten(1).contiguous()


def backward_torch(
    do_NHD: Tensor,
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    o_NHD: Tensor,
    lse_HN: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    row_tokens: int,
    is_whole: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's fused backward, or products where that is slower."""
    if not q_NHD.numel():
        return torch.empty_like(q_NHD), torch.empty_like(k_NKD), torch.empty_like(v_NKD)
    is_plain, is_half = is_whole and not window, _is_half(q_NHD)
    is_slow = q_NHD.device.type == "cpu" and is_half and row_tokens <= LONGEST_PRODUCTS
    if is_slow or softcap or (q_NHD.is_cuda and not (is_plain and is_half)):
        return _products_backward(do_NHD, q_NHD, k_NKD, v_NKD, first_N, row_tokens, window, softcap)
    groups = q_NHD.shape[1] // k_NKD.shape[1]
    do_BHTD, q_BHTD, o_BHTD = (_rows(x, row_tokens) for x in (do_NHD, q_NHD, o_NHD))
    lse_BHT = lse_HN.view(q_BHTD.shape[1], -1, row_tokens).transpose(0, 1)
    if q_NHD.is_cuda:
        none = torch.empty(0, dtype=torch.int64, device=q_NHD.device)
        given = (do_BHTD, q_BHTD, _rows(k_NKD, row_tokens), _rows(v_NKD, row_tokens), o_BHTD, lse_BHT)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *given, None, None, row_tokens, row_tokens, 0.0, True, none, none
        )
        return _tokens(grads[0]), _tokens(grads[1]), _tokens(grads[2])
    k_BHSD, v_BHSD = (_rows(x, row_tokens).repeat_interleave(groups, 1) for x in (k_NKD, v_NKD))
    dq_BHTD, dk_BHSD, dv_BHSD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(do_BHTD, q_BHTD, k_BHSD, v_BHSD, o_BHTD, lse_BHT, 0.0, is_plain),
        attn_mask=None if is_plain else _mask(first_N, row_tokens, window, q_NHD.dtype),
    )
    if groups > 1:
        dk_BHSD, dv_BHSD = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk_BHSD, dv_BHSD))
    return _tokens(dq_BHTD), _tokens(dk_BHSD), _tokens(dv_BHSD)


def _products(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    first_N: Tensor,
    row_tokens: int,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """All scores by batched products: any case, T T memory a head."""
    heads, rows = q_NHD.shape[1], q_NHD.shape[0] // row_tokens
    _, _, v_MSD, s_MTS, _ = _scores(q_NHD, k_NKD, v_NKD, first_N, row_tokens, window, softcap)
    lse_HN = s_MTS.float().logsumexp(-1).view(heads, -1)
    return _tokens_first(torch.softmax(s_MTS, -1) @ v_MSD, rows, heads), lse_HN


def _products_backward(
    do_NHD: Tensor,
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    first_N: Tensor,
    row_tokens: int,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Go back through o = p v, p = softmax(s), s = q k^T D^-0.5, by hand."""
    heads, kv_heads, rows = q_NHD.shape[1], k_NKD.shape[1], q_NHD.shape[0] // row_tokens
    given = (q_NHD, k_NKD, v_NKD, first_N, row_tokens, window, softcap)
    q_MTD, k_MSD, v_MSD, s_MTS, slope_MTS = _scores(*given)
    p_MTS = torch.softmax(s_MTS, -1)
    do_MTD = _heads_first(do_NHD, rows, heads)
    ds_MTS = torch._softmax_backward_data(do_MTD @ v_MSD.mT, p_MTS, -1, p_MTS.dtype)
    if slope_MTS is not None:
        ds_MTS *= slope_MTS
    scale = q_MTD.shape[-1] ** -0.5
    return (
        _tokens_first((ds_MTS @ k_MSD).mul_(scale), rows, heads),
        _tokens_first((ds_MTS.mT @ q_MTD).mul_(scale), rows, kv_heads),
        _tokens_first(p_MTS.mT @ do_MTD, rows, kv_heads),
    )


def _scores(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    first_N: Tensor,
    row_tokens: int,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return q, k and v heads first, the masked scores, and the softcap's slope at them."""
    heads, rows = q_NHD.shape[1], q_NHD.shape[0] // row_tokens
    q_MTD, k_MSD, v_MSD = (_heads_first(x, rows, heads) for x in (q_NHD, k_NKD, v_NKD))
    mask_BTS = _mask(first_N, row_tokens, window, q_NHD.dtype)[:, 0]
    scale, s_MTS = q_MTD.shape[-1] ** -0.5, q_MTD.new_empty(heads * rows, row_tokens, row_tokens)
    if softcap:
        bent_MTS = torch.tanh(torch.bmm(q_MTD, k_MSD.mT).float() * (scale / softcap))
        s_MTS = (bent_MTS * softcap).to(q_MTD.dtype) + mask_BTS.repeat(heads, 1, 1)
        return q_MTD, k_MSD, v_MSD, s_MTS, (1 - bent_MTS * bent_MTS).to(q_MTD.dtype)
    for head in range(heads):  # heads first, so that they share one mask
        part = slice(head * rows, (head + 1) * rows)
        torch.baddbmm(mask_BTS, q_MTD[part], k_MSD[part].mT, alpha=scale, out=s_MTS[part])
    return q_MTD, k_MSD, v_MSD, s_MTS, None


def _seen(first_N: Tensor, row_tokens: int, window: int) -> Tensor:
    """Return what each query sees: [B, 1, T, S]."""
    at_T = torch.arange(row_tokens, device=first_N.device)
    first_BT = first_N.view(-1, row_tokens)
    first_BT = first_BT - torch.arange(first_BT.shape[0], device=first_N.device)[:, None] * row_tokens
    if window:
        first_BT = torch.maximum(first_BT, at_T - (window - 1))
    return ((at_T >= first_BT[:, :, None]) & (at_T <= at_T[:, None]))[:, None]


def _mask(first_N: Tensor, row_tokens: int, window: int, dtype: torch.dtype) -> Tensor:
    """Return what to add to the scores: 0 where a query sees a key, else -inf."""
    seen_B1TS = _seen(first_N, row_tokens, window)
    mask_B1TS = torch.full(seen_B1TS.shape, float("-inf"), dtype=dtype, device=first_N.device)
    return mask_B1TS.masked_fill_(seen_B1TS, 0.0)


def _is_half(x_NHD: Tensor) -> bool:
    return x_NHD.dtype in (torch.bfloat16, torch.float16)


def _heads_first(x_NKD: Tensor, rows: int, num_heads: int) -> Tensor:
    """Copy flat tokens to [H B, T, D], kv heads repeated for the heads that share them."""
    x_KBTD = x_NKD.unflatten(0, (rows, -1)).permute(2, 0, 1, 3)
    if x_KBTD.shape[0] != num_heads:
        x_KBTD = x_KBTD.repeat_interleave(num_heads // x_KBTD.shape[0], dim=0)
    return x_KBTD.reshape(num_heads * rows, *x_KBTD.shape[2:])


def _tokens_first(x_MTD: Tensor, rows: int, num_heads: int) -> Tensor:
    """Copy [H B, T, D] to flat tokens [B T, K, D], summing the heads that share a kv head."""
    x_KGBTD = x_MTD.view(num_heads, -1, rows, *x_MTD.shape[1:])
    x_KBTD = x_KGBTD.sum(1) if x_KGBTD.shape[1] > 1 else x_KGBTD[:, 0]
    return x_KBTD.permute(1, 2, 0, 3).flatten(0, 1).contiguous()


def _rows(x_NHD: Tensor, row_tokens: int) -> Tensor:
    """View flat tokens as rows: [B T, H, D] -> [B, H, T, D]."""
    return x_NHD.unflatten(0, (-1, row_tokens)).transpose(1, 2)


def _tokens(x_BHTD: Tensor) -> Tensor:
    """Flatten rows: [B, H, T, D] -> [B T, H, D]."""
    return x_BHTD.transpose(1, 2).flatten(0, 1).contiguous()


# CPU


def forward_cpu(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    row_tokens: int,
    is_whole: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """In C: blocks of queries, shared among torch's threads."""
    q_NHD, k_NKD, v_NKD, first_N = (x.contiguous() for x in (q_NHD, k_NKD, v_NKD, first_N.int()))
    o_NHD, lse_HN = _empty(q_NHD, k_NKD, v_NKD, first_N, last_N, row_tokens, is_whole, window, softcap)
    if q_NHD.numel():
        native.function("attention", "attention_forward", "ppppppllllllffii")(
            *native.pointers(q_NHD, k_NKD, v_NKD, first_N, o_NHD, lse_HN),
            *_sizes(q_NHD, k_NKD, row_tokens, window, softcap),
        )
    return o_NHD, lse_HN


def backward_cpu(
    do_NHD: Tensor,
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    o_NHD: Tensor,
    lse_HN: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    row_tokens: int,
    is_whole: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """In C: rows of the batch and kv heads, shared among torch's threads."""
    given = [x.contiguous() for x in (do_NHD, q_NHD, k_NKD, v_NKD, o_NHD, lse_HN, first_N.int())]
    grads = [torch.empty_like(x) for x in given[1:4]]
    if q_NHD.numel():
        native.function("attention", "attention_backward", "ppppppppppllllllffii")(
            *native.pointers(*given, *grads), *_sizes(q_NHD, k_NKD, row_tokens, window, softcap)
        )
    return grads[0], grads[1], grads[2]


def _sizes(q_NHD: Tensor, k_NKD: Tensor, row_tokens: int, window: int, softcap: float) -> tuple[Any, ...]:
    """Return what both C functions are told besides where the tensors are."""
    tokens, heads, head_size = q_NHD.shape
    numbers = tokens, heads, k_NKD.shape[1], head_size, row_tokens, window, head_size**-0.5, softcap
    return *numbers, torch.get_num_threads(), native.type_of(q_NHD)


# What all paths share


def _empty(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    row_tokens: int,
    is_whole: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Allocate o and the log-sum-exp of each query's scores."""
    lse_HN = q_NHD.new_empty(q_NHD.shape[1], q_NHD.shape[0], dtype=torch.float32)
    return torch.empty_like(q_NHD, memory_format=torch.contiguous_format), lse_HN


def _empty_gradients(
    do_NHD: Tensor,
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    o_NHD: Tensor,
    lse_HN: Tensor,
    first_N: Tensor,
    last_N: Tensor,
    row_tokens: int,
    is_whole: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq_NHD = torch.empty_like(q_NHD, memory_format=torch.contiguous_format)
    dk_NKD = torch.empty_like(k_NKD, memory_format=torch.contiguous_format)
    return dq_NHD, dk_NKD, torch.empty_like(dk_NKD)


def _shape_class(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, *plain: Any) -> tuple[str, int]:
    """Name what the choice of a path depends on: the mask, and the power of 2 that T reaches."""
    _, _, row_tokens, is_whole, window, softcap = plain
    mask = "softcap" if softcap else "window" if window else "whole" if is_whole else "packed"
    return mask, 1 << (int(row_tokens) - 1).bit_length()


def cost(
    rows: int, row_tokens: int, heads: int, kv_heads: int, head_size: int, dtype_bytes: int
) -> dict[str, Any]:
    """Return the bytes moved and FLOPs done by one forward over full rows."""
    tokens = rows * row_tokens
    return {
        "bytes": 2 * tokens * (heads + kv_heads) * head_size * dtype_bytes,
        "flops": 2 * tokens * (row_tokens + 1) * heads * head_size,
    }


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Rows of 1k, 4k and 16k tokens with heads of 64 and 128, 32 over 8, and a packed row."""
    examples = []
    for rows, row_tokens, head_size, documents in (
        *((16384 // tokens, tokens, size, 1) for tokens in (1024, 4096, 16384) for size in (64, 128)),
        (4, 4096, 128, 8),
    ):
        tokens = rows * row_tokens
        q_NHD = torch.randn(tokens, 32, head_size, device=device, dtype=dtype)
        k_NKD, v_NKD = (torch.randn(tokens, 8, head_size, device=device, dtype=dtype) for _ in range(2))
        document_N = torch.arange(tokens, device=device) * documents // row_tokens
        packing = pack(document_N, row_tokens, is_whole=documents == 1)
        price = cost(rows * documents, row_tokens // documents, 32, 8, head_size, dtype.itemsize)
        label = f"{rows}x{row_tokens} d{head_size}" + (f" {documents} documents" if documents > 1 else "")
        inputs = (q_NHD, k_NKD, v_NKD, *_plain(packing), 0, 0.0)
        examples.append(Example(label, inputs, price["bytes"], price["flops"]))
    return examples


OPERATOR = Operator(
    "attention",
    _reference,
    fake=_empty,
    gradient=Gradient(
        inputs=(0, 1, 2),
        saves=lambda inputs, outputs: (*inputs[:3], *outputs, *inputs[3:]),
        fake=_empty_gradients,
    ),
    examples=_examples,
    shape_class=_shape_class,
)
OPERATOR.add("torch", forward_torch, backward_torch, dtypes=(torch.float32, torch.bfloat16, torch.float16))
OPERATOR.add("triton", forward_triton, backward_triton, **tile.path())
OPERATOR.add("cpu", forward_cpu, backward_cpu, **native.path("attention"))
