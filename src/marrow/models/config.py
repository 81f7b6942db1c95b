"""The shape of a decoder: the recipe's [model] table, readable without torch.

Everything that can be known about a model before a tensor exists is counted here: parameters,
floating point operations per token, bytes of KV cache per token.

Axes in names: V vocabulary, C hidden size, F intermediate size, H heads, K kv heads, D head size, E experts.
"""

from dataclasses import dataclass, replace
from typing import Annotated

from marrow.core.config import Range
from marrow.kernels.activations.rope_scaling import RopeScaling

AtLeast1 = Annotated[int, Range(low=1)]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-style decoder. The defaults are the quickstart's: 3.5 M parameters.

    vocab_size 0 means: take the tokenizer's (`with_vocab_size` then fills it in). qk_norm
    normalises each query and key head before RoPE (Qwen3); qkv_bias adds a bias to the query,
    key and value projections (Qwen2). initial_std is the standard deviation of fresh weights.
    rope_scaling stretches the context (Llama 3.1). sliding_window: keys that a query sees at most,
    0 for all (Mistral); the first `full_layers` layers see all even so (Qwen2).
    num_experts 0 is a dense MLP; otherwise each token takes experts_per_token of so many MLPs,
    each of intermediate_size (Mixtral, Qwen3-MoE), weighted by the router's probabilities, which
    normalise_experts makes sum to 1 over those taken.
    """

    vocab_size: Annotated[int, Range(low=0)] = 0
    hidden_size: AtLeast1 = 256
    intermediate_size: AtLeast1 = 704
    num_layers: AtLeast1 = 4
    num_heads: AtLeast1 = 4
    num_kv_heads: AtLeast1 = 2
    head_size: AtLeast1 = 64
    max_positions: AtLeast1 = 512
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qk_norm: bool = True
    qkv_bias: bool = False
    initial_std: float = 0.02
    rope_scaling: RopeScaling = RopeScaling()  # noqa: RUF009 - frozen
    sliding_window: Annotated[int, Range(low=0)] = 0
    full_layers: Annotated[int, Range(low=0)] = 0
    num_experts: Annotated[int, Range(low=0)] = 0
    experts_per_token: AtLeast1 = 2
    normalise_experts: bool = True

    def __post_init__(self) -> None:
        """Refuse shapes that no decoder can have; a reader of files does not pass `Range`."""
        sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_size", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, must be at least 1")
        if self.vocab_size < 0:
            raise ValueError(f"vocab_size = {self.vocab_size}, must be 0 (the tokenizer's) or more")
        for name in ("sliding_window", "full_layers", "num_experts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}, must be 0 or more")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token = {self.experts_per_token}, must be 1 to num_experts = {self.num_experts}"
            )
        if self.num_experts and self.qkv_bias:
            raise ValueError("qkv_bias and num_experts exclude each other: no supported family has both")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} is no multiple of num_kv_heads = {self.num_kv_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size = {self.head_size} is odd; RoPE rotates pairs")
        for name in ("rope_theta", "norm_eps", "initial_std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}, must be above 0")
        if self.qk_norm and self.qkv_bias:
            raise ValueError("qk_norm (Qwen3) and qkv_bias (Qwen2) exclude each other: no family has both")

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query, key and value projection: (H + 2K) D."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_size

    def with_vocab_size(self, vocab_size: int) -> "ModelConfig":
        """Return this shape with the vocabulary filled in.

        Raises: ValueError if the config asks for a smaller vocabulary than the tokenizer's.
        """
        if self.vocab_size and self.vocab_size < vocab_size:
            raise ValueError(f"vocab_size = {self.vocab_size} is less than the tokenizer's {vocab_size}")
        return replace(self, vocab_size=self.vocab_size or vocab_size)

    def window(self, layer: int) -> int:
        """Return how many keys a query of a layer sees at most, 0 for all."""
        return self.sliding_window if layer >= self.full_layers else 0

    def num_parameters(self, *, active: bool = False) -> int:
        """Count trained numbers; a tied head counts once. active: only a token's own experts."""
        attention = self.hidden_size * (self.qkv_size + self.num_heads * self.head_size)
        attention += self.qkv_size * self.qkv_bias + 2 * self.head_size * self.qk_norm
        mlp = 3 * self.hidden_size * self.intermediate_size
        if self.num_experts:
            experts = self.experts_per_token if active else self.num_experts
            mlp = mlp * experts + self.hidden_size * self.num_experts
        layers = self.num_layers * (attention + mlp + 2 * self.hidden_size)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return layers + self.hidden_size + embeddings

    def flops_per_token(self, context: int, *, backward: bool = False) -> float:
        """Count floating point operations of one token in a causal row of `context` tokens.

        Forward: 2 per weight of every matrix product, the head among them, and 4 H D per key
        that the token sees, of which there are (context + 1) / 2 on average, or fewer behind a sliding
        window. Of experts, those that a token takes. Norms, RoPE
        and the embedding lookup are not counted. backward=True: forward + backward = 3x. A row of
        several documents does less, so MFU computed with the whole row is an upper bound.
        Source: Kaplan et al. 2020, table 1; PaLM (Chowdhery et al. 2022), appendix B.
        """
        attention = self.hidden_size * (self.qkv_size + self.num_heads * self.head_size)
        mlp = 3 * self.hidden_size * self.intermediate_size
        if self.num_experts:
            mlp = mlp * self.experts_per_token + self.hidden_size * self.num_experts
        weights = self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size
        keys = sum(_mean_keys(context, self.window(layer)) for layer in range(self.num_layers))
        scores = 4 * self.num_heads * self.head_size * keys
        return (2 * weights + scores) * (3 if backward else 1)

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Count bytes of keys and values that one token leaves in the cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * dtype_bytes


def _mean_keys(context: int, window: int) -> float:
    """Return the keys that a token of a causal row sees on average."""
    seen = min(window or context, context)
    return (seen * (seen + 1) / 2 + (context - seen) * seen) / context
