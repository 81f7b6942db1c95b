import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.loader.plan import Plan

SEEDS = st.integers(0, 2**63)


@settings(deadline=None, max_examples=200)
@given(num_rows=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_every_epoch_holds_each_row_once(num_rows: int, seed: int, epoch: int) -> None:
    positions = np.arange(epoch * num_rows, (epoch + 1) * num_rows)
    rows = Plan(num_rows, seed).rows(positions)
    assert np.array_equal(np.sort(rows), np.arange(num_rows))


@settings(deadline=None, max_examples=200)
@given(data=st.data(), num_rows=st.integers(1, 1 << 50), seed=SEEDS)
def test_many_positions_at_once_are_the_positions_one_by_one(
    data: st.DataObject, num_rows: int, seed: int
) -> None:
    limit = min((1 << 62) - 1, num_rows * 1000)
    positions = data.draw(st.lists(st.integers(0, limit), max_size=20))
    plan = Plan(num_rows, seed)
    rows = plan.rows(np.array(positions, dtype=np.int64))
    assert rows.tolist() == [plan.row(position) for position in positions]
    assert rows.dtype == np.int64
    assert all(0 <= row < num_rows for row in rows.tolist())


def test_golden_order() -> None:
    """The order of published runs: a change here changes what every checkpoint resumes to."""
    assert Plan(10, 0).rows(np.arange(20)).tolist() == GOLDEN_10
    assert [Plan(10**12, 7).row(position) for position in (0, 1, 10**12 - 1, 10**12)] == GOLDEN_LARGE
    assert Plan(5097, 1).rows(np.arange(4)).tolist() == GOLDEN_5097


def test_epochs_and_seeds_are_unrelated() -> None:
    """The number of rows that two random permutations leave in place is Poisson with mean 1."""
    n = 1000
    orders = [Plan(n, seed).rows(np.arange(n) + epoch * n) for seed in range(8) for epoch in range(8)]
    fixed = [int((a == b).sum()) for i, a in enumerate(orders) for b in orders[:i]]
    assert len(fixed) == 64 * 63 // 2
    # Standard error of the mean of 2016 Poisson(1) numbers: 0.022; six of them.
    assert abs(np.mean(fixed) - 1) < 0.14
    assert max(fixed) < 10  # P(Poisson(1) >= 10) = 1e-7


@pytest.mark.parametrize("n", [64, 1000, 4097])
def test_rows_go_everywhere(n: int) -> None:
    """Chi-square of (where from, where to) over an 8 x 8 grid, summed over 60 epochs."""
    grid = np.zeros((8, 8))
    for epoch in range(60):
        rows = Plan(n, 3).rows(np.arange(n) + epoch * n)
        np.add.at(grid, (np.arange(n) * 8 // n, rows * 8 // n), 1)
    expected = np.outer(np.bincount(np.arange(n) * 8 // n), np.bincount(np.arange(n) * 8 // n)) * 60 / n
    chi_square = float(((grid - expected) ** 2 / expected).sum())
    # 49 degrees of freedom: mean 49, standard deviation 9.9; a fixed seed, so no chance at all.
    assert chi_square < 49 + 5 * 9.9


def test_neighbours_are_parted() -> None:
    n = 4096
    rows = Plan(n, 0).rows(np.arange(n))
    distance = np.abs(np.diff(rows))
    # Uniform: mean n/3, standard error n / sqrt(18 n) = 15; and 2 in n neighbours stay neighbours.
    assert abs(distance.mean() - n / 3) < 5 * 15
    assert (distance == 1).sum() < 10


@pytest.mark.parametrize(
    ("n", "times"), [(2, 500), (3, 150), (4, 50), pytest.param(5, 300, marks=pytest.mark.slow)]
)
def test_small_permutations_are_all_equally_likely(n: int, times: int) -> None:
    plan = Plan(n, 5)
    trials = times * math.factorial(n)
    orders = Counter(
        tuple(plan.row(position) for position in range(epoch * n, epoch * n + n)) for epoch in range(trials)
    )
    assert len(orders) == math.factorial(n)
    chi_square = sum((count - times) ** 2 / times for count in orders.values())
    freedom = math.factorial(n) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_a_row_of_a_trillion_takes_microseconds() -> None:
    plan = Plan(10**12, 0)
    times = []
    for trial in range(50):
        start_s = time.perf_counter()
        for i in range(20):
            plan.row(123_456_789_012 * trial + i)
        times.append((time.perf_counter() - start_s) / 20)
    assert min(times) < 100e-6  # about 10 here; the bound is against anything that grows with rows


@pytest.mark.parametrize("num_rows", [0, -1, (1 << 62) + 1])
def test_an_impossible_number_of_rows_is_refused(num_rows: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        Plan(num_rows, 0)


def test_no_positions_no_rows() -> None:
    assert Plan(10, 0).rows(np.arange(0)).tolist() == []


GOLDEN_10 = [9, 1, 2, 8, 6, 3, 7, 5, 4, 0, 2, 7, 0, 3, 6, 4, 5, 8, 1, 9]
GOLDEN_LARGE = [373992188610, 399050527809, 539540350311, 13216083006]
GOLDEN_5097 = [5062, 145, 2850, 2096]
