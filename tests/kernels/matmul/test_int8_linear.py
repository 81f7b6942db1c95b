"""int8_linear: sums of integers are exact on every path; unrounded rows keep the error budget."""

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

from marrow.kernels.matmul.int8_linear import (
    OPERATOR,
    forward_cpu,
    int8_linear,
    int8_linear_reference,
    quantise_to_int8,
    round_rows,
)

PATHS = usable(OPERATOR)
HAS_C = "cpu" in PATHS


def random_weight(outputs: int, inputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    return weight, torch.rand(outputs, generator=generator) / 100


@pytest.mark.skipif(not HAS_C, reason="no C compiler")
@pytest.mark.parametrize("use_tiles", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 63), (16, 64), (48, 128), (17, 128), (32, 200)])
def test_sums_of_integers_are_exact(outputs, inputs, use_tiles):
    """Rows of whole numbers with 127 among them, scales of 1, sums below 2^24: y is the sum itself."""
    weight, _ = random_weight(outputs, inputs, inputs)
    generator = torch.Generator().manual_seed(outputs)
    for rows in (1, 2, 3, 4, 5, 7, 16, 17, 33, 64, 70, 130):
        x = torch.randint(-127, 128, (rows, inputs), generator=generator)
        x[:, 0] = -127
        y = forward_cpu(x.float(), weight, torch.ones(outputs), use_tiles=use_tiles)
        assert torch.equal(y.long(), x @ weight.long().T), rows


@pytest.mark.skipif(not HAS_C, reason="no C compiler")
@pytest.mark.parametrize("use_tiles", [False, True])
def test_the_largest_sums_fit(use_tiles):
    inputs = 1 << 16
    weight = torch.full((16, inputs), -128, dtype=torch.int8)
    y = forward_cpu(torch.full((6, inputs), -1.0), weight, torch.ones(16), use_tiles=use_tiles)
    assert (y.double() - 128.0 * inputs).abs().max() <= 2.0**-23 * 128 * inputs


@pytest.mark.parametrize("path", [path for path in PATHS if path != "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 16, 64), (3, 13, 100), (17, 80, 192), (5, 1, 1)])
def test_rounded_rows_are_those_of_the_reference(path, dtype, rows, outputs, inputs):
    weight, scales = random_weight(outputs, inputs, rows)
    x = rounded(rows, inputs, seed=rows, scale=3.0).to(dtype)
    expected = int8_linear_reference(x, weight, scales)
    # The same integers; a product of three factors is rounded in another order at most.
    rtol = 2.0**-22 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(OPERATOR.run(path, x, weight, scales, True), expected, rtol=rtol, atol=0.0)


@pytest.mark.skipif(not HAS_C, reason="no C compiler")
@pytest.mark.parametrize("use_tiles", [False, True])
@settings(max_examples=25)
@hypothesis.given(
    rows=st.integers(1, 70),
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 300),
    seed=st.integers(0, 2**31),
)
def test_any_shape_agrees_with_the_reference(use_tiles, rows, outputs, inputs, seed):
    weight, scales = random_weight(outputs, inputs, seed)
    x = rounded(rows, inputs, seed=seed).float()
    y = forward_cpu(x, weight, scales, use_tiles=use_tiles)
    torch.testing.assert_close(y, int8_linear_reference(x, weight, scales), rtol=2.0**-22, atol=0.0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 16, 64), (3, 13, 100), (17, 80, 192)])
def test_unrounded_rows_stay_within_the_error_budget(path, dtype, rows, outputs, inputs):
    weight, scales = random_weight(outputs, inputs, rows)
    x = rounded(rows, inputs, seed=rows)
    terms = [float((x.abs() @ (weight.double().abs() * scales[:, None]).T).max())]
    assert_within_budget(OPERATOR, path, (x, weight, scales, False), dtype, terms=terms)


@pytest.mark.skipif(not HAS_C, reason="no C compiler")
@pytest.mark.parametrize("use_tiles", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25)
@hypothesis.given(
    rows=st.one_of(st.integers(1, 20), st.integers(1, 300)),
    outputs=st.integers(1, 70),
    inputs=st.one_of(st.integers(1, 300), st.sampled_from((512, 544, 800))),
    seed=st.integers(0, 2**31),
)
def test_any_shape_of_unrounded_rows_stays_within_the_error_budget(
    dtype, use_tiles, rows, outputs, inputs, seed
):
    weight, scales = random_weight(outputs, inputs, seed)
    x = rounded(rows, inputs, seed=seed)
    with filled_with_nan():
        y = forward_cpu(x.to(dtype), weight, scales, False, use_tiles=use_tiles)
    plain = int8_linear_reference(x.to(dtype), weight, scales, False)
    exact = int8_linear_reference(x, weight, scales, False)
    term = float((x.abs() @ (weight.double().abs() * scales[:, None]).T).max())
    assert_near(y, plain, exact, term=term, what=f"{dtype} tiles {use_tiles}")


def test_rows_of_8_bits_err_as_stated():
    weight, x = torch.randn(256, 4096, generator=torch.Generator().manual_seed(1)), rounded(8, 4096, seed=2)
    q, scales = quantise_to_int8(weight)
    exact = int8_linear_reference(x, q, scales, False)
    error = (int8_linear_reference(x.float(), q, scales).double() - exact).abs()
    sums = (q.double() * scales.double()[:, None]).abs().sum(1)
    assert (error <= x.abs().amax(1)[:, None] / 254 * sums * (1 + 1e-5)).all()
    assert error.square().mean().sqrt() < 0.012 * exact.std()
    assert ((q.double() * scales.double()[:, None]) - weight).abs().max() <= 0.51 * scales.max()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rounds_rows", [True, False])
def test_views_leading_axes_and_empty_inputs_work(path, rounds_rows):
    weight, scales = random_weight(32, 64, 3)
    x = rounded(4, 6, 128, seed=4).float()[:, ::2, ::2]
    y = run(OPERATOR, path, (x, weight, scales, rounds_rows), torch.float32)[0]
    assert y.shape == (4, 3, 32)
    assert torch.equal(y, OPERATOR.run(path, x.contiguous(), weight, scales, rounds_rows))
    turned = weight.T.contiguous().T
    assert torch.equal(y, OPERATOR.run(path, x, turned, scales, rounds_rows))
    assert OPERATOR.run(path, x[:0], weight, scales, rounds_rows).shape == (0, 3, 32)


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_is_not_finite_spoils_no_other(path):
    weight, scales = random_weight(16, 128, 5)
    x = rounded(20, 128, seed=6).float()
    x[1, 3], x[2, 70], x[4] = float("nan"), float("inf"), 0.0
    y = OPERATOR.run(path, x, weight, scales, True)
    assert y[1:3].isnan().all()
    assert (y[4] == 0).all()
    assert y[[0, *range(3, 20)]].isfinite().all()


def test_ties_go_to_even():
    q, steps = round_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert q.tolist() == [[127, 0, 2, 2, 0, -2]]
    assert steps.tolist() == [1.0]


@pytest.mark.skipif(not HAS_C, reason="no C compiler")
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(("dtype", "rounds_rows"), [(torch.float32, True), (torch.bfloat16, False)])
def test_threads_change_nothing(rows, dtype, rounds_rows):
    (weight, scales), x = random_weight(80, 256, 7), rounded(rows, 256, seed=8).to(dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = OPERATOR.run("cpu", x, weight, scales, rounds_rows)
        torch.set_num_threads(2)
        assert torch.equal(OPERATOR.run("cpu", x, weight, scales, rounds_rows), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("rounds_rows", [True, False])
def test_it_is_one_node_of_a_graph(rounds_rows):
    torch._dynamo.reset()  # operators share the checked function; dynamo recompiles one 8 times at most
    assert_is_node(OPERATOR, (rounded(3, 64, seed=9).float(), *random_weight(16, 64, 10), rounds_rows))


def test_fresh_numbers_agree_with_torch():
    x, (weight, scales) = torch.randn(5, 256), quantise_to_int8(torch.randn(64, 256))
    exact = x.double() @ (weight.double() * scales.double()[:, None]).T
    assert (int8_linear(x, weight, scales).double() - exact).abs().max() < 0.06 * exact.std()
