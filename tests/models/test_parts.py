"""Wherever the pieces of a model lie, their regions make up each logical tensor exactly once."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from marrow.models import huggingface
from marrow.models.config import ModelConfig
from marrow.models.decoder import Decoder, fresh
from marrow.models.parts import num_rows, parts, regions

TINY = ModelConfig(
    vocab_size=24,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=2,
    max_positions=16,
)
CONFIGS = {
    "qwen3": TINY,
    "qwen2": dataclasses.replace(TINY, qk_norm=False, qkv_bias=True),
    "untied": dataclasses.replace(TINY, tie_embeddings=False),
    "mixtral": dataclasses.replace(TINY, qk_norm=False, num_experts=4),
    "qwen3-moe": dataclasses.replace(TINY, num_experts=3),
}


def share(ours: str, whole: Tensor, config: ModelConfig, tp_rank: int, tp: int) -> Tensor:
    """Cut out what a tensor-parallel rank holds of a parameter, part by part, in plain steps."""
    rows = whole.flatten(0, 1) if whole.ndim == 3 else whole
    pieces, row = [], 0
    for part in parts(ours, config):
        piece = rows[row : row + part.shape[0]]
        if part.cut is not None:
            piece = piece.chunk(tp, dim=part.cut)[tp_rank]
        pieces.append(piece)
        row += part.shape[0]
    assert row == rows.shape[0]
    return torch.cat(pieces)


@pytest.mark.parametrize("family", CONFIGS)
@given(
    tp=st.sampled_from([1, 2]),
    cuts=st.lists(st.floats(0, 1), max_size=3),
    seed=st.integers(0, 2**31),
)
def test_pieces_of_any_layout_make_up_the_whole(family, tp, cuts, seed):
    config = CONFIGS[family]
    decoder = Decoder(config, seed=seed)
    expected = huggingface.state_dict(decoder)
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    times = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    for ours, parameter in decoder.named_parameters():
        for tp_rank in range(tp):
            held = share(ours, parameter.detach(), config, tp_rank, tp)
            assert held.shape[0] == num_rows(ours, config, tp)
            borders = [0, *sorted(round(cut * held.shape[0]) for cut in cuts), held.shape[0]]
            for low, high in itertools.pairwise(borders):
                piece = held[low:high]
                where = {"tp_rank": tp_rank, "tp": tp, "first_row": low, "rows": high - low}
                for region in regions(ours, config, **where):
                    assert region.shape == expected[region.name].shape
                    found[region.name][region.box] = region.of(piece)
                    times[region.name][region.box] += 1
    cut_names = {
        p.name for ours, _ in decoder.named_parameters() for p in parts(ours, config) if p.cut is not None
    }
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        held_by = 1 if name in cut_names else tp  # what is not cut, every tensor-parallel rank holds
        assert bool((times[name] == held_by).all()), name


@pytest.mark.parametrize("family", CONFIGS)
def test_regions_are_views_into_the_parameter(family):
    decoder = Decoder(CONFIGS[family])
    for ours, parameter in decoder.named_parameters():
        for region in regions(ours, decoder.config):
            region.of(parameter.detach()).fill_(7.0)
    assert all(bool((parameter == 7.0).all()) for parameter in decoder.parameters())


@pytest.mark.parametrize("family", CONFIGS)
def test_a_stage_draws_the_weights_that_the_whole_draws(family):
    config = CONFIGS[family]
    whole = dict(Decoder(config, seed=5).named_parameters())
    seen = set()
    for layers in (range(1), range(1, 2)):
        for name, parameter in Decoder(config, seed=5, layers=layers).named_parameters():
            assert torch.equal(parameter, whole[name]), name
            seen.add(name)
    assert seen == set(whole)


def test_every_tensor_has_numbers_of_its_own():
    """Two tensors of one shape, or one tensor under two seeds, never draw the same."""
    names = [part.name for index in range(2) for part in parts(f"layers.{index}.gate_up_GC", TINY)]
    drawn = [fresh(name, (12, 8), TINY, seed) for name in names for seed in (0, 1, 2**63)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_what_writes_to_the_stream_starts_smaller():
    config = dataclasses.replace(TINY, num_layers=8)
    for name, scale in (("o_proj", 0.25), ("experts.0.w2", 0.25), ("down_proj", 0.25), ("q_proj", 1.0)):
        drawn = fresh(f"model.layers.0.x.{name}.weight", (200, 200), config, 3)
        # 40,000 draws know their own deviation to 0.35 %: 2 % is more than five times that.
        assert drawn.std().item() == pytest.approx(config.initial_std * scale, rel=0.02)
