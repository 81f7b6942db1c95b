"""Drift: the textbook numbers, by brute force; alarms for change and none for chance."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import UsageError
from marrow.data.profile.columns import profile
from marrow.data.profile.drift import Drift, DriftLimits, drift, ks_distance, stability_index
from marrow.data.profile.page import drift_page, write_drift_page
from marrow.data.profile.record import Profile


def looked(folder: Path, **columns: Any) -> Profile:
    path = folder / "t.parquet"
    pq.write_table(pa.table(columns), path)
    return profile([path])


def compared(folder: Path, old: Any, new: Any, **limits: float) -> Any:
    found = drift(looked(folder, c=old), looked(folder, c=new), DriftLimits(**limits))
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["verdict"] == found.verdict
    assert drift_page(found).startswith("<!doctype html>")
    return found.columns[0]


def ks_by_force(one: list[float], other: list[float]) -> float:
    points = sorted({*one, *other})
    return max(
        abs(sum(v <= p for v in one) / len(one) - sum(v <= p for v in other) / len(other)) for p in points
    )


VALUES = st.lists(st.one_of(st.integers(-4, 4).map(float), st.floats(-10, 10)), min_size=1, max_size=60)


@given(VALUES, VALUES)
@settings(max_examples=60, deadline=None)
def test_the_distance_is_that_of_kolmogorov_and_smirnov(tmp_path_factory, one, other):
    folder = tmp_path_factory.mktemp("d")
    old, new = (looked(folder, c=values).columns[0].numbers for values in (one, other))
    assert old is not None
    assert new is not None
    distance, error = ks_distance(old, new)
    assert error == 0.0
    assert distance == pytest.approx(ks_by_force(one, other), abs=1e-12)
    assert ks_distance(new, old)[0] == pytest.approx(distance, abs=1e-12)


def test_the_distance_of_large_tables_is_within_the_stated_error(tmp_path):
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=60_000), generator.normal(0.3, 1.2, 60_000)
    found = compared(tmp_path, one, other)
    points = np.sort(np.concatenate([one, other]))
    true = (
        np.abs(
            np.searchsorted(np.sort(one), points, "right") - np.searchsorted(np.sort(other), points, "right")
        ).max()
        / 60_000
    )
    assert found.ks == pytest.approx(true, abs=found.ks_error)
    assert found.ks_error < 0.02


def test_the_index_is_that_of_the_textbook():
    shares = [(0.1, 0.2), (0.5, 0.4), (0.4, 0.4)]
    wanted = 0.1 * math.log(2) + (-0.1) * math.log(0.8)
    assert stability_index(shares) == pytest.approx(wanted)
    assert stability_index([(0.5, 0.5), (0.5, 0.5)]) == 0
    assert stability_index([(0.0, 0.0)]) == 0
    assert 0 < stability_index([(0.0, 0.5), (1.0, 0.5)]) < 10


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=12))
def test_the_index_is_never_negative_and_the_same_both_ways(shares):
    assert stability_index(shares) >= 0
    assert stability_index([(b, a) for a, b in shares]) == pytest.approx(stability_index(shares))


def test_the_parts_are_tenths_of_the_old_data_and_add_up(tmp_path):
    old, new = np.arange(1000.0), np.concatenate([np.arange(500.0), np.arange(500.0)])
    found = compared(tmp_path, old, new)
    assert [part.old for part in found.parts] == pytest.approx([0.1] * 10, abs=0.005)
    assert [part.new for part in found.parts[:5]] == pytest.approx([0.2] * 5, abs=0.01)
    for side in ("old", "new"):
        assert sum(getattr(part, side) for part in found.parts) == pytest.approx(1)
    assert found.verdict == "drift"


# Alarms


def sample(kind: str, seed: int, count: int) -> Any:
    generator = np.random.default_rng(seed)
    if kind == "normal":
        return generator.normal(size=count)
    if kind == "counts":
        return generator.poisson(3, count)
    if kind == "words":
        return generator.choice(["a", "b", "c", "d"], count, p=[0.5, 0.3, 0.15, 0.05]).tolist()
    if kind == "ids":
        return [f"{value:x}" for value in generator.integers(0, 2**60, count)]
    return [None if value < 0.2 else bool(value < 0.7) for value in generator.random(count)]


@pytest.mark.parametrize("kind", ["normal", "counts", "words", "ids", "flags"])
@pytest.mark.parametrize("count", [30, 500, 20_000])
def test_two_samples_of_the_same_data_have_not_drifted(tmp_path, kind, count):
    verdicts = [
        compared(tmp_path, sample(kind, seed, count), sample(kind, seed + 100, count)).verdict
        for seed in range(5 if count < 1000 else 1)
    ]
    assert verdicts.count("drift") == 0
    if count >= 500:
        assert set(verdicts) == {"same"}


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (sample("normal", 1, 3000), sample("normal", 2, 3000) + 1, "drift"),
        (sample("normal", 1, 3000), sample("normal", 2, 3000) + 0.35, "changed"),
        (sample("normal", 1, 3000), sample("normal", 2, 3000) * 3, "drift"),
        (["a"] * 90 + ["b"] * 10, ["a"] * 30 + ["b"] * 70, "drift"),
        (["a"] * 1000, ["b"] * 1000, "drift"),
        (["a", "b"] * 500, ["a", "b", "c"] * 333, "drift"),
        ([1.0] * 1000, [1.0] * 500 + [None] * 500, "drift"),
        ([1.0] * 1000, [1.0] * 700 + [math.nan] * 300, "drift"),
        ([5] * 1000, [5] * 1000, "same"),
        ([True] * 500 + [False] * 500, [True] * 950 + [False] * 50, "drift"),
        (["word"] * 1000, ["a far longer text"] * 1000, "drift"),
        ([[1]] * 500, [[1, 2, 3]] * 500, "drift"),
        ([None] * 100, [1.0] * 100, "drift"),
        ([1, 2, 3] * 300, [1.0, 2.0, 3.0] * 300, "changed"),
        ([1, 2, 3] * 300, ["1", "2", "3"] * 300, "drift"),
        ([1, 2], [], "drift"),
        ([], [], "same"),
        ([math.inf] * 10, [math.inf] * 10, "same"),
    ],
)
def test_what_has_changed_is_told(tmp_path, old, new, verdict):
    kinds = {None: pa.float64(), 1: pa.int64()}
    columns = [
        pa.array([], pa.int64()) if len(values) == 0 else
        pa.array(values, kinds[None]) if not isinstance(values, np.ndarray) and values[0] is None else
        pa.array(values)
        for values in (old, new)
    ]  # fmt: skip
    assert compared(tmp_path, *columns).verdict == verdict


def test_columns_that_came_or_went_are_told(tmp_path):
    found: Drift = drift(looked(tmp_path, a=[1], b=[1]), looked(tmp_path, b=[1], c=[1]))
    assert [(c.name, c.verdict, c.note) for c in found.columns] == [
        ("b", "same", ""),
        ("c", "changed", "the column is new"),
        ("a", "drift", "the column is gone"),
    ]
    assert found.verdict == "drift"
    assert [c.name for c in found.of("drift")] == ["a"]


def test_limits_decide_and_must_fit_together(tmp_path):
    old, new = sample("normal", 1, 3000), sample("normal", 2, 3000) + 0.35
    assert compared(tmp_path, old, new, psi_warn=5, psi_fail=5, ks_warn=0.9, ks_fail=0.9).verdict == "same"
    assert compared(tmp_path, old, new, psi_fail=0.1).verdict == "drift"
    with pytest.raises(UsageError, match="psi_warn = 2"):
        DriftLimits(psi_warn=2)


def test_the_page_shows_the_columns_that_changed_first(tmp_path):
    found = drift(
        looked(tmp_path, same=[1, 2] * 99, moved=[1, 2] * 99, **{"<i>": ["a"] * 198}),
        looked(tmp_path, same=[1, 2] * 99, moved=[3, 4] * 99, **{"<i>": ["<b>"] * 198}),
    )
    write_drift_page(found, tmp_path / "d.html", "old -> new")
    page = (tmp_path / "d.html").read_text()
    assert page.index("moved") < page.index("same</td>")
    assert "<i>" not in page
    found.write(tmp_path / "drift.json")
    assert json.loads((tmp_path / "drift.json").read_text())["verdict"] == "drift"


@pytest.mark.parametrize("shift", [0.0, 0.02])
def test_the_index_of_categories_is_a_chi_square_of_their_counts(tmp_path, shift):
    """Near each other; both are second-order in the difference, so a small shift leaves 5 %."""
    generator = np.random.default_rng(4)
    shares = np.array([0.4, 0.3, 0.2, 0.1])
    moved = shares + np.array([shift, -shift, 0, 0])
    rows = (20_000, 30_000)
    old, new = (
        generator.choice(["a", "b", "c", "d"], size=size, p=p)
        for size, p in zip(rows, (shares, moved), strict=True)
    )
    found = compared(tmp_path, old, new)
    counts = np.array([[(side == name).sum() for name in "abcd"] for side in (old, new)])
    expected = counts.sum(0) * counts.sum(1, keepdims=True) / counts.sum()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    scale = 1 / rows[0] + 1 / rows[1]
    assert found.psi / scale == pytest.approx(chi_square, rel=0.05)
    assert (chi_square > 3 + 3.5 * math.sqrt(6)) == (shift > 0) == (found.psi > found.psi_chance)
