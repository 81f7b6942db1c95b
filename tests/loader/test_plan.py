import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.loader import plan as plan_module
from marrow.loader.plan import FullShuffle, WindowShuffle, order_keys, permute_one, unpermute_one

SEEDS = st.integers(0, 2**63)


@settings(deadline=None, max_examples=80)
@given(num_rows=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 10**6))
def test_every_epoch_holds_each_row_once(num_rows: int, seed: int, epoch: int) -> None:
    positions = np.arange(epoch * num_rows, (epoch + 1) * num_rows)
    rows = FullShuffle(num_rows, seed).rows(positions)
    assert np.array_equal(np.sort(rows), np.arange(num_rows))


@settings(deadline=None, max_examples=80)
@given(data=st.data(), num_rows=st.integers(1, 1 << 50), seed=SEEDS)
def test_many_positions_at_once_are_the_positions_one_by_one(
    data: st.DataObject, num_rows: int, seed: int
) -> None:
    limit = min((1 << 62) - 1, num_rows * 1000)
    positions = data.draw(st.lists(st.integers(0, limit), max_size=20))
    plan = FullShuffle(num_rows, seed)
    rows = plan.rows(np.array(positions, dtype=np.int64))
    assert rows.tolist() == [plan.row(position) for position in positions]
    assert rows.dtype == np.int64
    assert all(0 <= row < num_rows for row in rows.tolist())


def test_golden_order() -> None:
    """The order of published runs: a change here changes what every checkpoint resumes to."""
    assert FullShuffle(10, 0).rows(np.arange(20)).tolist() == GOLDEN_10
    assert [FullShuffle(10**12, 7).row(position) for position in (0, 1, 10**12 - 1, 10**12)] == GOLDEN_LARGE
    assert FullShuffle(5097, 1).rows(np.arange(4)).tolist() == GOLDEN_5097


def test_epochs_and_seeds_are_unrelated() -> None:
    """The number of rows that two random permutations leave in place is Poisson with mean 1."""
    n = 1000
    orders = [FullShuffle(n, seed).rows(np.arange(n) + epoch * n) for seed in range(8) for epoch in range(8)]
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
        rows = FullShuffle(n, 3).rows(np.arange(n) + epoch * n)
        np.add.at(grid, (np.arange(n) * 8 // n, rows * 8 // n), 1)
    expected = np.outer(np.bincount(np.arange(n) * 8 // n), np.bincount(np.arange(n) * 8 // n)) * 60 / n
    chi_square = float(((grid - expected) ** 2 / expected).sum())
    # 49 degrees of freedom: mean 49, standard deviation 9.9; a fixed seed, so no chance at all.
    assert chi_square < 49 + 5 * 9.9


def test_neighbours_are_parted() -> None:
    n = 4096
    rows = FullShuffle(n, 0).rows(np.arange(n))
    distance = np.abs(np.diff(rows))
    # Uniform: mean n/3, standard error n / sqrt(18 n) = 15; and 2 in n neighbours stay neighbours.
    assert abs(distance.mean() - n / 3) < 5 * 15
    assert (distance == 1).sum() < 10


@pytest.mark.parametrize(
    ("n", "times"), [(2, 500), (3, 150), (4, 50), pytest.param(5, 300, marks=pytest.mark.slow)]
)
def test_small_permutations_are_all_equally_likely(n: int, times: int) -> None:
    plan = FullShuffle(n, 5)
    trials = times * math.factorial(n)
    orders = Counter(
        tuple(plan.row(position) for position in range(epoch * n, epoch * n + n)) for epoch in range(trials)
    )
    assert len(orders) == math.factorial(n)
    chi_square = sum((count - times) ** 2 / times for count in orders.values())
    freedom = math.factorial(n) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_a_row_of_a_trillion_takes_microseconds() -> None:
    plan = FullShuffle(10**12, 0)
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
        FullShuffle(num_rows, 0)


def test_no_positions_no_rows() -> None:
    assert FullShuffle(10, 0).rows(np.arange(0)).tolist() == []


GOLDEN_10 = [9, 1, 2, 8, 6, 3, 7, 5, 4, 0, 2, 7, 0, 3, 6, 4, 5, 8, 1, 9]
GOLDEN_LARGE = [373992188610, 399050527809, 539540350311, 13216083006]
GOLDEN_5097 = [5062, 145, 2850, 2096]


# Windows of shards


sizes_of_shards = st.one_of(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(1, 40)).map(
        lambda drawn: [drawn[0]] * drawn[1] + [min(drawn[0], drawn[2])]
    ),
)


def windows_by_hand(sizes: list[int], seed: int, window: int, epoch: int) -> list[set[int]]:
    """The rows of each window of an epoch, with lists: only the order of the shards is the formula's."""
    firsts = np.cumsum([0, *sizes])
    shards = [permute_one(slot, len(sizes), order_keys(seed, epoch, "shards")) for slot in range(len(sizes))]
    groups = [shards[low : low + window] for low in range(0, len(shards), window)]
    return [{row for s in group for row in range(firsts[s], firsts[s + 1])} for group in groups]


@settings(deadline=None, max_examples=80)
@given(sizes=sizes_of_shards, seed=st.integers(0, 9), window=st.integers(1, 8), epoch=st.integers(0, 3))
def test_a_window_holds_the_rows_of_its_shards_once_each(
    sizes: list[int], seed: int, window: int, epoch: int
) -> None:
    order = WindowShuffle(sizes, seed, window)
    n = sum(sizes)
    rows = order.rows(np.arange(n) + epoch * n).tolist()
    at = 0
    for expected in windows_by_hand(sizes, seed, window, epoch):
        assert set(rows[at : at + len(expected)]) == expected
        at += len(expected)
    assert at == n == order.num_rows


@settings(deadline=None, max_examples=60)
@given(sizes=sizes_of_shards, window=st.integers(1, 8), data=st.data())
def test_any_positions_together_are_each_alone(sizes: list[int], window: int, data: st.DataObject) -> None:
    order = WindowShuffle(sizes, 1, window)
    positions = data.draw(st.lists(st.integers(0, 5 * sum(sizes)), min_size=1, max_size=20))
    assert order.rows(np.array(positions)).tolist() == [order.row(position) for position in positions]


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 50), count=st.integers(1, 20), last=st.integers(1, 50), window=st.integers(1, 6))
def test_the_formula_equals_the_table(size: int, count: int, last: int, window: int) -> None:
    """Equal shards are arithmetic, others a table: for equal ones both give the same order."""
    sizes = [size] * count + [min(last, size)]
    n = sum(sizes)
    by_formula = WindowShuffle(sizes, 3, window)
    by_table = WindowShuffle(sizes, 3, window)
    by_table._blocks = plan_module._RaggedBlocks(np.array(sizes))
    assert isinstance(by_formula._blocks, plan_module._EqualBlocks)
    positions = np.arange(2 * n)
    assert by_formula.rows(positions).tolist() == by_table.rows(positions).tolist()
    of_equal = WindowShuffle.of_equal(n, size, 3, window)
    assert of_equal.rows(positions).tolist() == by_formula.rows(positions).tolist()


def test_what_comes_ahead_names_every_shard_in_time() -> None:
    sizes = [10, 10, 10, 10, 10, 10, 7]
    order = WindowShuffle(sizes, 0, window=2)
    shard_of = np.repeat(np.arange(7), sizes)
    for position in range(0, 3 * order.num_rows, 3):
        soon = shard_of[order.ahead(position, 20)].tolist()
        assert len(soon) == len(set(soon)) or position + 40 > order.num_rows
        rows = order.rows(np.arange(position, position + 20))
        assert set(shard_of[rows].tolist()) <= set(soon)
        here = order.rows(np.array([position]))[0]
        assert shard_of[here] in soon[:2], "soonest first"


def test_a_window_of_all_shards_is_a_full_shuffle() -> None:
    """Statistically: rows go everywhere (chi-square over an 8 x 8 grid, summed over 60 epochs)."""
    sizes = [37] * 20 + [11]
    n = sum(sizes)
    order = WindowShuffle(sizes, 0, window=21)
    grid = np.zeros((8, 8))
    for epoch in range(60):
        rows = order.rows(np.arange(n) + epoch * n)
        np.add.at(grid, (np.arange(n) * 8 // n, rows * 8 // n), 1)
    counts = np.bincount(np.arange(n) * 8 // n)
    expected = np.outer(counts, counts) * 60 / n
    assert float(((grid - expected) ** 2 / expected).sum()) < 49 + 5 * 9.9


def test_the_quality_of_a_window_is_what_it_says() -> None:
    """Displacement is bounded by the window; within it neighbours are unrelated."""
    sizes, window = [64] * 64, 8
    n = sum(sizes)
    order = WindowShuffle(sizes, 5, window)
    rows = order.rows(np.arange(n))
    slot_of_shard = np.empty(64, dtype=np.int64)
    for slot in range(64):
        slot_of_shard[permute_one(slot, 64, order_keys(5, 0, "shards"))] = slot
    unshuffled = slot_of_shard[rows // 64] * 64 + rows % 64  # where the row lay before its window's shuffle
    displacement = np.abs(np.arange(n) - unshuffled)
    assert displacement.max() < window * 64
    # Uniform within a window of w rows: mean w / 3, standard error w / sqrt(18 n) = 1.9.
    assert abs(displacement.mean() - 512 / 3) < 5 * 1.9
    # Neighbours: correlation of rows' places, standard error 1 / sqrt(4096) = 0.016. Windows are
    # taken off, since rows of one window are alike by design.
    place = unshuffled - unshuffled // 512 * 512
    assert abs(np.corrcoef(place[:-1], place[1:])[0, 1]) < 5 * 0.016
    # The whole epoch: shards are spread, so a run of positions has no drift.
    assert abs(np.corrcoef(np.arange(n), rows)[0, 1]) < 0.5


def test_neighbouring_places_are_uncorrelated_in_a_full_shuffle() -> None:
    n = 100_000
    rows = FullShuffle(n, 2).rows(np.arange(n))
    for lag in (1, 2, 16, 1024):
        # Standard error 1 / sqrt(n) = 0.0032.
        assert abs(np.corrcoef(rows[:-lag], rows[lag:])[0, 1]) < 5 * 0.0032
    displacement = np.abs(rows - np.arange(n))
    assert abs(displacement.mean() / n - 1 / 3) < 5 / math.sqrt(18 * n)


@pytest.mark.parametrize("shard_rows", [32_768, 1_000_003])
def test_a_window_of_a_trillion_rows_takes_microseconds(shard_rows: int) -> None:
    order = WindowShuffle.of_equal(10**12, shard_rows, 0, 64)
    times = []
    for trial in range(20):
        positions = 47_123_456_789 * trial + np.arange(1024)
        start_s = time.perf_counter()
        rows = order.rows(positions)
        times.append((time.perf_counter() - start_s) / 1024)
        assert rows.min() >= 0 and rows.max() < 10**12
    # 0.1 here in C, 1 in numpy, keys of an epoch included; the bound is against what grows with rows.
    assert min(times) < 20e-6


@settings(deadline=None, max_examples=100)
@given(size=st.one_of(st.integers(1, 200), st.integers(1, 1 << 62)), seed=st.integers(0, 99), data=st.data())
def test_the_way_back(size: int, seed: int, data: st.DataObject) -> None:
    value = data.draw(st.integers(0, size - 1))
    keys = order_keys(seed, 1)
    assert unpermute_one(permute_one(value, size, keys), size, keys) == value


@pytest.mark.parametrize(("sizes", "window"), [([], 1), ([3, 0], 1), ([3], 0), ([-1], 2)])
def test_impossible_windows_are_refused(sizes: list[int], window: int) -> None:
    with pytest.raises(ValueError, match="windows of"):
        WindowShuffle(sizes, 0, window)


def test_the_order_of_windows_is_golden() -> None:
    """A change would send every run that resumes to other rows."""
    order = WindowShuffle([4, 4, 4, 3], 7, 2)
    assert order.rows(np.arange(30)).tolist() == GOLDEN_WINDOW
    assert WindowShuffle([3, 5, 1, 2], 7, 2).rows(np.arange(22)).tolist() == GOLDEN_RAGGED


GOLDEN_WINDOW = [
    5,
    11,
    4,
    8,
    9,
    6,
    7,
    10,
    2,
    12,
    3,
    1,
    0,
    14,
    13,
    7,
    14,
    12,
    5,
    6,
    13,
    4,
    11,
    10,
    0,
    2,
    9,
    8,
    1,
    3,
]
GOLDEN_RAGGED = [7, 5, 6, 8, 3, 4, 2, 10, 9, 1, 0, 6, 10, 7, 4, 5, 9, 3, 2, 1, 0, 8]
