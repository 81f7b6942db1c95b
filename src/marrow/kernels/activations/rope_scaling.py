"""How a model's context is stretched: the record, readable without torch.

Hugging Face's names for the same fields stand in comments where they differ. What each kind computes is in
`rope_frequencies.py`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["none", "linear", "dynamic", "llama3", "yarn"]
FAST_TURNS = {"llama3": 4.0, "yarn": 32.0}  # as Hugging Face has them


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How a model's context is stretched; not at all by default. What a kind does not name, it does not read.

    factor: of the stretch, all kinds but none. original_positions: that the model was trained for first
    (dynamic, llama3, yarn). slow_turns, fast_turns: pairs that turn less or more often than this within the
    original context are divided by the factor, or kept (llama3, yarn); 0 fast turns are the kind's usual 4 or
    32. attention_factor: multiplies cosines and sines (yarn); None follows from the factor, or from the two
    mscales where both are given. is_truncated: the passage of yarn begins and ends at whole pairs.
    """

    kind: Kind = "none"
    factor: float = 1.0
    original_positions: int = 0  # original_max_position_embeddings; dynamic: max_position_embeddings
    slow_turns: float = 1.0  # llama3: low_freq_factor; yarn: beta_slow
    fast_turns: float = 0.0  # llama3: high_freq_factor; yarn: beta_fast
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    is_truncated: bool = True  # truncate

    def __post_init__(self) -> None:
        """Refuse what no kind can compute."""
        kinds = get_args(Kind)
        if self.kind not in kinds:
            raise ValueError(f"kind = {self.kind!r}: allowed are {', '.join(kinds)}")
        if not self.fast_turns and self.kind in FAST_TURNS:
            object.__setattr__(self, "fast_turns", FAST_TURNS[self.kind])
        if not self.factor >= 1:
            raise ValueError(f"factor = {self.factor}: must be at least 1")
        if self.kind not in ("none", "linear") and self.original_positions < 1:
            raise ValueError(f"original_positions = {self.original_positions}: {self.kind} needs it")
        if self.kind in ("llama3", "yarn") and not 0 < self.slow_turns < self.fast_turns:
            raise ValueError(f"slow_turns = {self.slow_turns} must lie between 0 and {self.fast_turns}")
