"""A scrape says what was counted, in the text format that Prometheus reads."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.serve.metrics import _FAMILIES, _HISTOGRAMS, CONTENT_TYPE, Histogram, Metrics, prometheus

SAMPLE = re.compile(r'(?P<name>[a-z_]+)\{(?P<labels>(?:[a-z]+="(?:\\.|[^"\\\n])*",?)+)\} (?P<value>\S+)')
LABEL = re.compile(r'([a-z]+)="((?:\\.|[^"\\])*)"')
UNESCAPED = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


def scrape(metrics: Metrics, model: str = "m", ready: bool = True) -> dict[tuple[str, str], float]:
    """Read a scrape by the grammar of the format: (name, the label beside the model) -> value."""
    found: dict[tuple[str, str], float] = {}
    kinds: dict[str, str] = {}
    text = prometheus(metrics, model, ready)
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# TYPE "):
            name, kind = line.removeprefix("# TYPE ").split(" ")
            assert name not in kinds, "a family stands once"
            kinds[name] = kind
        elif not line.startswith("# HELP "):
            sample = SAMPLE.fullmatch(line)
            assert sample is not None, line
            labels = {
                name: re.sub(r"\\.", lambda part: UNESCAPED[part[0]], value)
                for name, value in LABEL.findall(sample["labels"])
            }
            assert labels.pop("model") == model
            key = sample["name"], ",".join(labels.values())
            assert key not in found, "a series stands once"
            found[key] = float(sample["value"])
            family = re.sub(r"_(bucket|sum|count)$", "", sample["name"])
            assert sample["name"] in kinds or kinds[family] == "histogram"
    assert set(kinds.values()) == {"gauge", "counter", "histogram"}
    return found


@given(st.lists(st.floats(0, 100), max_size=30))
def test_a_histogram_counts_each_value_in_the_first_bucket_that_holds_it(values: list[float]) -> None:
    metrics = Metrics()
    for value in values:
        metrics.ttft_s.observe(value)
    found = scrape(metrics)
    name = "marrow_time_to_first_token_seconds"
    for bound in metrics.ttft_s.bounds:
        assert found[f"{name}_bucket", str(bound)] == sum(value <= bound for value in values)
    assert found[f"{name}_bucket", "+Inf"] == found[f"{name}_count", ""] == len(values)
    assert found[f"{name}_sum", ""] == pytest.approx(sum(values))


def test_a_value_on_a_bound_is_within_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.0001):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]


@pytest.mark.parametrize(("attribute", "kind", "name"), [family[:3] for family in _FAMILIES])
def test_each_count_is_shown_under_its_own_name(attribute: str, kind: str, name: str) -> None:
    metrics = Metrics()
    setattr(metrics, attribute, 41)
    found = scrape(metrics)
    assert found[f"marrow_{name}", ""] == 41
    assert [key for key, value in found.items() if value == 41] == [(f"marrow_{name}", "")]
    assert name.endswith("_total") == (kind == "counter")


def test_every_counter_is_exported() -> None:
    shown = {family[0] for family in _FAMILIES} | {family[0] for family in _HISTOGRAMS} | {"finished"}
    assert shown == set(Metrics.__dataclass_fields__)


def test_requests_are_counted_by_reason() -> None:
    metrics = Metrics()
    metrics.finished["stop"] += 3
    metrics.finished["error"] += 1
    found = scrape(metrics)
    assert {key[1]: value for key, value in found.items() if key[0] == "marrow_requests_total"} == {
        "stop": 3, "length": 0, "abort": 0, "error": 1,
    }  # fmt: skip
    assert metrics.ended == 4


@pytest.mark.parametrize("ready", [False, True])
def test_readiness_is_a_number(ready: bool) -> None:
    assert scrape(Metrics(), ready=ready)["marrow_ready", ""] == int(ready)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_name_of_a_model_can_be_read_back(model: str) -> None:
    assert scrape(Metrics(), model)  # the label is compared there


def test_two_engines_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.finished["stop"] += 1
    one.ttft_s.observe(1.0)
    assert (other.ended, other.ttft_s.counts) == (0, [0] * 16)
    assert "version=0.0.4" in CONTENT_TYPE
