"""The size of what is summed: for results that cancel, whose errors are those of their terms.

A sum of n numbers errs by up to n/2 ulp of the sum of their sizes, in any order, however small the sum itself
is; one result alone may be exact by luck, and small. Checks of the error budget take this size as `term`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from operator_checks import rounded
from torch import Tensor

from marrow.kernels.dispatch import Operator


def terms_of(operator: Operator, inputs: Sequence[Any]) -> list[float]:
    """Return the largest sum of sizes for each result and gradient of an operator of sums and products.

    That is what its reference gives for the sizes of all inputs and gradients; those of
    `operator_checks.run` with its seed of 0.
    """
    given = [x.abs() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    places = [n for n in (operator.gradient.numbers if operator.gradient else ()) if given[n] is not None]
    for place in places:
        given[place] = given[place].detach().requires_grad_()
    y = operator.run("reference", *given)
    found = [y.detach()]
    if places:
        grad = rounded(*y.shape, seed=0).abs()
        found += torch.autograd.grad(y, [given[place] for place in places], grad, allow_unused=True)
    return [float(x.max()) if x is not None and x.numel() else 0.0 for x in found]
