"""Reports of expectations: counts that add up, one line for each result, and a refusal that names them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core.errors import DataError, SourceError
from marrow.data.quality.report import CheckResult, ExpectationReport, Sample

NAMES = st.text(min_size=1, max_size=8)
SAMPLES = st.builds(Sample, NAMES, st.integers(1, 99), st.none() | st.text(max_size=8))
RESULTS = st.builds(
    CheckResult,
    NAMES,
    NAMES,
    st.sampled_from(["type", "range", "nulls"]),
    st.text(max_size=8),
    st.sampled_from(["warn", "fail"]),
    st.sampled_from(["pass", "warn", "fail"]),
    st.integers(0, 1000),
    st.integers(0, 10),
    st.sampled_from(["", "no such column"]),
    st.lists(SAMPLES, max_size=3).map(tuple),
)
REPORTS = st.builds(ExpectationReport, st.integers(0, 1000), st.lists(RESULTS, max_size=12).map(tuple))


def result(name: str = "price", **changes: object) -> CheckResult:
    values: dict[str, object] = {
        "name": name, "column": "price", "check": "range", "limit": "at least 0", "level": "fail",
        "status": "fail", "rows": 12_000, "failed": 1_500,
    }  # fmt: skip
    return CheckResult(**(values | changes))  # type: ignore[arg-type]


@given(REPORTS)
def test_counts_add_up_and_json_holds_all(report: ExpectationReport) -> None:
    facts = report.facts()
    assert list(facts) == ["pass", "warn", "fail"] and sum(facts.values()) == len(report.results)
    assert report.failed == (facts["fail"] > 0)
    values = json.loads(json.dumps(report.as_dict()))
    assert (values["rows"], values["failed"]) == (report.rows, report.failed)
    for one, kept in zip(report.results, values["results"], strict=True):
        samples = tuple(Sample(**sample) for sample in kept.pop("samples"))
        assert kept.pop("share") == one.share
        assert CheckResult(**kept, samples=samples) == one


@given(REPORTS)
def test_a_report_is_refused_if_and_only_if_it_has_failed(report: ExpectationReport) -> None:
    if not report.failed:
        report.refuse()
        return
    with pytest.raises(DataError) as caught:
        report.refuse()
    text = str(caught.value)
    assert all(one.told() in text for one in report.of("fail")[:8])
    assert text.startswith(f"{report.facts()['fail']} of {len(report.results)} expectations do not hold")


@given(REPORTS)
def test_samples_may_be_shown_changed_and_all_else_stays(report: ExpectationReport) -> None:
    shown = report.shown_as(lambda value: f"<{len(value)}>")
    assert shown.facts() == report.facts() and shown.rows == report.rows
    for one, other in zip(report.results, shown.results, strict=True):
        assert (one.name, one.failed, one.rows) == (other.name, other.failed, other.rows)
        for was, now in zip(one.samples, other.samples, strict=True):
            assert (was.file, was.line) == (now.file, now.line)
            assert now.value == (None if was.value is None else f"<{len(was.value)}>")
    assert report.shown_as(str) == report


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "price (at least 0): 1,500 of 12,000 rows"),
        ({"note": "no such column"}, "price (at least 0): no such column"),
        (
            {"samples": (Sample("a.csv", 7, "-1"), Sample("b.csv", 2, "-3"))},
            "price (at least 0): 1,500 of 12,000 rows, first -1 at a.csv:7",
        ),
        (
            {"samples": (Sample("a.csv", 7, None),)},
            "price (at least 0): 1,500 of 12,000 rows, first None at a.csv:7",
        ),
        ({"rows": 0, "failed": 0}, "price (at least 0): 0 of 0 rows"),
    ],
)
def test_a_result_is_told_in_one_line(changes: dict[str, object], told: str) -> None:
    assert result(**changes).told() == told


@pytest.mark.parametrize(("rows", "failed", "share"), [(0, 0, 0.0), (4, 1, 0.25), (3, 3, 1.0)])
def test_a_share_is_of_the_rows(rows: int, failed: int, share: float) -> None:
    assert result(rows=rows, failed=failed).share == share


@pytest.mark.parametrize(("count", "more"), [(8, ""), (9, "and 1 more"), (30, "and 22 more")])
def test_a_long_refusal_is_cut_and_says_where_the_rest_is(tmp_path: Path, count: int, more: str) -> None:
    report = ExpectationReport(9, tuple(result(f"r{i:02}") for i in range(count)))
    with pytest.raises(DataError) as caught:
        report.refuse(tmp_path / "expectations.json")
    text = str(caught.value)
    assert text.count("at least 0") == 8 and more in text and ("more" in text.split("hint")[0]) == bool(more)
    assert caught.value.hint is not None and str(tmp_path / "expectations.json") in caught.value.hint


def test_a_warning_alone_refuses_nothing() -> None:
    report = ExpectationReport(3, (result(status="warn", level="warn"), result(status="pass")))
    report.refuse()  # raises for what failed
    assert [one.status for one in report.results] == ["warn", "pass"]


def test_the_file_is_whole_or_not_there(tmp_path: Path) -> None:
    report = ExpectationReport(3, (result("größe", samples=(Sample("a.csv", 1, "ü"),)),))
    report.write(tmp_path / "e.json")
    text = (tmp_path / "e.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(report.as_dict())) and "größe" in text
    with pytest.raises(SourceError, match="cannot write the expectations' results") as caught:
        report.write(tmp_path / "e.json" / "f.json")
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]
