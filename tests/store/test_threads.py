"""Results come in the order of the items whatever the threads do, few are in flight, an error ends it."""

import os
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.store.threads import default_threads, in_order


def pool_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("marrow-store")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert pool_threads() == []


@given(st.lists(st.integers(), max_size=30), st.integers(0, 5))
def test_results_are_those_of_map(items: list[int], threads: int) -> None:
    assert list(in_order(lambda item: item * 2, items, threads)) == [item * 2 for item in items]


def test_a_slow_first_item_does_not_let_later_ones_pass() -> None:
    def work(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return item

    assert list(in_order(work, range(20), 4)) == list(range(20))


@pytest.mark.parametrize("threads", [2, 3])
def test_at_most_twice_the_threads_are_in_flight(threads: int) -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            drawn.append(item)
            yield item

    results = in_order(lambda item: item, items(), threads)
    assert drawn == [], "nothing is read before the first result is asked for"
    for taken in range(1, 100):
        assert next(results) == taken - 1
        assert len(drawn) <= taken + 2 * threads
    results.close()


def test_they_run_at_the_same_time() -> None:
    meet = threading.Barrier(3, timeout=10)  # broken, with an error, unless three are inside at once
    assert len(list(in_order(lambda item: meet.wait(), range(3), 3))) == 3


def test_one_thread_is_the_callers_own() -> None:
    assert set(in_order(lambda item: threading.current_thread(), range(3), 1)) == {threading.current_thread()}


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_error_comes_in_its_turn_and_ends_it(threads: int) -> None:
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        if item >= 5:
            raise ValueError(f"item {item}")
        return item

    results = in_order(work, range(1000), threads)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="item 5"):
        next(results)
    assert len(started) <= 5 + 2 * threads
    assert list(results) == []


def test_an_error_of_the_items_comes_through_and_what_runs_is_waited_for() -> None:
    ended: list[int] = []

    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("the folder is gone")

    def work(item: int) -> int:
        time.sleep(0.01)
        ended.append(item)
        return item

    with pytest.raises(OSError, match="the folder is gone"):
        list(in_order(work, items(), 4))
    ended_then = list(ended)
    time.sleep(0.03)
    assert ended == ended_then, "nothing of it runs on"


def test_whoever_stops_reading_stops_the_work() -> None:
    started: list[int] = []
    results = in_order(started.append, range(1000), 2)
    next(results)
    results.close()
    assert len(started) <= 1 + 2 * 2
    assert pool_threads() == []


def test_the_default_is_a_core_each_and_at_most_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, wanted in ((1, 1), (3, 3), (8, 8), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert default_threads() == wanted


@pytest.mark.parametrize(("cores", "wanted"), [(None, 1), (4, 4), (32, 8)])
def test_where_the_affinity_is_unknown_the_machine_counts(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, wanted: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert default_threads() == wanted
