"""config.json, both ways: the families of Hugging Face and the one `ModelConfig`.

    llama  mistral  qwen2  qwen3  mixtral  qwen3_moe

What the decoder cannot compute exactly is refused by the name of the field. On the way out a shape becomes
the plainest family that can hold it; a shape that none can hold is refused too.

Source: the config classes of transformers 5, and what transformers 4 wrote before.
"""

from collections.abc import Mapping
from typing import Any

from marrow.core.errors import ModelError
from marrow.kernels.activations.rope_scaling import RopeScaling
from marrow.models.config import ModelConfig

CONFIG = "config.json"
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
EXPERTS = ("mixtral", "qwen3_moe")
ALWAYS_WINDOWED = ("mistral", "mixtral")  # the others ask use_sliding_window
SCALINGS = ("linear", "dynamic", "llama3", "yarn")


def to_config(config: ModelConfig) -> dict[str, Any]:
    """Return config.json's values for a shape.

    Raises: ModelError if no family has it.
    """
    family = family_of(config)
    values: dict[str, Any] = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_positions,
        # Both spellings: transformers 5 reads rope_parameters, older readers rope_theta and rope_scaling.
        "rope_parameters": _rope_fields(config.rope_scaling) | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initial_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if config.rope_scaling.kind != "none":
        values["rope_scaling"] = _rope_fields(config.rope_scaling)
    if family == "llama":
        values["mlp_bias"] = False
    else:
        values["sliding_window"] = config.sliding_window or None
    if family in ("qwen2", "qwen3", "qwen3_moe"):
        values["use_sliding_window"] = bool(config.sliding_window)
    if family in ("qwen2", "qwen3"):
        values["max_window_layers"] = config.full_layers
    if family == "qwen2":
        del values["attention_bias"]
        if config.head_size * config.num_heads != config.hidden_size:
            raise ModelError(
                f"qkv_bias with head_size = {config.head_size} cannot be exported: qwen2 knows only "
                f"hidden_size / num_heads = {config.hidden_size / config.num_heads:g}"
            )
    if family in EXPERTS:
        values |= {
            "num_experts_per_tok": config.experts_per_token,
            "num_local_experts": config.num_experts,
            "num_experts": config.num_experts,
        }
    if family == "qwen3_moe":
        values |= {
            "moe_intermediate_size": config.intermediate_size,
            "norm_topk_prob": config.normalise_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return values


def family_of(config: ModelConfig) -> str:
    """Return the plainest family that holds a shape.

    Raises: ModelError if none does.
    """
    if config.num_experts:
        family = "qwen3_moe" if config.qk_norm else "mixtral"
    else:
        plain = "mistral" if config.sliding_window else "llama"
        family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else plain
    if family == "mixtral" and not config.normalise_experts:
        raise ModelError(
            "normalise_experts = false without qk_norm cannot be exported: mixtral always normalises",
            hint="set normalise_experts = true, or qk_norm = true (Qwen3-MoE)",
        )
    if config.sliding_window and config.full_layers and family not in ("qwen2", "qwen3"):
        raise ModelError(
            f"full_layers = {config.full_layers} cannot be exported: {family} has the window in every layer",
            hint="set full_layers = 0",
        )
    return family


def from_config(values: Mapping[str, Any]) -> ModelConfig:
    """Read config.json's values.

    Raises: ModelError naming the field that is missing or asks for what the decoder does not do.
    """
    family = values.get("model_type")
    if family not in CLASSES:
        raise _unsupported("model_type", family, f"one of {', '.join(CLASSES)}")
    _refuse_unsupported(values, family)
    try:
        heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
        window, full_layers = _window(values, family)
        size = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
        return ModelConfig(
            vocab_size=int(values["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(values[size]),
            num_layers=int(values["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(values.get("num_key_value_heads") or heads),
            head_size=int(values.get("head_dim") or hidden // heads),
            max_positions=int(values.get("max_position_embeddings", 2048)),
            rope_theta=float(_rope(values).get("rope_theta", 1e6 if family == "mixtral" else 1e4)),
            norm_eps=float(values.get("rms_norm_eps", 1e-5 if family == "mixtral" else 1e-6)),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            qk_norm=family in ("qwen3", "qwen3_moe"),
            qkv_bias=family == "qwen2",
            initial_std=float(values.get("initializer_range", 0.02)),
            rope_scaling=_rope_scaling(values),
            sliding_window=window,
            full_layers=full_layers,
            **(_experts(values, family) if family in EXPERTS else {}),
        )
    except KeyError as error:
        raise ModelError(f"{CONFIG} lacks {error.args[0]}", hint="the folder is no whole model") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{CONFIG}: {error}") from None


def _experts(values: Mapping[str, Any], family: str) -> dict[str, Any]:
    # transformers writes num_local_experts; Qwen's own folders say num_experts.
    number = values["num_local_experts"] if "num_local_experts" in values else values["num_experts"]
    return {
        "num_experts": int(number),
        "experts_per_token": int(values["num_experts_per_tok"]),
        "normalise_experts": family == "mixtral" or bool(values.get("norm_topk_prob", False)),
    }


def _window(values: Mapping[str, Any], family: str) -> tuple[int, int]:
    """Return the sliding window and the number of first layers that see all; a window that no text reaches
    is none.
    """
    window = values.get("sliding_window")
    if window is None or not values.get("use_sliding_window", family in ALWAYS_WINDOWED):
        return 0, 0
    if int(window) >= int(values.get("max_position_embeddings", 2048)):
        return 0, 0
    layers = int(values["num_hidden_layers"])
    kinds = values.get("layer_types")
    if kinds is not None:
        full = sum(kind == "full_attention" for kind in kinds)
        if list(kinds) != ["full_attention"] * full + ["sliding_attention"] * (layers - full):
            raise _unsupported("layer_types", kinds, "full_attention layers first, then sliding_attention")
    elif family in ("qwen2", "qwen3"):
        full = min(int(values.get("max_window_layers", 28)), layers)
    else:
        full = 0
    return (int(window), full) if full < layers else (0, 0)


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the places where RoPE's settings have been kept over the years."""
    old = {"rope_theta": values["rope_theta"]} if values.get("rope_theta") else {}
    return old | dict(values.get("rope_scaling") or {}) | dict(values.get("rope_parameters") or {})


def _rope_scaling(values: Mapping[str, Any]) -> RopeScaling:
    rope = _rope(values)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeScaling()
    positions = int(values.get("max_position_embeddings", 2048))
    given = {
        ours: rope[theirs] for theirs, ours in _ROPE_FIELDS[kind].items() if rope.get(theirs) is not None
    }
    if kind in ("dynamic", "yarn"):
        given.setdefault("original_positions", positions)
    if kind == "yarn":
        given.setdefault("fast_turns", 32.0)
    return RopeScaling(kind=kind, **given)


def _rope_fields(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.kind == "none":
        return {"rope_type": "default"}
    fields = {theirs: getattr(scaling, ours) for theirs, ours in _ROPE_FIELDS[scaling.kind].items()}
    # 0.0 and None say "not given" in the record, as an absent field does in the file.
    return {"rope_type": scaling.kind} | {
        name: value
        for name, value in fields.items()
        if value is not None and not (name.startswith("mscale") and value == 0.0)
    }


_ROPE_FIELDS = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor", "original_max_position_embeddings": "original_positions"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_positions",
        "low_freq_factor": "slow_turns",
        "high_freq_factor": "fast_turns",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_positions",
        "beta_slow": "slow_turns",
        "beta_fast": "fast_turns",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "is_truncated",
    },
}


def _refuse_unsupported(values: Mapping[str, Any], family: str) -> None:
    rope = _rope(values)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" and kind not in SCALINGS:
        field = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
        raise _unsupported(field, kind, f"default, {', '.join(SCALINGS)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or values.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unsupported("partial_rotary_factor", rope.get("partial_rotary_factor"), "1.0")
    if values.get("hidden_act", "silu") != "silu":
        raise _unsupported("hidden_act", values["hidden_act"], "silu")
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise _unsupported(name, True, "false")
    if family == "qwen3_moe":
        if values.get("decoder_sparse_step", 1) != 1:
            raise _unsupported(
                "decoder_sparse_step", values["decoder_sparse_step"], "1: experts in each layer"
            )
        if values.get("mlp_only_layers"):
            raise _unsupported("mlp_only_layers", values["mlp_only_layers"], "none: experts in each layer")
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method")
        raise _unsupported("quantization_config", method, "unquantised weights")


def _unsupported(field: str, value: Any, allowed: str) -> ModelError:
    return ModelError(f"{CONFIG}: {field} = {value!r} is not supported", hint=f"allowed: {allowed}")
