"""swiglu: every path against fp64 and plain torch, values and gradients."""

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import assert_is_node, assert_within_budget, rounded, run, usable
from thread_counts import one_and_two

from marrow.kernels.activations.swiglu import (
    OPERATOR,
    backward_cpu,
    backward_triton,
    forward_cpu,
    forward_triton,
    swiglu,
)
from marrow.kernels.memory import meta, phantom

PATHS = usable(OPERATOR)
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (3, 13), (5, 64), (4, 127), (2, 128), (3, 129), (1, 2049), (130, 17)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), SHAPES)
def test_values_and_gradients_stay_within_the_error_budget(path, dtype, rows, size):
    assert_within_budget(OPERATOR, path, (rounded(rows, 2 * size, seed=rows, scale=2.0),), dtype)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@hypothesis.given(
    rows=st.integers(1, 40),
    size=st.integers(1, 200),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_any_shape_stays_within_the_error_budget(path, dtype, rows, size, seed, scale):
    assert_within_budget(OPERATOR, path, (rounded(rows, 2 * size, seed=seed, scale=scale),), dtype)


@pytest.mark.parametrize("path", PATHS)
def test_of_two_bf16_numbers_that_are_equally_near_it_gives_the_even_one(path):
    """A gate of 64 or more is open: gate up, dy gate and dy up are exact, and often ties."""
    gate = (64 + torch.arange(128) / 2).expand(2, 128)
    up, dy = (torch.tensor(x)[:, None].expand(2, 128) for x in ([1.5, -1.25], [-1.0625, 1.75]))
    is_tie = ((gate * up).view(torch.int32) & 0xFFFF) == 0x8000
    odd = ((gate * up).view(torch.int32) >> 16)[is_tie] & 1  # of the nearer to 0
    assert 10 < odd.sum() < len(odd) - 10
    given = torch.cat((gate, up), 1).bfloat16().requires_grad_()
    y = OPERATOR.run(path, given)
    (dgate_up,) = torch.autograd.grad(y, given, dy.bfloat16())
    for found, exact in zip((y, *dgate_up.chunk(2, 1)), (gate * up, dy * up, dy * gate), strict=True):
        assert torch.equal(found, exact.bfloat16())


@pytest.mark.parametrize("path", PATHS)
def test_far_gates_close_or_pass_and_what_is_not_finite_stays_where_it_is(path):
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([0.0, -200.0, -88.0, 88.0, 200.0, inf, -inf, nan, 1.0, 1.0, 3e38])
    up = torch.tensor([1e4, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, nan, inf, 0.5])
    assert_within_budget(OPERATOR, path, (torch.cat((gate, up)).double()[None],), torch.float32)
    value = run(OPERATOR, path, (torch.cat((gate, up)).double()[None],), torch.float32)[0][0]
    assert value[[0, 1]].tolist() == [0.0, 0.0]
    assert value[4:6].tolist() == [400.0, inf]
    assert value[[6, 7, 8]].isnan().all()


def test_it_gates_the_last_half_by_the_first():
    assert swiglu(torch.tensor([[0.0, 1e4, 2.0, 3.0]])).tolist() == [[0.0, 3e4]]


def test_it_is_torch_s_own():
    gate, up = torch.randn(5, 70), torch.randn(5, 70)
    expected = (F.silu(gate.double()) * up.double()).float()
    torch.testing.assert_close(swiglu(torch.cat((gate, up), -1)), expected, rtol=1e-6, atol=1e-7)


def test_a_gradient_is_that_of_finite_differences():
    assert torch.autograd.gradcheck(
        lambda x: OPERATOR.run("reference", x), (rounded(3, 8, seed=1).requires_grad_(),)
    )


@pytest.mark.parametrize("path", PATHS)
def test_views_leading_axes_and_empty_inputs_work(path):
    x = rounded(12, 26, seed=2).float()
    view = x.view(2, 6, 26)[:, ::2]
    assert torch.equal(OPERATOR.run(path, view), OPERATOR.run(path, view.contiguous()))
    turned = x.T[:, :10]  # torch's own silu differs in the last place between layouts
    torch.testing.assert_close(
        OPERATOR.run(path, turned), OPERATOR.run(path, turned.contiguous()), rtol=1e-6, atol=0
    )
    assert OPERATOR.run(path, x[:0]).shape == (0, 13)
    assert OPERATOR.run(path, x[:, :0]).shape == (12, 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_too_large_for_caches_is_that_of_its_rows(dtype):
    """C writes it past the caches."""
    x, dy = torch.randn(4160, 8192).to(dtype), torch.randn(4160, 4096).to(dtype)
    assert torch.equal(forward_cpu(x)[::64], forward_cpu(x[::64]))
    assert torch.equal(backward_cpu(dy, x)[::64], backward_cpu(dy[::64], x[::64]))


def test_threads_change_nothing():
    x = rounded(65, 602, seed=3).float()
    one, two = one_and_two(lambda: run(OPERATOR, "cpu", (x.double(),), torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_an_odd_number_of_channels_is_refused():
    with pytest.raises(ValueError, match="even"):
        swiglu(torch.randn(2, 3))


def test_offsets_beyond_two_billion_elements_hit_their_tensors():
    x = meta(2**18, 16384, dtype=torch.bfloat16)
    with phantom() as watch:
        backward_triton(forward_triton(x), x)
    assert watch.launches == 2


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    assert_is_node(OPERATOR, (rounded(5, 16, seed=4).float().requires_grad_(),))
