"""How rows are drawn, and what is drawn: the data of `sample`, and its random numbers.

Axes: S rows, V vocabulary, N tokens of all histories, R listed alternatives.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

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


def _signed(seed: int) -> int:
    """Return the 64 bits of a seed as int64 holds them."""
    return ((seed + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)
