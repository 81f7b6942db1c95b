"""fp8_linear: the budget on every path; exact where all numbers are whole; blocks that are not full."""

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import assert_near, filled_with_nan, rounded, usable

from marrow.kernels.matmul.fp8_linear import (
    OPERATOR,
    forward_cpu,
    fp8_linear,
    fp8_linear_reference,
    quantise_to_fp8,
)

PATHS = usable(OPERATOR)
DTYPES = [torch.float32, torch.bfloat16]


def inputs(rows: int, outputs: int, columns: int, rounds_rows: bool, seed: int = 0):
    x, weight = rounded(rows, columns, seed=seed), rounded(outputs, columns, seed=seed + 1)
    return x, *quantise_to_fp8(weight.float()), rounds_rows


def assert_within_budget(path: str, given, dtype: torch.dtype, **options) -> None:
    """As operator_checks does it; fp8 tensors lack what that needs to see that inputs are unchanged."""
    x, weight, scales, rounds_rows = given
    bits, own = weight.view(torch.uint8).clone(), x.to(dtype)
    with filled_with_nan():
        if path == "cpu":
            y = forward_cpu(own, weight, scales, rounds_rows, **options)
        else:
            y = OPERATOR.run(path, own, weight, scales, rounds_rows)
    assert torch.equal(weight.view(torch.uint8), bits)
    assert torch.equal(own, x.to(dtype))
    assert y.dtype == dtype
    exact = fp8_linear_reference(x, weight, scales, rounds_rows)
    plain = fp8_linear_reference(x.to(dtype), weight, scales, rounds_rows)
    # Sums cancel: they err as their terms do.
    sizes = weight.float().abs().to(torch.float8_e4m3fn)
    term = float(fp8_linear_reference(x.abs(), sizes, scales, rounds_rows).max())
    assert_near(y, plain, exact, term=term, what=f"{path} {dtype} {options}")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounds_rows", [True, False])
@pytest.mark.parametrize(
    ("rows", "outputs", "columns"), [(1, 1, 1), (3, 16, 128), (8, 130, 20), (9, 129, 260), (17, 40, 131)]
)
def test_values_stay_within_the_error_budget(path, dtype, rounds_rows, rows, outputs, columns):
    assert_within_budget(path, inputs(rows, outputs, columns, rounds_rows), dtype)


@pytest.mark.skipif("cpu" not in PATHS, reason="no C compiler")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use_tiles", [False, True])
@settings(max_examples=25)
@hypothesis.given(
    rows=st.one_of(st.integers(1, 20), st.integers(1, 300)),
    outputs=st.integers(1, 140),
    columns=st.one_of(st.integers(1, 300), st.sampled_from((512, 544, 800))),
    rounds_rows=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_stays_within_the_error_budget(use_tiles, dtype, rows, outputs, columns, rounds_rows, seed):
    given = inputs(rows, outputs, columns, rounds_rows, seed)
    assert_within_budget("cpu", given, dtype, use_tiles=use_tiles)


@pytest.mark.skipif("cpu" not in PATHS, reason="no C compiler")
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_threads_change_nothing(rows):
    x, weight, scales, _ = inputs(rows, 200, 300, False)
    x, threads = x.bfloat16(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = forward_cpu(x, weight, scales, False)
        torch.set_num_threads(2)
        assert torch.equal(forward_cpu(x, weight, scales, False), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [2, 10])
def test_whole_numbers_are_exact(path, rows):
    """x is 448 or a whole number up to 16 that e4m3 holds, weights alike, scales are powers of two."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-16, 17, (rows, 256), generator=generator).float()
    x[:, ::128] = 448.0  # so that a step is 1
    weight = torch.randint(-16, 17, (130, 256), generator=generator).float().to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [4.0, 0.5]])
    whole = weight.float() * scales.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)
    assert torch.equal(OPERATOR.run(path, x, weight, scales, True), x @ whole.T)


@pytest.mark.parametrize("path", PATHS)
def test_every_weight_is_read_as_torch_reads_it(path):
    """All 254 numbers of e4m3, one an output."""
    bits = torch.arange(256, dtype=torch.uint8)
    weight = bits[bits & 127 != 127].view(torch.float8_e4m3fn)[:, None]
    y = OPERATOR.run(path, torch.ones(1, 1), weight, torch.ones(2, 1), False)
    assert torch.equal(y[0], weight[:, 0].float())


def test_rows_of_8_bits_err_as_stated():
    x, weight, scales, _ = inputs(8, 256, 4096, True)
    exact = fp8_linear_reference(x, weight, scales, False)
    error = fp8_linear_reference(x.float(), weight, scales).double() - exact
    assert 0.01 * exact.std() < error.square().mean().sqrt() < 0.03 * exact.std()


@pytest.mark.parametrize("path", PATHS)
def test_views_leading_axes_and_empty_inputs_work(path):
    x, weight, scales, _ = inputs(24, 32, 128, True)
    x = x.float().view(4, 6, 128)[:, ::2]
    y = OPERATOR.run(path, x, weight, scales, True)
    assert y.shape == (4, 3, 32)
    assert torch.equal(y, OPERATOR.run(path, x.contiguous(), weight, scales, True))
    assert OPERATOR.run(path, x[:0], weight, scales, True).shape == (0, 3, 32)


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_is_not_finite_spoils_no_other(path):
    x, weight, scales, _ = inputs(4, 16, 256, True)
    x[1, 3], x[2, 200] = float("nan"), float("inf")
    y = OPERATOR.run(path, x.float(), weight, scales, True)
    assert y[1:3].isnan().all()
    assert y[[0, 3]].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("rounds_rows", [True, False])
def test_it_is_one_node_of_a_graph(rounds_rows):
    torch._dynamo.reset()  # operators share the checked function; dynamo recompiles one 8 times at most
    x, weight, scales, _ = inputs(3, 16, 128, rounds_rows)
    given = x.float(), weight, scales, rounds_rows
    # The check that inputs are unchanged multiplies them, which torch cannot do with fp8.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.marrow.fp8_linear.default, given, test_utils=checks)
    compiled = torch.compile(lambda *inputs: fp8_linear(*inputs), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), fp8_linear(*given))
