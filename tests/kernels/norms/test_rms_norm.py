"""rms_norm: every path against fp64 and plain torch, values and gradients."""

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
from marrow.kernels.norms.rms_norm import (
    OPERATOR,
    backward_cpu,
    backward_triton,
    forward_cpu,
    forward_triton,
    rms_norm,
)

PATHS = usable(OPERATOR)
DTYPES = [torch.float32, torch.bfloat16]


def inputs(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, float]:
    return rounded(rows, columns, seed=seed, scale=3.0), rounded(columns, seed=seed + 1), 1e-5


def largest_terms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[float, float, float]:
    """dx = scale (g - n mean(g n)) cancels where a row has few columns: bound scale and g."""
    scale = torch.rsqrt(x.square().mean(-1) + eps).max()
    # A normal gradient is below 4 or so. dweight is a sum over rows in another order: known to some ulp of
    # what it may grow to on the way.
    return 0.0, float(scale * weight.abs().max() * 4), 4 * len(x) ** 0.5


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (1, 2), (3, 13), (5, 64), (4, 127), (2, 128), (3, 129)]
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
@pytest.mark.parametrize("columns", [64, 8])
def test_of_two_bf16_numbers_that_are_equally_near_it_gives_the_even_one(path, columns):
    """Rows of 1.5 and 0.5 with a mean square of 1, and no epsilon: 1.5 weight is exact, and often a tie."""
    x_C = torch.tensor([1.5, -0.5, 0.5, -1.5, 0.5, 1.5, -0.5, 0.5]).repeat(columns // 8)
    weights = 1 + torch.arange(1, 128, 3)[:, None].expand(-1, columns) / 128
    exact = x_C * weights
    is_tie = (exact.view(torch.int32) & 0xFFFF) == 0x8000
    odd = (exact.view(torch.int32) >> 16)[is_tie] & 1  # of the nearer to 0
    assert 10 < odd.sum() < len(odd) - 10
    found = torch.cat([OPERATOR.run(path, x_C.bfloat16()[None], w.bfloat16(), 0.0) for w in weights])
    assert torch.equal(found, exact.bfloat16())


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_is_not_finite_spoils_no_other(path):
    x, weight, eps = inputs(4, 33)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    y = run(OPERATOR, path, (x, weight, eps), torch.float32)[0]
    assert y[1].isnan().all()
    assert y[2, 0].isnan()  # infinity times a scale of 0
    assert (y[2, 1:] == 0).all()
    assert y[[0, 3]].isfinite().all()
    assert_within_budget(OPERATOR, path, (x[[0, 3]], weight, eps), torch.float32)


def test_a_gradient_is_that_of_finite_differences():
    x, weight, eps = inputs(3, 4)
    arguments = x.requires_grad_(), weight.requires_grad_(), eps
    assert torch.autograd.gradcheck(lambda *given: OPERATOR.run("reference", *given), arguments)


@pytest.mark.parametrize("path", PATHS[1:])  # torch sums in another order where strides differ
def test_views_leading_axes_and_empty_inputs_work(path):
    x, weight, eps = inputs(12, 24)
    given = x.float().view(2, 6, 24)[:, ::2], weight.float()[::1], eps
    expected = OPERATOR.run(path, given[0].contiguous(), *given[1:])
    assert torch.equal(OPERATOR.run(path, *given), expected)
    turned = x.float().T  # 24 rows of 12, not contiguous
    twelve = weight[:12].float()
    assert torch.equal(
        OPERATOR.run(path, turned, twelve, eps), OPERATOR.run(path, turned.contiguous(), twelve, eps)
    )
    assert OPERATOR.run(path, x[:0].float(), weight.float(), eps).shape == (0, 24)


@pytest.mark.slow
def test_a_result_too_large_for_caches_is_that_of_its_rows():
    """C writes it past the caches."""
    x, dy = (torch.randn(4160, 4096).bfloat16() for _ in range(2))
    weight = torch.randn(4096).bfloat16()
    whole, scale = forward_cpu(x, weight, 1e-5)
    some, few = forward_cpu(x[::64], weight, 1e-5)
    assert torch.equal(whole[::64], some)
    assert torch.equal(
        backward_cpu(dy, x, weight, scale)[0][::64], backward_cpu(dy[::64], x[::64], weight, few)[0]
    )


def test_threads_change_nothing():
    given = inputs(200, 300)
    one, two = one_and_two(lambda: run(OPERATOR, "cpu", given, torch.float32))
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("path", PATHS)
def test_many_rows_cost_the_weight_s_gradient_no_digits(path):
    """Summed one by one in fp32, 5000 rows would err by tens of ulp."""
    given = inputs(5000, 3)
    assert_within_budget(OPERATOR, path, given, torch.float32, terms=(0.0, float("inf"), 0.0))


def test_statistics_do_not_overflow_half_precision():
    x = torch.full((2, 8), 3e4, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, torch.ones(8, dtype=torch.bfloat16), 1e-5), torch.ones_like(x))


def test_it_is_torch_s_own():
    x, weight = torch.randn(5, 64), torch.randn(64)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), F.rms_norm(x, (64,), weight, 1e-6))


def test_a_weight_that_does_not_fit_is_refused():
    with pytest.raises(UsageError, match=r"weight|bias"):
        rms_norm(torch.randn(2, 8), torch.randn(7), 1e-5)


def test_offsets_beyond_two_billion_elements_hit_their_tensors():
    x, weight = meta(3 * 2**18, 8192, dtype=torch.bfloat16), meta(8192, dtype=torch.bfloat16)
    each_tile = {("rms_norm_backward", "(8192, 'torch.bfloat16')"): {"PROGRAMS": 2**20}}  # no long loops
    with phantom() as watch, tile.configuring(each_tile):
        y, scale = forward_triton(x, weight, 1e-5)
        backward_triton(y, x, weight, scale)
    assert watch.launches == 2


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    x, weight, eps = inputs(5, 8)
    assert_is_node(OPERATOR, (x.float().requires_grad_(), weight.float().requires_grad_(), eps))
