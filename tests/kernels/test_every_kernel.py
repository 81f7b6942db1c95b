"""What holds for the Triton path of every operator, whatever it computes."""

import pytest
import torch

from marrow.kernels import compiled, dispatch, tile
from marrow.kernels.memory import phantom

pytestmark = pytest.mark.skipif(not tile.IS_INTERPRETED, reason="kernels run on a GPU here")

FAILED = compiled.load_operators() if tile.IS_INTERPRETED else []
EXAMPLES = [
    pytest.param(operator, path, example, id=f"{name} {example.label}")
    for name, operator in sorted(dispatch.operators().items())
    if (path := operator.paths.get("triton")) is not None
    for example in operator.examples(torch.bfloat16, "meta")
]


def ends(grid):
    """The first program of a grid and the last."""
    return sorted({(0, 0, 0), tuple(size - 1 for size in grid)})


def test_all_operators_can_be_imported():
    assert FAILED == []


@pytest.mark.slow
@pytest.mark.parametrize(("operator", "path", "example"), EXAMPLES)
def test_no_address_is_outside_of_its_tensor(operator, path, example):
    with phantom(ends) as watch:
        compiled.run_example(operator, path, example)
    assert watch.launches > 0
