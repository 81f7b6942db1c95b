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
from marrow.kernels.dispatch import Example, Operator
from marrow.kernels.losses.cross_entropy import sum_row
from marrow.kernels.sampling.draws import Draw, Draws, Sampled, uniform
from marrow.kernels.tile import tl

_PAD = 16  # numbers of a vector


def sample(logits_SV: Tensor, draws: Draws, *, num_top: int | None = None) -> Sampled:
    """Draw one token a row.

    Args: logits_SV: [S, V], fp32 or bf16. draws: one a row. num_top: None for no log probabilities, or how
        many of the likeliest tokens to list besides the drawn one's.
    Returns: see `Sampled`.
    Cost: reads the logits two or three times, from the cache after the first; O(S V).
    """
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
    return tokens_S, kept_S, log_probs_S, top_tokens_SR.masked_fill(is_bad_S[:, None], -1), top_log_probs_SR


def collect_reference(
    logits_SV: Tensor, factors_S6: Tensor, keys_S4: Tensor, history_N: Tensor, starts_S1: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what each token weighs in the draw, fp64, -1 where a filter dropped it; and which rows are bad."""
    temperature_S1, top_p_S1, min_p_S1 = factors_S6.double()[:, :3, None].unbind(1)
    x_SV = _penalised(logits_SV.double(), factors_S6.double()[:, 3:], keys_S4[:, 3], history_N, starts_S1)
    vocab, rank_V = logits_SV.shape[1], torch.arange(logits_SV.shape[1], device=logits_SV.device)
    sorted_SV, order_SV = x_SV.sort(dim=-1, descending=True, stable=True)
    best_S1 = sorted_SV[:, :1]
    is_bad_S = ~best_S1[:, 0].isfinite() | x_SV.isnan().any(-1)
    is_greedy_S1 = ~(temperature_S1 > 0)
    masses_SV = torch.exp((sorted_SV - best_S1) / temperature_S1.masked_fill(is_greedy_S1, 1.0))
    keep_SV = rank_V < keys_S4[:, :1].masked_fill(keys_S4[:, :1] <= 0, vocab)
    masses_SV = masses_SV * keep_SV
    before_SV = masses_SV.cumsum(-1) - masses_SV
    keep_SV &= (before_SV < top_p_S1 * masses_SV.sum(-1, keepdim=True)) | (top_p_S1 >= 1) | (rank_V == 0)
    is_near_SV = sorted_SV >= best_S1 + temperature_S1 * min_p_S1.log()
    keep_SV &= is_near_SV | (min_p_S1 <= 0) | (sorted_SV == best_S1)
    keep_SV &= ~is_greedy_S1 | (rank_V == 0)
    # Back to the order of the vocabulary, in which the cumulative distribution runs.
    kept_SV = torch.where(keep_SV, masses_SV.nan_to_num(0.0), -1.0)
    return torch.zeros_like(masses_SV).scatter(-1, order_SV, kept_SV), is_bad_S


def _penalised(
    x_SV: Tensor, factors_S3: Tensor, num_drawn_S: Tensor, history_N: Tensor, starts_S1: Tensor
) -> Tensor:
    """Take from each row's logits what the tokens of its history cost."""
    lengths_S = starts_S1.diff()
    row_S = torch.arange(len(x_SV), device=x_SV.device)
    row_N = torch.repeat_interleave(row_S, lengths_S, output_size=len(history_N))  # a size needs no answer
    is_drawn_N = torch.arange(len(history_N), device=x_SV.device) >= (starts_S1[1:] - num_drawn_S)[row_N]
    counts_SV = torch.zeros_like(x_SV)
    seen_SV = counts_SV.index_put((row_N, history_N), torch.ones_like(history_N, dtype=x_SV.dtype))
    counts_SV = counts_SV.index_put((row_N, history_N), is_drawn_N.to(x_SV.dtype), accumulate=True)
    repetition_S1, presence_S1, frequency_S1 = factors_S3[:, :, None].unbind(1)
    repeated_SV = torch.where(x_SV > 0, x_SV / repetition_S1, x_SV * repetition_S1)
    x_SV = torch.where(seen_SV > 0, repeated_SV, x_SV)
    return x_SV - counts_SV * frequency_S1 - (counts_SV > 0) * presence_S1


# Triton


@tile.jit
def _key(x, BELOW_SIGN: tl.constexpr = 0x7FFFFFFF):  # type: ignore[no-untyped-def]
    """Return integers in the order of fp32 values."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # + 0.0: no -0
    return bits ^ ((bits >> 31) & BELOW_SIGN)


@tile.jit
def _maxima(x, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the largest of every BLOCK-th value, and how many are NaN."""
    at = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    nans = tl.zeros([BLOCK], tl.int32)
    for start in range(0, columns, BLOCK):
        some = tl.load(x + start + at, mask=start + at < columns, other=float("-inf")).to(tl.float32)
        nans += (some != some).to(tl.int32)
        best = tl.maximum(best, some)
    return best, tl.sum(nans, 0)


@tile.jit
def _bound(best, wanted, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the key of the `wanted`-th of the maxima, which as many values reach; or the least."""
    keys = _key(best).to(tl.int64)
    low, high = tl.min(keys, 0), tl.max(keys, 0)
    while low < high:
        middle = low + (high - low + 1) // 2
        is_reached = tl.sum((keys >= middle).to(tl.int32), 0) >= wanted
        low = tl.where(is_reached, middle, low)
        high = tl.where(is_reached, high, middle - 1)
    return tl.where(wanted > BLOCK, -(2**31), low)


@tile.jit
def _gather(x, columns, least, values, places, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Copy values whose key is at least `least`, in order; return how many."""
    at = tl.arange(0, BLOCK)
    count = tl.zeros([], tl.int32)
    for start in range(0, columns, BLOCK):
        inside = start + at < columns
        some = tl.load(x + start + at, mask=inside, other=float("-inf")).to(tl.float32)
        kept = inside & (_key(some).to(tl.int64) >= least)
        place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(values + place, some, mask=kept)
        tl.store(places + place, start + at, mask=kept)
        count += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()  # others of the program read what is stored
    return count


@tile.jit
def _head(values, count, most, inverse, above, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return how many values have a key of at least `above`, and their mass."""
    at = tl.arange(0, BLOCK)
    number = tl.zeros([], tl.int64)
    mass = tl.zeros([], tl.float64)
    for start in range(0, count, BLOCK):
        some = tl.load(values + start + at, mask=start + at < count, other=float("-inf"))
        kept = (start + at < count) & (_key(some).to(tl.int64) >= above)
        number += tl.sum(kept.to(tl.int64), 0)
        mass += tl.sum(tl.where(kept, tl.exp((some - most) * inverse), 0.0).to(tl.float64), 0)
    return number, mass


@tile.jit
def _filter(values, count, most, inverse, top_k, top_p, mass, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the key above which all are kept, and how many of its own. mass: of the row, without top-k."""
    floor = tl.full([], -(2**31), tl.int64)
    high = _key(most).to(tl.int64)
    limit, ties = floor, count.to(tl.int64)
    if top_k < count:
        low, top = floor, high
        while low < top:
            middle = low + (top - low + 1) // 2
            number, _ = _head(values, count, most, inverse, middle, BLOCK)
            low = tl.where(number >= top_k, middle, low)
            top = tl.where(number >= top_k, top, middle - 1)
        limit = low
        number, above = _head(values, count, most, inverse, limit + 1, BLOCK)
        ties = top_k - number
        more, reached = _head(values, count, most, inverse, limit, BLOCK)
        mass = above + (reached - above) * (ties.to(tl.float64) / (more - number).to(tl.float64))
    if top_p < 1.0:
        wanted = top_p.to(tl.float64) * mass
        low, top = limit, high
        while low < top:  # at `low` what top-k keeps is enough
            middle = low + (top - low + 1) // 2
            _, reached = _head(values, count, most, inverse, middle, BLOCK)
            low = tl.where(reached >= wanted, middle, low)
            top = tl.where(reached >= wanted, top, middle - 1)
        number, above = _head(values, count, most, inverse, low + 1, BLOCK)
        more, reached = _head(values, count, most, inverse, low, BLOCK)
        equal = (more - number).to(tl.float64)
        needed = tl.ceil((wanted - above) * equal / tl.maximum(reached - above, 1e-300))
        needed = tl.minimum(tl.maximum(needed, 1.0), equal).to(tl.int64)
        ties = tl.where(low == limit, tl.minimum(needed, ties), needed)
        limit = low
    return limit, ties


@tile.jit
def _draw(values, count, most, inverse, limit, ties, cut, u, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where the running mass of what is kept passes u times all of it, and how many are kept."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros([], tl.float64)
    found = tl.full([], -1, tl.int32)
    last = tl.zeros([], tl.int32)
    number = tl.zeros([], tl.int64)
    for second in tl.static_range(2):
        running = tl.zeros([], tl.float64)
        equal = tl.zeros([], tl.int64)
        for start in range(0, count, BLOCK):
            inside = start + at < count
            some = tl.load(values + start + at, mask=inside, other=float("-inf")).to(tl.float32)
            key = _key(some).to(tl.int64)
            same = (inside & (key == limit)).to(tl.int64)
            kept = inside & ((key > limit) | ((same > 0) & (equal + tl.cumsum(same, 0) <= ties)))
            kept = kept & ((some.to(tl.float64) >= cut) | (some == most))
            mass = tl.where(kept, tl.exp((some - most) * inverse), 0.0).to(tl.float64)
            if second == 1:
                passed = running + tl.cumsum(mass, 0) > u * total
                here = tl.min(tl.where(passed & kept, start + at, 2**31 - 1), 0)
                found = tl.where((found < 0) & (here < 2**31 - 1), here, found)
                last = tl.maximum(last, tl.max(tl.where(mass > 0.0, start + at, 0), 0))
            else:
                number += tl.sum(kept.to(tl.int64), 0)
            running += tl.sum(mass, 0)
            equal += tl.sum(same, 0)
        total = running
    return tl.where(found < 0, last, found), number


@tile.jit
def _sample(  # type: ignore[no-untyped-def]
    logits, factors, keys, uniforms, tokens, kepts, values, places, columns, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x, values, places = logits + row * columns, values + row * columns, places + row * columns
    temperature, top_p, min_p = (
        tl.load(factors + row * 6),
        tl.load(factors + row * 6 + 1),
        tl.load(factors + row * 6 + 2),
    )
    top_k = tl.load(keys + row * 4)
    top_k = tl.where((top_k <= 0) | (top_k > columns), columns, top_k)
    best, nans = _maxima(x, columns, BLOCK)
    most = tl.max(best, 0)
    is_greedy = (temperature > 0.0) == 0
    inverse = tl.where(is_greedy, 1.0, tl.minimum(1.0 / tl.where(is_greedy, 1.0, temperature), 1e30))
    u = tl.load(uniforms + row)
    cut = most.to(tl.float64) + temperature.to(tl.float64) * tl.log(tl.maximum(min_p, 1e-38).to(tl.float64))
    cut = tl.where(min_p > 0.0, cut, float("-inf"))
    floor = tl.full([], -(2**31), tl.int64)
    if (nans > 0) | (most == float("-inf")) | (most == float("inf")):
        tl.store(tokens + row, -1)
        tl.store(kepts + row, 0)
    elif is_greedy:
        at = tl.arange(0, BLOCK)
        first = tl.full([], 2**31 - 1, tl.int32)
        for start in range(0, columns, BLOCK):
            some = tl.load(x + start + at, mask=start + at < columns, other=float("-inf")).to(tl.float32)
            first = tl.minimum(first, tl.min(tl.where(some == most, start + at, 2**31 - 1), 0))
        tl.store(tokens + row, first)
        tl.store(kepts + row, 1)
    elif (top_k < columns) | (top_p < 1.0):
        mass = tl.zeros([], tl.float64)
        least = floor
        if top_k < columns:
            least = _bound(best, top_k, BLOCK)
        else:
            at = tl.arange(0, BLOCK)
            sums = tl.zeros([BLOCK], tl.float32)
            for start in range(0, columns, BLOCK):
                some = tl.load(x + start + at, mask=start + at < columns, other=float("-inf")).to(tl.float32)
                sums += tl.exp((some - most) * inverse)
            mass = tl.sum(sums.to(tl.float64), 0)
            # What has less than its share of the rest of the mass is beyond top-p.
            share = (1.0 - top_p.to(tl.float64)) * mass / columns
            bound = (most + temperature * (tl.log(share.to(tl.float32)) - 1e-3)).to(tl.float32)
            least = _key(tl.where(top_p > 0.0, bound, most)).to(tl.int64)
        count = _gather(x, columns, least, values, places, BLOCK)
        if top_k < columns:
            _, mass = _head(values, count, most, inverse, floor, BLOCK)
        limit, ties = _filter(values, count, most, inverse, top_k, top_p, mass, BLOCK)
        place, number = _draw(values, count, most, inverse, limit, ties, cut, u, BLOCK)
        tl.store(tokens + row, tl.load(places + place))
        tl.store(kepts + row, number)
    else:
        place, number = _draw(x, columns, most, inverse, floor, floor, cut, u, BLOCK)
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
        best, _ = _maxima(x, columns, BLOCK)
        count = _gather(x, columns, _bound(best, NUM_TOP, BLOCK), values, places, BLOCK)
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
        x_SV = _penalised(logits_SV.float(), factors_S6[:, 3:], keys_S4[:, 3], history_N, starts_S1)
    values_SV = logits_SV.new_empty(rows, columns, dtype=torch.float32)
    places_SV = logits_SV.new_empty(rows, columns, dtype=torch.int32)
    options = {"BLOCK": max(128, min(4096, 1 << (columns - 1).bit_length())), "num_warps": 8}
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
    rows, listed = len(logits_SV), max(num_top, 0)
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
        inputs = (logits_SV, draws.factors_S6, draws.keys_S4, draws.history_N, draws.starts_S1, -1)
        examples.append(Example(f"{rows}x{vocab}", inputs, logits_SV.nbytes, 2.0 * logits_SV.numel()))
    return examples


OPERATOR = Operator("sample", sample_reference, fake=_empty, results=5, examples=_examples)
OPERATOR.add("cpu", forward_cpu, **native.path("sample"))
OPERATOR.add("triton", forward_triton, **tile.path())
