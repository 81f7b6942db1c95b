"""Draw the next tokens from logits.

A token is a pure function of (its logits, the request's sampling, its seed, its position), as
`kernels/sampling/sample.py` draws it. So a request draws the same text alone, in any batch, and again
after a preemption.

Axes: S sequences that draw in this step, V vocabulary.
"""

from collections.abc import Sequence as Several
from dataclasses import dataclass

from torch import Tensor

from marrow.core.records import Sampling
from marrow.kernels.sampling import draws as kernel
from marrow.kernels.sampling.sample import sample
from marrow.serve.sequence import TokenLogprobs

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """What one row of logits is wanted for."""

    sampling: Sampling
    seed: int
    position: int


def choice_seed(seed: int, index: int) -> int:
    """Return the seed of a request's `index`-th choice; the first has the request's own."""
    return seed if index == 0 else _mix(_mix(seed & _MASK) + index)


def draw(logits_SV: Tensor, draws: Several[Draw]) -> list[int]:
    """Draw one token a row.

    Args: logits_SV: float32 [S, V]. draws: one a row.
    Returns: token ids; -1 for a row that holds a NaN or nothing but -inf.
    Cost: O(S V).
    """
    rows = [
        kernel.Draw(
            temperature=d.sampling.temperature,
            top_k=d.sampling.top_k,
            top_p=d.sampling.top_p,
            seed=d.seed,
            position=d.position,
        )
        for d in draws
    ]
    tokens: list[int] = sample(logits_SV, kernel.Draws.of(rows, logits_SV.device)).tokens_S.tolist()
    return tokens


def logprobs(logits_V: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Report a token's log-probability and the likeliest ones, before temperature and filters."""
    logprobs_V = logits_V.log_softmax(dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        values, ids = logprobs_V.topk(min(num_top, logprobs_V.shape[-1]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(token_id, float(logprobs_V[token_id]), top)


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
