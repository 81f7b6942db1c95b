"""Tensor parallelism with sequence parallelism: a layer's matrices in shares, and its tokens too.

    tokens N/tp --norm--> gather N --> own heads, own channels --> scatter-sum --> tokens N/tp

Queries, keys and values are cut by heads, gate and up by channels; what follows them is cut along its inputs,
so that each rank's product is one term of a sum. Norms and the residual stream hold a share of the tokens,
and so do the embedding and the loss: those weights are whole on every rank and learn from its tokens; their
gradients are summed (`sums.py`).

Source: Shoeybi et al. 2019 (Megatron-LM); Korthikanti et al. 2022.
"""

from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from marrow.models.config import ModelConfig
from marrow.models.decoder import Attend, Layer
from marrow.models.experts import Route
from marrow.train.parallel.collectives import gather_tokens, scatter_sum


class LayerShare(Layer):
    """One rank's share of a layer. config: the whole model's; group: the ranks with the other shares."""

    def __init__(self, config: ModelConfig, index: int, group: dist.ProcessGroup) -> None:
        super().__init__(share_of(config, group.size()), index)
        self.group = group

    def attention(self, normed_NC: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """As `Layer.attention`, of this rank's tokens."""
        whole_NC = gather_tokens(normed_NC, self.group)
        return scatter_sum(super().attention(whole_NC, angles, attend), self.group)

    def mlp(self, normed_NC: Tensor, route: Route | None = None) -> Tensor:
        """As `Layer.mlp`, of this rank's tokens."""
        whole_NC = gather_tokens(normed_NC, self.group)
        return scatter_sum(super().mlp(whole_NC, route), self.group)


def share_of(config: ModelConfig, tp: int) -> ModelConfig:
    """Return the shape of one share of each layer."""
    return replace(
        config,
        num_heads=config.num_heads // tp,
        num_kv_heads=config.num_kv_heads // tp,
        intermediate_size=config.intermediate_size // tp,
    )
