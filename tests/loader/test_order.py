import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import UsageError
from marrow.loader.mixture import Mixture, Phase
from marrow.loader.order import Job, Walk, merge
from marrow.loader.plan import FullShuffle, Order, WindowShuffle


def jobs(walk: Walk, count: int) -> list[Job]:
    return [next(walk) for _ in range(count)]


def some_orders(num_rows: int) -> list[Order]:
    return [
        FullShuffle(num_rows, 1),
        WindowShuffle.of_equal(num_rows, 7, 1, 3),
        Mixture([FullShuffle(num_rows, 0), FullShuffle(50, 1)], [Phase(0, (3, 1))], 2),
    ]


@settings(deadline=None, max_examples=60)
@given(
    kind=st.integers(0, 2),
    num_rows=st.integers(1, 400),
    start=st.integers(0, 1000),
    world=st.integers(1, 5),
    each=st.integers(1, 40),
    skip=st.lists(st.tuples(st.integers(0, 1500), st.integers(1, 300)), max_size=3),
)
def test_ranks_together_read_the_global_order(
    kind: int, num_rows: int, start: int, world: int, each: int, skip: list[tuple[int, int]]
) -> None:
    order = some_orders(num_rows)[kind]
    ranges = merge([(low, low + length) for low, length in skip])
    ranks = [
        jobs(Walk(order, start, world * each, rank=rank, world=world, skip=ranges), 5)
        for rank in range(world)
    ]
    wanted: list[int] = []
    position = start
    while len(wanted) < 5 * world * each:
        if not any(low <= position < high for low, high in ranges):
            wanted.append(position)
        position += 1
    rows = [row for step in zip(*ranks, strict=True) for job in step for row in job.rows_B.tolist()]
    assert rows == order.rows(np.array(wanted)).tolist()
    for step in zip(*ranks, strict=True):
        assert len({job.end for job in step}) == 1
    assert ranks[0][-1].end == wanted[-1] + 1


@pytest.mark.parametrize("num_rows", [10_007, 8_000])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.slow
def test_a_thousand_ranks_cover_an_epoch_evenly(num_rows: int, window: int | None) -> None:
    """Without a thousand machines: what each would read is a formula."""
    world, each = 1000, 4
    order = WindowShuffle.of_equal(num_rows, 100, 0, window) if window else FullShuffle(num_rows, 0)
    steps = -(-num_rows // (world * each))
    taken = [
        [job.rows_B for job in jobs(Walk(order, 0, world * each, rank=rank, world=world), steps)]
        for rank in range(world)
    ]
    per_rank = [sum(map(len, rows)) for rows in taken]
    counts = np.bincount(np.concatenate([row for rows in taken for row in rows]), minlength=num_rows)
    # Balance: not one row of difference, whether or not the epoch divides.
    assert set(per_rank) == {steps * each}
    # Coverage: all of the first epoch, once; what is over is the head of the second.
    over = steps * world * each - num_rows
    assert counts.min() == 1
    assert (counts == 2).sum() == over and counts.max() <= 2
    head = order.rows(np.arange(num_rows, num_rows + over))
    assert sorted(np.flatnonzero(counts == 2).tolist()) == sorted(head.tolist())


@settings(deadline=None, max_examples=80)
@given(
    start=st.integers(0, 50),
    stop=st.integers(0, 120),
    world=st.integers(1, 4),
    each=st.integers(1, 9),
    skip=st.lists(st.tuples(st.integers(0, 130), st.integers(1, 30)), max_size=3),
)
def test_it_stops_where_it_is_told(
    start: int, stop: int, world: int, each: int, skip: list[tuple[int, int]]
) -> None:
    ranges = merge([(low, low + length) for low, length in skip])
    wanted = [p for p in range(start, stop) if not any(low <= p < high for low, high in ranges)]
    order = FullShuffle(33, 0)
    ranks = [
        list(Walk(order, start, world * each, rank=rank, world=world, skip=ranges, stop=stop))
        for rank in range(world)
    ]
    got = [row for step in zip(*ranks, strict=True) for job in step for row in job.rows_B.tolist()]
    # All but what cannot be shared evenly: fewer rows than there are ranks.
    assert len(wanted) - len(got) == len(wanted) % world
    assert got == order.rows(np.array(wanted, dtype=np.int64)).tolist()[: len(got)]


def test_the_last_positions_of_all() -> None:
    order = FullShuffle(1000, 0)
    end = (1 << 63) - 1
    walk = Walk(order, end - 10, 5)
    assert [job.end for job in jobs(walk, 2)] == [end - 5, end]
    with pytest.raises(UsageError, match="2\\^63"):
        next(walk)


def test_the_start_may_lie_anywhere_and_costs_the_same() -> None:
    order = FullShuffle(10**9, 0)
    skip = merge([(10**9 + 3, 10**9 + 500_000)])

    def first_s(start: int) -> float:
        started_s = time.process_time()
        next(Walk(order, start, 256, skip=skip))
        return time.process_time() - started_s

    for start in (0, 10**9, 10**15):
        assert min(first_s(start) for _ in range(5)) < 10e-3


def test_what_is_ahead_is_told_before_it_is_needed() -> None:
    told: set[int] = set()
    order = WindowShuffle.of_equal(5000, 50, 0, 4)
    walk = Walk(order, 0, 16, ahead=lambda rows: told.update((rows // 50).tolist()))
    for job in jobs(walk, 600):
        assert set((job.rows_B // 50).tolist()) <= told


def test_what_lies_behind_is_not_told_again() -> None:
    """A cache that holds little would fetch it in place of what comes."""
    order = WindowShuffle.of_equal(50_000, 50, 0, 4)  # windows of 200 rows, ten batches each
    told: list[set[int]] = []
    walk = Walk(order, 0, 20, ahead=lambda rows: told.append(set((rows // 50).tolist())))
    used = [set((job.rows_B // 50).tolist()) for job in jobs(walk, 400)]
    for number in range(40, 400):
        # Looked up at most 512 rows ago, from the beginning of a window on: 36 batches.
        assert not set.union(*used[: number - 36]) & told[number]
        assert used[number] <= told[number]


@pytest.mark.parametrize(
    ("given_ranges", "merged"),
    [
        ([], ()),
        ([(5, 7), (1, 3)], ((1, 3), (5, 7))),
        ([(1, 3), (3, 5)], ((1, 5),)),
        ([(1, 9), (2, 3)], ((1, 9),)),
    ],
)
def test_ranges_are_merged(given_ranges: list[tuple[int, int]], merged: tuple[tuple[int, int], ...]) -> None:
    assert merge(given_ranges) == merged


@pytest.mark.parametrize("wrong", [(3, 3), (5, 2), (-1, 4), (0, 1 << 63)])
def test_impossible_ranges_are_refused(wrong: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="skip range"):
        merge([wrong])


@settings(deadline=None, max_examples=40)
@given(
    num_rows=st.integers(1, 200),
    rank=st.integers(0, 2),
    each=st.integers(1, 20),
    batches=st.integers(1, 9),
    stop=st.integers(0, 700),
    skip=st.lists(st.tuples(st.integers(0, 600), st.integers(1, 99)), max_size=2),
)
def test_jobs_together_are_the_jobs_one_by_one(
    num_rows: int, rank: int, each: int, batches: int, stop: int, skip: list[tuple[int, int]]
) -> None:
    def walk() -> Walk:
        ranges = merge([(low, low + length) for low, length in skip])
        return Walk(FullShuffle(num_rows, 0), 5, 3 * each, rank=rank, world=3, skip=ranges, stop=stop)

    alone = [(job.rows_B.tolist(), job.samples, job.end) for job in walk()]
    together = []
    for jobs_ in walk().many(batches):
        assert 1 <= len(jobs_.samples) == len(jobs_.ends) <= batches
        rows = jobs_.rows_N.reshape(len(jobs_.samples), -1).tolist()
        together += list(zip(rows, jobs_.samples, jobs_.ends, strict=True))
    assert together == alone
