"""How rows are drawn, and what is drawn: data, random numbers, and the filters in plain torch.

The oracle of `sample` and `verify_draft` sorts, in fp64. What is meant by the filters: `sample`.

Axes: S rows, V vocabulary, N tokens of all histories, R listed alternatives.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from marrow.core.errors import UsageError

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True, slots=True)
class Draw:
    """How one row is drawn. top_k 0, top_p 1, min_p 0, repetition 1, presence 0 and frequency 0 do nothing.

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

    def check(self, logits_SV: Tensor) -> None:
        """Refuse logits that are not a row for each draw: C would read behind their end.

        Raises: UsageError.
        """
        if logits_SV.ndim != 2 or logits_SV.shape[0] != self.keys_S4.shape[0]:
            raise UsageError(
                f"logits {list(logits_SV.shape)} for {len(self.keys_S4)} draws",
                hint="give [S, V], a row a draw",
            )


class Sampled(NamedTuple):
    """What was drawn.

    tokens_S: int64, -1 where nothing could be. kept_S: int64, among how many tokens. log_probs_S, fp32: the
    token's by the plain softmax, before penalties, temperature and filters; top_tokens_SR, top_log_probs_SR:
    the likeliest by it. All three empty where they were not asked for.
    """

    tokens_S: Tensor
    kept_S: Tensor
    log_probs_S: Tensor
    top_tokens_SR: Tensor
    top_log_probs_SR: Tensor


def uniform(seed_S: Tensor, position_S: Tensor) -> Tensor:
    """Return fp64 numbers in [0, 1) that depend on nothing else.

    Source: two rounds of the SplitMix64 finaliser (Steele et al. 2014).
    """
    state_S = mixed(seed_S) ^ (position_S * _GOLDEN)
    return shifted(mixed(state_S), 11).double() * 2.0**-53


def mixed(value: Tensor) -> Tensor:
    """Return the SplitMix64 finaliser of int64 numbers."""
    value = value + _GOLDEN
    value = (value ^ shifted(value, 30)) * _FIRST
    value = (value ^ shifted(value, 27)) * _SECOND
    return value ^ shifted(value, 31)


def shifted(value: Tensor, by: int) -> Tensor:
    """Shift to the right as an unsigned number."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def collect_reference(
    logits_SV: Tensor, factors_S6: Tensor, keys_S4: Tensor, history_N: Tensor, starts_S1: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what each token weighs in the draw, fp64, -1 where it is dropped; and which rows are bad."""
    temperature_S1, top_p_S1, min_p_S1 = factors_S6.double()[:, :3, None].unbind(1)
    x_SV = penalised(logits_SV.double(), factors_S6.double()[:, 3:], keys_S4[:, 3], history_N, starts_S1)
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


def penalised(
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


def _signed(seed: int) -> int:
    """Return the 64 bits of a seed as int64 holds them."""
    return ((seed + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)
