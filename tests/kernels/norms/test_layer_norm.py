"""layer_norm, with and without bias: every path against fp64 and plain torch, values and gradients."""

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
from marrow.kernels.norms.layer_norm import (
    OPERATOR,
    backward_cpu,
    backward_triton,
    forward_cpu,
    forward_triton,
    layer_norm,
)

PATHS = usable(OPERATOR)
DTYPES = [torch.float32, torch.bfloat16]

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]


def inputs(rows: int, columns: int, seed: int = 0, *, has_bias: bool = True) -> Inputs:
    bias = rounded(columns if has_bias else 0, seed=seed + 2)
    return rounded(rows, columns, seed=seed, scale=3.0) + 1, rounded(columns, seed=seed + 1), bias, 1e-5


def largest_terms(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> list[float]:
    """y and dx cancel where a row has few columns: bound x scale, and scale and g."""
    scale = torch.rsqrt(x.var(-1, correction=0) + eps)[:, None]
    size = float(weight.abs().max())
    # a normal gradient is below 4 or so; n is known to an ulp of x scale, which dweight and dx multiply
    known = float((x.abs() * scale).max())
    return [known * size, float(scale.max()) * size * 4 * max(1.0, known), known * 4 * len(x) ** 0.5]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (1, 2), (3, 13), (5, 64), (4, 127), (2, 128), (3, 129), (300, 5)]
)
def test_values_and_gradients_stay_within_the_error_budget(path, dtype, has_bias, rows, columns):
    given = inputs(rows, columns, has_bias=has_bias)
    assert_within_budget(OPERATOR, path, given, dtype, terms=largest_terms(*given))


@pytest.mark.parametrize("path", [path for path in PATHS if path != "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@hypothesis.given(rows=st.integers(1, 40), columns=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_any_shape_stays_within_the_error_budget(path, dtype, rows, columns, seed):
    given = inputs(rows, columns, seed)
    assert_within_budget(OPERATOR, path, given, dtype, terms=largest_terms(*given))


@pytest.mark.parametrize("path", PATHS)
def test_a_mean_far_from_zero_costs_no_digits(path):
    """mean(x^2) - mean^2 would: 1000^2 in fp32 has a unit in the last place of 0.06."""
    x = (rounded(3, 100, seed=1) + 1000).float()
    y = OPERATOR.run(path, x, torch.ones(100), torch.zeros(100), 1e-5)
    exact = F.layer_norm(x.double(), (100,))
    # The mean itself is known to some ulp of 1000.
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=4 * 2.0**-23 * 1000)


@pytest.mark.parametrize("has_bias", [True, False])
def test_it_is_torch_s_own(has_bias):
    x, weight, bias = torch.randn(5, 64), torch.randn(64), torch.randn(64) if has_bias else None
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-6), F.layer_norm(x, (64,), weight, bias, 1e-6))


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_is_not_finite_spoils_no_other(path):
    x, weight, bias, eps = inputs(4, 33)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    y = run(OPERATOR, path, (x, weight, bias, eps), torch.float32)[0]
    assert y[1:3].isnan().all()
    assert y[[0, 3]].isfinite().all()


def test_a_gradient_is_that_of_finite_differences():
    *leaves, eps = inputs(3, 4)
    arguments = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda *given: OPERATOR.run("reference", *given, eps), arguments)


@pytest.mark.parametrize("path", PATHS)
def test_views_leading_axes_and_empty_inputs_work(path):
    x, weight, bias, eps = (g.float() if isinstance(g, torch.Tensor) else g for g in inputs(12, 24))
    view = x.view(2, 6, 24)[:, ::2]
    expected = OPERATOR.run(path, view.contiguous(), weight, bias, eps)
    assert torch.equal(OPERATOR.run(path, view, weight, bias, eps), expected)
    assert OPERATOR.run(path, x[:0], weight, bias, eps).shape == (0, 24)


@pytest.mark.slow
def test_a_result_too_large_for_caches_is_that_of_its_rows():
    """C writes it past the caches."""
    x, dy = (torch.randn(4160, 4096).bfloat16() for _ in range(2))
    weight, bias = (torch.randn(4096).bfloat16() for _ in range(2))
    whole, *kept = forward_cpu(x, weight, bias, 1e-5)
    some, *few = forward_cpu(x[::64], weight, bias, 1e-5)
    assert torch.equal(whole[::64], some)
    dx = backward_cpu(dy, x, weight, bias, *kept)[0]
    assert torch.equal(dx[::64], backward_cpu(dy[::64], x[::64], weight, bias, *few)[0])


def test_threads_change_nothing():
    given = inputs(200, 300)
    one, two = one_and_two(lambda: run(OPERATOR, "cpu", given, torch.float32))
    assert all(map(torch.equal, one, two))


def test_a_weight_or_bias_that_does_not_fit_is_refused():
    for weight, bias in ((7, None), (8, 7)):
        with pytest.raises(UsageError, match=r"weight|bias"):
            layer_norm(torch.randn(2, 8), torch.randn(weight), torch.randn(bias) if bias else None, 1e-5)


def test_offsets_beyond_two_billion_elements_hit_their_tensors():
    x, weight = meta(3 * 2**18, 8192, dtype=torch.bfloat16), meta(8192, dtype=torch.bfloat16)
    each_tile = {("layer_norm_backward", "(8192, 'torch.bfloat16')"): {"PROGRAMS": 2**20}}  # no long loops
    with phantom() as watch, tile.configuring(each_tile):
        y, mean, scale = forward_triton(x, weight, weight, 1e-5)
        backward_triton(y, x, weight, weight, mean, scale)
    assert watch.launches == 2


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    *leaves, eps = inputs(5, 8)
    assert_is_node(OPERATOR, (*(leaf.float().requires_grad_() for leaf in leaves), eps))
