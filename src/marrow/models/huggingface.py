"""Hugging Face folders, both ways: config.json, safetensors, tokenizer files.

Names on disk are Hugging Face's, so any tool of that world reads our exports and we read theirs.
Fused tensors are split on the way out and joined on the way in, by one table (`_parts`) that
both directions share. What the decoder cannot compute exactly (RoPE scaling, a sliding window
shorter than the context, other activations) is refused by the name of the field.

Source: the config classes of transformers 5 for llama, mistral, qwen2 and qwen3.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from marrow.core.errors import ModelError
from marrow.models.config import ModelConfig
from marrow.models.decoder import Decoder
from marrow.text.tokenizer import Tokenizer

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save(folder: Path, decoder: Decoder, tokenizer_folder: Path | None = None) -> None:
    """Write a folder that `transformers` and `load` read.

    Args: folder: made if it is not there. tokenizer_folder: holds tokenizer.json; None leaves
        the tokenizer files out.
    Raises: ModelError if the tokenizer has more tokens than the model's vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = next(name for name, kind in DTYPES.items() if kind == decoder.embedding_VC.dtype)
    tokens: dict[str, int] = {}
    if tokenizer_folder is not None:
        shutil.copyfile(tokenizer_folder / "tokenizer.json", folder / "tokenizer.json")
        tokenizer, tokens = _read_tokenizer(tokenizer_folder, decoder.config)
        _write_json(folder / "tokenizer_config.json", tokenizer)
        _write_json(folder / "generation_config.json", {"_from_model_config": False} | tokens)
    _write_json(folder / CONFIG, to_config(decoder.config) | {"dtype": dtype} | tokens)
    save_weights(folder / WEIGHTS, decoder)


def load(folder: Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Decoder:
    """Read a model folder, ours or another's.

    Args: dtype: of the decoder's weights; None keeps what config.json says, else fp32.
    Raises: ModelError naming the file, field or tensor that is missing, damaged or unsupported.
    """
    values = _read_json(folder / CONFIG)
    config = from_config(values)
    named = values.get("dtype") or values.get("torch_dtype")
    decoder = Decoder(config, dtype=dtype or DTYPES.get(str(named), torch.float32), device="meta")
    decoder.allocate(device)
    if (folder / INDEX).exists():
        names = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
        _fill(decoder, [folder / name for name in names])
    else:
        _fill(decoder, [folder / WEIGHTS])
    return decoder


def load_weights(decoder: Decoder, path: Path) -> None:
    """Fill a decoder in place from one safetensors file with Hugging Face names.

    Raises: ModelError naming the tensor that is missing or has another shape; the decoder may
        then be half filled.
    """
    _fill(decoder, [path])


def save_weights(path: Path, decoder: Decoder) -> None:
    """Write one safetensors file with Hugging Face names; equal weights give equal bytes."""
    save_file(state_dict(decoder), path, metadata={"format": "pt"})


def state_dict(decoder: Decoder) -> dict[str, Tensor]:
    """Return the weights under Hugging Face names, each contiguous on the CPU."""
    tensors: dict[str, Tensor] = {}
    for ours, parameter in decoder.named_parameters():
        for name, part in _parts(ours, parameter.detach(), decoder.config):
            tensors[name] = part.cpu().contiguous().clone()
    return tensors


def to_config(config: ModelConfig) -> dict[str, Any]:
    """Return config.json's values for a shape; the family is the plainest that can hold it."""
    family = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    values: dict[str, Any] = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_positions,
        # Both spellings: transformers 5 reads rope_parameters, older readers rope_theta.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initial_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if family == "llama":
        values["mlp_bias"] = False
    else:
        values |= {"use_sliding_window": False, "sliding_window": None}
    if family == "qwen2":
        del values["attention_bias"]
        if config.head_size * config.num_heads != config.hidden_size:
            raise ModelError(
                f"qkv_bias with head_size = {config.head_size} cannot be exported: qwen2 knows only "
                f"hidden_size / num_heads = {config.hidden_size / config.num_heads:g}"
            )
    return values


def from_config(values: Mapping[str, Any]) -> ModelConfig:
    """Read config.json's values.

    Raises: ModelError naming the field that is missing or asks for what the decoder does not do.
    """
    family = values.get("model_type")
    if family not in FAMILIES:
        raise _unsupported("model_type", family, f"one of {', '.join(FAMILIES)}")
    _refuse_unsupported(values, family)
    try:
        heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
        return ModelConfig(
            vocab_size=int(values["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(values["intermediate_size"]),
            num_layers=int(values["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(values.get("num_key_value_heads") or heads),
            head_size=int(values.get("head_dim") or hidden // heads),
            max_positions=int(values.get("max_position_embeddings", 2048)),
            rope_theta=float(_rope(values).get("rope_theta", 10_000.0)),
            norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            qk_norm=family == "qwen3",
            qkv_bias=family == "qwen2",
            initial_std=float(values.get("initializer_range", 0.02)),
        )
    except KeyError as error:
        raise ModelError(f"{CONFIG} lacks {error.args[0]}", hint="the folder is no whole model") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{CONFIG}: {error}") from None


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the places where RoPE's settings have been kept over the years."""
    old = {"rope_theta": values["rope_theta"]} if values.get("rope_theta") else {}
    return old | dict(values.get("rope_scaling") or {}) | dict(values.get("rope_parameters") or {})


def _refuse_unsupported(values: Mapping[str, Any], family: str) -> None:
    rope = _rope(values)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise _unsupported(
            "rope_scaling" if values.get("rope_scaling") else "rope_parameters", kind, "default"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or values.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unsupported("partial_rotary_factor", rope.get("partial_rotary_factor"), "1.0")
    if values.get("hidden_act", "silu") != "silu":
        raise _unsupported("hidden_act", values["hidden_act"], "silu")
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise _unsupported(name, True, "false")
    window = values.get("sliding_window")
    windowed = window is not None and values.get("use_sliding_window", family == "mistral")
    if windowed and window < values.get("max_position_embeddings", 2048):
        raise _unsupported("sliding_window", window, "null, or at least max_position_embeddings")
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method")
        raise _unsupported("quantization_config", method, "unquantised weights")


def _unsupported(field: str, value: Any, allowed: str) -> ModelError:
    return ModelError(f"{CONFIG}: {field} = {value!r} is not supported", hint=f"allowed: {allowed}")


def _parts(ours: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield Hugging Face's name and our view (a slice of `tensor`) for each part of a parameter."""
    if ours in _TOP:
        yield _TOP[ours], tensor
        return
    _, index, name = ours.split(".")
    queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    sizes = {3: [queries, keys, keys], 2: [config.intermediate_size] * 2, 1: [tensor.shape[0]]}
    names = _LAYER[name]
    for part, piece in zip(names, torch.split(tensor, sizes[len(names)]), strict=True):
        yield f"model.layers.{index}.{part}", piece


_TOP = {
    "embedding_VC": "model.embed_tokens.weight",
    "norm_C": "model.norm.weight",
    "head_VC": "lm_head.weight",
}
_LAYER = {
    "attention_norm_C": ["input_layernorm.weight"],
    "qkv_YC": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "qkv_bias_Y": ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
    "q_norm_D": ["self_attn.q_norm.weight"],
    "k_norm_D": ["self_attn.k_norm.weight"],
    "out_CX": ["self_attn.o_proj.weight"],
    "mlp_norm_C": ["post_attention_layernorm.weight"],
    "gate_up_GC": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "down_CF": ["mlp.down_proj.weight"],
}


@torch.no_grad()
def _fill(decoder: Decoder, files: list[Path]) -> None:
    """Copy every tensor of the files into its place; all places must be filled, none left over."""
    places = {
        name: part
        for ours, parameter in decoder.named_parameters()
        for name, part in _parts(ours, parameter.detach(), decoder.config)
    }
    left = set(places)
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping: it has no __iter__)
                    if name not in places:
                        # A tied head is stored by some writers; buffers by old ones.
                        if name.endswith("rotary_emb.inv_freq") or (
                            name == _TOP["head_VC"] and decoder.config.tie_embeddings
                        ):
                            continue
                        raise ModelError(f"{path.name}: tensor {name} has no place in the model")
                    shape, wanted = list(file.get_slice(name).get_shape()), list(places[name].shape)
                    if shape != wanted:
                        raise ModelError(f"{path.name}: tensor {name} has shape {shape}, not {wanted}")
                    places[name].copy_(file.get_tensor(name))
                    left.discard(name)
        except FileNotFoundError:
            raise ModelError(f"no weights at {path}", hint="the folder is no whole model") from None
        except SafetensorError as error:
            raise ModelError(f"{path} is damaged: {error}", hint="copy or export the file again") from None
        except OSError as error:  # a folder, or what may not be read
            raise ModelError(f"cannot read {path}: {error}", hint="give a safetensors file") from None
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ModelError(f"{files[0].parent}: tensor {min(left)}{more} is missing")


def _read_tokenizer(folder: Path, config: ModelConfig) -> tuple[dict[str, Any], dict[str, int]]:
    """Return tokenizer_config.json's values, and the ids of bos, eos and pad where they exist."""
    path = folder / "tokenizer.json"
    values = _read_json(path)
    added = {token["content"]: token["id"] for token in values.get("added_tokens", [])}
    vocab = values["model"]["vocab"]  # a list of [text, score] in Unigram models, where the place is the id
    ids = range(len(vocab)) if isinstance(vocab, list) else vocab.values()
    size = 1 + max([*added.values(), *ids], default=-1)
    if size > config.vocab_size:
        raise ModelError(f"{path}: {size} tokens do not fit the model's vocabulary of {config.vocab_size}")
    roles = {role: f"<|{role}|>" for role in ("bos", "eos", "pad") if f"<|{role}|>" in added}
    given = folder / "tokenizer_config.json"
    if added and not roles:  # another maker's
        known = Tokenizer.load(folder)
        texts = {number: text for text, number in added.items()}
        roles = {"bos": texts[known.bos_id], "eos": texts[known.eos_id], "pad": texts[known.pad_id]}
    tokenizer = (
        (_read_json(given) if given.is_file() else {})
        | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_positions,
            "clean_up_tokenization_spaces": False,
        }
        | {f"{role}_token": token for role, token in roles.items()}
    )
    return tokenizer, {f"{role}_token_id": added[token] for role, token in roles.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"no {path.name} in {path.parent}", hint="give a Hugging Face model folder"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path} is damaged: {error}", hint="copy or export the folder again") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds no JSON object")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
