"""rope: every path against fp64 and plain torch, values and gradients; angles against transformers."""

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import assert_is_node, assert_within_budget, rounded, run, usable
from thread_counts import one_and_two
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from marrow.core.errors import UsageError
from marrow.kernels.activations.rope import (
    OPERATOR,
    backward_triton,
    forward_cpu,
    forward_triton,
    rope,
    rope_angles,
)
from marrow.kernels.activations.rope_scaling import RopeScaling
from marrow.kernels.memory import meta, phantom

PATHS = usable(OPERATOR)
DTYPES = [torch.float32, torch.bfloat16]


def inputs(tokens: int, heads: int, pairs: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Heads, and angles that bf16 holds exactly."""
    angles = rope_angles(torch.arange(tokens) * 7, 2 * pairs, 10_000.0, torch.bfloat16)
    return rounded(tokens, heads, 2 * pairs, seed=seed), *(angle.double() for angle in angles)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "pairs"), [(1, 1, 1), (3, 2, 13), (5, 4, 32), (2, 3, 64), (7, 1, 127), (90, 5, 3)]
)
def test_values_and_gradients_stay_within_the_error_budget(path, dtype, tokens, heads, pairs):
    assert_within_budget(OPERATOR, path, inputs(tokens, heads, pairs), dtype)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@hypothesis.given(
    tokens=st.integers(1, 40), heads=st.integers(1, 9), pairs=st.integers(1, 70), seed=st.integers(0, 2**31)
)
def test_any_shape_stays_within_the_error_budget(path, dtype, tokens, heads, pairs, seed):
    assert_within_budget(OPERATOR, path, inputs(tokens, heads, pairs, seed), dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("angles", DTYPES)
def test_angles_may_be_wider_than_the_heads(path, angles):
    x, *given = inputs(6, 2, 16)
    x, given = x.bfloat16(), [angle.to(angles) for angle in given]
    expected = OPERATOR.run("reference", x.double(), *(angle.double() for angle in given)).bfloat16()
    # one rounding of the result; plain torch in bf16 rounds its products too
    atol = 2.0**-7 if path == "reference" and angles == torch.bfloat16 else 0.0
    torch.testing.assert_close(OPERATOR.run(path, x, *given), expected, rtol=2.0**-7, atol=atol)


def test_it_is_transformers_own():
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_theta=10_000.0)
    q, k, positions = torch.randn(1, 4, 9, 64), torch.randn(1, 2, 9, 64), torch.arange(9) * 100
    theirs = apply_rotary_pos_emb(q, k, *LlamaRotaryEmbedding(config)(q, positions[None]))
    angles = rope_angles(positions, 64, 10_000.0, torch.float32)
    for ours, expected in zip((q, k), theirs, strict=True):
        torch.testing.assert_close(rope(ours[0].transpose(0, 1), *angles), expected[0].transpose(0, 1))


def test_yarn_sharpens_both_cosines_and_sines():
    scaling = RopeScaling("yarn", 4.0, 2048, fast_turns=32.0)
    cos, sin = rope_angles(torch.tensor([0, 5000]), 64, 1e4, torch.float64, scaling=scaling)
    length = (cos.square() + sin.square()).sqrt()
    torch.testing.assert_close(
        length, torch.full_like(length, 1.1386294361), rtol=1e-6, atol=0
    )  # 0.1 ln 4 + 1


def test_it_keeps_lengths_and_depends_on_distance_only():
    q, k = torch.randn(1, 2, 64, dtype=torch.float64), torch.randn(1, 2, 64, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        angles = [rope_angles(torch.tensor([at]), 64, 1e4, torch.float64) for at in (query_at, key_at)]
        return (rope(q, *angles[0]) * rope(k, *angles[1])).sum(-1)

    # Angles are made in fp32: a relative 1e-7 on an angle of up to 100.
    torch.testing.assert_close(score(17, 5), score(100, 88), rtol=1e-4, atol=1e-4)
    rotated = rope(q, *rope_angles(torch.tensor([9]), 64, 1e4, torch.float64))
    torch.testing.assert_close(rotated.norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=1e-6)


def test_a_gradient_is_that_of_finite_differences():
    x, cos, sin = inputs(3, 2, 4)
    assert torch.autograd.gradcheck(lambda x: OPERATOR.run("reference", x, cos, sin), (x.requires_grad_(),))


@pytest.mark.parametrize("path", PATHS)
def test_slices_of_fused_projections_views_and_empty_inputs_work(path):
    x, *angles = (given.float() for given in inputs(6, 5, 16))
    whole = OPERATOR.run(path, x, *angles)
    assert torch.equal(OPERATOR.run(path, x[:, 1:4], *angles), whole[:, 1:4])
    every_other = [angle[::2] for angle in angles]
    assert torch.equal(OPERATOR.run(path, x[::2], *every_other), whole[::2])
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)  # heads are not whole in memory
    assert torch.equal(OPERATOR.run(path, turned, *angles), whole)
    assert OPERATOR.run(path, x[:0], *(angle[:0] for angle in angles)).shape == (0, 5, 32)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "reference"])
def test_a_gradient_may_be_a_slice(path):
    x, *angles = (given.float() for given in inputs(6, 5, 16))
    wide = torch.randn(6, 8, 32)
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad(OPERATOR.run(path, leaf, *angles), leaf, wide[:, :5])
    (expected,) = torch.autograd.grad(OPERATOR.run("reference", leaf, *angles), leaf, wide[:, :5])
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_result_too_large_for_caches_is_that_of_its_tokens():
    """C writes it past the caches."""
    x = torch.randn(4160, 64, 128).bfloat16()
    angles = rope_angles(torch.arange(4160), 128, 1e4, torch.bfloat16)
    few = [angle[::64] for angle in angles]
    assert torch.equal(forward_cpu(x, *angles)[::64], forward_cpu(x[::64], *few))


def test_threads_change_nothing():
    given = inputs(70, 8, 32)
    one, two = one_and_two(lambda: run(OPERATOR, "cpu", given, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_angles_that_do_not_fit_are_refused():
    x, cos, sin = inputs(3, 2, 4)
    for given in ((cos[:2], sin), (cos, sin[:, :3])):
        with pytest.raises(UsageError, match=r"angles|axis|axes"):
            rope(x, *given)


def test_offsets_beyond_two_billion_elements_hit_their_tensors():
    x, angles = meta(2**19, 64, 128, dtype=torch.bfloat16), meta(2**19, 64, dtype=torch.bfloat16)
    with phantom() as watch:
        backward_triton(forward_triton(x, angles, angles), angles, angles)
    assert watch.launches == 2


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    x, *angles = (given.float() for given in inputs(5, 2, 8))
    assert_is_node(OPERATOR, (x.requires_grad_(), *angles))
