"""Draw the next tokens from logits.

A token is a pure function of (its logits, the request's sampling, its seed, its position): one
uniform number hashed from (seed, position) goes through the inverse of the cumulative
distribution. So a request draws the same text alone, in any batch, and again after a preemption.

Axes: S sequences that draw in this step, V vocabulary.
"""

from collections.abc import Sequence as Several
from dataclasses import dataclass

import torch
from torch import Tensor

from marrow.core.records import Sampling
from marrow.serve.sequence import TokenLogprobs

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row of logits is wanted for."""

    sampling: Sampling
    seed: int
    position: int


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that depends on nothing else.

    Source: two rounds of the SplitMix64 finaliser (Steele et al. 2014).
    """
    state = _mix(seed & _MASK) ^ (position * 0x9E3779B97F4A7C15 & _MASK)
    return (_mix(state) >> 11) * 2.0**-53


def choice_seed(seed: int, index: int) -> int:
    """Return the seed of a request's `index`-th choice; the first has the request's own."""
    return seed if index == 0 else _mix(_mix(seed & _MASK) + index)


def draw(logits_SV: Tensor, draws: Several[Draw]) -> list[int]:
    """Draw one token a row.

    Args: logits_SV: float32 [S, V]. draws: one a row.
    Returns: token ids; -1 for a row that holds a NaN or nothing but -inf.
    Cost: O(S V); O(S V log V) if a row asks for top_k or top_p.
    """
    tokens_S = logits_SV.argmax(dim=-1)
    # The largest is NaN if any is (max propagates it), and infinite if nothing can be drawn.
    bad_S = ~torch.isfinite(logits_SV.amax(dim=-1))
    rows = [row for row, d in enumerate(draws) if d.sampling.temperature > 0]
    if rows:
        chosen = [draws[row] for row in rows]
        index_R = torch.tensor(rows, device=logits_SV.device)
        tokens_S[index_R] = _invert(logits_SV[index_R], chosen)
    tokens_S[bad_S] = -1
    return [int(token) for token in tokens_S.tolist()]


def logprobs(logits_V: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Report a token's log-probability and the likeliest ones, before temperature and filters."""
    logprobs_V = logits_V.log_softmax(dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        values, ids = logprobs_V.topk(min(num_top, logprobs_V.shape[-1]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token_id, float(logprobs_V[token_id]), top)


def _invert(logits_RV: Tensor, draws: Several[Draw]) -> Tensor:
    """Find the token at which each row's cumulative probability passes its uniform number."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_RV.device)[:, None]

    # float64: with 150k tokens a float32 sum would give the tail a few per cent too much or little.
    scaled_RV = logits_RV.double() / column([d.sampling.temperature for d in draws])
    probabilities_RV = scaled_RV.softmax(dim=-1)
    if any(d.sampling.top_k or d.sampling.top_p < 1 for d in draws):
        vocabulary = logits_RV.shape[-1]
        sorted_RV, order_RV = probabilities_RV.sort(dim=-1, descending=True, stable=True)
        k_R1 = column([float(d.sampling.top_k or vocabulary) for d in draws])
        rank_V = torch.arange(vocabulary, device=logits_RV.device, dtype=torch.float64)
        sorted_RV = sorted_RV.masked_fill(rank_V[None] >= k_R1, 0.0)
        sorted_RV = sorted_RV / sorted_RV.sum(dim=-1, keepdim=True)
        before_RV = sorted_RV.cumsum(dim=-1) - sorted_RV
        p_R1 = column([d.sampling.top_p for d in draws])
        # top_p 1 keeps all, whatever the rounding of the sum says; the likeliest is always kept.
        drop_RV = (before_RV >= p_R1) & (p_R1 < 1)
        drop_RV[:, 0] = False
        sorted_RV = sorted_RV.masked_fill(drop_RV, 0.0)
        probabilities_RV = torch.zeros_like(probabilities_RV).scatter(-1, order_RV, sorted_RV)
    cumulative_RV = probabilities_RV.cumsum(dim=-1)
    target_R1 = column([uniform(d.seed, d.position) for d in draws]) * cumulative_RV[:, -1:]
    # right=True: the first token whose sum is greater, so one of probability 0 is never drawn.
    tokens_R = torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0]
    last_R = (probabilities_RV > 0).long().cumsum(dim=-1).argmax(dim=-1)  # for a sum rounded down
    return torch.minimum(tokens_R, last_R)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
