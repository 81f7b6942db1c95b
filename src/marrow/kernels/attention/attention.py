"""Packed attention: causal, over rows of T tokens, within documents.

    document   0 0 0 1 1 1 1 2        a query sees the keys of its own document
    query 5          x x x            that are not after it

`pack` turns the document numbers of a batch into a `Packing` once; all layers share it. When no
row holds two documents, plain causal attention is exact and no mask is made.

Axes: N = B T tokens, B rows, T tokens a row, H query heads, K kv heads, D head size, S keys.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.kernels import dispatch

LONGEST_PRODUCTS = 1024  # tokens of a row; T T probabilities a head are kept, 2 MiB in bf16 at this length


@dataclass(frozen=True, slots=True)
class Packing:
    """Which tokens of a batch may see each other.

    document_BT: a number per (row, document). mask_B1TS: what to add to the scores, 0 where a
    query sees a key and -inf elsewhere; None where no row holds two documents.
    """

    document_BT: Tensor
    mask_B1TS: Tensor | None


def pack(document_N: Tensor, row_tokens: int, dtype: torch.dtype = torch.float32) -> Packing:
    """Describe a batch, once for all layers.

    Args: document_N: integers [B T]; equal numbers in a row are one document. Padding may have
        any number, such as its predecessor's: causality keeps it from being seen.
        row_tokens: T, divides B T. dtype: of the queries that will come.
    Cost: B T T elements of `dtype` where a mask is needed.
    """
    document_BT = document_N.view(-1, row_tokens)
    if not (document_BT != document_BT[:, :1]).any():
        return Packing(document_BT, None)
    seen_B1TS = (document_BT[:, None, :, None] == document_BT[:, None, None, :]).tril_()
    mask_B1TS = torch.zeros(seen_B1TS.shape, dtype=dtype, device=document_N.device)
    return Packing(document_BT, mask_B1TS.masked_fill_(~seen_B1TS, float("-inf")))


def attention(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, packing: Packing) -> Tensor:
    """Attend within documents, causally, with scale D^-0.5.

    Args: q_NHD: [B T, H, D]; k_NKD, v_NKD: [B T, K, D], H a multiple of K (grouped queries).
    Returns: o_NHD of q's dtype; softmax in fp32.
    Cost: reads N (H + 2K) D, writes N H D elements; 2 N (T + 1) H D FLOPs; backward 2.5x.
    """
    result: Tensor = dispatch.choose("attention", q_NHD.device.type)(q_NHD, k_NKD, v_NKD, packing)
    return result


def attention_reference(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, packing: Packing) -> Tensor:
    """Compute `attention` in plain torch: all scores, one mask, one softmax."""
    groups = q_NHD.shape[1] // k_NKD.shape[1]
    rows, row_tokens = packing.document_BT.shape
    wide = torch.promote_types(q_NHD.dtype, torch.float32)
    q_BHTD = _rows(q_NHD, rows).to(wide)
    k_BHSD = _rows(k_NKD, rows).to(wide).repeat_interleave(groups, dim=1)
    v_BHSD = _rows(v_NKD, rows).to(wide).repeat_interleave(groups, dim=1)
    same_BTS = packing.document_BT[:, :, None] == packing.document_BT[:, None, :]
    causal_TS = torch.ones(row_tokens, row_tokens, dtype=torch.bool, device=q_NHD.device).tril()
    scores_BHTS = (q_BHTD @ k_BHSD.mT) * q_NHD.shape[-1] ** -0.5
    scores_BHTS = scores_BHTS.masked_fill(~(same_BTS & causal_TS)[:, None], float("-inf"))
    return _tokens(scores_BHTS.softmax(-1) @ v_BHSD).to(q_NHD.dtype)


def attention_torch(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, packing: Packing) -> Tensor:
    """Compute `attention` with torch's fused kernels, or with products where those are slower."""
    rows, row_tokens = packing.document_BT.shape
    trains_in_bf16 = q_NHD.dtype == torch.bfloat16 and torch.is_grad_enabled() and q_NHD.requires_grad
    if trains_in_bf16 and q_NHD.device.type == "cpu" and row_tokens <= LONGEST_PRODUCTS:
        o_NHD: Tensor = ProductAttention.apply(q_NHD, k_NKD, v_NKD, packing)  # type: ignore[no-untyped-call]
        return o_NHD
    q_BHTD, k_BKSD, v_BKSD = _rows(q_NHD, rows), _rows(k_NKD, rows), _rows(v_NKD, rows)
    # PERF: 16 rows of 512, half of them with two documents, 4 heads of 64 over 2, one core,
    # interleaved, forward + backward in bf16 / fp32: mask made once 98 / 131 ms, boolean mask
    # 101 / 132, a loop over documents 96 / 108 (but a graph for each batch), causal alone 92 / 121;
    # the CPU kernel's own causal flag on top of a mask changes nothing.
    mask_B1TS = None if packing.mask_B1TS is None else packing.mask_B1TS.to(q_NHD.dtype)
    o_BHTD = F.scaled_dot_product_attention(
        q_BHTD, k_BKSD, v_BKSD, attn_mask=mask_B1TS, is_causal=mask_B1TS is None, enable_gqa=True
    )
    return _tokens(o_BHTD)


class ProductAttention(torch.autograd.Function):
    """All scores by batched products, kept for a backward by hand.

    PERF: the backward of torch's fused CPU kernel is slow in bf16. A whole training step of 2048 tokens
    (128 channels, 4 layers, 2 heads of 64, one core, interleaved) takes 144 ms with this and 184 ms with
    that at T = 128, 155 and 169 ms at T = 256, 177 and 188 ms at T = 512; in fp32 258 and 252 ms at
    T = 128. It keeps B H T T probabilities for the backward.
    M = H B, heads first, so that the heads share one mask.
    """

    @staticmethod
    def forward(ctx: Any, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, packing: Packing) -> Tensor:
        """Return o_NHD."""
        rows, row_tokens = packing.document_BT.shape
        num_heads = q_NHD.shape[1]
        q_MTD, k_MSD, v_MSD = (_heads_first(x, rows, num_heads) for x in (q_NHD, k_NKD, v_NKD))
        mask_B1TS = packing.mask_B1TS
        mask_BTS = (_causal(row_tokens, q_NHD) if mask_B1TS is None else mask_B1TS[:, 0]).to(q_NHD.dtype)
        mask_BTS = mask_BTS.expand(rows, -1, -1)
        scores_MTS = q_MTD.new_empty(num_heads * rows, row_tokens, row_tokens)
        for head in range(num_heads):
            part = slice(head * rows, (head + 1) * rows)
            keys_BDS = k_MSD[part].mT
            torch.baddbmm(mask_BTS, q_MTD[part], keys_BDS, alpha=q_NHD.shape[2] ** -0.5, out=scores_MTS[part])
        p_MTS = torch.softmax(scores_MTS, -1)
        ctx.save_for_backward(q_MTD, k_MSD, v_MSD, p_MTS)
        ctx.rows, ctx.num_heads, ctx.num_kv_heads = rows, num_heads, k_NKD.shape[1]
        return _tokens_first(p_MTS @ v_MSD, rows, num_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor, None]:
        """Go back through o = p v, p = softmax(s), s = q k^T D^-0.5."""
        q_MTD, k_MSD, v_MSD, p_MTS = ctx.saved_tensors
        rows, heads, kv_heads = ctx.rows, ctx.num_heads, ctx.num_kv_heads
        scale = q_MTD.shape[-1] ** -0.5
        grad_MTD = _heads_first(grads[0], rows, heads)
        score_MTS = torch._softmax_backward_data(grad_MTD @ v_MSD.mT, p_MTS, -1, p_MTS.dtype)
        return (
            _tokens_first((score_MTS @ k_MSD).mul_(scale), rows, heads),
            _tokens_first((score_MTS.mT @ q_MTD).mul_(scale), rows, kv_heads),
            _tokens_first(p_MTS.mT @ grad_MTD, rows, kv_heads),
            None,
        )


def _causal(row_tokens: int, like: Tensor) -> Tensor:
    return torch.full((row_tokens, row_tokens), float("-inf"), dtype=like.dtype).triu(1)


def _heads_first(x_NKD: Tensor, rows: int, num_heads: int) -> Tensor:
    """Copy flat tokens to [H B, T, D], kv heads repeated for the heads that share them."""
    x_KBTD = x_NKD.view(rows, -1, *x_NKD.shape[1:]).permute(2, 0, 1, 3)
    if x_KBTD.shape[0] != num_heads:
        x_KBTD = x_KBTD.repeat_interleave(num_heads // x_KBTD.shape[0], dim=0)
    return x_KBTD.reshape(num_heads * rows, *x_KBTD.shape[2:])


def _tokens_first(x_MTD: Tensor, rows: int, num_heads: int) -> Tensor:
    """Copy [H B, T, D] to flat tokens [B T, K, D], summing the heads that share a kv head."""
    x_KGBTD = x_MTD.view(num_heads, -1, rows, *x_MTD.shape[1:])
    x_KBTD = x_KGBTD.sum(1) if x_KGBTD.shape[1] > 1 else x_KGBTD[:, 0]
    return x_KBTD.permute(1, 2, 0, 3).flatten(0, 1)


def _rows(x_NHD: Tensor, rows: int) -> Tensor:
    """View flat tokens as rows: [B T, H, D] -> [B, H, T, D]."""
    return x_NHD.view(rows, -1, *x_NHD.shape[1:]).transpose(1, 2)


def _tokens(x_BHTD: Tensor) -> Tensor:
    """Flatten rows: [B, H, T, D] -> [B T, H, D]."""
    return x_BHTD.transpose(1, 2).flatten(0, 1)


def cost(
    rows: int, row_tokens: int, heads: int, kv_heads: int, head_size: int, dtype_bytes: int
) -> dict[str, Any]:
    """Return the bytes moved and FLOPs done by one forward over full rows."""
    tokens = rows * row_tokens
    return {
        "bytes": 2 * tokens * (heads + kv_heads) * head_size * dtype_bytes,
        "flops": 2 * tokens * (row_tokens + 1) * heads * head_size,
    }


dispatch.register("attention", "reference", attention_reference)
dispatch.register("attention", "torch", attention_torch)
