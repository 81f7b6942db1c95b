"""What holds for the gradients of every operator: kept, used twice, never silently wrong."""

from typing import Any

import pytest
import torch
from portable_kernels import small_inputs
from torch import Tensor

from marrow.core.errors import UsageError
from marrow.kernels import roofline
from marrow.kernels.dispatch import Operator

SMALL = small_inputs()
CASES = [
    pytest.param(operator, path, id=f"{name} {path}")
    for name, operator in roofline.load_operators().items()
    for path in operator.paths
    if operator.gradient is not None
    and path != "triton"  # whose interpreter takes seconds for all of this; what is tested is dispatch's
    and "cpu" in operator.paths[path].devices
    and operator.paths[path].unusable() is None
]


def with_leaves(operator: Operator) -> tuple[tuple[Any, ...], list[Tensor]]:
    """Return an operator's small inputs, and those of them that have gradients."""
    inputs = list(SMALL.inputs_of(operator))
    assert operator.gradient is not None
    places = [n for n in operator.gradient.numbers if isinstance(inputs[n], Tensor)]
    for place in places:
        inputs[place] = inputs[place].requires_grad_()
    return tuple(inputs), [inputs[place] for place in places]


def total(operator: Operator, path: str, inputs: tuple[Any, ...]) -> Tensor:
    results = operator.run(path, *inputs)
    results = results if isinstance(results, tuple) else (results,)
    return sum((x.square().sum() for x in results if x.requires_grad), torch.zeros(()))


@pytest.mark.parametrize(("operator", "path"), CASES)
def test_backward_spoils_nothing_that_a_second_backward_needs(operator: Operator, path: str) -> None:
    inputs, leaves = with_leaves(operator)
    loss = total(operator, path, inputs)
    first = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    again = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert any(x is not None for x in first)
    for a, b in zip(first, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize(("operator", "path"), CASES)
def test_an_operator_used_twice_in_a_graph_has_the_sum_of_its_gradients(
    operator: Operator, path: str
) -> None:
    """Calls share no memory: what the first keeps for backward, the second must not overwrite."""
    inputs, leaves = with_leaves(operator)
    other = tuple(x.detach() * 3 if x is inputs[0] else x for x in inputs)  # the others are shared
    shared = leaves[1:]
    twice = torch.autograd.grad(
        total(operator, path, inputs) + total(operator, path, other), leaves, allow_unused=True
    )
    once = torch.autograd.grad(total(operator, path, inputs), leaves, allow_unused=True)
    alone = torch.autograd.grad(total(operator, path, other), shared, allow_unused=True) if shared else ()
    for a, b, c in zip(twice, once, (None, *alone), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b if c is None else b + c)


@pytest.mark.parametrize(("operator", "path"), CASES)
def test_a_gradient_of_a_gradient_is_refused_not_wrong(operator: Operator, path: str) -> None:
    inputs, leaves = with_leaves(operator)
    with pytest.raises(UsageError, match="cannot be differentiated again"):
        torch.autograd.grad(total(operator, path, inputs), leaves, create_graph=True, allow_unused=True)
