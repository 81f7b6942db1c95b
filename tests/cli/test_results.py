"""Results are plain data: they add up, JSON holds them, and the page takes whatever a run has."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.cli import results
from marrow.cli.results import MetricPoint, RunReport, Sample, Score, StepReport

SECONDS = st.floats(0, 1e6)
STEPS = st.builds(
    StepReport,
    st.sampled_from(["ingest", "clean", "train"]),
    st.sampled_from(["built", "cached", "rebuilt"]),
    st.text(max_size=4),
    SECONDS,
    SECONDS,
    st.integers(0, 2**40),
    st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4) | st.none(), max_size=3),
)
REPORTS = st.builds(
    RunReport,
    st.text(max_size=8),
    steps=st.lists(STEPS, max_size=5).map(tuple),
    metrics=st.lists(st.builds(MetricPoint, st.integers(0, 99), st.floats(0, 20)), max_size=4).map(tuple),
    scores=st.lists(st.builds(Score, st.text(max_size=4), st.floats(0, 9), st.booleans()), max_size=3).map(
        tuple
    ),
    parse_rates=st.dictionaries(st.text(max_size=4), st.floats(0, 1), max_size=2),
)


@given(REPORTS)
@settings(max_examples=50)
def test_a_report_goes_through_json_and_its_totals_are_those_of_its_steps(report: RunReport) -> None:
    values = json.loads(json.dumps(dataclasses.asdict(report), allow_nan=False))
    steps = [StepReport(**step) for step in values["steps"]]
    assert tuple(steps) == report.steps
    assert tuple(MetricPoint(**point) for point in values["metrics"]) == report.metrics
    assert tuple(Score(**score) for score in values["scores"]) == report.scores
    assert report.wall_s == sum(step.wall_s for step in steps)
    assert report.cpu_s == sum(step.cpu_s for step in steps)
    assert report.peak_rss_bytes == max([0, *(step.peak_rss_bytes for step in steps)])


def test_a_run_that_did_nothing_has_totals_of_nothing() -> None:
    empty = RunReport("quickstart")
    assert (empty.wall_s, empty.cpu_s, empty.peak_rss_bytes) == (0, 0, 0)
    assert json.loads(json.dumps(dataclasses.asdict(empty)))["serving"] is None


RECORDS = [kind for kind in vars(results).values() if dataclasses.is_dataclass(kind)]


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_records_cannot_be_changed_and_take_no_stray_field(kind: type) -> None:
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    needed = {
        field.name: "x"
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    made = kind(**needed)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, next(iter(needed)), "y")
    with pytest.raises((TypeError, AttributeError)):
        object.__setattr__(made, "stray", 1)
    assert made == kind(**needed) and dataclasses.replace(made) == made


def test_defaults_that_can_grow_are_not_shared() -> None:
    one, other = StepReport("a", "built"), StepReport("b", "built")
    assert one.facts == other.facts == {} and one.facts is not other.facts
    assert Sample("prompt") == Sample("prompt", None, None, None)
