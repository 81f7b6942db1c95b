"""A note on an edge answers as a walk over the positions would, for every order, stretch and mixture."""

import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.cli.consumption import note, seen
from marrow.cli.mixture import Sources
from marrow.core.frozen_map import FrozenMap
from marrow.loader.config import LoaderRecipe, SourceRecipe, source_order
from marrow.loader.mixture import Phase, Schedule
from marrow.loader.plan import FullShuffle, Order, WindowShuffle
from marrow.loader.seen import Seen

NO_SOURCES = Sources({}, {}, {})


def walked(rows_of_positions: list[int], start: int, rows: list[int]) -> Seen:
    """Look at each position in turn."""
    hits = [start + i for i, row in enumerate(rows_of_positions) if row in set(rows)]
    return Seen(len(hits), hits[0] if hits else None)


def rows_at(order: Order, start: int, stop: int) -> list[int]:
    found: list[int] = order.rows(np.arange(start, stop)).tolist()
    return found


def asked(detail: dict[str, Any], rows_of_S: list[int], rows: list[int]) -> Seen | None:
    """Ask with the note as the catalog gives it back."""
    return seen(json.loads(json.dumps(detail)), rows_of_S, np.array(rows, np.int64))


SHARDS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@given(
    SHARDS,
    st.integers(0, 99),
    st.integers(0, 60),
    st.integers(0, 60),
    st.sampled_from([0, 1, 2, 4]),
    st.data(),
)
@settings(max_examples=60)
def test_a_note_of_one_order_counts_what_a_walk_counts(
    rows_of_S: list[int], seed: int, start: int, length: int, window: int, data: st.DataObject
) -> None:
    total, stop = sum(rows_of_S), start + length
    rows = data.draw(st.lists(st.integers(0, total - 1), unique=True, min_size=1, max_size=4))
    order: Order = WindowShuffle(rows_of_S, seed, window) if window else FullShuffle(total, seed)
    name = f"window of {window} shards" if window else "full"
    detail = note(
        LoaderRecipe(), NO_SOURCES, "shards", {"seed": seed, "samples": [start, stop], "order": name}
    )
    assert asked(detail, rows_of_S, rows) == walked(rows_at(order, start, stop), start, rows)


@given(SHARDS, st.integers(0, 9), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=3))
@settings(max_examples=40)
def test_what_was_skipped_was_not_seen(rows_of_S: list[int], seed: int, skips: list[tuple[int, int]]) -> None:
    total = sum(rows_of_S)
    ranges = [[low, low + length] for low, length in skips]
    left_out = {position for low, high in ranges for position in range(low, high)}
    order = FullShuffle(total, seed)
    kept = [(at, row) for at, row in enumerate(rows_at(order, 0, 40)) if at not in left_out]
    hits = [at for at, row in kept if row == 0]
    found = asked({"seed": seed, "samples": [0, 40], "order": "full", "skip": ranges}, rows_of_S, [0])
    assert found == Seen(len(hits), hits[0] if hits else None)


def mixture(window: int, weights: dict[str, tuple[float, ...]], phases: tuple[int, ...]) -> LoaderRecipe:
    sources = {name: SourceRecipe("", its) for name, its in weights.items()}
    return LoaderRecipe(window=window, phases=phases, mixture=FrozenMap(sources))


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("span", [(0, 300), (37, 211), (300, 300)])
def test_a_note_of_a_mixture_counts_the_sources_of_its_role_alone(window: int, span: tuple[int, int]) -> None:
    """Sources a and c are the same shards, b is others; each has an order of its own."""
    start, stop = span
    recipe = mixture(window, {"c": (1.0, 2.0), "a": (3.0, 1.0), "b": (2.0, 2.0)}, (0, 120))
    roles = {"a": "shards", "b": "shards: b", "c": "shards"}
    rows_of_S = {"shards": [7, 4, 9], "shards: b": [5, 6]}
    schedule = Schedule([Phase(0, (3.0, 2.0, 1.0)), Phase(120, (1.0, 2.0, 2.0))], 5)
    source_N, place_N = schedule.places(np.arange(stop))
    facts = {"seed": 5, "samples": [start, stop], "order": "mixture of 3"}
    for role, rows in itertools.product(rows_of_S, ([0], [1, 3, 8])):
        detail = note(recipe, Sources({}, roles, {}), role, facts)
        expected = Seen()
        for number, name in enumerate(sorted(roles)):
            if roles[name] != role:
                continue
            order = source_order(name, rows_of_S[role], 5, window)
            mine = np.flatnonzero((source_N == number) & (np.arange(stop) >= start))
            hits = mine[np.isin(order.rows(place_N[mine]), rows)].tolist()
            expected = expected.and_also(Seen(len(hits), hits[0] if hits else None))
        assert asked(detail, rows_of_S[role], rows) == expected


def test_a_note_is_plain_data_with_no_more_than_it_needs() -> None:
    recipe = mixture(1, {"b": (1.0,), "a": (2.0,)}, (0,))
    facts = {"seed": 1, "samples": [0, 9], "order": "mixture", "loss": 2.5}
    detail = note(recipe, Sources({}, {"a": "shards", "b": "other"}, {}), "shards", facts)
    assert detail == json.loads(json.dumps(detail))
    assert detail == {
        "seed": 1, "samples": [0, 9], "order": "mixture", "window": 1,
        "phases": [[0, [2.0, 1.0]]], "sources": {"a": 0},
    }  # fmt: skip


@pytest.mark.parametrize(
    "detail",
    [
        {},
        {"seed": 1},
        {"samples": [0, 10]},
        {"seed": 1, "samples": [0, 10], "order": "an order of the future"},
        {"seed": 1, "samples": [0, 10], "order": "window of many shards"},
        {"seed": 1, "samples": [0, 10], "order": "a window of 2 shards"},
    ],
)
def test_what_a_note_does_not_tell_is_not_made_up(detail: dict[str, Any]) -> None:
    assert asked(detail, [10], [1]) is None


def test_a_note_without_an_order_is_of_the_full_one() -> None:
    assert asked({"seed": 3, "samples": [0, 100]}, [4, 6], [9]) == asked(
        {"seed": 3, "samples": [0, 100], "order": "full"}, [10], [9]
    )
