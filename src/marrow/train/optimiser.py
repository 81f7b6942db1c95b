"""Muon for the hidden matrices, AdamW for the rest, on fp32 master weights.

    decoder (bf16) --backward--> gradients --> momentum, masters (fp32) --one cast--> decoder

A hidden matrix moves by its momentum with all singular values set to about 1, so that every
direction learns, not only the few that dominate the gradient. Fused weights are taken apart
first: queries, keys and values are matrices of their own. Matrices of equal shape are
orthogonalised together. Vectors, the embedding and the head take AdamW.

With fp32 weights the masters are the decoder's own.
Source: Jordan et al. 2024 (Muon); Loshchilov and Hutter 2019 (AdamW).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from marrow.kernels.optimisers.adamw import adamw
from marrow.kernels.optimisers.newton_schulz import newton_schulz
from marrow.models.config import ModelConfig
from marrow.models.decoder import Decoder
from marrow.train.config import TrainRecipe

EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows [low, high) of the parameter `name`: one logical matrix, wide or tall."""

    name: str
    low: int
    high: int
    columns: int

    @property
    def is_tall(self) -> bool:
        """More outputs than inputs: held transposed in its group."""
        return self.high - self.low > self.columns

    @property
    def lr_scale(self) -> float:
        """Keep the size of the change of an output equal over shapes: sqrt(outputs / inputs), >= 1."""
        return math.sqrt(max(1.0, (self.high - self.low) / self.columns))

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """View this matrix, the short side first."""
        view = tensors[self.name][self.low : self.high]
        return view.mT if self.is_tall else view


def hidden_matrices(decoder: Decoder) -> list[Matrix]:
    """List the logical matrices inside the layers, in the order of the parameters."""
    found = []
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 2 and name.startswith("layers."):
            low = 0
            for rows in _logical_rows(name, parameter.shape[0], decoder.config):
                found.append(Matrix(name, low, low + rows, parameter.shape[1]))
                low += rows
    return found


def _logical_rows(name: str, rows: int, config: ModelConfig) -> list[int]:
    if name.endswith("qkv_YC"):
        keys = config.num_kv_heads * config.head_size
        return [config.num_heads * config.head_size, keys, keys]
    if name.endswith("gate_up_GC"):
        return [config.intermediate_size] * 2
    return [rows]


class Optimiser:
    """Owns the master weights and the optimiser state of one decoder; `decoder` is written by `step`.

    Use: for each micro-batch, backward then `collect`; then one `step`.
    """

    def __init__(self, decoder: Decoder, recipe: TrainRecipe) -> None:
        self.recipe = recipe
        self.step_count = 0
        self.weights = dict(decoder.named_parameters())
        self.masters = {name: weight.detach().float() for name, weight in self.weights.items()}
        self.gradients: dict[str, Tensor] = {}
        matrices = hidden_matrices(decoder) if recipe.optimiser == "muon" else []
        self.groups: dict[tuple[int, int], list[Matrix]] = {}
        for matrix in matrices:
            rows, columns = matrix.of(self.masters).shape
            self.groups.setdefault((rows, columns), []).append(matrix)
        self.momentum = {
            shape: torch.zeros(len(group), *shape, device=decoder.embedding_VC.device)
            for shape, group in self.groups.items()
        }
        by_muon = {matrix.name for matrix in matrices}
        self.adamw_names = [name for name in self.masters if name not in by_muon]
        self.mean = {name: torch.zeros_like(self.masters[name]) for name in self.adamw_names}
        self.square = {name: torch.zeros_like(self.masters[name]) for name in self.adamw_names}

    def collect(self) -> None:
        """Take the gradients of one micro-batch, adding to those taken since the last step.

        Several micro-batches are added in fp32; one alone is taken as it is.
        """
        for name, weight in self.weights.items():
            assert weight.grad is not None, name
            if name in self.gradients:
                self.gradients[name] = self.gradients[name].float().add_(weight.grad)
            else:
                self.gradients[name] = weight.grad
            weight.grad = None

    @torch.no_grad()
    def step(self, lr_factor: float) -> float:
        """Move the weights by the collected gradients and forget those.

        Args: lr_factor: of the schedule, multiplies both learning rates.
        Returns: the gradients' norm before clipping. If it is not finite nothing was moved.
        """
        norm = float(torch.stack([_norm(gradient) for gradient in self.gradients.values()]).norm())
        if norm - norm != 0.0:  # inf and nan
            return norm
        limit = self.recipe.max_grad_norm
        scale = min(1.0, limit / norm) if limit and norm else 1.0
        self.step_count += 1
        self._step_muon(self.recipe.lr * lr_factor, scale)
        self._step_adamw(self.recipe.adamw_lr * lr_factor, scale)
        for name, weight in self.weights.items():
            if weight.dtype != torch.float32 and name not in self.mean:
                weight.copy_(self.masters[name])
        self.gradients.clear()
        return norm

    def _step_muon(self, lr: float, scale: float) -> None:
        beta = self.recipe.momentum
        for shape, group in self.groups.items():
            gradient_MRC = torch.stack([matrix.of(self.gradients) for matrix in group])
            momentum_MRC = self.momentum[shape]
            momentum_MRC.mul_(beta).add_(gradient_MRC, alpha=(1 - beta) * scale)
            # Nesterov: the direction looks one gradient ahead.
            ahead_MRC = momentum_MRC.mul(beta).add_(gradient_MRC, alpha=(1 - beta) * scale)
            direction_MRC = newton_schulz(ahead_MRC.to(self.weights[group[0].name].dtype)).float()
            for matrix, direction_RC in zip(group, direction_MRC, strict=True):
                master_RC = matrix.of(self.masters)
                if self.recipe.weight_decay:
                    master_RC.mul_(1 - lr * self.recipe.weight_decay)
                master_RC.add_(direction_RC, alpha=-lr * matrix.lr_scale)

    def _step_adamw(self, lr: float, scale: float) -> None:
        for decay in (True, False):  # vectors do not decay
            names = [name for name in self.adamw_names if (self.masters[name].ndim == 2) is decay]
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
        tensors = {f"master.{name}": tensor for name, tensor in self.masters.items()}
        tensors |= {f"momentum.{rows}x{columns}": m for (rows, columns), m in self.momentum.items()}
        tensors |= {f"mean.{name}": tensor for name, tensor in self.mean.items()}
        return tensors | {f"square.{name}": tensor for name, tensor in self.square.items()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], step_count: int) -> None:
        """Take over what `state` returned, and write the decoder's weights from the masters."""
        own = self.state()
        assert own.keys() == tensors.keys(), "a checkpoint of another model or optimiser"
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        for name, weight in self.weights.items():
            weight.copy_(self.masters[name])
        self.step_count = step_count


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float32)
    return norm
