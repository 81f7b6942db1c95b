import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core.errors import DataError
from marrow.loader.order import merge
from marrow.loader.state import LoaderState

RANGES = st.lists(st.tuples(st.integers(0, 10**12), st.integers(1, 10**6)), max_size=4).map(
    lambda drawn: merge([(low, low + length) for low, length in drawn])
)


@given(
    seed=st.integers(0, 2**63),
    position=st.integers(0, 2**63 - 1),
    skip=RANGES,
    manifest=st.text(max_size=40),
    order=st.text(max_size=40),
)
def test_a_state_survives_its_text(
    seed: int, position: int, skip: tuple[tuple[int, int], ...], manifest: str, order: str
) -> None:
    state = LoaderState(seed, position, skip, manifest, order)
    assert LoaderState.from_json(state.to_json()) == state


def test_a_state_of_an_earlier_version_is_read() -> None:
    text = '{"seed": 3, "position": 64, "skip": [[1, 2]], "manifest": "ab"}'
    assert LoaderState.from_json(text) == LoaderState(3, 64, ((1, 2),), "ab", "full")


@pytest.mark.parametrize(
    "change",
    [
        {"position": -1},
        {"position": 1 << 63},
        {"position": "x"},
        {"position": None},
        {"seed": "x"},
        {"skip": [[1]]},
        {"skip": [[3, 2]]},
        {"skip": [[0, 1 << 64]]},
        {"skip": 5},
    ],
)
def test_a_state_with_a_wrong_value_is_refused(change: dict[str, object]) -> None:
    values = json.loads(LoaderState(0, 0).to_json()) | change
    with pytest.raises(DataError, match="no loader state") as error:
        LoaderState.from_json(json.dumps(values))
    assert error.value.hint


@pytest.mark.parametrize("name", ["seed", "position", "skip", "manifest"])
def test_a_state_that_lacks_something_is_refused(name: str) -> None:
    values = json.loads(LoaderState(0, 0).to_json())
    del values[name]
    with pytest.raises(DataError, match="no loader state"):
        LoaderState.from_json(json.dumps(values))
