import dataclasses
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from marrow.core.errors import ModelError
from marrow.kernels.activations.rope_scaling import RopeScaling
from marrow.models import families, huggingface
from marrow.models.decoder import Decoder

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.2,  # large, so that every part of the model matters to the logits
    "rms_norm_eps": 1e-5,
}
FAMILIES = {  # a configuration's class and what it is given beside SHAPE
    "llama": ("LlamaConfig", {}),
    "llama, other head size, theta, tied": (
        "LlamaConfig",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral, window beyond the context": ("MistralConfig", {"sliding_window": 64}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "llama 3.1": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama, linear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama, dynamic": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "qwen3, yarn": (
        "Qwen3Config",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral, window": ("MistralConfig", {"sliding_window": 7}),
    "qwen2, window in the upper layer": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3, window": (
        "Qwen3Config",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, window": (
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 6},
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16},
    ),
    "qwen3-moe, normalised": (
        "Qwen3MoeConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "head_dim": 8,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
}
# Both sides do the same fp32 products; only the order of sums differs: 1e-5 of logits around 1 to 10.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers():
    transformers.logging.disable_progress_bar()


@pytest.fixture
def tokens():
    return torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def tokenizer_folder(tmp_path):
    """A byte-level tokenizer with our special tokens, as text/tokenizer.py writes it."""
    special = ["<|bos|>", "<|eos|>", "<|pad|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:93]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(special + letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def config_of(family):
    """Make the configuration; not at import, which would cost every test process three seconds."""
    name, fields = FAMILIES[family]
    return getattr(transformers, name)(**SHAPE, **fields)


def peer(family, seed=0):
    """A random transformers model, norms and biases included."""
    config = config_of(family)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture
def decoder(tiny):
    decoder = Decoder(tiny, seed=11)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.2)
    return decoder


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_we_load_what_transformers_saves_and_give_the_same_logits(family, tmp_path, tokens, logits_of):
    model = peer(family)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        ours = logits_of(huggingface.load(tmp_path, torch.float32), tokens)
        torch.testing.assert_close(ours, model(tokens).logits, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"qk_norm": False},
        {"qk_norm": False, "qkv_bias": True},
        {"tie_embeddings": False},
        {"num_kv_heads": 4, "head_size": 16, "rope_theta": 1e6},
        {"qk_norm": False, "sliding_window": 7},
        {"sliding_window": 7, "full_layers": 1},
        {"rope_scaling": RopeScaling("llama3", 8.0, original_positions=16)},
        {"rope_scaling": RopeScaling("yarn", 4.0, original_positions=16, fast_turns=32.0)},
        {"num_experts": 4},
        {"num_experts": 4, "normalise_experts": False, "tie_embeddings": False},
        {"num_experts": 4, "qk_norm": False, "experts_per_token": 1},
    ],
)
def test_transformers_loads_what_we_save_and_gives_the_same_logits(change, tiny, tmp_path, tokens, logits_of):
    decoder = Decoder(dataclasses.replace(tiny, **change), seed=1)
    huggingface.save(tmp_path, decoder)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, logits_of(decoder, tokens), **CLOSE)


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": 4, "qk_norm": False, "normalise_experts": False},
        {"num_experts": 4, "sliding_window": 8, "full_layers": 1},
        {"qk_norm": False, "sliding_window": 8, "full_layers": 1},
    ],
)
def test_a_shape_that_no_family_has_is_refused_before_anything_is_written(change, tiny, tmp_path):
    with pytest.raises(ModelError, match="cannot be exported"):
        huggingface.save(tmp_path / "export", Decoder(dataclasses.replace(tiny, **change)))
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("change", [{}, {"num_experts": 3}])
@pytest.mark.parametrize("shard_bytes", [1, 8000])
def test_shards_are_no_larger_than_asked_and_are_read_by_both(
    change, shard_bytes, tiny, tmp_path, tokens, logits_of
):
    decoder = Decoder(dataclasses.replace(tiny, **change), seed=2)
    huggingface.save(tmp_path, decoder, shard_bytes=shard_bytes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert {name: file for file, tensors in files.items() for name in tensors} == index["weight_map"]
    sizes = {file: sum(t.nbytes for t in tensors.values()) for file, tensors in files.items()}
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert all(size <= shard_bytes or len(files[file]) == 1 for file, size in sizes.items())
    again = huggingface.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), again.parameters(), strict=True))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, logits_of(decoder, tokens), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_keeps_every_bit(dtype, decoder, tmp_path):
    decoder.to(dtype)
    huggingface.save(tmp_path, decoder)
    again = huggingface.load(tmp_path)
    assert again.config == decoder.config
    assert again.embedding_VC.dtype == dtype
    for (name, a), (_, b) in zip(decoder.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_equal_models_give_equal_files(decoder, tmp_path):
    for name in ("a", "b"):
        huggingface.save(tmp_path / name, decoder)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_the_tokenizer_travels_along(decoder, tokenizer_folder, tmp_path):
    huggingface.save(tmp_path / "export", decoder, tokenizer_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.decode(tokenizer("AB0")["input_ids"]) == "AB0"
    assert tokenizer.model_max_length == decoder.config.max_positions
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (0, 1)
    assert model.config.eos_token_id == 1


@pytest.mark.slow
def test_greedy_generation_of_transformers_follows_our_logits(decoder, tmp_path, logits_of):
    huggingface.save(tmp_path, decoder)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    row = [5, 6, 7]
    theirs = model.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False, pad_token_id=2)
    for _ in range(8):
        row.append(int(logits_of(decoder, torch.tensor([row]))[0, -1].argmax()))
    assert theirs[0].tolist() == row


def test_a_tokenizer_larger_than_the_model_is_refused(decoder, tokenizer_folder, tmp_path):
    small = Decoder(dataclasses.replace(decoder.config, vocab_size=90))
    with pytest.raises(ModelError, match="96 tokens do not fit the model's vocabulary of 90"):
        huggingface.save(tmp_path / "export", small, tokenizer_folder)


def test_shards_of_weights_are_read_as_one(tmp_path, tokens, logits_of):
    model = peer("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(huggingface.load(tmp_path), tokens), model(tokens).logits, **CLOSE
        )


def test_a_snapshot_is_loaded_in_place(decoder, tmp_path):
    other = Decoder(decoder.config, seed=99)
    place = other.layers["0"].qkv_YC
    huggingface.save_weights(tmp_path / "snapshot.safetensors", decoder)
    huggingface.load_weights(other, tmp_path / "snapshot.safetensors")
    assert other.layers["0"].qkv_YC is place
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_scaling": {"type": "mrope"}, "rope_parameters": None}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "original_positions"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor"),
        ({"model_type": "gemma"}, "model_type"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 32,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "layer_types",
        ),
        ({"model_type": "mixtral"}, "num_experts"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_attention_heads": 3}, "num_heads = 3"),
        ({"hidden_size": None}, "config.json"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused_by_name(change, field, tiny):
    llama = families.to_config(dataclasses.replace(tiny, qk_norm=False))
    with pytest.raises(ModelError, match=field):
        families.from_config(llama | change)


def test_a_lacking_field_is_named(tiny):
    values = families.to_config(tiny)
    del values["num_hidden_layers"]
    with pytest.raises(ModelError, match="lacks num_hidden_layers"):
        families.from_config(values)


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_survive_both_maps(family):
    config = families.from_config(config_of(family).to_dict())
    assert families.from_config(families.to_config(config)) == config


def damage_lose_tensor(tensors):
    del tensors["model.layers.1.self_attn.k_proj.weight"]


def damage_shape(tensors):
    tensors["model.norm.weight"] = torch.zeros(31)


def damage_extra(tensors):
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_lose_tensor, "tensor model.layers.1.self_attn.k_proj.weight is missing"),
        (damage_shape, r"model.norm.weight has shape \[31\], not \[32\]"),
        (damage_extra, "model.layers.2.mlp.up_proj.weight has no place"),
    ],
)
def test_wrong_tensors_are_named(damage, message, decoder, tmp_path):
    huggingface.save(tmp_path, decoder)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        huggingface.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_torn_file_is_called_damaged(keep, decoder, tmp_path):
    huggingface.save(tmp_path, decoder)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="damaged"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(name, decoder, tmp_path):
    huggingface.save(tmp_path, decoder)
    (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=name):
        huggingface.load(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    peer("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=lost.name):
        huggingface.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_config_is_called_so(text, decoder, tmp_path):
    huggingface.save(tmp_path, decoder)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"config\.json"):
        huggingface.load(tmp_path)


def test_a_head_stored_beside_a_tied_embedding_is_left_alone(decoder, tmp_path):
    huggingface.save(tmp_path, decoder)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(huggingface.load(tmp_path).embedding_VC, decoder.embedding_VC)


def test_older_spellings_of_the_config_are_read(decoder, tmp_path):
    """transformers 4 wrote rope_theta and torch_dtype, and rope_scaling null."""
    huggingface.save(tmp_path, decoder)
    values = json.loads((tmp_path / "config.json").read_text())
    values.pop("rope_parameters")
    values |= {"rope_scaling": None, "torch_dtype": values.pop("dtype"), "rope_theta": 10_000.0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert huggingface.load(tmp_path).config == decoder.config
    shutil.rmtree(tmp_path)
