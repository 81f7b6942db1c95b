"""What the ranks of the tests of spread models do: importable by name, as a rank's process must."""

import torch
import torch.distributed as dist

from marrow.loader.batch import Batch
from marrow.models.config import ModelConfig
from marrow.train.config import TrainRecipe
from marrow.train.parallel.config import ParallelRecipe
from marrow.train.parallel.mesh import GROUPS, Mesh
from marrow.train.step import Trained

STEPS, T = 5, 16


def rows_of(step: int, micro: int) -> Batch:
    """One micro-batch of all ranks: ragged documents, so that ranks have unlike numbers of targets."""
    generator = torch.Generator().manual_seed(1000 * step + micro)
    rows = 4
    tokens = torch.randint(0, 50, (rows, T + 1), generator=generator)
    starts = torch.rand(rows, T, generator=generator) < 0.2
    starts[:, 0] = True
    document = starts.cumsum(1) + torch.arange(rows)[:, None] * T
    positions = torch.stack(
        [torch.arange(T) - torch.where(s, torch.arange(T), 0).cummax(0).values for s in starts]
    )
    targets = tokens[:, 1:].clone()
    targets[:, :-1][starts[:, 1:]] = -100
    targets[torch.rand(rows, T, generator=generator) < 0.2 * micro] = -100
    flat = [x.flatten() for x in (tokens[:, :-1], targets, positions, document.int())]
    return Batch(*flat, int((targets >= 0).sum()), range(rows), rows, T)


def part_of(batch: Batch, rank: int, ranks: int) -> Batch:
    rows = batch.rows // ranks
    chunk = [
        x.chunk(ranks)[rank].clone()
        for x in (batch.tokens_N, batch.targets_N, batch.positions_N, batch.document_N)
    ]
    return Batch(*chunk, int((chunk[1] >= 0).sum()), range(rows), rows, T)


def train_steps(rank: int, jobs):
    """Train each (model, recipe, parallel) for some steps, one after the other on the same ranks."""
    return [train_one(*job) for job in jobs]


def train_one(model: ModelConfig, recipe: TrainRecipe, parallel: ParallelRecipe):
    mesh = Mesh.open(parallel)
    trained = Trained.make(model, recipe, parallel, mesh)
    figures = []
    for step in range(STEPS):
        batches = [rows_of(step, micro) for micro in range(recipe.micro_batches)]
        targets = sum(batch.num_targets for batch in batches)
        mine = [part_of(batch, mesh.rank("dp", "fsdp"), mesh.size("dp", "fsdp")) for batch in batches]
        nats = trained.gradients(mine, targets)
        figures.append((nats, trained.optimiser.step(1.0)))
    found = [
        (region.name, region.shape, region.box, region.of(trained.optimiser.masters[name]).clone())
        for name in trained.optimiser.masters
        for region in trained.optimiser.held[name].regions
    ]
    return found, figures


def members(rank: int, parallel: ParallelRecipe):
    """Which ranks the sum over each group reaches."""
    mesh = Mesh.open(parallel)
    found = {}
    for axes in GROUPS:
        seen = torch.zeros(dist.get_world_size())
        seen[rank] = 1
        group = mesh.group(*axes)
        if group is not None:
            dist.all_reduce(seen, group=group)
        found[axes] = seen.nonzero().flatten().tolist()
        assert len(found[axes]) == mesh.size(*axes) and found[axes][mesh.rank(*axes)] == rank
    ends = torch.zeros(dist.get_world_size())
    ends[rank] = 1
    if mesh.ends is not None:
        dist.all_reduce(ends, group=mesh.ends)
    return found, ends.nonzero().flatten().tolist()
