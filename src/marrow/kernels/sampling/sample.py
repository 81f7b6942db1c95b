"""Draw the next tokens from logits: penalties, temperature, top-k, top-p, min-p, in this order, and no sort.

    x      the logits, less what a token's earlier use costs (repetition, then frequency and presence)
    p      softmax(x / temperature)
    top-k  keeps the first k in the order (x downwards, token upwards): of equals, the first
    top-p  keeps the shortest head of that order whose mass is at least top_p of what top-k kept; at least one
    min-p  keeps x >= max(x) + temperature log(min_p), that is p >= min_p max(p)

A token is a pure function of its row: one uniform number hashed from (seed, position) goes through the
inverse of the cumulative distribution of what is kept, in the order of the vocabulary. So a row draws the
same alone and in any batch. Temperature 0 takes the largest x, the first of equals. A row that holds a NaN or
+inf, or nothing but -inf, gives -1.

All that filters keep is above a threshold, or among the first few that equal it: thresholds are found by
bounds and bits, never by sorting (as in FlashInfer, Ye et al. 2025).

Axes: S rows, V vocabulary, N tokens of all histories, R listed alternatives.
"""

import torch
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.arguments import Expects
from marrow.kernels.dispatch import Example, Operator
from marrow.kernels.losses.cross_entropy import sum_row
from marrow.kernels.sampling.draws import Draw, Draws, Sampled, collect_reference, penalised, uniform
from marrow.kernels.sampling.thresholds import (
    bound,
    collect,
    cut_of,
    draw,
    gather,
    inverse_of,
    maxima,
    row_options,
)
from marrow.kernels.tile import tl

_PAD = 16  # numbers of a vector


def sample(logits_SV: Tensor, draws: Draws, *, num_top: int | None = None) -> Sampled:
    """Draw one token a row.

    Args: logits_SV: [S, V], fp32 or bf16. draws: one a row. num_top: None for no log probabilities, or how
        many of the likeliest tokens to list besides the drawn one's.
    Returns: see `Sampled`.
    Raises: UsageError if there is not a row for each draw.
    Cost: reads the logits two or three times, from the cache after the first; O(S V).
    """
    draws.check(logits_SV)
    listed = -1 if num_top is None else min(num_top, logits_SV.shape[1])
    packed = draws.factors_S6, draws.keys_S4, draws.history_N, draws.starts_S1
    return Sampled(*OPERATOR(logits_SV, *packed, listed))


def sample_reference(
    logits_SV: Tensor, factors_S6: Tensor, keys_S4: Tensor, history_N: Tensor, starts_S1: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `sample` in plain torch, by sorting, in fp64."""
    masses_SV, is_bad_S = collect_reference(logits_SV, factors_S6, keys_S4, history_N, starts_S1)
    kept_S = (masses_SV >= 0).sum(-1).masked_fill(is_bad_S, 0)
    sums_SV = masses_SV.clamp(min=0).cumsum(-1)
    target_S1 = uniform(keys_S4[:, 1], keys_S4[:, 2])[:, None] * sums_SV[:, -1:]
    tokens_S = (sums_SV > target_S1).long().argmax(-1)
    last_S = (masses_SV > 0).long().cumsum(-1).argmax(-1)  # for a sum that was rounded down
    tokens_S = torch.where(sums_SV[:, -1] > target_S1[:, 0], tokens_S, last_S).masked_fill(is_bad_S, -1)
    if num_top < 0:
        nothing_S, nothing_SR = logits_SV.new_empty(0, dtype=torch.float32), (len(logits_SV), 0)
        return tokens_S, kept_S, nothing_S, tokens_S.new_empty(nothing_SR), nothing_S.new_empty(nothing_SR)
    exact_SV = logits_SV.double()
    log_SV = exact_SV.log_softmax(-1).masked_fill(is_bad_S[:, None], float("nan"))
    log_probs_S = log_SV.gather(1, tokens_S.clamp(min=0)[:, None])[:, 0].float()
    top_tokens_SR = exact_SV.sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    top_log_probs_SR = log_SV.gather(1, top_tokens_SR).float()
    top_tokens_SR = top_tokens_SR.masked_fill(is_bad_S[:, None], -1)
    return tokens_S, kept_S, log_probs_S, top_tokens_SR, top_log_probs_SR


# Triton


@tile.jit
def _sample(  # type: ignore[no-untyped-def]
    logits, factors, keys, uniforms, tokens, kepts, values, places, columns, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x, values, places = logits + row * columns, values + row * columns, places + row * columns
    temperature, top_p = tl.load(factors + row * 6), tl.load(factors + row * 6 + 1)
    min_p, top_k = tl.load(factors + row * 6 + 2), tl.load(keys + row * 4)
    top_k = tl.where((top_k <= 0) | (top_k > columns), columns, top_k)
    best, nans = maxima(x, columns, BLOCK)
    most = tl.max(best, 0)
    inverse, cut = inverse_of(temperature, BLOCK), cut_of(most, temperature, min_p, BLOCK)
    u = tl.load(uniforms + row)
    if (nans > 0) | (most == float("-inf")) | (most == float("inf")):
        tl.store(tokens + row, -1)
        tl.store(kepts + row, 0)
    elif (temperature <= 0.0) | (top_k < columns) | (top_p < 1.0):
        count, limit, ties = collect(x, columns, best, temperature, top_p, top_k, values, places, BLOCK)
        place, number, _, _ = draw(
            values, places, x, count, most, inverse, limit, ties, cut, 1.0, -1, u, BLOCK, False, False
        )
        tl.store(tokens + row, tl.load(places + place))
        tl.store(kepts + row, number)
    else:
        floor = tl.full([], -(2**31), tl.int64)
        place, number, _, _ = draw(
            x, places, x, columns, most, inverse, floor, floor, cut, 1.0, -1, u, BLOCK, False, False
        )
        tl.store(tokens + row, place)
        tl.store(kepts + row, number)


@tile.jit
def _report(  # type: ignore[no-untyped-def]
    logits,
    tokens,
    log_probs,
    top_tokens,
    top_log_probs,
    values,
    places,
    columns,
    NUM_TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x, values, places = logits + row * columns, values + row * columns, places + row * columns
    token = tl.load(tokens + row)
    most, rest, _ = sum_row(x, columns, 1.0, BLOCK, False)
    drawn = tl.load(x + token, mask=token >= 0, other=float("nan")).to(tl.float32)
    tl.store(log_probs + row, drawn - most - rest)
    if NUM_TOP > 0:
        best, _ = maxima(x, columns, BLOCK)
        count = gather(x, columns, bound(best, NUM_TOP, BLOCK), values, places, BLOCK)
        at = tl.arange(0, BLOCK)
        value, place = tl.full([], float("inf"), tl.float32), tl.full([], -1, tl.int32)
        for rank in range(NUM_TOP):  # the next in the order
            after = tl.full([], float("-inf"), tl.float32)
            where = tl.full([], 2**31 - 1, tl.int32)
            for start in range(0, count, BLOCK):
                inside = start + at < count
                some = tl.load(values + start + at, mask=inside, other=float("-inf"))
                index = tl.load(places + start + at, mask=inside, other=2**31 - 1)
                is_next = inside & ((some < value) | ((some == value) & (index > place)))
                here = tl.max(tl.where(is_next, some, float("-inf")), 0)
                there = tl.min(tl.where(is_next & (some == here), index, 2**31 - 1), 0)
                is_better = (there < 2**31 - 1) & ((here > after) | (where == 2**31 - 1))
                where = tl.where(is_better, there, where)
                after = tl.where(is_better, here, after)
            value, place = after, where
            is_bad = token < 0
            tl.store(top_tokens + row * NUM_TOP + rank, tl.where(is_bad, -1, place))
            log_prob = tl.where(is_bad, float("nan"), value - most - rest)
            tl.store(top_log_probs + row * NUM_TOP + rank, log_prob)


def forward_triton(
    logits_SV: Tensor, factors_S6: Tensor, keys_S4: Tensor, history_N: Tensor, starts_S1: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One program a row; penalties, where there is a history, by torch."""
    logits_SV, (rows, columns) = logits_SV.contiguous(), logits_SV.shape
    out = _empty(logits_SV, factors_S6, keys_S4, history_N, starts_S1, num_top)
    tokens_S, kept_S, log_probs_S, top_tokens_SR, top_log_probs_SR = out
    factors_S6, keys_S4, x_SV = factors_S6.contiguous(), keys_S4.contiguous(), logits_SV
    if len(history_N):
        x_SV = penalised(logits_SV.float(), factors_S6[:, 3:], keys_S4[:, 3], history_N, starts_S1)
    values_SV = logits_SV.new_empty(rows, columns, dtype=torch.float32)
    places_SV = logits_SV.new_empty(rows, columns, dtype=torch.int32)
    options = row_options("sample", columns)
    uniform_S = uniform(keys_S4[:, 1], keys_S4[:, 2])
    arguments = (x_SV, factors_S6, keys_S4, uniform_S, tokens_S, kept_S, values_SV, places_SV, columns)
    tile.launch(_sample, (rows,), *arguments, **options)
    if num_top >= 0:
        listed = (tokens_S, log_probs_S, top_tokens_SR, top_log_probs_SR, values_SV, places_SV)
        tile.launch(_report, (rows,), logits_SV, *listed, columns, NUM_TOP=num_top, **options)
    return out


# CPU


def forward_cpu(
    logits_SV: Tensor, factors_S6: Tensor, keys_S4: Tensor, history_N: Tensor, starts_S1: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows in C, shared among torch's threads."""
    # PERF: one core, 1 to 64 rows, times as fast as filters that sort, as transformers has them: 2k tokens 4
    # to 20, 32k 18 to 65, 152k 30 to 100; as torch.topk with a top-k of 50: 1.5 to 2.2, 2.5 to 3.8, 3.1 to 5.
    logits_SV, (rows, columns) = logits_SV.contiguous(), logits_SV.shape
    out = _empty(logits_SV, factors_S6, keys_S4, history_N, starts_S1, num_top)
    tokens_S, kept_S, log_probs_S, top_tokens_SR, top_log_probs_SR = out
    threads = max(1, min(rows, torch.get_num_threads()))
    memory, counts, stride = scratch(threads, columns, has_history=len(history_N) > 0)
    given = (factors_S6.contiguous(), keys_S4.contiguous(), history_N.contiguous(), starts_S1.contiguous())
    native.function("sample", "sample", "p" * 12 + "llllii")(
        *native.pointers(logits_SV, *given, tokens_S, log_probs_S, kept_S, top_tokens_SR, top_log_probs_SR),
        *native.pointers(memory, counts),
        *(rows, columns, num_top, stride, threads, native.type_of(logits_SV)),
    )
    return out


def scratch(threads: int, columns: int, *, has_history: bool) -> tuple[Tensor, Tensor, int]:
    """Return memory for rows and for counts of tokens, a part for each thread, and a row's stride there."""
    stride = (columns + 2 * _PAD) // _PAD * _PAD
    memory = torch.empty(threads, 6, stride, dtype=torch.float32)
    return memory, torch.zeros(threads, columns if has_history else 0, dtype=torch.int32), stride


# What all paths share


def _empty(
    logits_SV: Tensor, factors_S6: Tensor, keys_S4: Tensor, history_N: Tensor, starts_S1: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate what `Sampled` holds."""
    rows, listed = logits_SV.shape[0], max(num_top, 0)
    return (
        logits_SV.new_empty(rows, dtype=torch.int64),
        logits_SV.new_empty(rows, dtype=torch.int64),
        logits_SV.new_empty(rows if num_top >= 0 else 0, dtype=torch.float32),
        logits_SV.new_empty(rows, listed, dtype=torch.int64),
        logits_SV.new_empty(rows, listed, dtype=torch.float32),
    )


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Make batches that ask for all filters: of a small vocabulary and of a large one."""
    examples = []
    for rows, vocab in ((4, 2048), (8, 151936)):
        logits_SV = torch.randn(rows, vocab, device=device, dtype=dtype) * 3
        draw = Draw(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, repetition=1.1, history=(1, 2, 3))
        draws = Draws.of([draw] * rows, device)
        inputs = (logits_SV, draws.factors_S6, draws.keys_S4, draws.history_N, draws.starts_S1, 5)
        examples.append(Example(f"{rows}x{vocab}", inputs, logits_SV.nbytes, 2.0 * logits_SV.numel()))
    return examples


OPERATOR = Operator(
    "sample",
    sample_reference,
    fake=_empty,
    results=5,
    examples=_examples,
    expects=Expects(
        dtypes={"factors_S6": torch.float32}
        | dict.fromkeys(("keys_S4", "history_N", "starts_S1"), torch.int64),
        axes={"starts_S1": "Z"},
    ),
)
OPERATOR.add("cpu", forward_cpu, **native.path("sample"))
OPERATOR.add("triton", forward_triton, **tile.path())
