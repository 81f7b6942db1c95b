"""lora_linear: every path against fp64 and plain torch, any mixture of adapters; DoRA by its definition."""

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

from marrow.kernels.matmul.lora_linear import (
    OPERATOR,
    dora_gains,
    forward_cpu,
    forward_torch,
    lora_linear,
    lora_linear_reference,
)

PATHS = usable(OPERATOR)
DTYPES = [torch.float32, torch.bfloat16]


def inputs(rows, outputs, columns, rank, adapters, *, has_gains=False, seed=0):
    """adapters: one for each row, or their number, where each row takes the first."""
    count = adapters if isinstance(adapters, int) else max(2, *adapters) + 1
    # Gains are fp32 as a rule; `run` casts them to the tested dtype, which suits all paths.
    return (
        rounded(rows, outputs, seed=seed),
        rounded(rows, columns, seed=seed + 1),
        rounded(count, rank, columns, seed=seed + 2),
        rounded(count, outputs, rank, seed=seed + 3),
        torch.linspace(0.5, 2.0, count),
        None if isinstance(adapters, int) else torch.tensor(adapters, dtype=torch.int32),
        rounded(count, outputs, seed=seed + 4) if has_gains else torch.empty(0).double(),
    )


CASES = [
    (1, 1, 1, 1, 1, False),
    (5, 33, 20, 3, 1, True),
    (6, 16, 40, 8, (1, -1, 0, 1, 2, -1), False),
    (6, 70, 17, 20, (1, -1, 0, 1, 2, -1), True),
    (3, 8, 8, 2, (-1, -1, -1), True),
    (18, 16, 16, 4, (2, 0) * 9, True),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "columns", "rank", "adapters", "has_gains"), CASES)
def test_values_and_gradients_stay_within_the_error_budget(
    path, dtype, rows, outputs, columns, rank, adapters, has_gains
):
    given = inputs(rows, outputs, columns, rank, adapters, has_gains=has_gains)
    assert_within_budget(OPERATOR, path, given, dtype, terms=terms_of(OPERATOR, given))


@pytest.mark.parametrize("path", [path for path in PATHS if path not in ("triton", "reference")])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@hypothesis.given(
    adapters=st.lists(st.integers(-1, 3), min_size=1, max_size=12),
    outputs=st.integers(1, 30),
    columns=st.integers(1, 30),
    rank=st.integers(1, 9),
    has_gains=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_mixture_stays_within_the_error_budget(
    path, dtype, adapters, outputs, columns, rank, has_gains, seed
):
    given = inputs(len(adapters), outputs, columns, rank, tuple(adapters), has_gains=has_gains, seed=seed)
    assert_within_budget(OPERATOR, path, given, dtype, terms=terms_of(OPERATOR, given))


@pytest.mark.skipif("cpu" not in PATHS, reason="no C compiler")
@pytest.mark.parametrize("use_tiles", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@hypothesis.given(
    rows=st.one_of(st.integers(1, 40), st.integers(129, 400)),
    count=st.sampled_from((1, 1, 3, 4)),
    outputs=st.integers(1, 70),
    columns=st.one_of(st.integers(1, 70), st.sampled_from((64, 544))),
    rank=st.one_of(st.integers(1, 40), st.sampled_from((16, 32, 64, 512))),
    has_gains=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_c_stays_within_the_error_budget_by_tiles_and_lanes(
    dtype, use_tiles, rows, count, outputs, columns, rank, has_gains, seed
):
    numbers = torch.randint(-1, count, (rows,), generator=torch.Generator().manual_seed(seed)).tolist()
    given = inputs(rows, outputs, columns, rank, tuple(numbers), has_gains=has_gains, seed=seed)
    own = [x.to(dtype) if x.dtype == torch.float64 else x for x in given]
    with filled_with_nan():
        y, low = forward_cpu(*own, use_tiles=use_tiles)
    plain, exact = lora_linear_reference(*own), lora_linear_reference(*given)
    assert_near(y, plain, exact, term=terms_of(OPERATOR, given)[0], what=f"{dtype} tiles {use_tiles}")
    a_of_rows = given[2][given[5].clamp(min=0).long()]
    low_exact = torch.einsum("mk,mrk->mr", given[1], a_of_rows) * (given[5] >= 0)[:, None]
    size = float(torch.einsum("mk,mrk->mr", given[1].abs(), a_of_rows.abs()).max())
    assert_near(low, forward_torch(*own)[1], low_exact, term=size, what=f"low {dtype} tiles {use_tiles}")


@pytest.mark.skipif("cpu" not in PATHS, reason="no C compiler")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 300])
def test_threads_change_nothing(dtype, rows):
    given = inputs(rows, 100, 96, 20, tuple(row % 3 - 1 for row in range(rows)), has_gains=True)
    own = [x.to(dtype) if x.dtype == torch.float64 else x for x in given]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        y, low = forward_cpu(*own)
        torch.set_num_threads(2)
        for ours, one in zip(forward_cpu(*own), (y, low), strict=True):
            assert torch.equal(ours, one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", PATHS)
def test_rows_without_an_adapter_are_left_alone(path):
    given = inputs(4, 8, 8, 2, (0, -1, 1, -1), has_gains=True)
    y = run(OPERATOR, path, given, torch.float32)[0]
    assert torch.equal(y[1::2], given[0][1::2].float())
    assert not torch.isclose(y[::2], given[0][::2].float()).all(1).any()


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_is_not_finite_spoils_no_other(path):
    base, x, *rest = inputs(5, 8, 8, 2, (0, 1, 0, 1, -1))
    x[2, 3], x[4, 0] = float("nan"), float("inf")
    y = OPERATOR.run(path, base.float(), x.float(), rest[0].float(), rest[1].float(), *rest[2:])
    assert y[2].isnan().all() or path == "reference"
    assert y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("adapters", [1, (0, -1, 1)])
def test_a_gradient_is_that_of_finite_differences(adapters):
    base, x, a, b, scales, numbers, gains = inputs(3, 3, 4, 2, adapters, has_gains=True)
    arguments = tuple(given.requires_grad_() for given in (base, x, a, b, gains))

    def call(base, x, a, b, gains):
        return OPERATOR.run("torch", base, x, a, b, scales.double(), numbers, gains)

    assert torch.autograd.gradcheck(call, arguments)


@pytest.mark.parametrize("path", PATHS)
def test_views_and_empty_inputs_work(path):
    given = inputs(8, 12, 16, 4, (0, 1) * 4, has_gains=True)
    given = [x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x for x in given]
    base, x, *rest = given
    rest[3] = rest[3][::2]
    expected = OPERATOR.run(path, base[::2].contiguous(), x[::2].contiguous(), *rest)
    assert torch.equal(OPERATOR.run(path, base[::2], x[::2], *rest), expected)
    rest[3] = rest[3][:0]
    assert OPERATOR.run(path, base[:0], x[:0], *rest).shape == (0, 12)


def test_gains_make_dora():
    """W' = magnitude (W + s B A) / |W + s B A|, the norm of each output's row; x W'^T."""
    weight, a, b = torch.randn(6, 10).double(), torch.randn(3, 10).double(), torch.randn(6, 3).double()
    magnitude, x = torch.rand(6).double().requires_grad_(), torch.randn(4, 10).double()
    whole = weight + 0.5 * b @ a
    expected = x @ (magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)).T
    gains = dora_gains(weight, a, b, 0.5, magnitude)
    y = lora_linear(x @ weight.T, x, a[None], b[None], torch.tensor([0.5]), None, gains[None])
    torch.testing.assert_close(y, expected)
    ours, theirs = (torch.autograd.grad(out.square().sum(), magnitude)[0] for out in (y, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [1, (0, -1, 1)])
def test_it_is_one_node_of_a_graph(adapters):
    torch._dynamo.reset()  # operators share the checked function; dynamo recompiles one 8 times at most
    given = inputs(3, 8, 16, 2, adapters, has_gains=True)
    places = (0, 1, 2, 3, 6)
    assert_is_node(OPERATOR, [x.float().requires_grad_() if i in places else x for i, x in enumerate(given)])
