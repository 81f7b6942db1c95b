"""The logical tensors behind the decoder's fused parameters: one table for files, shards and fresh weights.

    layers.0.qkv_YC                [ q | k | v ]       each one logical tensor
    layers.0.gate_up_GC            [ gate | up ]
    layers.0.experts.gate_up_EGC   [ gate | up ] of expert 0, of expert 1...  taken as E G rows

A parameter lies in memory as its parts one below the other. A process that holds only a piece of it (some
rows, or its share of every part under tensor parallelism) asks `regions` where that piece lies in the whole:
checkpoints, exports and fresh weights are thus the same however a model is spread.

Axes: as in `decoder.py`. Source: the state dictionaries of transformers for each family.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from marrow.models.config import ModelConfig

ROWS, COLUMNS = 0, 1


@dataclass(frozen=True, slots=True)
class Part:
    """A logical tensor. name: Hugging Face's. cut: the axis that tensor parallelism divides; None: every rank
    of it holds the whole.
    """

    name: str
    shape: tuple[int, ...]
    cut: int | None = None

    def shape_in(self, tp: int) -> tuple[int, ...]:
        """Return the shape of one of `tp` equal shares."""
        return tuple(size // tp if axis == self.cut else size for axis, size in enumerate(self.shape))


@dataclass(frozen=True, slots=True)
class Region:
    """A box of a logical tensor that is held here.

    start, size: of the box, within the whole of `shape`. row: where the box begins in the piece that holds
    it.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    row: int

    @property
    def box(self) -> tuple[slice, ...]:
        """Index the whole with this."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.size, strict=True))

    def of(self, tensor: Tensor) -> Tensor:
        """View the box in a tensor that is laid out as the piece is."""
        rows = tensor.flatten(0, 1) if tensor.ndim == 3 else tensor
        return rows[self.row : self.row + self.size[0]]


def parts(ours: str, config: ModelConfig) -> list[Part]:
    """List the logical tensors of a parameter, in the order in which they lie in it."""
    channels = config.hidden_size
    if ours in _TOP:
        vocabulary = (config.vocab_size, channels)
        return [Part(_TOP[ours], (channels,) if ours == "norm_C" else vocabulary)]
    _, index, name = ours.split(".", 2)
    queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    heads = {"q": queries, "k": keys, "v": keys}
    inner = config.intermediate_size
    prefix = f"model.layers.{index}"
    mlp, gate, up, down = _expert_names(config)
    match name:
        case "attention_norm_C":
            return [Part(f"{prefix}.input_layernorm.weight", (channels,))]
        case "mlp_norm_C":
            return [Part(f"{prefix}.post_attention_layernorm.weight", (channels,))]
        case "q_norm_D" | "k_norm_D":
            return [Part(f"{prefix}.self_attn.{name[0]}_norm.weight", (config.head_size,))]
        case "qkv_YC":
            return [
                Part(f"{prefix}.self_attn.{head}_proj.weight", (rows, channels), ROWS)
                for head, rows in heads.items()
            ]
        case "qkv_bias_Y":
            return [
                Part(f"{prefix}.self_attn.{head}_proj.bias", (rows,), ROWS) for head, rows in heads.items()
            ]
        case "out_CX":
            return [Part(f"{prefix}.self_attn.o_proj.weight", (channels, queries), COLUMNS)]
        case "gate_up_GC":
            return [
                Part(f"{prefix}.mlp.{each}_proj.weight", (inner, channels), ROWS) for each in ("gate", "up")
            ]
        case "down_CF":
            return [Part(f"{prefix}.mlp.down_proj.weight", (channels, inner), COLUMNS)]
        case "experts.router_EC":
            return [Part(f"{prefix}.{mlp}.gate.weight", (config.num_experts, channels))]
        case "experts.gate_up_EGC":
            return [
                Part(f"{prefix}.{mlp}.experts.{expert}.{each}.weight", (inner, channels), ROWS)
                for expert in range(config.num_experts)
                for each in (gate, up)
            ]
        case "experts.down_ECF":
            return [
                Part(f"{prefix}.{mlp}.experts.{expert}.{down}.weight", (channels, inner), COLUMNS)
                for expert in range(config.num_experts)
            ]
    raise AssertionError(f"parameter {ours} has no parts")


def regions(
    ours: str,
    config: ModelConfig,
    *,
    tp_rank: int = 0,
    tp: int = 1,
    first_row: int = 0,
    rows: int | None = None,
) -> Iterator[Region]:
    """Yield where a held piece of a parameter lies in its logical tensors.

    Args: config: of the whole model. first_row, rows: the piece is so many rows from there on of what the
        tensor-parallel rank `tp_rank` of `tp` would hold, all by default; a parameter of three axes counts
        its first two as rows.
    Returns: a region for each part that the piece touches, in order.
    """
    last_row = num_rows(ours, config, tp) if rows is None else first_row + rows
    part_row = 0
    for part in parts(ours, config):
        share = part.shape_in(tp)
        low, high = max(first_row, part_row), min(last_row, part_row + share[0])
        if low < high:
            start = [0] * len(share)
            if part.cut is not None:
                start[part.cut] = share[part.cut] * tp_rank
            start[0] += low - part_row
            size = (high - low, *share[1:])
            yield Region(part.name, part.shape, tuple(start), size, low - first_row)
        part_row += share[0]


def num_rows(ours: str, config: ModelConfig, tp: int = 1) -> int:
    """Count the rows of a parameter, as `regions` counts them."""
    return sum(part.shape_in(tp)[0] for part in parts(ours, config))


def _expert_names(config: ModelConfig) -> tuple[str, str, str, str]:
    """Return what the family calls the MLP, and an expert's gate, up and down projections."""
    if config.qk_norm:  # Qwen3-MoE
        return "mlp", "gate_proj", "up_proj", "down_proj"
    return "block_sparse_moe", "w1", "w3", "w2"  # Mixtral


_TOP = {
    "embedding_VC": "model.embed_tokens.weight",
    "norm_C": "model.norm.weight",
    "head_VC": "lm_head.weight",
}
