"""quantise and dequantise: the same bits on every path, and torch's own fp8."""

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import assert_is_node, run, usable

from marrow.core.errors import UsageError
from marrow.kernels.matmul.dequantise import OPERATOR as DEQUANTISE
from marrow.kernels.matmul.dequantise import dequantise, dequantise_reference
from marrow.kernels.matmul.quantise import FORMATS, OPERATOR, quantise, quantise_reference

PATHS = [path for path in usable(OPERATOR) if path != "reference"]
SHAPES = [((5, 300), (1, 0)), ((3, 256), (1, 128)), ((40, 50), (16, 32)), ((1, 1), (1, 0)), ((7, 20), (0, 0))]


def numbers(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return rows of very different sizes, zeros at the start of the first."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x = x * torch.logspace(-9, 4, rows)[:, None]
    x[0, : min(columns, 20)] = 0
    return x.to(dtype)


def assert_same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.dtype == torch.float8_e4m3fn:
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        assert (
            torch.equal(a, b)
            if not a.is_floating_point()
            else torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))
        )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_path_gives_the_same_bits(path, form, dtype):
    for number, ((rows, columns), block) in enumerate(SHAPES):
        x = numbers(rows, columns, number, dtype)
        expected = quantise_reference(x, form, *block)
        assert_same(tuple(run(OPERATOR, path, (x, form, *block), dtype)), expected)
        for wanted in (torch.float32, torch.bfloat16, torch.float16):
            back = dequantise_reference(*expected, wanted, *block)
            assert_same((DEQUANTISE.run(path, *expected, wanted, *block),), (back,))


@pytest.mark.skipif("cpu" not in PATHS, reason="no C compiler")
@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=40)
@hypothesis.given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 150),
    high=st.integers(0, 9),
    wide=st.integers(0, 70),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_block_gives_the_same_bits(form, rows, columns, high, wide, seed):
    x = numbers(rows, columns, seed)
    assert_same(OPERATOR.run("cpu", x, form, high, wide), quantise_reference(x, form, high, wide))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMATS)
def test_a_block_that_is_not_finite_spoils_no_other(path, form):
    x = torch.ones(4, 64)
    x[1, 3], x[2, 40] = float("nan"), float("-inf")
    q, steps, zeros = OPERATOR.run(path, x, form, 1, 32)
    assert steps.isnan().tolist() == [[False, False], [True, False], [False, True], [False, False]]
    assert_same((q, steps, zeros), quantise_reference(x, form, 1, 32))
    back = dequantise(q, steps, zeros, torch.float32, 1, 32)[steps.isfinite().repeat_interleave(32, 1)]
    torch.testing.assert_close(back, torch.ones_like(back), rtol=2.0**-11, atol=0.0)  # steps of fp16


def test_fp8_rounds_as_torch_does():
    x = torch.randn(64, 448, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 2, 64)[:, None]
    x[:, 0] = 448.0  # so that the step is 1
    x = x.clamp(-448, 448)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    middles = torch.cat((every, (every[:-1] + every[1:]) / 2))  # each number, and each tie
    x[0, 1:] = 0
    x = torch.cat((x, torch.nn.functional.pad(middles.repeat(2)[: 447 * 1], (1, 0), value=448.0)[None]))
    for path in PATHS:
        q, steps, _ = OPERATOR.run(path, x, "fp8", 1, 0)
        assert (steps == 1).all()
        assert torch.equal(q.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("form", "span"), [("int4", 7.0), ("int4z", 15.0)])
def test_of_two_steps_of_fp16_that_are_equally_near_the_even_one_is_taken(path, form, span):
    """Blocks of one number, whose step lies halfway between two fp16 numbers, subnormal ones too."""
    every = torch.arange(0x7C00, dtype=torch.int16)[:: 1 if path == "cpu" else 331]
    low = every.view(torch.float16).float()
    high = torch.where(every == 0x7BFF, 65536.0, (every + 1).view(torch.float16).float())
    x = (low + high) / 2 * span  # exact: 12 bits, and 4 more
    assert torch.equal(x.double() / span, (low.double() + high.double()) / 2)
    for sign in (1, -1):
        _, steps, _ = OPERATOR.run(path, sign * x[:, None], form, 1, 0)
        even = torch.where(every % 2 == 0, low, high)
        even[every == 0x7BFF] = float("inf")
        assert torch.equal(steps[:, 0], even)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("form", "most"), [("int8", 127), ("int4", 7), ("int4z", 15)])
def test_of_two_numbers_that_are_equally_near_the_even_one_is_taken(path, form, most):
    """Blocks whose step is 1: every half between two numbers."""
    signs = torch.tensor([1.0, 1.0] if form == "int4z" else [1.0, -1.0])[:, None]
    x = signs * (torch.arange(most) + torch.tensor([0.5, 0.0])[:, None])
    x = torch.cat((x, signs * most), 1)
    q, steps, zeros = OPERATOR.run(path, x, form, 1, 0)
    assert (steps == 1).all()
    assert torch.equal(q.float() - (zeros.float() if form != "int8" else 0), x.round())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", ["int8", "int4z"])
def test_numbers_come_back_to_the_even_bf16_number_where_two_are_equally_near(path, form):
    q = (
        torch.arange(1, 16)[None]
        .to(torch.int8 if form == "int8" else torch.uint8)
        .expand(64, 15)
        .contiguous()
    )
    steps, zeros = 1 + torch.arange(64)[:, None] / 128, torch.zeros(64, 1, dtype=torch.uint8)
    exact = q.float() * steps  # 4 bits times 8
    is_tie = (exact.view(torch.int32) & 0xFFFF) == 0x8000
    odd = (exact.view(torch.int32) >> 16)[is_tie] & 1  # of the nearer to 0
    assert 20 < odd.sum() < len(odd) - 20
    found = DEQUANTISE.run(path, q, steps, zeros, torch.bfloat16, 1, 0)
    assert torch.equal(found, exact.bfloat16())


@pytest.mark.parametrize(("form", "steps_off"), [("int8", 0.5), ("int4", 1.0), ("int4z", 1.0)])
def test_numbers_come_back_to_the_nearest_step(form, steps_off):
    """Half a step off; the step is rounded to fp16 in int4, so that an end may lie beyond the last one."""
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(2))
    q, steps, zeros = quantise(x, form, 1, 32)
    off = (dequantise(q, steps, zeros, torch.float32, 1, 32) - x).abs() / steps.repeat_interleave(32, 1)
    assert off.max() <= steps_off + 1e-3
    assert (off <= 0.5 + 4e-3).double().mean() > 0.95


@pytest.mark.parametrize("path", PATHS)
def test_views_and_empty_inputs_work(path):
    x = numbers(12, 60, 3)[::2, ::2]
    assert_same(OPERATOR.run(path, x, "int8", 1, 16), OPERATOR.run(path, x.contiguous(), "int8", 1, 16))
    q, steps, zeros = OPERATOR.run(path, x[:0], "int8", 1, 16)
    assert (q.shape, steps.shape, zeros.shape) == ((0, 30), (0, 2), (0, 2))
    assert DEQUANTISE.run(path, q, steps, zeros, torch.float32, 1, 16).shape == (0, 30)


@pytest.mark.skipif("cpu" not in PATHS, reason="no C compiler")
def test_threads_change_nothing():
    x, threads = numbers(33, 256, 4), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = OPERATOR.run("cpu", x, "int4z", 1, 64)
        torch.set_num_threads(2)
        assert_same(OPERATOR.run("cpu", x, "int4z", 1, 64), one)
    finally:
        torch.set_num_threads(threads)


def test_another_format_is_refused():
    with pytest.raises(UsageError, match="'int3' is unknown"):
        quantise(torch.ones(2, 2), "int3")


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    torch._dynamo.reset()  # operators share the checked function; dynamo recompiles one 8 times at most
    x = numbers(4, 64, 5)
    assert_is_node(OPERATOR, (x, "int4z", 1, 32))
    assert_is_node(DEQUANTISE, (*quantise(x, "int4z", 1, 32), torch.bfloat16, 1, 32))
