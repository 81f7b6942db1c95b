"""What all operator tests share: a clean kernel table, and what is slow."""

from collections.abc import Iterator

import pytest

from marrow.kernels import dispatch

INTERPRETED = {"test_interpreter", "test_memory", "test_every_kernel", "test_tile"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the interpreter's tests to `make test`: together they take a minute and a half.

    So it is with the reference against itself, which only shows that the budget is not too narrow.
    """
    for item in items:
        if "kernels" not in item.path.parts:
            continue
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        is_oracle = "reference" in [x for x in parameters if isinstance(x, str)]
        if is_oracle or "triton" in item.name or "graph" in item.name or item.path.stem in INTERPRETED:
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def _clean_table() -> Iterator[None]:
    dispatch.reset()
    yield
    dispatch.reset()
