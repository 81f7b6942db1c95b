"""fake_quantise: what quantise and dequantise give, with the gradient of the identity."""

import pytest
import torch
from operator_checks import assert_is_node, filled_with_nan, usable

from marrow.core.errors import UsageError
from marrow.kernels.matmul.dequantise import dequantise_reference
from marrow.kernels.matmul.fake_quantise import OPERATOR, fake_quantise
from marrow.kernels.matmul.quantise import FORMATS, quantise_reference

PATHS = usable(OPERATOR)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "block"), [((5, 70), (1, 0)), ((3, 64), (1, 32)), ((20, 17), (16, 16))])
def test_it_is_rounding_and_back(path, form, dtype, shape, block):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    expected = dequantise_reference(*quantise_reference(x, form, *block), dtype, *block)
    before = x.clone()
    with filled_with_nan():
        y = OPERATOR.run(path, x, form, *block)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (2, 2, 3, 64)])
def test_activations_of_any_arrangement_are_their_rows(form, shape):
    x = torch.randn(shape, requires_grad=True)
    y = fake_quantise(x, form, 1, 32)
    assert torch.equal(y, fake_quantise(x.view(-1, 64), form, 1, 32).view(shape))
    (dx,) = torch.autograd.grad(y, x, torch.ones(shape))
    assert torch.equal(dx, torch.ones(shape))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMATS)
def test_the_gradient_goes_straight_through(path, form):
    x = torch.randn(4, 64, requires_grad=True)
    dy = torch.randn(4, 64)
    (dx,) = torch.autograd.grad(OPERATOR.run(path, x, form, 1, 32), x, dy)
    assert torch.equal(dx, dy)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_shows_and_stays_in_its_block(path):
    x = torch.ones(3, 64)
    x[1, 3] = float("nan")
    y = OPERATOR.run(path, x, "int8", 1, 32)
    assert y[1, :32].isnan().all()
    assert (y[[0, 2]] == 1).all()
    assert (y[1, 32:] == 1).all()


@pytest.mark.parametrize("path", PATHS)
def test_views_and_empty_inputs_work(path):
    x = torch.randn(12, 64)[::2, ::2]
    assert torch.equal(
        OPERATOR.run(path, x, "int4", 1, 32), OPERATOR.run(path, x.contiguous(), "int4", 1, 32)
    )
    assert OPERATOR.run(path, x[:0], "int4", 1, 32).shape == (0, 32)


def test_rounding_twice_changes_nothing_more():
    """The largest number of a block is kept, and so is the step."""
    x = torch.randn(8, 128)
    once = fake_quantise(x, "int8", 1, 64)
    torch.testing.assert_close(fake_quantise(once, "int8", 1, 64), once, rtol=1e-6, atol=0.0)


def test_another_format_is_refused():
    with pytest.raises(UsageError, match="unknown"):
        fake_quantise(torch.ones(2, 2), "int3")


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    torch._dynamo.reset()  # operators share the checked function; dynamo recompiles one 8 times at most
    assert_is_node(OPERATOR, (torch.randn(4, 64, requires_grad=True), "int4z", 1, 32))
