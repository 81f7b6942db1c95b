"""Muon for the hidden matrices, AdamW for the rest, on fp32 master weights.

    decoder (bf16) --backward--> gradients --sums--> momentum, masters (fp32) --one cast--> decoder

A hidden matrix moves by its momentum with all singular values set to about 1, so that every direction learns,
not only the few that dominate the gradient. Fused weights are taken apart first: queries, keys and values are
matrices of their own, and so is each expert. Matrices of equal shape are orthogonalised together. Vectors,
the embedding, the head and routers take AdamW. Plain SGD is there because it hides nothing: a wrong scale of
a gradient shows.

All state lies as the weights lie: over a mesh each rank keeps what belongs to its piece
(`parallel/spread.py`). With fp32 weights the masters are the decoder's own.
Source: Jordan et al. 2024 (Muon); Loshchilov and Hutter 2019 (AdamW).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from marrow.kernels.optimisers.adamw import adamw
from marrow.kernels.optimisers.newton_schulz import newton_schulz
from marrow.models.decoder import Decoder
from marrow.models.parts import Part, Region, parts
from marrow.train.config import TrainRecipe
from marrow.train.parallel.mesh import Mesh
from marrow.train.parallel.spread import held, local
from marrow.train.parallel.sums import sum_over

EPSILON = 1e-8
ALONE = Mesh.alone()


@dataclass(frozen=True, slots=True)
class Matrix:
    """A logical matrix in the parameter `name`. region: the box of it that this rank holds; None: nothing."""

    name: str
    part: Part
    region: Region | None

    @property
    def is_tall(self) -> bool:
        """More outputs than inputs: orthogonalised transposed."""
        rows, columns = self.part.shape
        return rows > columns

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole, the short side first."""
        short, long = sorted(self.part.shape)
        return short, long

    @property
    def lr_scale(self) -> float:
        """Keep the size of the change of an output equal over shapes: sqrt(outputs / inputs), >= 1."""
        rows, columns = self.part.shape
        return math.sqrt(max(1.0, rows / columns))

    def box_of(self, whole_RC: Tensor) -> Tensor:
        """View the held box in the whole matrix, which lies the short side first."""
        assert self.region is not None
        return (whole_RC.mT if self.is_tall else whole_RC)[self.region.box]


def is_hidden(name: str, weight: Tensor) -> bool:
    """Whether a parameter consists of matrices inside the layers that Muon moves."""
    return name.startswith("layers.") and weight.ndim >= 2 and not name.endswith("router_EC")


class Optimiser:
    """Owns the master weights and the optimiser state of a decoder's piece, of all stages that this rank has;
    their weights are written by `step`.

    zero: each of the dp copies keeps masters and moments of a share of the parameters, moves those, and sends
    the others what it moved (ZeRO-1, Rajbhandari et al. 2020).

    Use: for each micro-batch, backward then `collect`; then one `step`.
    """

    def __init__(self, *stages: Decoder, recipe: TrainRecipe, mesh: Mesh = ALONE, zero: bool = False) -> None:
        self.recipe, self.config, self.mesh = recipe, stages[0].config, mesh
        self.step_count = 0
        self.held = {piece.name: piece for stage in stages for piece in held(stage, mesh)}
        self.weights = {name: piece.local for name, piece in self.held.items()}
        self.owner = self._owners() if zero else {}
        mine = [name for name in self.weights if self.owner.get(name, mesh.rank("dp")) == mesh.rank("dp")]
        self.masters = {name: self.weights[name].float() for name in mine}
        self.gradients: dict[str, Tensor] = {}
        hidden = [name for name in mine if is_hidden(name, self.weights[name])]
        muon = hidden if recipe.optimiser == "muon" else []
        adamw_names = [] if recipe.optimiser == "sgd" else [name for name in mine if name not in muon]
        self.momentum = {name: torch.zeros_like(self.masters[name]) for name in muon}
        self.mean = {name: torch.zeros_like(self.masters[name]) for name in adamw_names}
        self.square = {name: torch.zeros_like(self.masters[name]) for name in adamw_names}
        self.groups: dict[tuple[int, int], list[Matrix]] = {}
        for matrix in self._matrices():
            self.groups.setdefault(matrix.shape, []).append(matrix)

    def _matrices(self) -> Iterator[Matrix]:
        """Yield those that Muon moves: all of the layers here, on each rank of them in the same order."""
        for name in self.momentum:
            boxes = {region.name: region for region in self.held[name].regions}
            for part in parts(name, self.config):
                yield Matrix(name, part, boxes.get(part.name))

    def collect(self) -> None:
        """Take the gradients of one micro-batch, adding to those taken since the last step.

        Several micro-batches are added in fp32; one alone is taken as it is.
        """
        for name, piece in self.held.items():
            if piece.parameter.grad is None:  # of another stage
                continue
            gradient = local(piece.parameter.grad)
            if name in self.gradients:
                self.gradients[name] = self.gradients[name].float().add_(gradient)
            else:
                self.gradients[name] = gradient
            piece.parameter.grad = None

    @torch.no_grad()
    def step(self, lr_factor: float) -> float:
        """Move the weights by the collected gradients and forget those.

        Args: lr_factor: of the schedule, multiplies both learning rates.
        Returns: the norm of the whole model's gradients before clipping. If it is not finite nothing was
            moved.
        """
        assert self.gradients.keys() == self.held.keys(), "a parameter that has no part in the loss"
        self._sum_gradients()
        norm = self._norm()
        if norm - norm != 0.0:  # inf and nan
            return norm
        limit = self.recipe.max_grad_norm
        scale = min(1.0, limit / norm) if limit and norm else 1.0
        self.step_count += 1
        if self.recipe.optimiser == "sgd":
            self._step_sgd(self.recipe.lr * lr_factor, scale)
        self._step_muon(self.recipe.lr * lr_factor, scale)
        self._step_adamw(self.recipe.adamw_lr * lr_factor, scale)
        for name, master in self.masters.items():
            if self.weights[name].dtype != torch.float32 and name not in self.mean:
                self.weights[name].copy_(master)
        self._share_weights()
        self.gradients.clear()
        return norm

    def _owners(self) -> dict[str, int]:
        """Deal the parameters out to the copies, the largest first, each to who has least so far.

        By their whole sizes, so that all ranks of a copy agree, however unlike their shards are.
        """
        loads = [0] * self.mesh.size("dp")
        owner = {}
        for piece in sorted(self.held.values(), key=lambda piece: -piece.parameter.numel()):
            owner[piece.name] = loads.index(min(loads))
            loads[owner[piece.name]] += piece.parameter.numel()
        return owner

    def _share_weights(self) -> None:
        """Give each parameter from the copy that moved it to the others."""
        group = self.mesh.group("dp")
        if not self.owner or group is None:
            return
        waiting = [
            dist.broadcast(self.weights[name], dist.get_global_rank(group, copy), group=group, async_op=True)
            for name, copy in self.owner.items()
        ]
        for work in waiting:
            work.wait()

    def _sum_gradients(self) -> None:
        """Sum over the ranks that hold the same weights and saw other tokens."""
        mesh = self.mesh
        if mesh.size("tp") > 1:
            whole = [name for name, piece in self.held.items() if not piece.is_cut]
            self._widen(whole)
            sum_over([self.gradients[name] for name in whole], mesh.group("tp"))
        tied = self._tied()
        self._widen(tied)
        sum_over([self.gradients[name] for name in tied], mesh.ends)
        if mesh.size("dp") > 1 and mesh.size("fsdp") == 1:  # FSDP sums over copies itself
            self._widen(list(self.gradients))
            sum_over(list(self.gradients.values()), mesh.group("dp"))

    def _tied(self) -> list[str]:
        """Name what the first and the last stage both hold."""
        return ["embedding_VC"] if self.mesh.ends is not None and self.config.tie_embeddings else []

    def _widen(self, names: list[str]) -> None:
        for name in names:
            self.gradients[name] = self.gradients[name].float()

    def _norm(self) -> float:
        """Return the norm over all ranks: whoever has it knows that all ranks have all sums."""
        mesh = self.mesh
        norms = torch.stack([_norm(self.gradients[name]) for name in self.held]).double()
        if mesh.size(*mesh.sizes) == 1:
            return float(norms.norm())
        tied = self._tied()
        times = [
            (1.0 if piece.is_cut else 1.0 / mesh.size("tp")) / (2.0 if name in tied else 1.0)
            for name, piece in self.held.items()
        ]
        total = (norms.square() * torch.tensor(times, dtype=torch.float64, device=norms.device)).sum()
        dist.all_reduce(total)
        return math.sqrt(float(total) / mesh.size("dp"))

    def _step_sgd(self, lr: float, scale: float) -> None:
        for name, master in self.masters.items():
            master.add_(self.gradients[name], alpha=-lr * scale)

    def _step_muon(self, lr: float, scale: float) -> None:
        beta = self.recipe.momentum
        ahead = {}
        for name, momentum in self.momentum.items():
            gradient = self.gradients[name]
            momentum.mul_(beta).add_(gradient, alpha=(1 - beta) * scale)
            # Nesterov: the direction looks one gradient ahead.
            ahead[name] = momentum.mul(beta).add_(gradient, alpha=(1 - beta) * scale)
        for group in self.groups.values():
            self._orthogonalise(group, ahead, lr)

    def _orthogonalise(self, group: list[Matrix], ahead: Mapping[str, Tensor], lr: float) -> None:
        """Move the matrices of one shape.

        Where a rank holds boxes only, the sum over all who hold some puts the wholes together: each number
        has one holder, the others add zero.
        """
        dtype = self.weights[group[0].name].dtype
        like = self.masters[group[0].name]
        plane = self.mesh.group("fsdp", "tp")
        whole_MRC = like.new_zeros(len(group), *group[0].shape, dtype=dtype)
        for matrix, whole_RC in zip(group, whole_MRC, strict=True):
            if matrix.region is not None:
                matrix.box_of(whole_RC).copy_(matrix.region.of(ahead[matrix.name]))
        sum_over([whole_MRC], plane)
        direction_MRC = newton_schulz(whole_MRC).float()
        for matrix, direction_RC in zip(group, direction_MRC, strict=True):
            if matrix.region is not None:
                master = matrix.region.of(self.masters[matrix.name])
                if self.recipe.weight_decay:
                    master.mul_(1 - lr * self.recipe.weight_decay)
                master.add_(matrix.box_of(direction_RC), alpha=-lr * matrix.lr_scale)

    def _step_adamw(self, lr: float, scale: float) -> None:
        for decay in (True, False):  # vectors do not decay
            names = [name for name in self.mean if (self.masters[name].ndim >= 2) is decay]
            narrow = [self.weights[name] for name in names if self.weights[name].dtype != torch.float32]
            adamw(
                [self.masters[name] for name in names],
                [self.gradients[name] for name in names],
                [self.mean[name] for name in names],
                [self.square[name] for name in names],
                lr=lr,
                step=self.step_count,
                betas=(self.recipe.beta1, self.recipe.beta2),
                eps=EPSILON,
                weight_decay=self.recipe.weight_decay if decay else 0.0,
                scale=scale,
                copies=narrow,
            )

    def state(self) -> dict[str, Tensor]:
        """Return masters and moments by name: views, all fp32. With `step_count` they are all there is."""
        kinds = {"master": self.masters, "momentum": self.momentum, "mean": self.mean, "square": self.square}
        return {
            f"{kind}.{region.name}": region.of(tensor)
            for kind, tensors in kinds.items()
            for name, tensor in tensors.items()
            for region in self.held[name].regions
        }

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], step_count: int) -> None:
        """Take over what `state` returned, and write the decoder's weights from the masters."""
        own = self.state()
        assert own.keys() == tensors.keys(), "a checkpoint of another model or optimiser"
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        for name, master in self.masters.items():
            self.weights[name].copy_(master)
        self._share_weights()
        self.step_count = step_count


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float32)
    return norm
