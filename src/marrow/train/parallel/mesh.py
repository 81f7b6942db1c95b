"""The mesh of ranks: where this process stands, and the groups that it talks to.

    rank = (((pp) dp) fsdp) tp        row-major, tp innermost

A group is named by the axes along which its ranks differ: `mesh.group("dp")` are the ranks that hold
the same weights. One process alone is a mesh too, with no groups and no torch.distributed.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.distributed as dist

from marrow.core.errors import TrainError
from marrow.train.parallel.config import AXES, ParallelRecipe

Axes = tuple[str, ...]
# Every set of axes that something sums, gathers or sends along.
GROUPS: tuple[Axes, ...] = (
    ("tp",),
    ("fsdp",),
    ("pp",),
    ("dp",),
    ("fsdp", "tp"),
)


@dataclass(frozen=True, slots=True)
class Mesh:
    """Where a rank stands.

    sizes, place: by axis. groups: the rank's own; sets of axes of one rank have none. ends: the first and the
    last rank along pp, which both hold a tied embedding; None on others.
    """

    sizes: Mapping[str, int]
    place: Mapping[str, int]
    groups: Mapping[Axes, dist.ProcessGroup]
    ends: dist.ProcessGroup | None = None

    @classmethod
    def alone(cls) -> "Mesh":
        """Return the mesh of a single process."""
        return cls(dict.fromkeys(AXES, 1), dict.fromkeys(AXES, 0), {})

    @classmethod
    def open(cls, parallel: ParallelRecipe) -> "Mesh":
        """Form the groups. Every rank of the default process group calls this, in step.

        Raises: TrainError if the recipe's numbers do not make up the world.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        if parallel.world != world:
            numbers = " x ".join(f"{axis} {size}" for axis, size in parallel.sizes.items() if size > 1) or "1"
            raise TrainError(
                f"the recipe's mesh is {numbers} = {parallel.world} ranks, the job has {world}",
                hint=f"start {parallel.world} processes, or change [parallel] so that its product is {world}",
            )
        if world == 1:
            return cls.alone()
        rank, groups = dist.get_rank(), {}
        for axes in GROUPS:
            for ranks in group_ranks(parallel.sizes, axes):
                if len(ranks) == 1:
                    continue
                group = dist.new_group(ranks)
                if rank in ranks:
                    groups[axes] = group
        ends = None
        if parallel.pp > 1:
            for ranks in group_ranks(parallel.sizes, ("pp",)):
                group = dist.new_group([ranks[0], ranks[-1]])
                ends = group if rank in (ranks[0], ranks[-1]) else ends
        return cls(dict(parallel.sizes), place_of(rank, parallel.sizes), groups, ends)

    def size(self, *axes: str) -> int:
        """Return how many ranks differ along these axes."""
        return math.prod(self.sizes[axis] for axis in axes)

    def rank(self, *axes: str) -> int:
        """Return this rank's number among those that differ along these axes."""
        number = 0
        for axis in _ordered(axes):
            number = number * self.sizes[axis] + self.place[axis]
        return number

    def group(self, *axes: str) -> dist.ProcessGroup | None:
        """Return the group along these axes, None where it would be this rank alone."""
        return self.groups.get(_ordered(axes))

    def device_mesh(self, device: str) -> Any:
        """Return the `DeviceMesh` that FSDP shards over: (copies,) shards."""
        from torch.distributed.device_mesh import DeviceMesh  # loaded by who shards alone

        shard, copies = self.group("fsdp"), self.group("dp")
        assert shard is not None, "no fsdp axis"
        if copies is None:
            return DeviceMesh.from_group(shard, device, mesh_dim_names=("fsdp",))
        ranks = [
            [
                rank_of(dict(self.place) | {"dp": copy, "fsdp": piece}, self.sizes)
                for piece in range(self.size("fsdp"))
            ]
            for copy in range(self.size("dp"))
        ]
        return DeviceMesh.from_group(
            [copies, shard], device, mesh=torch.tensor(ranks), mesh_dim_names=("copies", "fsdp")
        )


def rank_of(place: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Return the rank at a place."""
    rank = 0
    for axis in AXES:
        rank = rank * sizes[axis] + place[axis]
    return rank


def place_of(rank: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return a rank's number along each axis."""
    place = {}
    for axis in reversed(AXES):
        rank, place[axis] = divmod(rank, sizes[axis])
    return {axis: place[axis] for axis in AXES}


def group_ranks(sizes: Mapping[str, int], axes: Iterable[str]) -> Iterator[list[int]]:
    """Yield the ranks of every group whose members differ along `axes` alone, each in order."""
    inner = _ordered(tuple(axes))
    outer = tuple(axis for axis in AXES if axis not in inner)
    for fixed in product(*(range(sizes[axis]) for axis in outer)):
        yield [
            rank_of(dict(zip(outer + inner, fixed + moving, strict=True)), sizes)
            for moving in product(*(range(sizes[axis]) for axis in inner))
        ]


def _ordered(axes: Axes) -> Axes:
    return tuple(axis for axis in AXES if axis in axes)
