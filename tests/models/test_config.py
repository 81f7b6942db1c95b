import subprocess
import sys

import pytest
import torch

from marrow.core.config import load_recipe
from marrow.core.errors import RecipeError
from marrow.models.config import ModelConfig
from marrow.models.decoder import Decoder


def test_it_is_readable_without_torch():
    program = "import sys, marrow.models.config; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"qk_norm": False},
        {"qk_norm": False, "qkv_bias": True},
        {"tie_embeddings": False},
        {"num_kv_heads": 4, "num_layers": 1, "head_size": 6},
        {"num_experts": 5},
    ],
)
def test_parameters_are_counted_as_the_decoder_has_them(change, tiny):
    values = {name: getattr(tiny, name) for name in tiny.__dataclass_fields__}
    config = ModelConfig(**(values | change))
    assert config.num_parameters() == sum(p.numel() for p in Decoder(config, device="meta").parameters())


def test_flops_are_those_that_torch_counts(tiny, logits_of):
    """torch counts the products of a plain forward; attention there is full, not causal."""
    from torch.utils.flop_counter import FlopCounterMode

    from marrow.kernels import dispatch

    dispatch.reset("reference")
    length = 16
    with FlopCounterMode(display=False) as counter:
        logits_of(Decoder(tiny), torch.zeros(1, length, dtype=torch.int64))
    dispatch.reset()
    square = 4 * tiny.num_layers * tiny.num_heads * tiny.head_size * length
    causal = square * (length + 1) / 2 / length
    assert counter.get_total_flops() / length == tiny.flops_per_token(length) - causal + square
    assert tiny.flops_per_token(length, backward=True) == 3 * tiny.flops_per_token(length)


def test_kv_bytes_are_those_of_the_cache_s_tensors(tiny):
    k = torch.zeros(tiny.num_layers, 1, tiny.num_kv_heads, tiny.head_size, dtype=torch.bfloat16)
    assert tiny.kv_bytes_per_token(2) == 2 * k.numel() * k.element_size()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3, "num_kv_heads": 2}, "no multiple of num_kv_heads"),
        ({"head_size": 7}, "odd"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"qk_norm": True, "qkv_bias": True}, "exclude"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**change)


def test_a_recipe_gets_the_same_refusal_with_its_line(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[model]\nnum_heads = 3\nnum_kv_heads = 2\n")
    with pytest.raises(RecipeError, match=r"r.toml:2.*\[model\] num_heads = 3"):
        load_recipe(recipe, {"model": ModelConfig})


def test_the_vocabulary_is_the_tokenizer_s_unless_it_is_larger():
    assert ModelConfig().with_vocab_size(300).vocab_size == 300
    assert ModelConfig(vocab_size=512).with_vocab_size(300).vocab_size == 512
    with pytest.raises(ValueError, match="less than the tokenizer's 300"):
        ModelConfig(vocab_size=299).with_vocab_size(300)


def test_the_defaults_are_a_few_million_parameters():
    assert 1e6 < ModelConfig().with_vocab_size(4096).num_parameters() < 1e7
