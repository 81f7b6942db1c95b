"""What all operator tests share: a clean kernel table, and the error budget."""

import os
from collections.abc import Iterator

import pytest
import torch

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
