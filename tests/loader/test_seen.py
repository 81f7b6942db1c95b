"""Which rows a run has seen: the order asked backwards, against simply going through it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.loader import seen as seen_module
from marrow.loader.mixture import Mixture, Phase
from marrow.loader.plan import FullShuffle, Order, WindowShuffle
from marrow.loader.seen import Seen, times_mixed, times_seen


def slowly(order: Order, rows: list[int], start: int, stop: int, skip: list[tuple[int, int]]) -> Seen:
    positions = [p for p in range(start, stop) if not any(low <= p < high for low, high in skip)]
    at = order.rows(np.array(positions, dtype=np.int64)).tolist() if positions else []
    hits = [position for position, row in zip(positions, at, strict=True) if row in rows]
    return Seen(len(hits), hits[0] if hits else None)


@st.composite
def questions(draw: st.DrawFn) -> tuple[Order, list[int], int, int, list[tuple[int, int]]]:
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    num_rows, seed = sum(sizes), draw(st.integers(0, 9))
    order: Order = FullShuffle(num_rows, seed)
    if draw(st.booleans()):
        order = WindowShuffle(sizes, seed, draw(st.integers(1, 3)))
    rows = sorted(draw(st.sets(st.integers(0, num_rows - 1), max_size=5)))
    start, stop = sorted(draw(st.tuples(*[st.integers(0, 5 * num_rows)] * 2)))
    cuts = sorted(draw(st.lists(st.integers(0, 5 * num_rows), max_size=6, unique=True)))
    return order, rows, start, stop, list(zip(cuts[::2], cuts[1::2], strict=False))


@settings(deadline=None, max_examples=120)
@given(question=questions())
def test_the_answer_is_that_of_going_through_all_positions(
    question: tuple[Order, list[int], int, int, list[tuple[int, int]]],
) -> None:
    order, rows, start, stop, skip = question
    found = times_seen(order, np.array(rows, dtype=np.int64), start, stop, skip)
    assert found == slowly(order, rows, start, stop, skip)


def test_parts_of_an_epoch_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_module, "_AT_ONCE", 7)
    order = FullShuffle(100, 3)
    rows = np.array([5, 50], dtype=np.int64)
    assert times_seen(order, rows, 13, 287) == slowly(order, [5, 50], 13, 287, [])


def test_whole_epochs_are_not_gone_through() -> None:
    """A billion epochs take no longer than two."""
    computed: list[int] = []
    order = FullShuffle(1000, 1)

    class Counting:
        num_rows, name = order.num_rows, order.name

        def rows(self, positions_N: np.ndarray) -> np.ndarray:
            computed.append(len(positions_N))
            return order.rows(positions_N)

        def ahead(self, position: int, count: int) -> np.ndarray:
            return order.ahead(position, count)

    found = times_seen(Counting(), np.array([7, 8]), 0, 1000 * 10**9)
    assert found.times == 2 * 10**9
    assert sum(computed) == 1000


def test_no_rows_are_never_seen() -> None:
    assert times_seen(FullShuffle(10, 0), np.empty(0, np.int64), 0, 100) == Seen(0, None)


@st.composite
def mixed_questions(draw: st.DrawFn) -> tuple[list[Order], list[Phase], int, int, list[int], int, int]:
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    orders: list[Order] = [FullShuffle(size, seed) for seed, size in enumerate(sizes)]
    starts = sorted(draw(st.sets(st.integers(1, 5_000), max_size=2)))
    weights = st.lists(st.floats(0.05, 9), min_size=len(sizes), max_size=len(sizes))
    phases = [Phase(start, tuple(draw(weights))) for start in (0, *starts)]
    source = draw(st.integers(0, len(sizes) - 1))
    rows = sorted(draw(st.sets(st.integers(0, sizes[source] - 1), max_size=3)))
    edges = sorted(draw(st.tuples(*[st.integers(0, 7_000)] * 2)))
    return orders, phases, draw(st.integers(0, 9)), source, rows, edges[0], edges[1]


@settings(deadline=None, max_examples=150)
@given(question=mixed_questions(), skip=st.lists(st.integers(0, 7_000), max_size=4, unique=True))
def test_of_a_mixture_the_answer_is_that_of_going_through_all_positions(
    question: tuple[list[Order], list[Phase], int, int, list[int], int, int], skip: list[int]
) -> None:
    orders, phases, seed, source, rows, start, stop = question
    cuts = sorted(skip)
    ranges = list(zip(cuts[::2], cuts[1::2], strict=False))
    mixture = Mixture(orders, phases, seed)
    found = times_mixed(
        mixture.schedule, source, orders[source], np.array(rows, dtype=np.int64), start, stop, ranges
    )
    first_row = sum(order.num_rows for order in orders[:source])
    assert found == slowly(mixture, [first_row + row for row in rows], start, stop, ranges)


def test_of_a_long_run_on_a_mixture_little_is_computed() -> None:
    """Of 10^12 positions only the edges; the two sources' counts add up to what was consumed."""
    orders: list[Order] = [FullShuffle(1_000, 1), FullShuffle(7_000, 2)]
    mixture = Mixture(orders, [Phase(0, (0.3, 0.7)), Phase(10**6, (0.5, 0.5))], 5)
    stop = 10**12 + 77
    counted = [
        times_mixed(mixture.schedule, source, order, np.arange(order.num_rows), 0, stop)
        for source, order in enumerate(orders)
    ]
    assert [seen.times for seen in counted] == list(mixture.counts(stop))
    assert min(seen.first for seen in counted if seen.first is not None) == 0
