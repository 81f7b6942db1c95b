"""What all operator tests share: a clean kernel table, and the error budget."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

# Before an operator is imported: on the CPU Triton's kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from marrow.kernels import dispatch

ULP = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the interpreter's tests to `make test`: together they take a minute and a half."""
    for item in items:
        parameters = getattr(item, "callspec", None)
        if "kernels" in item.path.parts and parameters is not None and "triton" in parameters.params.values():
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def _clean_table() -> Iterator[None]:
    dispatch.reset()
    yield
    dispatch.reset()


Check = Callable[[Tensor, Tensor, Tensor], bool]


@pytest.fixture
def within_budget() -> Check:
    """Compare ours and plain torch, both in the tested dtype, with the same sums in fp64.

    Budget: 1.5 times the error that torch's own arithmetic makes in this dtype, plus 2 units in
    the last place of the largest value: a path may round elsewhere, but not much more often.
    """

    def check(ours: Tensor, plain: Tensor, exact: Tensor) -> bool:
        assert ours.shape == exact.shape
        assert ours.dtype == plain.dtype
        assert exact.dtype == torch.float64
        allowed = 1.5 * (plain.double() - exact).abs().max() + 2 * ULP[ours.dtype] * exact.abs().max()
        return bool((ours.double() - exact).abs().max() <= allowed)

    return check
