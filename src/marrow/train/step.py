"""One step of a model that is spread over a mesh: gradients of all its micro-batches, then one move.

    my rows of each micro-batch -> forward, backward (or the pipeline's actions) -> sums -> optimiser

One process is the mesh of one rank: the same lines, no communication.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from marrow.core.span import span
from marrow.loader.batch import Batch
from marrow.models.config import ModelConfig
from marrow.train.config import TrainRecipe
from marrow.train.loss import Loss
from marrow.train.optimiser import Optimiser
from marrow.train.parallel.config import ParallelRecipe
from marrow.train.parallel.mesh import Mesh
from marrow.train.parallel.spread import spread
from marrow.train.pipeline import Pipeline


@dataclass(frozen=True, slots=True)
class Trained:
    """What this rank trains. stages: by their number in the pipeline, one alone where there is none."""

    mesh: Mesh
    stages: dict[int, Loss]
    optimiser: Optimiser
    dtype: torch.dtype

    @classmethod
    def make(
        cls,
        model: ModelConfig,
        recipe: TrainRecipe,
        parallel: ParallelRecipe,
        mesh: Mesh,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> "Trained":
        """Make this rank's piece with fresh weights."""
        stages = {}
        for chunk in range(parallel.stages_per_rank):
            stage = chunk * mesh.size("pp") + mesh.rank("pp")
            decoder = spread(
                model,
                mesh,
                stage=stage,
                num_stages=parallel.num_stages,
                seed=recipe.seed,
                dtype=dtype,
                device=device,
                reshard=parallel.reshard,
            )
            stages[stage] = Loss(decoder, mesh, balance=recipe.balance)
        decoders = [loss.decoder for loss in stages.values()]
        optimiser = Optimiser(*decoders, recipe=recipe, mesh=mesh, zero=parallel.zero == 1)
        return cls(mesh, stages, optimiser, dtype)

    def gradients(self, batches: Sequence[Batch], targets: int) -> float:
        """Go forward and backward through this rank's rows of each micro-batch.

        Args: targets: of the step, over all ranks and micro-batches.
        Returns: the mean nats a target over all ranks, the same number on each.
        """
        if self.mesh.size("pp") > 1:
            nats = Pipeline(self.stages, self.mesh, self.dtype).run(batches, targets, self.optimiser.collect)
        else:
            (loss,) = self.stages.values()
            nats = 0.0
            for batch in batches:
                with span("forward"):
                    computed = loss(batch)
                assert computed.loss is not None
                with span("backward"):
                    (computed.loss / max(1, targets)).backward()  # type: ignore[no-untyped-call]
                    self.optimiser.collect()
                nats += computed.nats
        if self.mesh.size(*self.mesh.sizes) > 1:
            total = torch.tensor(nats, dtype=torch.float64)
            dist.all_reduce(total)
            nats = float(total)
        return nats / max(1, targets)
