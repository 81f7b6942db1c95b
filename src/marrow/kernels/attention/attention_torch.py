"""`attention` in plain torch: its fused kernels where they can, else products of all queries with all keys.

What serves where no C compiler and no Triton is; on a GPU torch's kernel for whole rows.

Axes: as in `attention`; M = H B.
"""

import torch
from torch import Tensor

LONGEST_PRODUCTS = 1024  # tokens of a row; T T scores a head at once, 2 MiB in bf16 at this length


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
        return torch.empty_like(q_NHD), q_NHD.new_empty(q_NHD.shape[1], 0, dtype=torch.float32)
    q_NHD, k_NKD, v_NKD = q_NHD.contiguous(), k_NKD.contiguous(), v_NKD.contiguous()
    q_BHTD, k_BKSD, v_BKSD = (rows_of(x, row_tokens) for x in (q_NHD, k_NKD, v_NKD))
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
    return tokens_of(o_BHTD), lse_BHT.transpose(0, 1).flatten(1).contiguous()


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
    q_NHD, k_NKD, v_NKD = q_NHD.contiguous(), k_NKD.contiguous(), v_NKD.contiguous()
    is_plain, is_half = is_whole and not window, _is_half(q_NHD)
    is_slow = q_NHD.device.type == "cpu" and is_half and row_tokens <= LONGEST_PRODUCTS
    if is_slow or softcap or (q_NHD.is_cuda and not (is_plain and is_half)):
        return _products_backward(do_NHD, q_NHD, k_NKD, v_NKD, first_N, row_tokens, window, softcap)
    groups = q_NHD.shape[1] // k_NKD.shape[1]
    do_BHTD, q_BHTD, o_BHTD = (rows_of(x, row_tokens) for x in (do_NHD, q_NHD, o_NHD))
    lse_BHT = lse_HN.view(q_BHTD.shape[1], -1, row_tokens).transpose(0, 1)
    if q_NHD.is_cuda:
        none = torch.empty(0, dtype=torch.int64, device=q_NHD.device)
        given = (do_BHTD, q_BHTD, rows_of(k_NKD, row_tokens), rows_of(v_NKD, row_tokens), o_BHTD, lse_BHT)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *given, None, None, row_tokens, row_tokens, 0.0, True, none, none
        )
        return tokens_of(grads[0]), tokens_of(grads[1]), tokens_of(grads[2])
    k_BHSD, v_BHSD = (rows_of(x, row_tokens).repeat_interleave(groups, 1) for x in (k_NKD, v_NKD))
    dq_BHTD, dk_BHSD, dv_BHSD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(do_BHTD, q_BHTD, k_BHSD, v_BHSD, o_BHTD, lse_BHT, 0.0, is_plain),
        attn_mask=None if is_plain else _mask(first_N, row_tokens, window, q_NHD.dtype),
    )
    if groups > 1:
        dk_BHSD, dv_BHSD = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk_BHSD, dv_BHSD))
    return tokens_of(dq_BHTD), tokens_of(dk_BHSD), tokens_of(dv_BHSD)


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


def seen_by(first_N: Tensor, row_tokens: int, window: int) -> Tensor:
    """Return what each query sees: [B, 1, T, S]."""
    at_T = torch.arange(row_tokens, device=first_N.device)
    first_BT = first_N.view(-1, row_tokens)
    first_BT = first_BT - torch.arange(first_BT.shape[0], device=first_N.device)[:, None] * row_tokens
    if window:
        first_BT = torch.maximum(first_BT, at_T - (window - 1))
    return ((at_T >= first_BT[:, :, None]) & (at_T <= at_T[:, None]))[:, None]


def _mask(first_N: Tensor, row_tokens: int, window: int, dtype: torch.dtype) -> Tensor:
    """Return what to add to the scores: 0 where a query sees a key, else -inf."""
    seen_B1TS = seen_by(first_N, row_tokens, window)
    mask_B1TS = torch.full(seen_B1TS.shape, float("-inf"), dtype=dtype, device=first_N.device)
    return mask_B1TS.masked_fill_(seen_B1TS, 0.0)


def _is_half(x_NHD: Tensor) -> bool:
    return x_NHD.dtype in (torch.bfloat16, torch.float16)


def _heads_first(x_NKD: Tensor, rows: int, num_heads: int) -> Tensor:
    """Copy flat tokens to [H B, T, D], kv heads repeated for the heads that share them."""
    x_KBTD = x_NKD.reshape(rows, -1, *x_NKD.shape[1:]).permute(2, 0, 1, 3)
    if x_KBTD.shape[0] != num_heads:
        x_KBTD = x_KBTD.repeat_interleave(num_heads // x_KBTD.shape[0], dim=0)
    return x_KBTD.reshape(num_heads * rows, *x_KBTD.shape[2:])


def _tokens_first(x_MTD: Tensor, rows: int, num_heads: int) -> Tensor:
    """Copy [H B, T, D] to flat tokens [B T, K, D], summing the heads that share a kv head."""
    x_KGBTD = x_MTD.view(num_heads, -1, rows, *x_MTD.shape[1:])
    x_KBTD = x_KGBTD.sum(1) if x_KGBTD.shape[1] > 1 else x_KGBTD[:, 0]
    return x_KBTD.permute(1, 2, 0, 3).flatten(0, 1).contiguous()


def rows_of(x_NHD: Tensor, row_tokens: int) -> Tensor:
    """View flat tokens as rows: [B T, H, D] -> [B, H, T, D]."""
    rows = x_NHD.shape[0] // row_tokens
    return x_NHD.reshape(rows, row_tokens, *x_NHD.shape[1:]).transpose(1, 2)


def tokens_of(x_BHTD: Tensor) -> Tensor:
    """Flatten rows: [B, H, T, D] -> [B T, H, D]."""
    return x_BHTD.transpose(1, 2).flatten(0, 1).contiguous()
