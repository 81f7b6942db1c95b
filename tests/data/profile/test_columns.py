"""Profiles: the numbers of numpy, and of every odd table."""

import datetime
import decimal
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError, SourceError
from marrow.data.engine import Processes, Threads
from marrow.data.profile.columns import profile
from marrow.data.profile.page import profile_page, write_profile_page
from marrow.data.profile.record import SHARES, ColumnProfile, Profile, read_profile


def made(tmp_path: Path, columns: Any, **options: Any) -> Profile:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    path = tmp_path / "t.parquet"
    pq.write_table(table, path, **options)
    found = profile([path])
    again = read_profile(written(found, tmp_path / "profile.json"))
    assert again == found
    assert profile_page(found).startswith("<!doctype html>")
    return found


def written(found: Profile, path: Path) -> Path:
    found.write(path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return path


def column(tmp_path: Path, values: Any) -> ColumnProfile:
    return made(tmp_path, {"c": values}).columns[0]


def test_numbers_agree_with_numpy(tmp_path):
    values = np.random.default_rng(0).gamma(2.0, 3.0, 3000)
    found = column(tmp_path, values)
    numbers = found.numbers
    assert numbers is not None
    assert numbers.rank_error == 0
    wanted = np.quantile(values, SHARES, method="inverted_cdf")
    assert numbers.quantiles == pytest.approx(wanted.tolist(), abs=0)
    assert numbers.mean == pytest.approx(values.mean(), rel=1e-12)
    assert numbers.deviation == pytest.approx(values.std(), rel=1e-9)
    assert (numbers.minimum, numbers.maximum) == (values.min(), values.max())
    assert (found.distinct, found.nulls, found.kind) == (3000, 0, "number")
    assert sum(count for _, _, count in numbers.bins) == 3000


def test_many_numbers_agree_with_numpy_within_the_stated_error(tmp_path):
    values = np.random.default_rng(1).normal(size=150_000)
    found = made(tmp_path, {"c": values}, row_group_size=20_000).columns[0]
    numbers = found.numbers
    assert numbers is not None
    assert 0 < numbers.rank_error < 0.005
    for share, quantile in zip(SHARES, numbers.quantiles, strict=True):
        rank = np.searchsorted(np.sort(values), quantile) / len(values)
        assert abs(rank - share) <= numbers.rank_error + 1 / len(values)
    low, high = numbers.quantiles[0], numbers.quantiles[-1]
    assert (low, high) == (values.min(), values.max())
    assert numbers.mean == pytest.approx(values.mean(), abs=1e-9)
    assert abs(found.distinct - 150_000) <= 4 * found.distinct_error * 150_000


def test_the_curve_is_that_of_the_values(tmp_path):
    values = np.repeat([1.0, 2.0, 5.0], [10, 30, 60])
    numbers = column(tmp_path, values).numbers
    assert numbers is not None
    assert numbers.curve == ((1.0, 0.0, 0.1), (2.0, 0.1, 0.4), (5.0, 0.4, 1.0))
    assert numbers.gap == 0.0


@given(st.lists(st.one_of(st.none(), st.floats(), st.sampled_from([0.0, 1.5])), max_size=60))
@settings(max_examples=60, deadline=None)
def test_every_value_is_counted_once(tmp_path_factory, values):
    found = column(tmp_path_factory.mktemp("p"), pa.array(values, pa.float64()))
    finite = [v for v in values if v is not None and math.isfinite(v)]
    assert found.nulls == sum(v is None for v in values)
    assert found.nan == sum(v is not None and math.isnan(v) for v in values)
    assert found.infinite == sum(v is not None and math.isinf(v) for v in values)
    assert found.numbers is not None
    assert found.numbers.count == len(finite) == sum(count for _, _, count in found.numbers.bins)
    if finite:
        assert (found.numbers.minimum, found.numbers.maximum) == (min(finite), max(finite))


def test_texts_are_described_by_their_lengths_and_frequent_values(tmp_path):
    long = "x" * 5000
    found = column(tmp_path, ["a", "größe", "a", "", None, long, long + "y"])
    assert (found.kind, found.of, found.distinct) == ("text", "characters", 5)
    assert found.top[0] == ("a", 2)
    assert [count for _, count in found.top] == [2, 1, 1, 1, 1]  # long texts that begin alike are two
    assert max(len(value) for value, _ in found.top) <= 120
    assert found.numbers is not None
    assert found.numbers.maximum == 5001
    assert (found.minimum, found.maximum) == ("", long[:117] + "...")


@pytest.mark.parametrize(
    ("values", "kind", "of", "least", "greatest"),
    [
        ([3, 1, 2**62 + 1], "integer", "values", "1", str(2**62 + 1)),
        ([True, False, None], "boolean", "values", "False", "True"),
        (
            [datetime.date(2024, 1, 2), datetime.date(1960, 1, 1)],
            "date",
            "seconds",
            "1960-01-01",
            "2024-01-02",
        ),
        ([datetime.datetime(2024, 1, 2, 3)], "timestamp", "seconds", "2024-01-02 03:00:00.000000", None),
        ([datetime.time(3, 4)], "time", "seconds", "03:04:00", "03:04:00"),
        ([decimal.Decimal("1.50"), decimal.Decimal("2.25")], "number", "values", "1.50", "2.25"),
        ([b"ab", b"c"], "binary", "bytes", "b'ab'", "b'c'"),
        ([[1, 2], [], None], "list", "items", None, None),
        ([{"a": 1}, None], "struct", "values", None, None),
        (pa.nulls(3), "other", "values", None, None),
        (pa.array([None, None], pa.int64()), "integer", "values", None, None),
        (pa.array([None, None], pa.string()), "text", "characters", None, None),
        (pa.array([5], pa.timestamp("ns")), "timestamp", "seconds", "1970-01-01 00:00:00.000000005", None),
        (pa.array([5], pa.duration("s")), "other", "values", None, None),
        (pa.array(["a", "b"]).dictionary_encode(), "text", "characters", "a", "b"),
        (pa.array([b"ab", b"cd"], pa.binary(2)), "binary", "bytes", None, None),
        ([1e308, -1e308, 1.7e308], "number", "values", "-1e+308", "1.7e+308"),
        ([5e-324, 1e-300], "number", "values", "5e-324", "1e-300"),
        (pa.array([2**64 - 1], pa.uint64()), "integer", "values", str(2**64 - 1), None),
        (pa.array([1.5, 2.5], pa.float16()), "number", "values", "1.5", "2.5"),
    ],
)
def test_every_kind_of_column_has_a_profile(tmp_path, values, kind, of, least, greatest):
    found = column(tmp_path, values)
    assert (found.kind, found.of) == (kind, of)
    assert found.minimum == least
    assert found.maximum == (least if greatest is None and least is not None else greatest)


def test_an_empty_table_has_a_profile(tmp_path):
    found = made(tmp_path, pa.schema([("a", pa.int64()), ("b", pa.string())]).empty_table())
    assert found.rows == 0
    assert [column.null_share for column in found.columns] == [0.0, 0.0]
    assert made(tmp_path, pa.table({})).columns == ()


@pytest.mark.parametrize("name", ["", " ", "a.b", 'x"y', "<script>alert(1)</script>", "a\nb", "🦴", "\x00"])
def test_a_column_may_have_any_name(tmp_path, name):
    found = made(tmp_path, {name: ["<b>", "<b>"]})
    assert found.columns[0].name == name
    page = profile_page(found)
    assert "<script>" not in page
    assert "<b>&lt;b&gt;" not in page


@pytest.mark.slow
def test_a_thousand_columns_have_a_profile(tmp_path):
    columns = {f"c{i}": [float(i), None, 2.0] for i in range(1000)}
    found = made(tmp_path, columns)
    assert len(found.columns) == 1000
    assert (tmp_path / "profile.json").stat().st_size < 2e6
    page = tmp_path / "p.html"
    write_profile_page(found, page, "a table")
    assert page.stat().st_size < 4e6
    assert "Charts of the first 200 columns only." in page.read_text()


def test_equal_rows_give_equal_bytes(tmp_path):
    table = pa.table({"a": np.random.default_rng(3).normal(size=30_000), "b": ["x", "y", "z"] * 10_000})
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "t.parquet")
        written(profile([tmp_path / name / "t.parquet"]), tmp_path / name / "profile.json")
    assert (tmp_path / "one" / "profile.json").read_bytes() == (
        tmp_path / "two" / "profile.json"
    ).read_bytes()


def test_provenance_is_no_column_of_the_data(tmp_path):
    found = made(tmp_path, {"a": [1], "_file": ["x"], "_row": [1]})
    assert [column.name for column in found.columns] == ["a"]


def test_several_files_and_kinds_are_one_table(tmp_path):
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("a,b\n3,x\n")
    (tmp_path / "c.jsonl").write_text('{"a": 4}\n{"a": 5, "b": "y"}\n')
    found = profile([tmp_path / name for name in ("a.parquet", "b.csv", "c.jsonl")])
    a, b = found.columns
    assert (found.rows, a.distinct, a.maximum, b.nulls) == (5, 5, "5", 3)


def test_what_is_no_profile_is_refused(tmp_path):
    for text in (
        "",
        "{}",
        "[]",
        '{"version": 99}',
        '{"version": 1, "rows": 1, "files": [], "columns": [{}]}',
    ):
        path = tmp_path / "profile.json"
        path.write_text(text)
        with pytest.raises(DataError):
            read_profile(path)
    with pytest.raises(SourceError):
        read_profile(tmp_path / "none.json")


def test_the_page_needs_no_network(tmp_path):
    page = profile_page(made(tmp_path, {"a": list(range(100)), "b": ["x", "y"] * 50}), "mine")
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "Distribution of values" in page
    assert "Most frequent values" in page


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv"])
@pytest.mark.parametrize("make", [lambda: Threads(2), lambda: Processes(2)], ids=["threads", "processes"])
@pytest.mark.slow
def test_every_engine_gives_the_same_profile(tmp_path, suffix, make):
    draw = np.random.default_rng(5)
    columns = {f"c{i}": draw.normal(size=9_000).round(i % 4) for i in range(23)}
    columns["text"] = [f"{'word ' * (i % 7)}{i % 100}" for i in range(9_000)]
    path = tmp_path / f"t.{suffix}"
    table = pa.table(columns)
    if suffix == "parquet":
        pq.write_table(table, path, row_group_size=1_000)
    elif suffix == "arrow":
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table, max_chunksize=700)
    else:
        pacsv.write_csv(table, path)
    told: list[tuple[float, float | None, str]] = []
    with make() as engine:
        found = profile(
            [path], lambda done, total, unit, figures=None: told.append((done, total, unit)), engine=engine
        )
    assert found == profile([path])
    assert told[-1] == ((9_000, 9_000, "rows") if suffix == "csv" else (24, 24, "columns"))
