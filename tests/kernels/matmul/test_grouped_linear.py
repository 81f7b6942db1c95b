"""grouped_linear: every path against fp64 and plain torch, with experts that have no rows, and a rest."""

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import (
    assert_is_node,
    assert_near,
    assert_within_budget,
    filled_with_nan,
    rounded,
    run,
    usable,
)
from sum_terms import terms_of

from marrow.kernels.matmul.grouped_linear import (
    OPERATOR,
    forward_cpu,
    grouped_linear,
    grouped_linear_reference,
    multiply_in_c,
)

PATHS = usable(OPERATOR)
DTYPES = [torch.float32, torch.bfloat16]


def inputs(
    counts: tuple[int, ...], rest: int, outputs: int, columns: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = rounded(sum(counts) + rest, columns, seed=seed)
    weight = rounded(len(counts), outputs, columns, seed=seed + 1)
    return x, weight, torch.tensor(counts).cumsum(0).int()


CASES = [
    ((1,), 0, 1, 1),
    ((0, 3, 0, 17), 0, 33, 20),
    ((5, 0), 4, 16, 70),
    ((0, 0), 2, 8, 8),
    ((2, 2, 2, 2, 2, 2, 2), 1, 13, 17),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("counts", "rest", "outputs", "columns"), CASES)
def test_values_and_gradients_stay_within_the_error_budget(path, dtype, counts, rest, outputs, columns):
    given = inputs(counts, rest, outputs, columns)
    assert_within_budget(OPERATOR, path, given, dtype, terms=terms_of(OPERATOR, given))


@pytest.mark.parametrize("path", [path for path in PATHS if path != "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@hypothesis.given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    rest=st.integers(0, 3),
    outputs=st.integers(1, 40),
    columns=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
def test_any_shape_stays_within_the_error_budget(path, dtype, counts, rest, outputs, columns, seed):
    given = inputs(tuple(counts), rest, outputs, columns, seed)
    assert_within_budget(OPERATOR, path, given, dtype, terms=terms_of(OPERATOR, given))


@pytest.mark.skipif("cpu" not in PATHS, reason="no C compiler")
@pytest.mark.parametrize("use_tiles", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@hypothesis.given(
    counts=st.lists(st.one_of(st.integers(0, 6), st.integers(0, 300)), min_size=1, max_size=4),
    rest=st.integers(0, 3),
    outputs=st.integers(1, 70),
    columns=st.one_of(st.integers(1, 70), st.sampled_from((64, 512, 544, 800))),
    seed=st.integers(0, 2**31),
)
def test_c_stays_within_the_error_budget_by_tiles_and_lanes(
    dtype, use_tiles, counts, rest, outputs, columns, seed
):
    given = inputs(tuple(counts), rest, outputs, columns, seed)
    x, weight, offsets = (part.to(dtype) if part.is_floating_point() else part for part in given)
    with filled_with_nan():
        y = multiply_in_c(x, weight, offsets, use_tiles=use_tiles)
    plain, exact = grouped_linear_reference(x, weight, offsets), grouped_linear_reference(*given)
    assert_near(y, plain, exact, term=terms_of(OPERATOR, given)[0], what=f"{dtype} tiles {use_tiles}")


@pytest.mark.skipif("cpu" not in PATHS, reason="no C compiler")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [(1, 3), (40, 0, 5), (3, 700)])
def test_threads_change_nothing(dtype, counts):
    x, weight, offsets = inputs(counts, 2, 100, 96)
    x, weight, threads = x.to(dtype), weight.to(dtype), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = multiply_in_c(x, weight, offsets, use_tiles=True)
        torch.set_num_threads(2)
        assert torch.equal(multiply_in_c(x, weight, offsets, use_tiles=True), one)
        assert forward_cpu(x, weight, offsets).shape == one.shape
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", PATHS)
def test_each_row_meets_its_own_expert_alone(path):
    """Expert e multiplies by e + 1: what a row gets tells whom it met."""
    weight = torch.eye(4).repeat(3, 1, 1) * torch.arange(1.0, 4.0)[:, None, None]
    y = OPERATOR.run(path, torch.ones(7, 4), weight, torch.tensor([2, 2, 5], dtype=torch.int32))
    assert y[:, 0].tolist() == [1, 1, 3, 3, 3, 0, 0]
    assert torch.equal(y, y[:, :1].expand(7, 4))


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_is_not_finite_spoils_no_other(path):
    x, weight, offsets = inputs((3, 4), 2, 8, 8)
    x[1, 3], x[8, 0] = float("nan"), float("inf")  # one of them in the rest
    y = run(OPERATOR, path, (x, weight, offsets), torch.float32)[0]
    assert y[1].isnan().all()
    assert y[[0, 2, 3, 4, 5, 6, 7]].isfinite().all()


def test_a_gradient_is_that_of_finite_differences():
    x, weight, offsets = inputs((2, 0, 3), 1, 3, 4)
    arguments = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: OPERATOR.run("reference", *given, offsets), arguments)


@pytest.mark.parametrize("path", PATHS)
def test_views_and_empty_inputs_work(path):
    x, weight, offsets = inputs((3, 2), 0, 6, 16)
    x, weight = x.float(), weight.float()
    expected = OPERATOR.run(path, x[:, ::2].contiguous(), weight[..., ::2].contiguous(), offsets)
    assert torch.equal(OPERATOR.run(path, x[:, ::2], weight[..., ::2], offsets), expected)
    assert OPERATOR.run(path, x[:0], weight, torch.zeros(2, dtype=torch.int32)).shape == (0, 6)


def test_it_is_a_linear_layer_where_there_is_one_expert():
    x, weight = torch.randn(5, 16), torch.randn(1, 8, 16)
    y = grouped_linear(x, weight, torch.tensor([5], dtype=torch.int32))
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight[0]))


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    torch._dynamo.reset()  # operators share the checked function; dynamo recompiles one 8 times at most
    x, weight, offsets = inputs((2, 0, 3), 1, 8, 16)
    assert_is_node(OPERATOR, (x.float().requires_grad_(), weight.float().requires_grad_(), offsets))
