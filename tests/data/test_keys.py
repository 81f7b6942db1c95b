"""Keys: equal values have equal keys, different ones different keys, in memory or out of it."""

import decimal
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import DiskFull
from marrow.data.keys import KeyStore, keys_of, missing, mix, repeated


def pairs(column: pa.Array) -> list[tuple[int, int]]:
    keys = keys_of(column, 0)
    return list(zip(keys["high"].tolist(), keys["low"].tolist(), strict=True))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([1, 2], pa.int8()), pa.array([1, 2], pa.int64())),
        (pa.array([1.5], pa.float32()), pa.array([1.5], pa.float64())),
        (pa.array([0.0]), pa.array([-0.0])),
        (pa.array([math.nan]), pa.array([-math.nan])),
        (pa.array(["ab"]), pa.array([b"ab"])),
        (pa.array([True]), pa.array([1], pa.uint8())),
    ],
)
def test_equal_values_have_equal_keys_whatever_their_width(one, other):
    assert pairs(one) == pairs(other)


def test_rows_count_nulls_and_keys_leave_them_out():
    keys = keys_of(pa.array([None, "a", None, "b", "a"]), 100)
    assert keys["row"].tolist() == [101, 103, 104]
    assert keys["high"][0] == keys["high"][2] != keys["high"][1]


def test_decimals_and_times_have_keys():
    one = pa.array([decimal.Decimal("1.10"), decimal.Decimal("1.20")])
    assert len(set(pairs(one))) == 2
    for kind in (
        pa.date32(),
        pa.date64(),
        pa.timestamp("us"),
        pa.time32("s"),
        pa.time64("ns"),
        pa.duration("s"),
    ):
        values = pa.array([1, 2, 1], pa.int32() if kind.bit_width == 32 else pa.int64())
        found = pairs(values.cast(kind) if kind != pa.date64() else pa.array([0, 86400000, 0]).cast(kind))
        assert found[0] == found[2] != found[1]


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50, unique=True))
def test_mixing_is_one_to_one(values):
    assert len(set(mix(np.array(values, np.uint64)).tolist())) == len(values)


VALUES = st.lists(st.text("ab", max_size=3), max_size=80)


@given(VALUES, VALUES, st.integers(1, 2000), st.integers(1, 2000))
@settings(max_examples=50, deadline=None)
def test_spilled_keys_answer_as_those_in_memory_do(values, known, memory, other_memory):
    def fill(texts: list[str], limit: int) -> KeyStore:
        store = KeyStore(memory_bytes=limit)
        for start in range(0, len(texts), 7):
            store.add(keys_of(pa.array(texts[start : start + 7], pa.string()), start))
        return store

    with fill(values, memory) as store, fill(known, other_memory) as those:
        again = [i for i, v in enumerate(values) if v in values[:i]]
        lost = [i for i, v in enumerate(values) if v not in known]
        for most in (0, 3, 1000):
            count, rows = repeated(store, most)
            assert (count, rows.tolist()) == (len(again), again[:most])
            count, rows = missing(store, those, most)
            assert (count, rows.tolist()) == (len(lost), lost[:most])


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    class Full:
        def __getattr__(self, name: str):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: Full())
    store = KeyStore(Path(tmp_path), memory_bytes=1)
    with pytest.raises(DiskFull, match="set keys aside"):
        store.add(keys_of(pa.array([1]), 0))


def test_closing_twice_is_fine_and_leaves_nothing(tmp_path):
    store = KeyStore(tmp_path, memory_bytes=1)
    store.add(keys_of(pa.array([1, 2, 1]), 0))
    assert store.spilled_bytes == 72
    store.close()
    store.close()
    assert list(tmp_path.iterdir()) == []
