"""A mixture of experts: each token goes through the few MLPs that a router picks for it.

    tokens     t0 t1 t2      chosen: t0 -> 1, 3   t1 -> 0, 3   t2 -> 1, 0
    sorted     | e0: t1 t2 | e1: t0 t2 | e2: none | e3: t0 t1 |      grouped matrix products over these rows
    back       t0 = w * row of e1 + w * row of e3, ...

No token is dropped, no capacity is set, and no number of rows is read by the host. How experts are chosen is
injected (`route`), as attention is: training adds the load-balance loss there.

Axes: N tokens, C hidden size, E experts, A experts a token takes, M = N A rows, F intermediate size, G = 2F.
Source: Shazeer et al. 2017; Gale et al. 2022 (MegaBlocks, no dropped tokens); Qwen team 2025 (Qwen3-MoE).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marrow.kernels.activations.swiglu import swiglu
from marrow.kernels.matmul.grouped_linear import grouped_linear
from marrow.models.config import ModelConfig

Route = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Takes the layer's number and the router's logits_NE; returns weights_NA (fp32) and experts_NA (int64)."""


class Experts(nn.Module):
    """The MLP of one layer. Weights are given their memory by the decoder."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        experts, channels, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.router_EC = nn.Parameter(torch.empty(experts, channels))
        self.gate_up_EGC = nn.Parameter(torch.empty(experts, 2 * inner, channels))
        self.down_ECF = nn.Parameter(torch.empty(experts, channels, inner))

    def forward(self, normed_NC: Tensor, route: Route | None = None) -> Tensor:
        """Return what the MLP adds. route: chooses; None takes `choose_experts`."""
        logits_NE = F.linear(normed_NC, self.router_EC)
        if route is None:
            weights_NA, experts_NA = choose_experts(self.config, logits_NE)
        else:
            weights_NA, experts_NA = route(self.index, logits_NE)
        return self.mix(normed_NC, weights_NA, experts_NA)

    def mix(self, normed_NC: Tensor, weights_NA: Tensor, experts_NA: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs for each token."""
        taken = experts_NA.shape[1]
        sorted_M, order_M = experts_NA.flatten().sort(stable=True)
        places_M = torch.empty_like(order_M).scatter_(
            0, order_M, torch.arange(len(order_M), device=order_M.device)
        )
        experts_E = torch.arange(self.gate_up_EGC.shape[0], device=order_M.device)
        ends_E = torch.searchsorted(sorted_M, experts_E, right=True).int()
        # Each row is gathered once, here and on the way back, so that no gradient adds with atomics: the same
        # bits each time.
        copies_MC = normed_NC[:, None].expand(-1, taken, -1).flatten(0, 1)
        rows_MC = copies_MC.index_select(0, order_M)
        hidden_MF = swiglu(grouped_linear(rows_MC, self.gate_up_EGC, ends_E))
        out_MC = grouped_linear(hidden_MF, self.down_ECF, ends_E)
        out_NAC = out_MC.index_select(0, places_M).view(-1, taken, normed_NC.shape[1])
        weighted_NAC = out_NAC * weights_NA.to(out_NAC.dtype)[..., None]
        return weighted_NAC.sum(1)


def choose_experts(config: ModelConfig, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Choose each token's experts by probability.

    Returns: weights_NA in fp32, experts_NA int64; of equal probabilities the lower expert comes first or not,
        as torch.topk has it.
    """
    probabilities_NE = logits_NE.softmax(-1, dtype=torch.float32)
    weights_NA, experts_NA = probabilities_NE.topk(config.experts_per_token, dim=-1)
    if config.normalise_experts:
        weights_NA = weights_NA / weights_NA.sum(-1, keepdim=True)
    return weights_NA, experts_NA


def balance_loss(probabilities_NE: Tensor, experts_NA: Tensor, row_tokens: int) -> Tensor:
    """Sum over packed rows how unevenly each row's tokens use the experts.

    A row's loss is E sum_e (share of its choices that went to e) (mean probability of e): 1 when all experts
    are used alike, at most E / A. Taken row by row it does not depend on how rows are dealt to micro-batches
    and ranks, so that any layout trains the same model. transformers' loss is A times this, over all tokens.

    Args: probabilities_NE: softmax of the router's logits, fp32. experts_NA: chosen. row_tokens: T.
    Returns: a scalar, with gradients through the probabilities.
    Source: Fedus et al. 2021 (Switch); DeepSeek-V3 2024, equation 17 (sequence by sequence).
    """
    num_experts = probabilities_NE.shape[1]
    counts_NE = torch.zeros_like(probabilities_NE).scatter_add_(
        1, experts_NA, torch.ones_like(experts_NA, dtype=probabilities_NE.dtype)
    )
    shares_RE = counts_NE.view(-1, row_tokens, num_experts).mean(1) / experts_NA.shape[1]
    means_RE = probabilities_NE.view(-1, row_tokens, num_experts).mean(1)
    loss: Tensor = num_experts * (shares_RE * means_RE).sum()
    return loss
