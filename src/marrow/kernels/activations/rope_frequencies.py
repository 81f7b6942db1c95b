"""How fast each pair of channels turns: theta^(-2i/D) and the variants that stretch a model's context.

    linear    all frequencies divided by the factor (position interpolation)
    dynamic   theta grows with the length, once it exceeds what the model was trained for (NTK-aware)
    llama3    slow pairs divided by the factor, fast ones kept, a linear passage between
    yarn      the same passage counted in turns over the original context; attention sharpened

Pure functions of the record `RopeScaling`.
Source: Chen et al. 2023 (linear); bloc97 2023 (NTK); Peng et al. 2023 (YaRN); Llama 3.1's model card.
"""

import math

import torch
from torch import Tensor

from marrow.kernels.activations.rope_scaling import RopeScaling


def frequencies(
    head_size: int,
    theta: float,
    scaling: RopeScaling | None = None,
    *,
    length: int = 0,
    device: torch.device | None = None,
) -> tuple[Tensor, float]:
    """Return the angle that each pair turns per position, and the factor of cosines and sines.

    Args: head_size: even. theta: > 0. length: tokens of the longest text, for the dynamic kind.
    Returns: fp32 [D/2], and 1.0 but for yarn.
    """
    steps_E = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    if scaling is not None and scaling.kind == "dynamic":
        stretch = scaling.factor * max(length, scaling.original_positions) / scaling.original_positions
        theta *= (stretch - (scaling.factor - 1)) ** (head_size / (head_size - 2))
    plain_E = 1.0 / theta**steps_E
    if scaling is None or scaling.kind in ("none", "dynamic"):
        return plain_E, 1.0
    if scaling.kind == "linear":
        return plain_E / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _blend(plain_E, _kept_by_turns(plain_E, scaling), scaling), 1.0
    return _blend(plain_E, _kept_by_pair(head_size, theta, scaling, device), scaling), _sharpening(scaling)


def _blend(plain_E: Tensor, kept_E: Tensor, scaling: RopeScaling) -> Tensor:
    """Return each frequency: `kept_E` = 1 keeps it, 0 divides it by the factor."""
    return plain_E / scaling.factor * (1 - kept_E) + plain_E * kept_E


def _kept_by_turns(plain_E: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3: linear in the number of turns within the original context."""
    turns_E = scaling.original_positions * plain_E / (2 * math.pi)
    return ((turns_E - scaling.slow_turns) / (scaling.fast_turns - scaling.slow_turns)).clamp(0, 1)


def _kept_by_pair(head_size: int, theta: float, scaling: RopeScaling, device: torch.device | None) -> Tensor:
    """YaRN: linear in the number of the pair, between those that make so many turns."""

    def pair(turns: float) -> float:
        return (
            head_size * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )

    first, last = pair(scaling.fast_turns), pair(scaling.slow_turns)
    if scaling.is_truncated:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_size - 1)
    numbers_E = torch.arange(head_size // 2, dtype=torch.float32, device=device)
    return 1 - ((numbers_E - first) / max(last - first, 1e-3)).clamp(0, 1)


def _sharpening(scaling: RopeScaling) -> float:
    """YaRN's temperature of the attention: on queries and keys alike, so its root."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _magnitude(scaling.factor, scaling.mscale) / _magnitude(scaling.factor, scaling.mscale_all_dim)
    return _magnitude(scaling.factor, 1.0)


def _magnitude(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0
