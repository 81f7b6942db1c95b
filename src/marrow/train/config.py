"""`[train]`: how a model is trained. What the model is stands in `[model]`, on what in `[shards]`.

All that decides the resulting weights is counted in steps and rows, never in seconds, so that a
slow machine reaches the same weights later. `dtype`, `threads` and `compile` also touch the last
bits of the weights: "auto" is decided at the first start of a run and recorded with it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from marrow.core.config import Count, Duration, Range


@dataclass(frozen=True, slots=True)
class TrainRecipe:
    """The optimiser's recipe.

    steps: optimiser steps. batch_rows: packed rows a step, all ranks together; micro_batches: in
        how many equal parts a step's rows are computed, for memory only.
    optimiser: "muon" takes the hidden matrices with `lr` and leaves embeddings and norms to AdamW
        with `adamw_lr`; "adamw" takes everything with `adamw_lr`; "sgd" everything with `lr`, without
        momentum.
    schedule: after `warmup_steps`, "linear" falls to 0 at the end; "cosine" too, along a half
        wave; "wsd" stays, then falls linearly to 0 over the last `decay_share` of the steps.
    balance: weight of the experts' load-balance loss; for a model with experts.
    weight_decay: decoupled, on matrices only. max_grad_norm: 0 never clips.
    checkpoint_every: the longest that a kill can cost; `checkpoint_every_steps` also counts steps
        (0: only time). A checkpoint is put off while checkpoints would cost over 2 % of the time.
    compile: "auto" uses torch.compile where a compiler is found and the run is long enough.
    """

    steps: Annotated[Count, Range(1)] = 1_000
    batch_rows: Annotated[int, Range(1)] = 8
    micro_batches: Annotated[int, Range(1)] = 1
    seed: Annotated[int, Range(0, 2**63 - 1)] = 1
    optimiser: Literal["muon", "adamw", "sgd"] = "muon"
    lr: Annotated[float, Range(0)] = 0.02
    adamw_lr: Annotated[float, Range(0)] = 0.004
    momentum: Annotated[float, Range(0, 1)] = 0.95
    beta1: Annotated[float, Range(0, 1)] = 0.9
    beta2: Annotated[float, Range(0, 1)] = 0.95
    weight_decay: Annotated[float, Range(0)] = 0.0
    balance: Annotated[float, Range(0)] = 0.001
    max_grad_norm: Annotated[float, Range(0)] = 1.0
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    warmup_steps: Annotated[Count, Range(0)] = 40
    decay_share: Annotated[float, Range(0, 1)] = 0.3
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Annotated[int, Range(0)] = 0
    compile: Literal["auto", "on", "off"] = "auto"
    log_every: Annotated[Count, Range(1)] = 10
    checkpoint_every: Annotated[Duration, Range(0)] = 30.0
    checkpoint_every_steps: Annotated[Count, Range(0)] = 0

    def __post_init__(self) -> None:
        if self.batch_rows % self.micro_batches:
            raise ValueError(
                f"batch_rows = {self.batch_rows} does not divide into micro_batches = {self.micro_batches}"
            )
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps} is more than steps = {self.steps}")

    @property
    def num_samples(self) -> int:
        """Packed rows that the whole run reads."""
        return self.steps * self.batch_rows
