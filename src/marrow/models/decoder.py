"""The one decoder: Llama, Mistral, Qwen2, Qwen3 and their mixtures of experts are flags of `ModelConfig`.

    embedding -> [ norm -> qkv -> RoPE -> attend -> out -> + -> norm -> MLP or experts -> + ] x layers -> norm
                                          ^ injected                           ^ route, injected

Tokens are flat: no batch axis. Which tokens see which is not known here: `attend(layer, q, k, v)`
is injected, a document mask in training, a paged cache in serving. The head is a method of its
own, so that a caller runs it on the rows that it needs. Projections of the same input are fused
(qkv; gate and up); `parts.py` knows the logical tensors in them. Nothing here knows of other processes:
a part of the layers (`layers`) is a stage of a pipeline, and a `Layer` of another config a share of it.

Axes: N tokens, C hidden size, H heads, K kv heads, D head size, F intermediate size, V vocabulary.
Source: Touvron et al. 2023 (Llama); Qwen team 2025 (Qwen3, for qk_norm).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marrow.core.hashes import hash_bytes
from marrow.kernels.activations.rope import rope, rope_angles
from marrow.kernels.activations.swiglu import swiglu
from marrow.kernels.norms.add_rms_norm import add_rms_norm
from marrow.kernels.norms.rms_norm import rms_norm
from marrow.models.config import ModelConfig
from marrow.models.experts import Experts, Route
from marrow.models.parts import regions

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Decoder(nn.Module):
    """A causal language model over flat tokens.

    Weights are in `dtype` on `device`, drawn from `seed` by `reset` (pass device="meta" to make
    the shape alone). layers: which of them to hold, all by default: the embedding belongs to the first, the
    last norm and the head to the last. Raises: ValueError if the config has no vocabulary yet.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layers: range | None = None,
    ) -> None:
        super().__init__()
        if not config.vocab_size:
            raise ValueError("vocab_size = 0: fill it in with ModelConfig.with_vocab_size")
        layers = range(config.num_layers) if layers is None else layers
        self.config = config
        self.is_first, self.is_last = 0 in layers, config.num_layers - 1 in layers
        with torch.device("meta"):
            if self.is_first or (self.is_last and config.tie_embeddings):
                self.embedding_VC = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
            self.layers = nn.ModuleDict({str(index): Layer(config, index) for index in layers})
            if self.is_last:
                self.norm_C = nn.Parameter(torch.empty(config.hidden_size))
                if not config.tie_embeddings:
                    self.head_VC = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.allocate(device, dtype)
        if torch.device(device).type != "meta":
            self.reset(seed)

    def allocate(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Give every weight new memory on `device`, not filled; in `dtype`, None keeps each one's own.

        Not Module.to_empty: for weights on "meta" torch loads sympy to do the same, most of a second.
        """
        for module in list(self.modules()):
            for name, weight in list(module.named_parameters(recurse=False)):
                empty = torch.empty(weight.shape, dtype=dtype or weight.dtype, device=device)
                setattr(module, name, nn.Parameter(empty))

    @property
    def output_weight(self) -> Tensor:
        """The head's weight: the embedding itself where they are tied."""
        return self.embedding_VC if self.config.tie_embeddings else self.head_VC

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.parameters()).device

    def forward(
        self, tokens_N: Tensor, positions_N: Tensor, attend: Attend, route: Route | None = None
    ) -> Tensor:
        """Compute the normed hidden state of every token.

        Args: tokens_N: int64 [N]; where the first layer is not held, the stream_NC of those before.
            positions_N: int64 [N], place of each token in its own text.
            attend: gets the layer's number, q_NHD, k_NKD, v_NKD (rotated); returns o_NHD.
            route: chooses experts, see `experts.py`; None takes the most probable.
        Returns: hidden_NC; where the last layer is not held, the stream for those after.
        """
        config = self.config
        angles = rope_angles(
            positions_N, config.head_size, config.rope_theta, self.dtype, scaling=config.rope_scaling
        )
        stream_NC, update_NC = tokens_N, None
        if self.is_first:
            stream_NC = F.embedding(tokens_N, self.embedding_VC)
        for layer in self.layers.values():
            stream_NC, update_NC = layer(stream_NC, update_NC, angles, attend, route)
        if not self.is_last:
            return stream_NC if update_NC is None else stream_NC + update_NC
        if update_NC is None:
            return rms_norm(stream_NC, self.norm_C, config.norm_eps)
        return add_rms_norm(stream_NC, update_NC, self.norm_C, config.norm_eps)[0]

    def logits(self, hidden_NC: Tensor) -> Tensor:
        """Score the vocabulary for some rows: hidden_NC -> logits_NV, of the weights' dtype."""
        return F.linear(hidden_NC, self.output_weight)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draw fresh weights: a pure function of (config, seed), the same on every device and dtype.

        Cost: the memory of one logical tensor in fp32.
        """
        for name, parameter in self.named_parameters():
            for region in regions(name, self.config):
                region.of(parameter).copy_(fresh(region.name, region.shape, self.config, seed))


def fresh(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """Draw a logical tensor: by its name, so that it is the same wherever and in whatever order it is drawn.

    Matrices are normal with `initial_std`; those that write to the residual stream are smaller by
    sqrt(2 num_layers), so that its variance does not grow with depth (GPT-2). Norms are 1, biases 0.
    Returns: fp32, on the CPU.
    """
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
    residual = name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight"))
    std = config.initial_std / (2 * config.num_layers) ** 0.5 if residual else config.initial_std
    number = int(hash_bytes(f"{seed} {name}".encode())[:16], 16)
    generator = torch.Generator().manual_seed(number & (2**63 - 1))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


class Layer(nn.Module):
    """Attention and an MLP (SwiGLU, or experts), each behind a norm and added to the residual stream.

    X = H D query channels, Y = (H + 2K) D fused channels: queries, then keys, then values.
    G = 2F fused channels: gate, then up.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        channels, heads_size = config.hidden_size, config.num_heads * config.head_size
        self.attention_norm_C = nn.Parameter(torch.empty(channels))
        self.qkv_YC = nn.Parameter(torch.empty(config.qkv_size, channels))
        self.qkv_bias_Y = nn.Parameter(torch.empty(config.qkv_size)) if config.qkv_bias else None
        if config.qk_norm:
            self.q_norm_D = nn.Parameter(torch.empty(config.head_size))
            self.k_norm_D = nn.Parameter(torch.empty(config.head_size))
        self.out_CX = nn.Parameter(torch.empty(channels, heads_size))
        self.mlp_norm_C = nn.Parameter(torch.empty(channels))
        if config.num_experts:
            self.experts = Experts(config, index)
        else:
            self.gate_up_GC = nn.Parameter(torch.empty(2 * config.intermediate_size, channels))
            self.down_CF = nn.Parameter(torch.empty(channels, config.intermediate_size))

    def forward(
        self,
        stream_NC: Tensor,
        update_NC: Tensor | None,
        angles: tuple[Tensor, Tensor],
        attend: Attend,
        route: Route | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream, and the update that is still to be added to it.

        Args: update_NC: what the layer before has left to add; None before the first. Each sum is thus made
            by the norm that reads it.
        """
        eps = self.config.norm_eps
        if update_NC is None:
            normed_NC = rms_norm(stream_NC, self.attention_norm_C, eps)
        else:
            normed_NC, stream_NC = add_rms_norm(stream_NC, update_NC, self.attention_norm_C, eps)
        update_NC = self.attention(normed_NC, angles, attend)
        normed_NC, stream_NC = add_rms_norm(stream_NC, update_NC, self.mlp_norm_C, eps)
        return stream_NC, self.mlp(normed_NC, route)

    def attention(self, normed_NC: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Return what attention adds."""
        config = self.config
        qkv_NY = F.linear(normed_NC, self.qkv_YC, self.qkv_bias_Y)
        heads_NLD = qkv_NY.view(-1, config.num_heads + 2 * config.num_kv_heads, config.head_size)
        q_NHD, k_NKD, v_NKD = torch.split(
            heads_NLD, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1
        )
        if config.qk_norm:
            q_NHD = rms_norm(q_NHD, self.q_norm_D, config.norm_eps)
            k_NKD = rms_norm(k_NKD, self.k_norm_D, config.norm_eps)
        o_NHD = attend(self.index, rope(q_NHD, *angles), rope(k_NKD, *angles), v_NKD)
        return F.linear(o_NHD.flatten(1), self.out_CX)

    def mlp(self, normed_NC: Tensor, route: Route | None = None) -> Tensor:
        """Return what the MLP adds."""
        if self.config.num_experts:
            added_NC: Tensor = self.experts(normed_NC, route)
            return added_NC
        return F.linear(swiglu(F.linear(normed_NC, self.gate_up_GC)), self.down_CF)
