"""geglu, in both forms: every path against fp64 and plain torch, values and gradients."""

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import assert_is_node, assert_within_budget, rounded, run, usable
from thread_counts import one_and_two

from marrow.kernels.activations.geglu import (
    OPERATOR,
    backward_cpu,
    backward_triton,
    forward_cpu,
    forward_triton,
    geglu,
)
from marrow.kernels.memory import meta, phantom

PATHS = usable(OPERATOR)
DTYPES = [torch.float32, torch.bfloat16]
OURS = [path for path in PATHS if path != "reference"]  # torch's gelu(inf) is NaN, its tails are coarse
FORMS = [True, False]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("is_tanh", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 13), (5, 64), (4, 127), (3, 129)])
def test_values_and_gradients_stay_within_the_error_budget(path, is_tanh, dtype, rows, size):
    assert_within_budget(OPERATOR, path, (rounded(rows, 2 * size, seed=rows, scale=2.0), is_tanh), dtype)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "triton"])
@pytest.mark.parametrize("is_tanh", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@hypothesis.given(
    rows=st.integers(1, 40),
    size=st.integers(1, 200),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.01, 1.0, 10.0]),
)
def test_any_shape_stays_within_the_error_budget(path, is_tanh, dtype, rows, size, seed, scale):
    x = rounded(rows, 2 * size, seed=seed, scale=scale)
    # torch goes through 1 + erf or 1 + tanh, which is 0 where it should be tiny, in fp64 too: what they
    # multiply is the term; a normal gradient is below 4 or so.
    largest = float(x.abs().max())
    assert_within_budget(OPERATOR, path, (x, is_tanh), dtype, terms=(largest**2, 4 * largest))


@pytest.mark.parametrize("path", OURS)
@pytest.mark.parametrize("is_tanh", FORMS)
def test_every_gate_is_as_exact_as_its_size_allows(path, is_tanh):
    """The tails too: an error that is small beside 1 would be large beside them."""
    gate = torch.linspace(-5, 5, 1001).float()
    x = torch.cat((gate, torch.ones(1001)))[None]
    ours = OPERATOR.run(path, x, is_tanh)[0].double()
    exact = OPERATOR.run("reference", x.double(), is_tanh)[0]
    if path == "triton" and not is_tanh:  # through 1 + erf: 2^-24 beside 1, times the gate
        assert ((ours - exact).abs() <= 2.0**-23 * gate.abs()).all()
    else:  # e^-u of a u of up to 20 that has been rounded three times
        assert ((ours - exact).abs() <= 20 * 3 * 2.0**-24 * exact.abs()).all()


@pytest.mark.parametrize("path", OURS)
@pytest.mark.parametrize("is_tanh", FORMS)
def test_far_gates_close_or_pass_and_nan_stays_where_it_is(path, is_tanh):
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([0.0, -40.0, 40.0, inf, nan, 1.0, 1.0])
    up = torch.tensor([1e4, 2.0, 2.0, 2.0, 2.0, nan, inf])
    value = run(OPERATOR, path, (torch.cat((gate, up)).double()[None], is_tanh), torch.float32)[0][0]
    assert value[:4].tolist() == [0.0, 0.0, 80.0, inf]
    assert value[4:6].isnan().all()
    assert value[6] == inf


@pytest.mark.parametrize(("approximate", "scale"), [("tanh", 1.0), ("none", 3.0)])
def test_it_is_torch_s_own(approximate, scale):
    gate, up = torch.randn(5, 70) * scale, torch.randn(5, 70)
    expected = (F.gelu(gate.double(), approximate=approximate) * up.double()).float()
    ours = geglu(torch.cat((gate, up), -1), approximate)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_tanh", FORMS)
def test_a_gradient_is_that_of_finite_differences(is_tanh):
    x = rounded(3, 8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: OPERATOR.run("reference", x, is_tanh), (x,))


@pytest.mark.parametrize("path", PATHS)
def test_views_and_empty_inputs_work(path):
    x = rounded(12, 26, seed=2).float()
    view = x.view(2, 6, 26)[:, ::2]
    assert torch.equal(OPERATOR.run(path, view, True), OPERATOR.run(path, view.contiguous(), True))
    assert OPERATOR.run(path, x[:0], False).shape == (0, 13)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_too_large_for_caches_is_that_of_its_rows(dtype):
    """C writes it past the caches."""
    x, dy = torch.randn(4160, 8192).to(dtype), torch.randn(4160, 4096).to(dtype)
    assert torch.equal(forward_cpu(x, True)[::64], forward_cpu(x[::64], True))
    assert torch.equal(backward_cpu(dy, x, True)[::64], backward_cpu(dy[::64], x[::64], True))


def test_threads_change_nothing():
    x = rounded(65, 602, seed=3)
    one, two = one_and_two(lambda: run(OPERATOR, "cpu", (x, True), torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_what_it_cannot_compute_is_refused():
    with pytest.raises(ValueError, match="even"):
        geglu(torch.randn(2, 3))
    with pytest.raises(ValueError, match="sigmoid"):
        geglu(torch.randn(2, 4), "sigmoid")


def test_offsets_beyond_two_billion_elements_hit_their_tensors():
    x = meta(2**18, 16384, dtype=torch.bfloat16)
    with phantom() as watch:
        backward_triton(forward_triton(x, True), x, True)
    assert watch.launches == 2


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    assert_is_node(OPERATOR, (rounded(5, 16, seed=4).float().requires_grad_(), False))
