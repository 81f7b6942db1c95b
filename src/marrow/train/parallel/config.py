"""`[parallel]`: over how many processes a run is spread, and how: numbers that the model knows nothing of.

world = pp x dp x cp x fsdp x tp
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from marrow.core.config import Range
from marrow.core.errors import TrainError
from marrow.models.config import ModelConfig

AtLeast1 = Annotated[int, Range(1)]
AXES = ("pp", "dp", "fsdp", "tp")  # outermost first: neighbours in tp have neighbouring ranks


@dataclass(frozen=True, slots=True)
class ParallelRecipe:
    """How many ranks share what.

    dp: copies of the model, each with rows of its own. fsdp: ranks that share the weights of one copy, each
        with rows of its own too; with dp > 1 that is HSDP. tp: ranks that share every matrix, and the tokens
        between them. pp: stages, each some of the layers.
    zero: 0 keeps the whole optimiser state in every copy; 1 shares it among the dp copies (ZeRO-1).
    reshard: fsdp frees gathered weights after the forward and gathers them again (ZeRO-3); false keeps them
        until the backward is done (ZeRO-2).
    schedule: of the pipeline; "interleaved" gives each rank `stages_per_rank` stages, for a smaller bubble.
    """

    dp: AtLeast1 = 1
    fsdp: AtLeast1 = 1
    tp: AtLeast1 = 1
    pp: AtLeast1 = 1
    zero: Annotated[int, Range(0, 1)] = 0
    reshard: bool = True
    schedule: Literal["1f1b", "interleaved"] = "1f1b"
    stages_per_rank: AtLeast1 = 1

    def __post_init__(self) -> None:
        """Refuse numbers that cannot go together whatever the model is."""
        if self.schedule == "1f1b" and self.stages_per_rank > 1:
            raise ValueError(f'stages_per_rank = {self.stages_per_rank} needs schedule = "interleaved"')
        if self.schedule == "interleaved" and (self.pp == 1 or self.stages_per_rank == 1):
            raise ValueError('schedule = "interleaved" needs pp and stages_per_rank of at least 2')

    @property
    def sizes(self) -> Mapping[str, int]:
        """The mesh's axes and their sizes, outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.pp * self.dp * self.fsdp * self.tp

    @property
    def num_stages(self) -> int:
        """Pipeline stages in all."""
        return self.pp * self.stages_per_rank


def check_fits(
    parallel: ParallelRecipe, model: ModelConfig, *, context: int, batch_rows: int, micro_batches: int
) -> None:
    """Refuse a mesh over which a model and its batches cannot be dealt out evenly.

    Raises: TrainError naming the number, what it must divide, and what would.
    """
    data_ranks = parallel.dp * parallel.fsdp
    rows = batch_rows // micro_batches
    wanted = [
        ("tp", parallel.tp, "model.num_kv_heads", model.num_kv_heads),
        ("tp", parallel.tp, "model.intermediate_size", model.intermediate_size),
        ("tp", parallel.tp, "shards.context", context),
        ("dp x fsdp", data_ranks, "train.batch_rows / train.micro_batches", rows),
    ]
    for name, number, what, size in wanted:
        if size % number:
            fits = [n for n in range(1, number + 1) if size % n == 0][-3:]
            raise TrainError(
                f"{name} = {number} does not divide {what} = {size}",
                hint=f"these would: {', '.join(map(str, fits))}",
            )
    if parallel.num_stages > model.num_layers:
        raise TrainError(
            f"{parallel.num_stages} pipeline stages, but the model has {model.num_layers} layers",
            hint=f"set parallel.pp x parallel.stages_per_rank to at most {model.num_layers}",
        )
    if parallel.stages_per_rank > 1 and micro_batches % parallel.pp:
        raise TrainError(
            f"train.micro_batches = {micro_batches} is no multiple of pp = {parallel.pp}: stages interleave",
            hint=f"set train.micro_batches = {-(-micro_batches // parallel.pp) * parallel.pp}",
        )
    if parallel.pp > 1 and micro_batches < parallel.pp:
        raise TrainError(
            f"train.micro_batches = {micro_batches} leave stages of pp = {parallel.pp} without work",
            hint=f"set train.micro_batches = {parallel.pp} or more: the bubble is (pp - 1) / micro_batches",
        )
