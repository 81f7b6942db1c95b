"""rope_frequencies: each way to stretch a context gives Hugging Face's frequencies."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from marrow.kernels.activations.rope_frequencies import frequencies
from marrow.kernels.activations.rope_scaling import RopeScaling

HEAD_SIZE, THETA = 64, 500_000.0

CASES = {
    "linear": ({"factor": 4.0}, RopeScaling("linear", 4.0), 0),
    "dynamic": ({"factor": 2.0}, RopeScaling("dynamic", 2.0, 4096), 0),
    "dynamic, longer": ({"factor": 2.0}, RopeScaling("dynamic", 2.0, 4096), 9000),
    "llama3": (
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        RopeScaling("llama3", 8.0, 8192),
        0,
    ),
    "yarn": (
        {"factor": 4.0, "original_max_position_embeddings": 2048},
        RopeScaling("yarn", 4.0, 2048),
        0,
    ),
    "yarn, not truncated": (
        {
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 24,
            "beta_slow": 2,
            "truncate": False,
            "mscale": 0.707,
            "mscale_all_dim": 1.2,
        },
        RopeScaling("yarn", 40.0, 4096, 2.0, 24.0, mscale=0.707, mscale_all_dim=1.2, is_truncated=False),
        0,
    ),
    "yarn, given factor": (
        {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.5},
        RopeScaling("yarn", 4.0, 32, fast_turns=32.0, attention_factor=1.5),
        0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_hugging_face_s(case):
    given, scaling, length = CASES[case]
    config = LlamaConfig(
        hidden_size=4 * HEAD_SIZE,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": scaling.kind, "rope_theta": THETA, **given},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[scaling.kind](config, None, seq_len=length or None)
    ours, ours_factor = frequencies(HEAD_SIZE, THETA, scaling, length=length)
    assert ours.dtype == torch.float32
    # The same fp32 sums in another order: 2 ulp; powers of theta in fp32 alone differ by some.
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert ours_factor == pytest.approx(factor, rel=1e-12)


def test_a_dynamic_context_is_stretched_only_when_it_is_exceeded():
    scaling = RopeScaling("dynamic", 2.0, 4096)
    plain = frequencies(HEAD_SIZE, THETA)[0]
    assert torch.equal(frequencies(HEAD_SIZE, THETA, scaling, length=4096)[0], plain)
    assert (frequencies(HEAD_SIZE, THETA, scaling, length=4097)[0][1:] < plain[1:]).all()


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_fast_pairs_are_kept_and_slow_ones_are_stretched(kind):
    scaling, plain = RopeScaling(kind, 8.0, 8192), frequencies(HEAD_SIZE, THETA)[0]
    ours = frequencies(HEAD_SIZE, THETA, scaling)[0]
    assert torch.equal(ours[:2], plain[:2])
    torch.testing.assert_close(ours[-2:], plain[-2:] / 8.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "longrope", "factor": 2.0, "original_positions": 8}, "kind = 'longrope'"),
        ({"kind": "YARN", "factor": 2.0, "original_positions": 8}, "allowed are none, linear"),
        ({"kind": "linear", "factor": 0.5}, "factor"),
        ({"kind": "linear", "factor": float("nan")}, "factor"),
        ({"kind": "yarn", "factor": 2.0}, "original_positions"),
        ({"kind": "llama3", "factor": 2.0, "original_positions": 8, "slow_turns": 4.0}, "slow_turns"),
    ],
)
def test_what_no_kind_can_compute_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**given)
