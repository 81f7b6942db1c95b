"""newton_schulz: every path against fp64, plain torch and singular values."""

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import assert_is_node, assert_within_budget, rounded, usable

from marrow.kernels.optimisers.newton_schulz import OPERATOR, A, B, C, newton_schulz

PATHS = usable(OPERATOR)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 13, 40), (1, 65, 70), (3, 64, 64)])
def test_it_stays_within_the_error_budget(path, dtype, shape):
    assert_within_budget(OPERATOR, path, (rounded(*shape, seed=1), 5), dtype)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@hypothesis.given(
    matrices=st.integers(1, 4),
    rows=st.integers(1, 40),
    more=st.integers(0, 40),
    steps=st.integers(0, 6),
    seed=st.integers(0, 2**31),
)
def test_any_shape_stays_within_the_error_budget(path, dtype, matrices, rows, more, steps, seed):
    assert_within_budget(OPERATOR, path, (rounded(matrices, rows, rows + more, seed=seed), steps), dtype)


@pytest.mark.parametrize("shape", [(2, 512, 520), (1, 515, 600)])
def test_blocks_of_a_large_matrix_stay_within_the_error_budget(shape):
    assert_within_budget(OPERATOR, "torch", (rounded(*shape, seed=2), 2), torch.float32)


@pytest.mark.parametrize("path", PATHS)
def test_singular_values_follow_the_polynomial_and_vectors_stay(path):
    """The plain oracle: on a singular value decomposition each step is a polynomial of numbers."""
    x = rounded(2, 20, 30, seed=3).float()
    u, values, vh = torch.linalg.svd(x.double(), full_matrices=False)
    values = values / (values.square().sum(-1, keepdim=True).sqrt() + 1e-7)
    for _ in range(5):
        values = A * values + B * values**3 + C * values**5
    expected = u @ torch.diag_embed(values) @ vh
    # fp32 products of sums of 30, five times, each time stretched by up to A.
    torch.testing.assert_close(OPERATOR.run(path, x, 5).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32), (2, 3, 96, 32)])
def test_all_singular_values_come_near_one(shape):
    found = torch.linalg.svdvals(newton_schulz(rounded(*shape, seed=4).float()))
    if shape[-2] != shape[-1]:  # square ones have values of almost 0, which need more steps
        assert found.min() > 0.6
    assert found.max() < 1.25


def test_a_tall_matrix_is_its_transpose_s_transpose():
    x = rounded(3, 50, 20, seed=5).float()
    # Products of other layouts round elsewhere: sums of 50 in fp32, five times.
    torch.testing.assert_close(newton_schulz(x), newton_schulz(x.mT.contiguous()).mT, rtol=0, atol=1e-5)
    torch.testing.assert_close(newton_schulz(x[0]), newton_schulz(x)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_zeros_stay_zeros_and_views_and_empty_inputs_work(path):
    x = rounded(2, 8, 24, seed=6).float()
    assert torch.equal(OPERATOR.run(path, torch.zeros(1, 3, 5), 5), torch.zeros(1, 3, 5))
    view = x[:, :, ::2]
    torch.testing.assert_close(OPERATOR.run(path, view, 5), OPERATOR.run(path, view.contiguous(), 5))
    assert OPERATOR.run(path, x[:0], 5).shape == (0, 8, 24)


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    assert_is_node(OPERATOR, (rounded(2, 5, 8, seed=7).float(), 3))
