"""Paged attention in Triton: one kernel for prompts, chunks of prompts and single tokens, in any mix.

A program takes a block of rows of one sequence and kv head: its queries times the heads that share the kv
head, so that keys and values are read once for the group. Blocks of rows are counted off without the host:
sequence s begins at block starts[s] // queries + s, which a program finds by bisection, and at most
N // queries + B blocks exist. Where these are too few to fill the GPU, the keys of every sequence are split,
and a second kernel adds the splits up.

Axes: as in `paged_attention`. Source: FlashAttention-2 (Dao 2023), Flash-Decoding (Dao et al. 2023).
"""

from typing import Any

import torch
from torch import Tensor

from marrow.kernels import tile
from marrow.kernels.attention.flash import NEVER, _bend
from marrow.kernels.attention.paged_lists import check_lists
from marrow.kernels.tile import tl


# fmt: off
@tile.jit
def _load(  # type: ignore[no-untyped-def]
    cache, table, at_N, least, length, kv_heads, head, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr,
):
    """Load rows of a kv head by the list of blocks, zeros before key `least`, and where their scales are."""
    across = tl.arange(0, WIDTH)
    inside_N = (at_N >= least) & (at_N < length)
    if MASKED:
        blocks = tl.load(table + at_N // BLOCK, mask=inside_N, other=0)
    else:
        blocks = tl.load(table + at_N // BLOCK)
    rows = (blocks.to(tl.int64) * BLOCK + at_N % BLOCK) * kv_heads + head
    places = cache + rows[:, None] * SIZE + across[None, :]
    if MASKED:
        inside = inside_N[:, None] & (across[None, :] < SIZE)
        return tl.load(places, mask=inside, other=0.0), rows
    if SIZE == WIDTH:
        return tl.load(places), rows
    return tl.load(places, mask=across[None, :] < SIZE, other=0.0), rows


@tile.jit
def _attend(  # type: ignore[no-untyped-def]
    queries, keys, values, key_scales, value_scales, table, begin, end, least, length, kv_heads, head,
    low_M, high_M, o, most, total, scale, softcap, MASKED: tl.constexpr, QUANTISED: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):
    """Carry o, the largest scores and the sums on over the keys from `begin` to `end`."""
    for first in range(begin, end, BLOCK_N):
        at_N = first + tl.arange(0, BLOCK_N)
        k, rows = _load(keys, table, at_N, least, length, kv_heads, head, MASKED, BLOCK, SIZE, WIDTH)
        scores = tl.dot(queries, tl.trans(k.to(queries.dtype)), input_precision=PRECISION)
        if QUANTISED:  # a key's scale is one number for all of its scores
            inside = (at_N >= least) & (at_N < length)
            scores *= tl.load(key_scales + rows, mask=inside, other=0.0)[None, :]
        scores, _ = _bend(scores, scale, softcap, SOFTCAP)
        if MASKED:
            seen = (at_N[None, :] >= low_M[:, None]) & (at_N[None, :] <= high_M[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(most, tl.max(scores, 1))
        shrink = tl.exp2(most - top)
        p = tl.exp2(scores - top[:, None])
        total = total * shrink + tl.sum(p, 1)
        v, rows = _load(values, table, at_N, least, length, kv_heads, head, MASKED, BLOCK, SIZE, WIDTH)
        if QUANTISED:
            p *= tl.load(value_scales + rows, mask=inside, other=0.0)[None, :]
        product = tl.dot(p.to(queries.dtype), v.to(queries.dtype), input_precision=PRECISION)
        o = o * shrink[:, None] + product
        most = top
    return o, most, total


@tile.jit
def _forward(  # type: ignore[no-untyped-def]
    q, keys, values, key_scales, value_scales, blocks, starts, ends, o, tops, totals, sequences, tokens,
    list_length, heads, kv_heads, window, scale, softcap, SPLITS: tl.constexpr, QUANTISED: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    number, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # The last sequence whose blocks of rows begin at this one or before.
    sequence = number * 0  # a tensor, even if the loop does not run
    beyond = sequence + sequences
    while beyond - sequence > 1:
        middle = (sequence + beyond) // 2
        is_before = tl.load(starts + middle) // QUERIES + middle <= number
        sequence = tl.where(is_before, middle, sequence)
        beyond = tl.where(is_before, beyond, middle)
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    first_query = (number - (start // QUERIES + sequence)) * QUERIES
    if first_query < count:
        length = tl.load(ends + sequence)
        row_M = tl.arange(0, BLOCK_M)
        query_M = first_query + row_M // GROUP
        inside_M = (row_M < QUERIES * GROUP) & (query_M < count)
        high_M = length - count + query_M
        low_M = tl.maximum(high_M - window + 1, 0)
        across = tl.arange(0, WIDTH)
        place_M = (start + query_M).to(tl.int64) * heads + head * GROUP + row_M % GROUP
        places = place_M[:, None] * SIZE + across[None, :]
        inside = inside_M[:, None] & (across[None, :] < SIZE)
        queries = tl.load(q + places, mask=inside, other=0.0)
        # Of the keys that some query sees this split takes its share, in whole blocks of BLOCK_N.
        least = tl.maximum(length - count + first_query - window + 1, 0)  # before it may be anything
        first_key = least // BLOCK_N * BLOCK_N
        most_key = tl.minimum(first_query + QUERIES, count) + length - count
        share = (tl.maximum(most_key - first_key, 0) + SPLITS * BLOCK_N - 1) // (SPLITS * BLOCK_N) * BLOCK_N
        begin = first_key + split * share
        end = tl.minimum(begin + share, most_key)
        # Up to here all queries see all keys, where there is no window.
        full = tl.minimum(end, tl.maximum(length - count + first_query + 1, 0)) // BLOCK_N * BLOCK_N
        full = tl.maximum(tl.where(window < length, begin, full), begin)
        sums = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        most = tl.full([BLOCK_M], NEVER, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        table = blocks + sequence.to(tl.int64) * list_length
        sums, most, total = _attend(
            queries, keys, values, key_scales, value_scales, table, begin, full, least, length, kv_heads,
            head, low_M, high_M, sums, most, total, scale, softcap, False, QUANTISED, SOFTCAP, BLOCK, SIZE,
            WIDTH, BLOCK_N, PRECISION,
        )
        sums, most, total = _attend(
            queries, keys, values, key_scales, value_scales, table, full, end, least, length, kv_heads,
            head, low_M, high_M, sums, most, total, scale, softcap, True, QUANTISED, SOFTCAP, BLOCK, SIZE,
            WIDTH, BLOCK_N, PRECISION,
        )
        if SPLITS == 1:
            sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(o + places, sums.to(o.dtype.element_ty), mask=inside)
        else:
            base = split.to(tl.int64) * tokens * heads
            tl.store(o + base * SIZE + places, sums, mask=inside)
            tl.store(tops + base + place_M, most, mask=inside_M)
            tl.store(totals + base + place_M, total, mask=inside_M)


@tile.jit
def _merge(parts, tops, totals, o, rows, SPLITS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add up the splits of a row, a query's head."""
    row = tl.program_id(0).to(tl.int64)
    across = tl.arange(0, WIDTH)
    most = tl.full([], NEVER, tl.float32)
    for split in range(SPLITS):
        most = tl.maximum(most, tl.load(tops + row + split * rows))
    total = tl.zeros([], tl.float32)
    sums = tl.zeros([WIDTH], tl.float32)
    for split in range(SPLITS):
        share = tl.exp2(tl.load(tops + row + split * rows) - most)
        total += share * tl.load(totals + row + split * rows)
        place = parts + (row + split * rows) * SIZE + across
        sums += share * tl.load(place, mask=across < SIZE, other=0.0)
    sums = sums / tl.where(total == 0.0, 1.0, total)
    tl.store(o + row * SIZE + across, sums.to(o.dtype.element_ty), mask=across < SIZE)
# fmt: on


def forward_triton(
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
    """Start one program for each block of rows, kv head and split; the host reads no tensor of a GPU."""
    check_lists(q_NHD, keys_PSKD, blocks_BM, starts_B, ends_B)
    q_NHD, keys_PSKD, values_PSKD = q_NHD.contiguous(), keys_PSKD.contiguous(), values_PSKD.contiguous()
    tokens, heads, size = q_NHD.shape
    sequences, (_, block, kv_heads, _), o_NHD = blocks_BM.shape[0], keys_PSKD.shape, torch.empty_like(q_NHD)
    if not q_NHD.numel():
        return o_NHD
    options = _options(q_NHD, keys_PSKD, max_queries, softcap)
    blocks = tokens // (options["BLOCK_M"] // options["GROUP"]) + sequences
    splits = _splits(blocks * kv_heads, max_keys, options["BLOCK_N"], tile.multiprocessors(q_NHD.device))
    parts = o_NHD if splits == 1 else o_NHD.new_empty(splits, tokens, heads, size, dtype=torch.float32)
    tops, totals = o_NHD.new_empty(2, splits, tokens, heads, dtype=torch.float32)
    scales = [x if x is None else x.float().contiguous() for x in (key_scales_PSK, value_scales_PSK)]
    tables = [x.int().contiguous() for x in (blocks_BM, starts_B, ends_B)]
    numbers = (sequences, tokens, blocks_BM.shape[1], heads, kv_heads, window or 1 << 30, size**-0.5, softcap)
    given = (q_NHD, keys_PSKD, values_PSKD, *scales, *tables, parts, tops, totals, *numbers)
    tile.launch(_forward, (blocks, kv_heads, splits), *given, SPLITS=splits, BLOCK=block, **options)
    if splits > 1:
        shape = {name: options[name] for name in ("SIZE", "WIDTH")}
        rows = tokens * heads
        tile.launch(_merge, (rows,), parts, tops, totals, o_NHD, rows, SPLITS=splits, **shape, num_warps=1)
    return o_NHD


def _splits(programs: int, max_keys: int, block: int, multiprocessors: int) -> int:
    """Return in how many parts to split keys: four programs a multiprocessor, four blocks of keys each."""
    wanted = -(-4 * multiprocessors // programs)
    most = max(1, max_keys // (4 * block))
    return min(1 << (wanted - 1).bit_length(), 1 << most.bit_length() - 1, 64)


def _options(q_NHD: Tensor, keys_PSKD: Tensor, max_queries: int, softcap: float) -> dict[str, Any]:
    """Return the kernel's constants: its shape, and how it is cut in blocks."""
    heads, size, kv_heads = q_NHD.shape[1], q_NHD.shape[2], keys_PSKD.shape[2]
    group, width = heads // kv_heads, max(16, 1 << (size - 1).bit_length())
    is_half, kind = q_NHD.dtype.itemsize == 2, "decode" if max_queries == 1 else "mixed"
    rows = max(16, 1 << (group - 1).bit_length())
    if kind == "mixed" and not (tile.IS_INTERPRETED and q_NHD.device.type == "cpu"):
        rows = max(rows, (64 if tile.capability(q_NHD.device) >= 90 else 32) if is_half else 16)
    # PERF: not measured.
    default = {
        "BLOCK_M": rows,
        "BLOCK_N": 64 if is_half else 32,
        "num_warps": 4,
        "num_stages": 3 if is_half else 1,
    }
    others = [
        default | {"BLOCK_N": keys, "num_stages": stages} for keys in (32, 64, 128) for stages in (2, 3, 4)
    ]
    others += [default | {"num_warps": warps} for warps in (2, 8)]
    shape = (kind, width, *(str(x.dtype).removeprefix("torch.") for x in (q_NHD, keys_PSKD)))
    cut = tile.config("paged_attention", shape, default, others if is_half else ())
    fixed = {
        "QUANTISED": keys_PSKD.dtype.itemsize == 1,
        "SOFTCAP": softcap != 0,
        "GROUP": group,
        "SIZE": size,
        "WIDTH": width,
        # Three products of TF32 parts are as good as one in fp32, and run on tensor cores.
        "PRECISION": "ieee" if is_half else "tf32x3",
    }
    return fixed | cut
