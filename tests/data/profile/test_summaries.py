"""Summaries: within the bounds that they state, against numpy and against counting by hand."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.data.profile.summaries import Distinct, Frequent, Quantiles, distinct_of, finite, seconds


def rank_errors(sketch: Quantiles, values: np.ndarray) -> float:
    """Return the largest difference between ranks by the sketch and true ranks, at every value held."""
    held, weights = sketch.points()
    true = np.searchsorted(np.sort(values), held, "right")
    return float(np.abs(np.cumsum(weights) - true).max())


@given(st.lists(st.floats(-1e6, 1e6), max_size=300), st.integers(1, 7))
def test_few_values_are_exact(values, piece):
    sketch = Quantiles(size=512)
    for start in range(0, len(values), piece):
        sketch.add(np.array(values[start : start + piece]))
    held, weights = sketch.points()
    assert sketch.error == 0
    assert Counter(dict(zip(held.tolist(), weights.tolist(), strict=True))) == Counter(values)
    if values:
        assert (sketch.minimum, sketch.maximum) == (min(values), max(values))


@pytest.mark.parametrize("order", ["random", "rising", "falling", "waves", "few"])
def test_ranks_are_off_by_no_more_than_said(order):
    generator = np.random.default_rng(1)
    values = generator.normal(size=200_000)
    if order == "rising":
        values.sort()
    elif order == "falling":
        values = np.sort(values)[::-1].copy()
    elif order == "waves":
        values = np.sin(np.arange(200_000) / 37.0)
    elif order == "few":
        values = generator.integers(0, 5, 200_000).astype(float)
    sketch = Quantiles(size=512)
    for piece in np.array_split(values, 83):
        sketch.add(piece)
    assert sketch.count == 200_000
    assert int(sketch.points()[1].sum()) == 200_000
    assert rank_errors(sketch, values) <= sketch.error
    assert sketch.error <= 0.02 * 200_000  # log2(n / size) / size of the values


@given(st.integers(0, 2**32), st.lists(st.integers(1, 900), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_how_the_values_are_cut_into_batches_does_not_matter(seed, lengths):
    values = np.random.default_rng(seed).normal(size=sum(lengths))
    whole, cut = Quantiles(size=64), Quantiles(size=64)
    whole.add(values)
    for piece in np.split(values, np.cumsum(lengths)[:-1]):
        cut.add(piece)
    for one, other in zip(whole.points(), cut.points(), strict=True):
        assert one.tolist() == other.tolist()
    assert whole.error == cut.error


def test_quantiles_of_many_values_take_little_memory():
    sketch = Quantiles(size=256)
    for start in range(0, 1_000_000, 10_000):
        sketch.add(np.arange(start, start + 10_000, dtype=float))
    held, _ = sketch.points()
    assert len(held) < 256 * 14


@pytest.mark.parametrize("true", [0, 1, 1000, 1024, 1025, 50_000, 1_000_000])
def test_distinct_values_are_counted_within_the_stated_error(true):
    sketch = Distinct(size=1024)
    for start in range(0, true, 30_000):
        column = pa.array(range(start, min(true, start + 30_000)))
        sketch.add(distinct_of(column)[2])
        sketch.add(distinct_of(column)[2])
    if true <= 1024:
        assert (sketch.count, sketch.error) == (true, 0.0)
    else:
        assert abs(sketch.count - true) <= 4 * sketch.error * true  # four standard deviations


def test_frequent_values_are_exact_while_they_fit_and_bounded_after():
    generator = np.random.default_rng(2)
    values = (generator.zipf(1.3, 60_000) % 5000).tolist()
    true = Counter(map(str, values))
    for size, exact in ((6000, True), (100, False)):
        sketch = Frequent(size=size)
        for start in range(0, len(values), 1000):
            distinct, counts, hashes = distinct_of(pa.array(values[start : start + 1000]))
            sketch.add(distinct, counts, hashes, lambda value: str(value.as_py()))
        for name, count in sketch.top(20):
            assert count <= true[name] <= count + sketch.error
        assert (sketch.error == 0) == exact
        if exact:
            assert sketch.top(5) == sorted(true.items(), key=lambda item: (-item[1], item[0]))[:5]


@pytest.mark.parametrize(
    ("column", "distinct"),
    [
        (pa.array([1, 2, 1]), 2),
        (pa.array([0.0, -0.0, float("nan"), -float("nan")]), 2),
        (pa.array(["a", "b", "a"]), 2),
        (pa.array([b"a", b"b"]), 2),
        (pa.array([True, True]), 1),
        (pa.array([1, 1], pa.date32()), 1),
        (pa.array([1, 2], pa.decimal128(5, 2)), 2),
        (pa.array([b"ab", b"ab"], pa.binary(2)), 1),
    ],
)
def test_distinct_values_come_once_with_their_counts(column, distinct):
    values, counts, hashes = distinct_of(column)
    assert len(values) == len(counts) == len(set(hashes.tolist())) == distinct
    assert counts.sum() == len(column)


def test_numbers_that_are_none_are_counted_apart():
    values, num_nan, num_infinite = finite(pa.array([1.0, None, float("nan"), float("inf"), -float("inf")]))
    assert (values.tolist(), num_nan, num_infinite) == ([1.0], 1, 2)


@pytest.mark.parametrize(
    ("column", "wanted"),
    [
        (pa.array([1], pa.date32()), 86400),
        (pa.array([86400_000], pa.date64()), 86400),
        (pa.array([1500], pa.timestamp("ms")), 1.5),
        (pa.array([1_500_000_000], pa.timestamp("ns", "UTC")), 1.5),
        (pa.array([7], pa.time32("s")), 7),
        (pa.array([7_000_000], pa.time64("us")), 7),
    ],
)
def test_times_become_seconds(column, wanted):
    assert seconds(column).to_pylist() == [wanted]
