"""FlashAttention in Triton: forward and backward of `attention`, by blocks of queries and keys.

    keys        begin    full          diagonal    end
                | masked | all are seen | masked |      a block of queries reads the keys from where its
                                                        first document begins to its own end

Rows of a batch are documents like any others, so the tokens are one flat list: documents that a block does
not meet are never read, and no mask of T x T exists. Backward has two kernels, so that nothing is added up
by atomics: keys collect dk and dv from the queries that see them, queries collect dq.

Axes: as in `attention`. Source: FlashAttention-2 (Dao 2023).
"""

from typing import Any

import torch
from torch import Tensor

from marrow.kernels import tile
from marrow.kernels.tile import tl

LOG2E = tl.constexpr(1.4426950408889634) if tile.triton else 1.4426950408889634
NEVER = tl.constexpr(-1e30) if tile.triton else -1e30  # the largest score where there is none yet; finite


# fmt: off
@tile.jit
def _bend(scores, scale, softcap, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores to the base 2, and the softcap's slope at them."""
    if SOFTCAP:
        bent = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (scale / softcap * 2.0 * LOG2E)))  # tanh
        return bent * (softcap * LOG2E), 1.0 - bent * bent
    return scores * (scale * LOG2E), 1.0


@tile.jit
def _rows(  # type: ignore[no-untyped-def]
    start, stride, first, tokens, BLOCK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):
    """Load BLOCK rows of a head from row `first`: [BLOCK, WIDTH], zeros outside.

    One wide offset for all and narrow ones within the block: half of the registers of wide ones.
    """
    at, across = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    begin = start + tl.full([], first, tl.int64) * stride
    inside = at[:, None] < tokens - first
    if SIZE != WIDTH:
        inside = inside & (across[None, :] < SIZE)
    return tl.load(begin + (at[:, None] * stride + across[None, :]), mask=inside, other=0.0)


@tile.jit
def _store(  # type: ignore[no-untyped-def]
    start, stride, first, tokens, x, BLOCK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):
    at, across = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    begin = start + tl.full([], first, tl.int64) * stride
    inside = (at[:, None] < tokens - first) & (across[None, :] < SIZE)
    tl.store(begin + (at[:, None] * stride + across[None, :]), x.to(start.dtype.element_ty), mask=inside)


@tile.jit
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, begin, end, at_M, low_M, o, most, total, stride, tokens, scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):
    """Carry o, the largest scores and the sums on over the keys from `begin` to `end`."""
    for first in range(begin, end, BLOCK_N):
        at_N = first + tl.arange(0, BLOCK_N)
        keys = _rows(k, stride, first, tokens, BLOCK_N, SIZE, WIDTH)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
        scores, _ = _bend(scores, scale, softcap, SOFTCAP)
        if MASKED:
            seen = (at_N[None, :] >= low_M[:, None]) & (at_N[None, :] <= at_M[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.exp2(most - top)
        p = tl.exp2(scores - top[:, None])
        total = total * shrink + tl.sum(p, 1)
        values = _rows(v, stride, first, tokens, BLOCK_N, SIZE, WIDTH)
        o = tl.dot(p.to(values.dtype), values, o * shrink[:, None], input_precision=PRECISION)
        most = top
    return o, most, total


@tile.jit
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, first, o, lse, tokens, heads, kv_heads, window, scale, softcap, SOFTCAP: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the longest first
    at_M = start + tl.arange(0, BLOCK_M)
    firsts = tl.load(first + at_M, mask=at_M < tokens, other=0x7FFFFFFF)
    low_M = tl.maximum(firsts, at_M - window + 1)
    end = tl.minimum(start + BLOCK_M, tokens)
    begin = tl.min(low_M, 0) // BLOCK_N * BLOCK_N
    # Between these all queries see all keys.
    full = (tl.max(tl.where(at_M < tokens, low_M, 0), 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    diagonal = tl.maximum(start // BLOCK_N * BLOCK_N, begin)
    full = tl.minimum(full, diagonal)
    stride, kv_stride = heads * SIZE, kv_heads * SIZE
    queries = _rows(q + head * SIZE, stride, start, tokens, BLOCK_M, SIZE, WIDTH)
    k += head // (heads // kv_heads) * SIZE
    v += head // (heads // kv_heads) * SIZE
    sums = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    most = tl.full([BLOCK_M], NEVER, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums, most, total = _attend(
        queries, k, v, begin, full, at_M, low_M, sums, most, total, kv_stride, tokens, scale, softcap,
        True, SOFTCAP, SIZE, WIDTH, BLOCK_N, PRECISION,
    )
    sums, most, total = _attend(
        queries, k, v, full, diagonal, at_M, low_M, sums, most, total, kv_stride, tokens, scale, softcap,
        False, SOFTCAP, SIZE, WIDTH, BLOCK_N, PRECISION,
    )
    sums, most, total = _attend(
        queries, k, v, diagonal, end, at_M, low_M, sums, most, total, kv_stride, tokens, scale, softcap,
        True, SOFTCAP, SIZE, WIDTH, BLOCK_N, PRECISION,
    )
    _store(o + head * SIZE, stride, start, tokens, sums / total[:, None], BLOCK_M, SIZE, WIDTH)
    place = head.to(tl.int64) * tokens + at_M
    tl.store(lse + place, (most + tl.log2(total)) / LOG2E, mask=at_M < tokens)


@tile.jit
def _delta(do, o, delta, tokens, heads, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum do times o for each query."""
    head, start = tl.program_id(0), tl.program_id(1) * BLOCK_M
    at_M = start + tl.arange(0, BLOCK_M)
    left = _rows(do + head * SIZE, heads * SIZE, start, tokens, BLOCK_M, SIZE, WIDTH).to(tl.float32)
    right = _rows(o + head * SIZE, heads * SIZE, start, tokens, BLOCK_M, SIZE, WIDTH).to(tl.float32)
    place = head.to(tl.int64) * tokens + at_M
    tl.store(delta + place, tl.sum(left * right, 1), mask=at_M < tokens)


@tile.jit
def _collect_keys(  # type: ignore[no-untyped-def]
    keys, values, q, do, lse, delta, first, begin, end, at_N, dk, dv, stride, tokens, window, scale,
    softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):
    """Add what the queries from `begin` to `end` of one head give; scores lie [keys, queries]."""
    for start in range(begin, end, BLOCK_M):
        at_M = start + tl.arange(0, BLOCK_M)
        inside = at_M < tokens
        queries = _rows(q, stride, start, tokens, BLOCK_M, SIZE, WIDTH)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        scores, slope = _bend(scores, scale, softcap, SOFTCAP)
        shift = tl.load(lse + at_M, mask=inside, other=0.0) * LOG2E
        p = tl.exp2(scores - shift[None, :])
        if MASKED:
            firsts = tl.load(first + at_M, mask=inside, other=0x7FFFFFFF)
            low_M = tl.maximum(firsts, at_M - window + 1)
            p = tl.where((at_N[:, None] >= low_M[None, :]) & (at_N[:, None] <= at_M[None, :]), p, 0.0)
        grads = _rows(do, stride, start, tokens, BLOCK_M, SIZE, WIDTH)
        dv = tl.dot(p.to(grads.dtype), grads, dv, input_precision=PRECISION)
        dp = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        ds = p * (dp - tl.load(delta + at_M, mask=inside, other=0.0)[None, :]) * slope
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@tile.jit
def _backward_keys(  # type: ignore[no-untyped-def]
    q, k, v, do, lse, delta, first, last, dk, dv, tokens, heads, kv_heads, window, scale, softcap,
    SOFTCAP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):
    head, start = tl.program_id(0), tl.program_id(1) * BLOCK_N
    at_N = start + tl.arange(0, BLOCK_N)
    lasts = tl.load(last + at_N, mask=at_N < tokens, other=-1)
    highs = tl.minimum(lasts, at_N + window - 1)  # the last query that sees each key
    end = tl.minimum(tl.max(highs, 0) + 1, tokens)
    begin = start // BLOCK_M * BLOCK_M
    # From the diagonal's end to where the first key's document ends all queries see all keys.
    full = (start + BLOCK_N + BLOCK_M - 2) // BLOCK_M * BLOCK_M
    until = (tl.min(tl.where(at_N < tokens, highs, 0x7FFFFFFF), 0) + 1) // BLOCK_M * BLOCK_M
    full = tl.minimum(full, end)
    until = tl.maximum(tl.minimum(until, end), full)
    stride, kv_stride, group = heads * SIZE, kv_heads * SIZE, heads // kv_heads
    keys = _rows(k + head * SIZE, kv_stride, start, tokens, BLOCK_N, SIZE, WIDTH)
    values = _rows(v + head * SIZE, kv_stride, start, tokens, BLOCK_N, SIZE, WIDTH)
    k_sums = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    v_sums = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for number in range(group):
        one = head * group + number
        from_q, from_do = q + one * SIZE, do + one * SIZE
        from_lse, from_delta = lse + one.to(tl.int64) * tokens, delta + one.to(tl.int64) * tokens
        k_sums, v_sums = _collect_keys(
            keys, values, from_q, from_do, from_lse, from_delta, first, begin, full, at_N, k_sums, v_sums,
            stride, tokens, window, scale, softcap, True, SOFTCAP, SIZE, WIDTH, BLOCK_M, PRECISION,
        )
        k_sums, v_sums = _collect_keys(
            keys, values, from_q, from_do, from_lse, from_delta, first, full, until, at_N, k_sums, v_sums,
            stride, tokens, window, scale, softcap, False, SOFTCAP, SIZE, WIDTH, BLOCK_M, PRECISION,
        )
        k_sums, v_sums = _collect_keys(
            keys, values, from_q, from_do, from_lse, from_delta, first, until, end, at_N, k_sums, v_sums,
            stride, tokens, window, scale, softcap, True, SOFTCAP, SIZE, WIDTH, BLOCK_M, PRECISION,
        )
    _store(dk + head * SIZE, kv_stride, start, tokens, k_sums * scale, BLOCK_N, SIZE, WIDTH)
    _store(dv + head * SIZE, kv_stride, start, tokens, v_sums, BLOCK_N, SIZE, WIDTH)


@tile.jit
def _collect_queries(  # type: ignore[no-untyped-def]
    queries, grads, shift, delta, k, v, begin, end, at_M, low_M, dq, stride, tokens, scale, softcap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):
    """Add what the keys from `begin` to `end` give."""
    for start in range(begin, end, BLOCK_N):
        at_N = start + tl.arange(0, BLOCK_N)
        keys = _rows(k, stride, start, tokens, BLOCK_N, SIZE, WIDTH)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        scores, slope = _bend(scores, scale, softcap, SOFTCAP)
        p = tl.exp2(scores - shift[:, None])
        if MASKED:
            p = tl.where((at_N[None, :] >= low_M[:, None]) & (at_N[None, :] <= at_M[:, None]), p, 0.0)
        values = _rows(v, stride, start, tokens, BLOCK_N, SIZE, WIDTH)
        dp = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        ds = p * (dp - delta[:, None]) * slope
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


@tile.jit
def _backward_queries(  # type: ignore[no-untyped-def]
    q, k, v, do, lse, delta, first, dq, tokens, heads, kv_heads, window, scale, softcap,
    SOFTCAP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):
    head = tl.program_id(0)
    start = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M  # the longest first
    at_M = start + tl.arange(0, BLOCK_M)
    inside = at_M < tokens
    firsts = tl.load(first + at_M, mask=inside, other=0x7FFFFFFF)
    low_M = tl.maximum(firsts, at_M - window + 1)
    end = tl.minimum(start + BLOCK_M, tokens)
    begin = tl.min(low_M, 0) // BLOCK_N * BLOCK_N
    full = (tl.max(tl.where(inside, low_M, 0), 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    diagonal = tl.maximum(start // BLOCK_N * BLOCK_N, begin)
    full = tl.minimum(full, diagonal)
    stride, kv_stride = heads * SIZE, kv_heads * SIZE
    queries = _rows(q + head * SIZE, stride, start, tokens, BLOCK_M, SIZE, WIDTH)
    grads = _rows(do + head * SIZE, stride, start, tokens, BLOCK_M, SIZE, WIDTH)
    place = head.to(tl.int64) * tokens + at_M
    shift = tl.load(lse + place, mask=inside, other=0.0) * LOG2E
    deltas = tl.load(delta + place, mask=inside, other=0.0)
    k += head // (heads // kv_heads) * SIZE
    v += head // (heads // kv_heads) * SIZE
    sums = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    sums = _collect_queries(
        queries, grads, shift, deltas, k, v, begin, full, at_M, low_M, sums, kv_stride, tokens, scale,
        softcap, True, SOFTCAP, SIZE, WIDTH, BLOCK_N, PRECISION,
    )
    sums = _collect_queries(
        queries, grads, shift, deltas, k, v, full, diagonal, at_M, low_M, sums, kv_stride, tokens, scale,
        softcap, False, SOFTCAP, SIZE, WIDTH, BLOCK_N, PRECISION,
    )
    sums = _collect_queries(
        queries, grads, shift, deltas, k, v, diagonal, end, at_M, low_M, sums, kv_stride, tokens, scale,
        softcap, True, SOFTCAP, SIZE, WIDTH, BLOCK_N, PRECISION,
    )
    _store(dq + head * SIZE, stride, start, tokens, sums * scale, BLOCK_M, SIZE, WIDTH)
# fmt: on


def forward_triton(
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
    """Start a program for each block of queries and head; heads side by side, to share keys in cache."""
    q_NHD, k_NKD, v_NKD = q_NHD.contiguous(), k_NKD.contiguous(), v_NKD.contiguous()
    tokens, heads, head_size = q_NHD.shape
    o_NHD, lse_HN = torch.empty_like(q_NHD), q_NHD.new_empty(heads, tokens, dtype=torch.float32)
    options = _options("attention", q_NHD, softcap)
    grid = heads, -(-tokens // options["BLOCK_M"])
    numbers = (tokens, heads, k_NKD.shape[1], window or tokens, head_size**-0.5, softcap)
    first_N = first_N.int().contiguous()
    tile.launch(_forward, grid, q_NHD, k_NKD, v_NKD, first_N, o_NHD, lse_HN, *numbers, **options)
    return o_NHD, lse_HN


def backward_triton(
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
    """Start a program for each block of keys and kv head, then one for each block of queries and head."""
    q_NHD, k_NKD, v_NKD = q_NHD.contiguous(), k_NKD.contiguous(), v_NKD.contiguous()
    do_NHD, first_N, last_N = do_NHD.contiguous(), first_N.int().contiguous(), last_N.int().contiguous()
    tokens, heads, head_size = q_NHD.shape
    kv_heads, delta_HN = k_NKD.shape[1], torch.empty_like(lse_HN)
    dq_NHD, dk_NKD, dv_NKD = torch.empty_like(q_NHD), torch.empty_like(k_NKD), torch.empty_like(v_NKD)
    options = _options("attention_backward_keys", q_NHD, softcap)
    shape = {name: options[name] for name in ("SIZE", "WIDTH")}
    block = 64 if q_NHD.dtype.itemsize == 2 else 16
    grid = heads, -(-tokens // block)
    tile.launch(_delta, grid, do_NHD, o_NHD.contiguous(), delta_HN, tokens, heads, **shape, BLOCK_M=block)
    given = (q_NHD, k_NKD, v_NKD, do_NHD, lse_HN, delta_HN, first_N)
    numbers = (tokens, heads, kv_heads, window or tokens, head_size**-0.5, softcap)
    grid = kv_heads, -(-tokens // options["BLOCK_N"])
    tile.launch(_backward_keys, grid, *given, last_N, dk_NKD, dv_NKD, *numbers, **options)
    options = _options("attention_backward_queries", q_NHD, softcap)
    grid = heads, -(-tokens // options["BLOCK_M"])
    tile.launch(_backward_queries, grid, *given, dq_NHD, *numbers, **options)
    return dq_NHD, dk_NKD, dv_NKD


# BLOCK_M, BLOCK_N, num_warps, num_stages that spill no register, by kernel, width of a head and
# capability (0: the others); fp32 has the last. PERF: not measured on a GPU.
_BLOCKS = {
    ("attention", 64): {0: (128, 64, 8, 2), 90: (128, 128, 8, 2)},
    ("attention", 128): {0: (128, 64, 8, 2), 80: (64, 64, 8, 2)},
    ("attention_backward_keys", 64): {0: (32, 128, 8, 2), 90: (64, 128, 8, 2)},
    ("attention_backward_keys", 128): {0: (32, 64, 8, 1), 80: (64, 64, 8, 2), 90: (16, 128, 8, 2)},
    ("attention_backward_queries", 64): {0: (128, 64, 8, 2), 100: (128, 32, 8, 2)},
    ("attention_backward_queries", 128): {0: (128, 64, 8, 2), 80: (64, 64, 8, 2)},
}
_WIDE_BLOCKS = {
    "attention": (16, 32, 4, 1),
    "attention_backward_keys": (16, 16, 8, 1),
    "attention_backward_queries": (16, 32, 4, 1),
}


def _options(kernel: str, q_NHD: Tensor, softcap: float) -> dict[str, Any]:
    """Return a kernel's constants: its shape, and how it is cut in blocks."""
    head_size, dtype = q_NHD.shape[2], q_NHD.dtype
    width = max(16, 1 << (head_size - 1).bit_length())
    is_half = dtype.itemsize == 2
    if tile.IS_INTERPRETED and q_NHD.device.type == "cpu":
        blocks = (16, 32, 4, 1) if kernel == "attention_backward_keys" else (32, 16, 4, 1)
    elif is_half and width <= 128:
        by_capability = _BLOCKS[kernel, max(64, width)]
        blocks = by_capability.get(tile.capability(q_NHD.device) // 10 * 10, by_capability[0])
    else:
        blocks = _WIDE_BLOCKS[kernel]
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    default = dict(zip(names, blocks, strict=True))
    others = [
        dict(zip(names, (rows, keys, warps, stages), strict=True))
        for rows, keys in ((64, 64), (128, 64), (64, 128), (128, 128), (32, 128))
        for warps in (4, 8)
        for stages in (2, 3)
    ]
    cut = tile.config(kernel, (width, str(dtype).removeprefix("torch.")), default, others if is_half else ())
    # Three products of TF32 parts are as good as one in fp32, and run on tensor cores.
    precision = "ieee" if is_half else "tf32x3"
    return {"SIZE": head_size, "WIDTH": width, "SOFTCAP": softcap != 0, "PRECISION": precision} | cut
