"""One sequence of tokens on its way through the engine.

    waiting --admitted--> running --stop, length, abort, error--> finished
       ^                     |
       '----- preempted -----'      its blocks are freed; what it had computed is computed again

`tokens` holds the prompt and all that was drawn; the keys and values of the first `num_computed`
of them lie in `blocks`. Decoding is the case in which a single token is not computed yet.
`ledger` charges each second since the arrival to exactly one stage, so the stages add up to the
time the sequence took.
"""

from dataclasses import dataclass, field
from typing import Literal

from marrow.core.records import FinishReason, Sampling

Stage = Literal["queue", "prefill", "decode", "preempted"]
Status = Literal["waiting", "running", "finished"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of one token of the text, and of the likeliest tokens in its place.

    `logprob` is None for the first token of a prompt, which nothing predicts.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One completion that is asked for.

    prompt: token ids. num_logprobs: likeliest tokens to report at each position; None reports
    nothing. prompt_logprobs: report the prompt's tokens too (they are then computed, not shared).
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    num_logprobs: int | None = None
    prompt_logprobs: bool = False


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's prompt, what was drawn so far, and where its keys and values are.

    Args: id: grows with the arrival; a lower one is never preempted for a higher one.
        arrived_s, deadline_s: on `time.perf_counter()`'s clock.
    """

    id: int
    request: Request
    seed: int
    arrived_s: float
    deadline_s: float = float("inf")
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_shared: int = 0  # prompt tokens that the prefix cache had at the first admission
    num_scored: int = 0  # prompt tokens whose log-probabilities were reported
    num_preemptions: int = 0
    blocks: list[int] = field(default_factory=list)
    chain: list[bytes] = field(default_factory=list)  # digests of the full blocks; see blocks.py
    status: Status = "waiting"
    finish_reason: FinishReason | None = None
    ledger: dict[str, float] = field(default_factory=dict)
    stage: Stage | None = "queue"
    stage_since_s: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.stage_since_s = self.arrived_s

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def num_drawn(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_missing(self) -> int:
        """Tokens whose keys and values are not computed yet; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether the next step gives this sequence its next token from one computed token."""
        return self.num_drawn > 0 and self.num_missing == 1

    def enter(self, stage: Stage | None, now_s: float) -> None:
        """Charge the time since the last change to the stage that ends, and begin another."""
        if self.stage is not None and stage != self.stage:
            self.ledger[self.stage] = self.ledger.get(self.stage, 0.0) + now_s - self.stage_since_s
            self.stage, self.stage_since_s = stage, now_s
