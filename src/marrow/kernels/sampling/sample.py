"""Draw the next tokens from logits: penalties, temperature, top-k, top-p, min-p, in this order, and no sort.

    x      the logits, less what a token's earlier use costs (repetition, then frequency and presence)
    p      softmax(x / temperature)
    top-k  keeps the first k in the order (x downwards, token upwards): of equals, the first
    top-p  keeps the shortest head of that order whose mass is at least top_p of what top-k kept; at least one
    min-p  keeps x >= max(x) + temperature log(min_p), that is p >= min_p max(p)

A token is a pure function of its row: one uniform number hashed from (seed, position) goes through the inverse
of the cumulative distribution of what is kept, in the order of the vocabulary. So a row draws the same alone
and in any batch. Temperature 0 takes the largest x, the first of equals. A row that holds a NaN or +inf, or
nothing but -inf, gives -1.

All that filters keep is above a threshold, or among the first few that equal it: thresholds are found by bounds
and bits, never by sorting (as in FlashInfer, Ye et al. 2025).

Axes: S rows, V vocabulary, N tokens of all histories, R listed alternatives.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from marrow.kernels import native
from marrow.kernels.dispatch import Example, Operator

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)
_PAD = 16  # numbers of a vector


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is drawn. top_k 0, top_p 1 and min_p 0 keep all; repetition 1 and the others 0 cost nothing.

    seed: any 64-bit integer. history: earlier tokens, of which the last `num_drawn` are not of the prompt:
    repetition counts all of them, presence and frequency those. As vLLM and OpenAI define them.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    history: tuple[int, ...] = ()
    num_drawn: int = 0


@dataclass(frozen=True, slots=True)
class Draws:
    """The draws of all rows, as tensors on the device of the logits.

    factors_S6: fp32: temperature, top_p, min_p, repetition, presence, frequency. keys_S4: int64: top_k, seed,
    position, num_drawn. history_N: int64, row after row; starts_S1: int64 [S + 1], where each row's begins.
    """

    factors_S6: Tensor
    keys_S4: Tensor
    history_N: Tensor
    starts_S1: Tensor

    @classmethod
    def of(cls, draws: list[Draw], device: torch.device | str = "cpu") -> "Draws":
        """Pack the draws of the rows."""
        factors = [(d.temperature, d.top_p, d.min_p, d.repetition, d.presence, d.frequency) for d in draws]
        keys = [(d.top_k, _signed(d.seed), d.position, d.num_drawn) for d in draws]
        starts = [0]
        for d in draws:
            starts.append(starts[-1] + len(d.history))
        return cls(
            torch.tensor(factors, dtype=torch.float32).view(-1, 6).to(device),
            torch.tensor(keys, dtype=torch.int64).view(-1, 4).to(device),
            torch.tensor([token for d in draws for token in d.history], dtype=torch.int64).to(device),
            torch.tensor(starts, dtype=torch.int64).to(device),
        )


class Sampled(NamedTuple):
    """What was drawn.

    tokens_S: int64, -1 where nothing could be. kept_S: int64, among how many tokens. log_probs_S, fp32: of the
    token by the plain softmax, before penalties, temperature and filters; top_tokens_SR, top_log_probs_SR:
    the likeliest by it. All three empty where they were not asked for.
    """

    tokens_S: Tensor
    kept_S: Tensor
    log_probs_S: Tensor
    top_tokens_SR: Tensor
    top_log_probs_SR: Tensor


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
    exact_SV = logits_SV.double()
    temperature_S1, top_p_S1, min_p_S1 = factors_S6.double()[:, :3, None].unbind(1)
    x_SV = _penalised(exact_SV, factors_S6.double()[:, 3:], keys_S4[:, 3], history_N, starts_S1)
    vocab, rank_V = logits_SV.shape[1], torch.arange(logits_SV.shape[1], device=logits_SV.device)
    sorted_SV, order_SV = x_SV.sort(dim=-1, descending=True, stable=True)
    best_S1 = sorted_SV[:, :1]
    is_bad_S1 = ~best_S1.isfinite() | x_SV.isnan().any(-1, keepdim=True)
    is_greedy_S1 = ~(temperature_S1 > 0)
    divisor_S1 = temperature_S1.masked_fill(is_greedy_S1, 1.0)
    masses_SV = torch.exp((sorted_SV - best_S1) / divisor_S1)
    top_k_S1 = keys_S4[:, :1].masked_fill(keys_S4[:, :1] <= 0, vocab)
    keep_SV = rank_V < top_k_S1
    masses_SV = masses_SV * keep_SV
    before_SV = masses_SV.cumsum(-1) - masses_SV
    keep_SV &= (before_SV < top_p_S1 * masses_SV.sum(-1, keepdim=True)) | (top_p_S1 >= 1) | (rank_V == 0)
    is_near_SV = sorted_SV >= best_S1 + temperature_S1 * min_p_S1.log()
    keep_SV &= is_near_SV | (min_p_S1 <= 0) | (sorted_SV == best_S1)
    keep_SV &= ~is_greedy_S1 | (rank_V == 0)
    kept_S = keep_SV.sum(-1).masked_fill(is_bad_S1[:, 0], 0)
    # Back to the order of the vocabulary, in which the cumulative distribution runs.
    masses_SV = torch.zeros_like(masses_SV).scatter(-1, order_SV, (masses_SV * keep_SV).nan_to_num(0.0))
    sums_SV = masses_SV.cumsum(-1)
    target_S1 = uniform(keys_S4[:, 1], keys_S4[:, 2])[:, None] * sums_SV[:, -1:]
    tokens_S = (sums_SV > target_S1).long().argmax(-1)
    last_S = (masses_SV > 0).long().cumsum(-1).argmax(-1)  # for a sum that was rounded down
    tokens_S = torch.where(sums_SV[:, -1] > target_S1[:, 0], tokens_S, last_S).masked_fill(
        is_bad_S1[:, 0], -1
    )
    if num_top < 0:
        nothing_S, nothing_SR = logits_SV.new_empty(0, dtype=torch.float32), (len(logits_SV), 0)
        return tokens_S, kept_S, nothing_S, tokens_S.new_empty(nothing_SR), nothing_S.new_empty(nothing_SR)
    log_SV = exact_SV.log_softmax(-1).masked_fill(is_bad_S1, float("nan"))
    log_probs_S = log_SV.gather(1, tokens_S.clamp(min=0)[:, None])[:, 0].float()
    top_tokens_SR = exact_SV.sort(dim=-1, descending=True, stable=True).indices[:, :num_top]
    top_log_probs_SR = log_SV.gather(1, top_tokens_SR).float()
    return tokens_S, kept_S, log_probs_S, top_tokens_SR.masked_fill(is_bad_S1, -1), top_log_probs_SR


def uniform(seed_S: Tensor, position_S: Tensor) -> Tensor:
    """Return fp64 numbers in [0, 1) that depend on nothing else.

    Source: two rounds of the SplitMix64 finaliser (Steele et al. 2014).
    """
    state_S = _mix(seed_S) ^ (position_S * _GOLDEN)
    return _shifted(_mix(state_S), 11).double() * 2.0**-53


def _mix(value: Tensor) -> Tensor:
    value = value + _GOLDEN
    value = (value ^ _shifted(value, 30)) * _FIRST
    value = (value ^ _shifted(value, 27)) * _SECOND
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, by: int) -> Tensor:
    """Shift to the right as an unsigned number."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def _signed(seed: int) -> int:
    """Return the 64 bits of a seed as int64 holds them."""
    return ((seed + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def _penalised(
    x_SV: Tensor, factors_S3: Tensor, num_drawn_S: Tensor, history_N: Tensor, starts_S1: Tensor
) -> Tensor:
    """Take from each row's logits what the tokens of its history cost."""
    lengths_S = starts_S1.diff()
    row_N = torch.repeat_interleave(torch.arange(len(x_SV), device=x_SV.device), lengths_S)
    is_drawn_N = torch.arange(len(history_N), device=x_SV.device) >= (starts_S1[1:] - num_drawn_S)[row_N]
    counts_SV = torch.zeros_like(x_SV)
    seen_SV = counts_SV.index_put((row_N, history_N), torch.ones_like(history_N, dtype=x_SV.dtype))
    counts_SV = counts_SV.index_put((row_N, history_N), is_drawn_N.to(x_SV.dtype), accumulate=True)
    repetition_S1, presence_S1, frequency_S1 = factors_S3[:, :, None].unbind(1)
    repeated_SV = torch.where(x_SV > 0, x_SV / repetition_S1, x_SV * repetition_S1)
    x_SV = torch.where(seen_SV > 0, repeated_SV, x_SV)
    return x_SV - counts_SV * frequency_S1 - (counts_SV > 0) * presence_S1


def forward_cpu(
    logits_SV: Tensor, factors_S6: Tensor, keys_S4: Tensor, history_N: Tensor, starts_S1: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows in C, shared among torch's threads."""
    logits_SV, (rows, columns) = logits_SV.contiguous(), logits_SV.shape
    out = _empty(logits_SV, factors_S6, keys_S4, history_N, starts_S1, num_top)
    tokens_S, kept_S, log_probs_S, top_tokens_SR, top_log_probs_SR = out
    threads = max(1, min(rows, torch.get_num_threads()))
    stride = (columns + 2 * _PAD) // _PAD * _PAD
    memory = torch.empty(threads, 6, stride, dtype=torch.float32)
    counts = torch.zeros(threads, columns if len(history_N) else 0, dtype=torch.int32)
    given = (factors_S6.contiguous(), keys_S4.contiguous(), history_N.contiguous(), starts_S1.contiguous())
    native.function("sample", "sample", "p" * 12 + "llllii")(
        *native.pointers(logits_SV, *given, tokens_S, log_probs_S, kept_S, top_tokens_SR, top_log_probs_SR),
        *native.pointers(memory, counts),
        *(rows, columns, num_top, stride, threads, native.type_of(logits_SV)),
    )
    return out


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
