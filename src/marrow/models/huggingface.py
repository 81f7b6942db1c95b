"""Hugging Face folders, both ways: config.json, safetensors in one file or in shards, tokenizer files.

Names on disk are Hugging Face's, so any tool of that world reads our exports and we read theirs.
`families.py` maps the configuration, `parts.py` the names; fused tensors are split on the way out and
joined on the way in. A large model is written in shards with an index, and read file by file: never more
than one tensor is in memory twice.

Source: the folder layout of transformers 5 and safetensors.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from marrow.core.errors import ModelError
from marrow.models.config import ModelConfig
from marrow.models.decoder import Decoder
from marrow.models.families import CONFIG, from_config, to_config
from marrow.models.parts import regions
from marrow.text.tokenizer import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 5_000_000_000  # transformers' own, so that folders look alike


def save(
    folder: Path, decoder: Decoder, tokenizer_folder: Path | None = None, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a folder that `transformers` and `load` read.

    Args: folder: made if it is not there. tokenizer_folder: holds tokenizer.json; None leaves
        the tokenizer files out. shard_bytes: weights beyond this are spread over several files.
    Raises: ModelError if the tokenizer has more tokens than the model's vocabulary, or no family of Hugging
        Face has such a shape.
    """
    values = to_config(decoder.config)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = next(name for name, kind in DTYPES.items() if kind == decoder.dtype)
    tokens: dict[str, int] = {}
    if tokenizer_folder is not None:
        shutil.copyfile(tokenizer_folder / "tokenizer.json", folder / "tokenizer.json")
        tokenizer, tokens = _read_tokenizer(tokenizer_folder, decoder.config)
        _write_json(folder / "tokenizer_config.json", tokenizer)
        _write_json(folder / "generation_config.json", {"_from_model_config": False} | tokens)
    _write_json(folder / CONFIG, values | {"dtype": dtype} | tokens)
    _save_shards(folder, decoder, shard_bytes)


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
    return {name: _on_cpu(view) for name, view in _views(decoder).items()}


def _views(decoder: Decoder) -> dict[str, Tensor]:
    """Return the decoder's own memory under Hugging Face names."""
    return {
        region.name: region.of(parameter.detach())
        for ours, parameter in decoder.named_parameters()
        for region in regions(ours, decoder.config)
    }


def _on_cpu(view: Tensor) -> Tensor:
    return view.cpu().contiguous().clone()


def _save_shards(folder: Path, decoder: Decoder, shard_bytes: int) -> None:
    """Write the weights in files of at most `shard_bytes`, a larger tensor alone in one."""
    views = _views(decoder)
    shards: list[list[str]] = [[]]
    size = 0
    for name, view in views.items():
        if shards[-1] and size + view.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += view.nbytes
    if len(shards) == 1:
        save_weights(folder / WEIGHTS, decoder)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _on_cpu(views[name]) for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(view.nbytes for view in views.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / INDEX, index)


@torch.no_grad()
def _fill(decoder: Decoder, files: list[Path]) -> None:
    """Copy every tensor of the files into its place; all places must be filled, none left over."""
    places = _views(decoder)
    left = set(places)
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping: it has no __iter__)
                    if name not in places:
                        # A tied head is stored by some writers; buffers by old ones.
                        if name.endswith("rotary_emb.inv_freq") or (
                            name == "lm_head.weight" and decoder.config.tie_embeddings
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
