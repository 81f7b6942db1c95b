"""What a model takes, counted before it exists: memory by part, for training and for serving.

    weights + gradients + optimiser + activations + loss           training, on one rank that holds it all
    weights + keys and values                                      serving

Activations are what autograd keeps of the operators as they stand (`kernels`): a layer keeps the streams that
its norms read, what its products read, and the projections. Tests hold the count against what torch really
keeps.

Axes: N tokens of a micro-batch on a rank; C, F, H, K, D, Y, V, E as in `decoder.py`; A experts a token takes.
Source: Korthikanti et al. 2022 (the same count for a plain transformer).
"""

from dataclasses import dataclass

from marrow.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes of each part while a step runs, at its peak at the end of the forward."""

    weights: int
    gradients: int
    optimiser: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """All of it, without what the allocator loses to fragments."""
        return self.weights + self.gradients + self.optimiser + self.activations + self.loss


def training_memory(
    config: ModelConfig,
    tokens: int,
    *,
    optimiser: str = "adamw",
    dtype_bytes: int = 2,
    recompute: bool = False,
) -> TrainingMemory:
    """Count a training step's memory.

    Args: tokens: of a micro-batch. optimiser: "adamw", "muon" or "sgd". dtype_bytes: of weights, gradients
        and activations; narrower weights have fp32 masters. recompute: layers keep their input alone, and one
        layer at a time is computed again in the backward.
    """
    numbers = config.num_parameters()
    hidden = config.num_layers * hidden_numbers(config)
    moments = {"adamw": 2 * numbers, "muon": 2 * (numbers - hidden) + hidden, "sgd": 0}[optimiser]
    masters = numbers if dtype_bytes < 4 else 0
    layer = layer_activations(config, tokens, dtype_bytes)
    kept = config.num_layers * layer
    if recompute:
        kept = config.num_layers * 2 * tokens * config.hidden_size * dtype_bytes + layer
    ends = tokens * config.hidden_size * dtype_bytes + 4 * tokens  # what the last norm keeps
    head = (
        (tokens + config.vocab_size) * config.hidden_size * dtype_bytes
    )  # its gradients, made in the forward
    return TrainingMemory(
        weights=numbers * dtype_bytes,
        gradients=numbers * dtype_bytes,
        optimiser=4 * (moments + masters),
        activations=kept + ends,
        loss=head,
    )


def hidden_numbers(config: ModelConfig) -> int:
    """Count the numbers of one layer's matrices that Muon moves."""
    attention = config.hidden_size * (config.qkv_size + config.num_heads * config.head_size)
    return attention + 3 * config.hidden_size * config.intermediate_size * max(1, config.num_experts)


def layer_activations(config: ModelConfig, tokens: int, dtype_bytes: int = 2) -> int:
    """Count the bytes that one layer keeps for its backward."""
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_size
    channels, inner = config.hidden_size, config.intermediate_size
    # Two streams and their normed rows; the fused projection; rotated queries and keys; what attention gives.
    numbers = 4 * channels + config.qkv_size + (heads + kv_heads) * size + heads * size
    scales = 2 + heads + (heads + kv_heads) * config.qk_norm  # fp32: of norms, attention's log-sum-exp
    if not config.num_experts:
        return tokens * ((numbers + 3 * inner) * dtype_bytes + 4 * scales)
    taken = config.experts_per_token
    # Each taken expert's row, its gate and up, their product, and its output, which its weight multiplies.
    numbers += taken * (2 * channels + 3 * inner)
    router = 4 * (config.num_experts + 2 * taken) + 8 * 4 * taken  # probabilities, weights; places and orders
    return tokens * (numbers * dtype_bytes + 4 * scales + router)


def kv_bytes(config: ModelConfig, tokens: int, dtype_bytes: int = 2) -> int:
    """Count the bytes of keys and values of so many tokens, over all layers; a window bounds a layer's."""
    each = 2 * config.num_kv_heads * config.head_size * dtype_bytes
    return each * sum(min(tokens, config.window(layer) or tokens) for layer in range(config.num_layers))
