"""add_rms_norm: every path against fp64 and plain torch, values and gradients."""

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import assert_is_node, assert_within_budget, rounded, run, usable
from thread_counts import one_and_two

from marrow.core.errors import UsageError
from marrow.kernels import tile
from marrow.kernels.memory import meta, phantom
from marrow.kernels.norms.add_rms_norm import (
    OPERATOR,
    add_rms_norm,
    backward_cpu,
    backward_triton,
    forward_cpu,
    forward_triton,
)

PATHS = usable(OPERATOR)
OURS = [path for path in PATHS if path != "reference"]
DTYPES = [torch.float32, torch.bfloat16]

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]


def inputs(rows: int, columns: int, seed: int = 0) -> Inputs:
    """A sum that bf16 holds too, so that all dtypes norm the same numbers: see the test of rounding."""
    total, residual = (rounded(rows, columns, seed=seed + i).mul(8).round().div(8) for i in range(2))
    return residual, total - residual, rounded(columns, seed=seed + 2), 1e-5


def largest_terms(residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> list[float]:
    """dx = dtotal + scale (g - n mean(g n)) cancels where a row has few columns: bound scale and g."""
    scale = torch.rsqrt((residual + x).square().mean(-1) + eps).max()
    term = float(scale * weight.abs().max() * 4)  # a normal gradient is below 4 or so
    # a sum over rows in another order: known to some ulp of what it may grow to on the way
    return [0.0, 0.0, term, term, 4 * len(x) ** 0.5]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (1, 2), (3, 13), (5, 64), (4, 127), (2, 128), (3, 129), (300, 5)]
)
def test_values_and_gradients_stay_within_the_error_budget(path, dtype, rows, columns):
    given = inputs(rows, columns)
    assert_within_budget(OPERATOR, path, given, dtype, terms=largest_terms(*given))


@pytest.mark.parametrize("path", [path for path in PATHS if path != "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@hypothesis.given(rows=st.integers(1, 40), columns=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_any_shape_stays_within_the_error_budget(path, dtype, rows, columns, seed):
    given = inputs(rows, columns, seed)
    assert_within_budget(OPERATOR, path, given, dtype, terms=largest_terms(*given))


@pytest.mark.parametrize("path", PATHS)
def test_the_sum_is_rounded_before_it_is_normed(path):
    """Backward reads the rounded sum: with another in forward it would differentiate another function."""
    residual, x, weight = (
        rounded(*shape, seed=i).bfloat16() for i, shape in enumerate([(7, 96)] * 2 + [(96,)])
    )
    y, total = OPERATOR.run(path, residual, x, weight, 1e-5)
    assert torch.equal(total, residual + x)
    # The sum of the rounded sum and nothing is itself: the same numbers are normed, to the bit.
    assert torch.equal(y, OPERATOR.run(path, total, torch.zeros_like(x), weight, 1e-5)[0])


def test_it_is_torch_s_own():
    residual, x, weight = torch.randn(5, 64), torch.randn(5, 64), torch.randn(64)
    y, total = add_rms_norm(residual, x, weight, 1e-6)
    assert torch.equal(total, residual + x)
    torch.testing.assert_close(y, F.rms_norm(residual + x, (64,), weight, 1e-6))


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_is_not_finite_spoils_no_other(path):
    residual, x, weight, eps = inputs(4, 33)
    residual[1, 3], x[2, 0] = float("nan"), float("inf")
    y, total = run(OPERATOR, path, (residual, x, weight, eps), torch.float32)[:2]
    assert y[1].isnan().all()
    assert total[1].isnan().sum() == 1
    assert (y[2, 1:] == 0).all()
    assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("path", OURS)
@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone_may_be_used(path, used):
    residual, x, weight, eps = inputs(3, 40)
    leaves = [given.float().requires_grad_() for given in (residual, x, weight)]
    grad = torch.randn(3, 40)
    found = {
        name: torch.autograd.grad(OPERATOR.run(name, *leaves, eps)[used], leaves, grad, allow_unused=True)
        for name in (path, "reference")
    }
    for ours, expected in zip(found[path], found["reference"], strict=True):
        expected = torch.zeros_like(ours) if expected is None else expected
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_gradient_is_that_of_finite_differences():
    *leaves, eps = inputs(3, 4)
    arguments = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda *given: OPERATOR.run("reference", *given, eps), arguments)


@pytest.mark.parametrize("path", PATHS)
def test_views_leading_axes_and_empty_inputs_work(path):
    residual, x, weight, eps = (g.float() if isinstance(g, torch.Tensor) else g for g in inputs(12, 24))
    views = residual.view(2, 6, 24)[:, ::2], x.view(2, 6, 24)[:, 1::2]
    expected = OPERATOR.run(path, *(view.contiguous() for view in views), weight, eps)
    assert all(map(torch.equal, OPERATOR.run(path, *views, weight, eps), expected))
    assert OPERATOR.run(path, residual[:0], x[:0], weight, eps)[0].shape == (0, 24)


@pytest.mark.slow
def test_results_too_large_for_caches_are_those_of_their_rows():
    """C writes them past the caches."""
    residual, x, dy, dtotal = (torch.randn(4160, 4096).bfloat16() for _ in range(4))
    weight = torch.randn(4096).bfloat16()
    y, total, scale = forward_cpu(residual, x, weight, 1e-5)
    some = forward_cpu(residual[::64], x[::64], weight, 1e-5)
    assert torch.equal(y[::64], some[0])
    assert torch.equal(total[::64], some[1])
    dx = backward_cpu(dy, dtotal, total, weight, scale)[0]
    assert torch.equal(dx[::64], backward_cpu(dy[::64], dtotal[::64], *some[1:2], weight, some[2])[0])


def test_threads_change_nothing():
    given = inputs(200, 300)
    one, two = one_and_two(lambda: run(OPERATOR, "cpu", given, torch.float32))
    assert all(map(torch.equal, one, two))


def test_what_does_not_fit_is_refused():
    x, weight = torch.randn(2, 8), torch.randn(8)
    for residual in (torch.randn(1, 8), x.bfloat16()):
        with pytest.raises((UsageError, ValueError), match="equal"):
            add_rms_norm(residual, x, weight, 1e-5)
    with pytest.raises(UsageError, match=r"weight|bias"):
        add_rms_norm(x, x, weight[:7], 1e-5)


def test_offsets_beyond_two_billion_elements_hit_their_tensors():
    x, weight = meta(3 * 2**18, 8192, dtype=torch.bfloat16), meta(8192, dtype=torch.bfloat16)
    each_tile = {("add_rms_norm_backward", "(8192, 'torch.bfloat16')"): {"PROGRAMS": 2**20}}  # no long loops
    with phantom() as watch, tile.configuring(each_tile):
        y, total, scale = forward_triton(x, x, weight, 1e-5)
        backward_triton(y, total, total, weight, scale)
    assert watch.launches == 2


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    *leaves, eps = inputs(5, 8)
    assert_is_node(OPERATOR, (*(leaf.float().requires_grad_() for leaf in leaves), eps))
