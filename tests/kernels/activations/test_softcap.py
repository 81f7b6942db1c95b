"""softcap: every path against fp64 and plain torch, values and gradients."""

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import assert_is_node, assert_within_budget, rounded, run, usable
from thread_counts import one_and_two

from marrow.kernels.activations.softcap import (
    OPERATOR,
    backward_cpu,
    backward_triton,
    forward_cpu,
    forward_triton,
    softcap,
)
from marrow.kernels.memory import meta, phantom

PATHS = usable(OPERATOR)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (13,), (5, 64), (3, 2, 127), (2049,)])
@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_values_and_gradients_stay_within_the_error_budget(path, dtype, shape, cap):
    assert_within_budget(OPERATOR, path, (rounded(*shape, seed=1, scale=2.0), cap), dtype)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@hypothesis.given(
    size=st.integers(1, 5000),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    cap=st.sampled_from([0.7, 30.0, 50.0]),
)
def test_any_shape_stays_within_the_error_budget(path, dtype, size, seed, scale, cap):
    # 1 - tanh^2 cancels, to 0 in plain torch: the gradient that it multiplies, up to 4, is the term.
    assert_within_budget(
        OPERATOR, path, (rounded(size, seed=seed, scale=scale), cap), dtype, terms=(0.0, 4.0)
    )


@pytest.mark.parametrize("path", PATHS)
def test_small_logits_pass_and_large_ones_stay_within_the_cap(path):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, 1e-30, -1e-3, 1e4, -1e4, inf, -inf, nan]).double()
    value, grad = run(OPERATOR, path, (x, 30.0), torch.float32)
    assert value[0] == 0
    torch.testing.assert_close(value[1:3], x[1:3].float(), rtol=1e-6, atol=0)
    assert value[3:7].tolist() == [30.0, -30.0, 30.0, -30.0]
    assert value[7].isnan()
    assert (grad[3:7] == 0).all()


def test_a_gradient_is_that_of_finite_differences():
    x = rounded(3, 8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: OPERATOR.run("reference", x, 0.7), (x,))


@pytest.mark.parametrize("path", PATHS)
def test_views_and_empty_inputs_work(path):
    x = rounded(12, 26, seed=2).float()
    assert torch.equal(OPERATOR.run(path, x.T, 2.0), OPERATOR.run(path, x, 2.0).T)
    assert OPERATOR.run(path, x[:0], 2.0).shape == (0, 26)


@pytest.mark.slow
def test_a_result_too_large_for_caches_is_that_of_its_parts():
    """C writes it past the caches."""
    x, dy = (torch.randn(4160, 4096).bfloat16() for _ in range(2))
    assert torch.equal(forward_cpu(x, 2.0)[::64], forward_cpu(x[::64], 2.0))
    assert torch.equal(backward_cpu(dy, x, 2.0)[::64], backward_cpu(dy[::64], x[::64], 2.0))


def test_threads_change_nothing():
    x = rounded(40_001, seed=3)
    one, two = one_and_two(lambda: run(OPERATOR, "cpu", (x, 2.0), torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("cap", [0.0, -1.0, float("nan")])
def test_a_cap_that_is_not_positive_is_refused(cap):
    with pytest.raises(ValueError, match="cap"):
        softcap(torch.randn(2), cap)


def test_offsets_beyond_two_billion_elements_hit_their_tensors():
    x = meta(3 * 2**30, dtype=torch.bfloat16)
    with phantom() as watch:
        backward_triton(forward_triton(x, 2.0), x, 2.0)
    assert watch.launches == 2


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    assert_is_node(OPERATOR, (rounded(5, 16, seed=4).float().requires_grad_(), 1.5))
