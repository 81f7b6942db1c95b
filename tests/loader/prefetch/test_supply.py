"""The supply: prefetch and workers change when work is done, never what comes out or for the worse."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import loader_jobs as jobs
import numpy as np
import pytest

from marrow.core.errors import UsageError
from marrow.core.span import Ledger
from marrow.loader.prefetch.supply import TRIAL, Supply
from marrow.loader.stages import stage

WAYS = [{"prefetch": 0}, {"prefetch": 3}, {"workers": 2, "prefetch": 1}]
IDS = ["inline", "thread", "workers"]


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_all_ways_give_the_same(way: dict[str, int]) -> None:
    with Supply(jobs.arrays, iter(range(20)), **way) as supply:
        for task in range(20):
            found = supply.take()
            assert found["task"] == task
            assert np.array_equal(found["large"], jobs.arrays(task)["large"])
        with pytest.raises(StopIteration):
            supply.take()
        assert supply.counters()["batches"] == 20


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_an_error_comes_in_its_turn(way: dict[str, int]) -> None:
    with Supply(jobs.FailsAt(4), iter(range(20)), **way) as supply:
        assert [supply.take()["task"] for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(ValueError, match="task 4 is bad"):
            supply.take()


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_closed_twice_and_no_more(way: dict[str, int]) -> None:
    supply = Supply(jobs.arrays, iter(range(5)), **way)
    supply.take()
    supply.close()
    supply.close()
    with pytest.raises(UsageError, match="closed"):
        supply.take()


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_counts_come_from_wherever_they_were_made(way: dict[str, int]) -> None:
    with Supply(jobs.counted, iter(range(9)), **way) as supply:
        for _ in range(9):
            supply.take()
        counters = supply.counters()
    assert counters["counts"]["samples skipped"] == 9
    assert sorted(counters["notes"]) == sorted(f"task {task}" for task in range(9) for _ in range(task % 3))


@pytest.mark.parametrize("numbers", [{"prefetch": -1}, {"workers": -1}])
def test_negative_numbers_are_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="cannot be negative"):
        Supply(jobs.arrays, iter(()), **numbers)


def staged(seconds: dict[str, float]) -> Callable[[int], int]:
    def make(task: int) -> int:
        for name, s in seconds.items():
            with stage(name):
                time.sleep(s)
        return task

    return make


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("slowest", ["fetch", "transform"])
def test_the_wait_is_charged_to_the_stage_that_is_slow(slowest: str, prefetch: int) -> None:
    # On a busy machine a sleep of 1 ms takes 5.
    seconds = {"fetch": 0.001, "decode": 0.001, "transform": 0.001} | {slowest: 0.04}
    with Supply(staged(seconds), iter(range(15)), prefetch=prefetch) as supply, Ledger("train") as ledger:
        for _ in range(12):
            supply.take()
            time.sleep(0.001)
    parts = ledger.summary().parts
    waits = {name: part.seconds for name, part in parts.items() if name.startswith("data wait")}
    assert max(waits, key=lambda name: waits[name]) == f"data wait: {slowest}"
    assert waits[f"data wait: {slowest}"] > 0.6 * sum(waits.values())
    assert sum(part.seconds for part in parts.values()) == pytest.approx(ledger.summary().wall_s, rel=1e-6)
    assert sum(supply.counters()["waited_s"].values()) == pytest.approx(sum(waits.values()), rel=0.02)


def test_batches_that_are_ready_are_no_wait() -> None:
    with Supply(staged({"transform": 0.002}), iter(range(30)), prefetch=2) as supply:
        for _ in range(20):
            time.sleep(0.006)
            supply.take()
        waited, worked = (sum(supply.counters()[what].values()) for what in ("waited_s", "worked_s"))
    assert waited < 0.5 * worked


def test_waits_for_workers_are_charged_to_their_stage_too() -> None:
    with Supply(jobs.slower, iter(range(100)), workers=1, prefetch=0) as supply:
        supply.take()
        before = supply.counters()["waited_s"]
        for _ in range(15):
            supply.take()
        after = supply.counters()["waited_s"]
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    assert max(spent, key=lambda name: spent[name]) == "transform"


def test_workers_that_cost_more_than_they_do_are_let_go() -> None:
    count = 4 * TRIAL
    with Supply(jobs.counted, iter(range(count)), workers=1) as supply:
        assert [supply.take() for _ in range(count)] == list(range(count))
        assert supply.pids == []
        counters = supply.counters()
    assert counters["counts"]["workers let go"] == 1
    assert any("let go" in note for note in counters["notes"])


def test_workers_that_do_more_than_they_cost_stay() -> None:
    count = 3 * TRIAL
    with Supply(jobs.slow, iter(range(count)), workers=1) as supply:
        assert [supply.take()["task"] for _ in range(count)] == list(range(count))
        assert len(supply.pids) == 1


def test_a_thread_does_not_slow_a_consumer_that_only_takes() -> None:
    """In CPU time, in turns, the least of each; handed to a thread, each item costs 5 to 20 times as much."""
    source = np.zeros(20_000, np.int64)

    def batches(task: int) -> Any:
        return source.copy()

    def cost_s(prefetch: int) -> float:
        with Supply(batches, iter(range(10_000)), prefetch=prefetch) as supply:
            for _ in range(50):
                supply.take()
            start_s = time.process_time()
            for _ in range(400):
                supply.take()
            return time.process_time() - start_s

    pairs = [(cost_s(0), cost_s(2)) for _ in range(7)]
    inline, thread = (min(column) for column in zip(*pairs, strict=True))
    assert thread < 2 * inline  # 1.1 on an idle machine; the margin is for a busy one


def test_tasks_are_taken_one_at_a_time_in_order() -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for task in range(50):
            taken.append(task)
            yield task

    with Supply(lambda task: task, tasks(), prefetch=4) as supply:
        assert [supply.take() for _ in range(50)] == list(range(50))
    assert taken == list(range(50))
