"""A run's story is read from its artifacts: a cached run tells what the first one told."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from marrow_process import TINY

from marrow.cli.recipe import read_recipe
from marrow.cli.report import headline
from marrow.cli.results import RunReport
from marrow.cli.story import read_findings, tell
from marrow.core.config import Recipe
from marrow.core.records import Parent
from marrow.store.steps import COST, Step, StepResult, Workspace, run_step
from marrow.store.store import Store

METRICS = [
    {"step": 0, "loss": 6.2, "tokens_per_s": 900.0, "mfu": 0.1, "data_wait_share": 0.2, "lr": 0.1},
    {"step": 2, "loss": 5.1, "tokens_per_s": 950.0, "mfu": 0.2, "data_wait_share": 0.1, "lr": 0.2},
]
SCORES = {"xz": 2.4, "ngram5": 2.9, "zlib": 2.7, "model": 2.1, "unigram": 4.8}
DROPPED = [
    {"rule": "too short", "file": "a.csv", "line": 3},
    {"rule": "too short", "file": "b.csv", "line": 9},
]
COUNTS = {"too short": {"documents": 2, "bytes": 7}, "a rule": {"documents": 0, "bytes": 0}}
LATENCY = {"p50": 12.5, "p90": 20.0, "p99": 40.0, "mean": 13.0}
SERVED = {"requests": 8, "concurrency": 4, "failed": 1, "wall_s": 2.0, "completion_tokens_per_s": 88.0}
FINDINGS = {
    "samples": [{"prompt": "def ", "before": "zz", "midway": "re", "after": "read"}],
    "parse_rates": {"model": 0.5, "5-gram": 0.25},
    "nearest": [
        {"prompt": "def ", "completion": "read", "file": "a.csv", "line": 3, "span_text": "def r", "x": 1}
    ],
}
STEPS: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, str]]] = {  # parents, facts, files
    "ingest": ((), {"rows": 1400}, {}),
    "clean": (
        ("ingest",),
        {"documents": 1200, "dropped": COUNTS},
        {"dropped.jsonl": "".join(json.dumps(sample) + "\n" for sample in DROPPED)},
    ),
    "train": (("clean",), {"steps": 12}, {"metrics.jsonl": "".join(json.dumps(m) + "\n" for m in METRICS)}),
    "evaluate": (("train", "clean"), {"bits_per_byte": SCORES}, {}),
    "serve": (("train",), SERVED | {"ttft_ms": LATENCY, "itl_ms": None}, {}),
}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return read_recipe(TINY, ["train.lr=0.01"])


def run_steps(store: Store, kinds: tuple[str, ...] = tuple(STEPS)) -> dict[str, StepResult]:
    """Run small steps that leave facts and files as the real ones do."""
    results: dict[str, StepResult] = {}
    for kind in kinds:
        parents, facts, files = STEPS[kind]

        def build(
            work: Workspace, facts: dict[str, Any] = facts, files: dict[str, str] = files
        ) -> dict[str, Any]:
            for name, text in (files | {"result": json.dumps(facts)}).items():
                (work.out / name).write_text(text, encoding="utf-8")
            return facts

        edges = [Parent(parent, results[parent].artifact.id) for parent in parents if parent in results]
        results[kind] = run_step(store, Step(kind=kind, build=build, parents=edges))
    return results


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> RunReport:
    with Store.open(tmp_path_factory.mktemp("story") / "home") as store:
        return tell(recipe, store, run_steps(store), FINDINGS)


def test_scores_are_the_model_then_the_ngram_then_the_rest_by_name(story: RunReport) -> None:
    assert [(score.name, score.bits_per_byte) for score in story.scores] == [
        ("this model", 2.1),
        ("5-gram (Kneser-Ney)", 2.9),
        ("unigram", 4.8),
        ("xz, given the training text", 2.4),
        ("zlib", 2.7),
    ]
    assert [score.ours for score in story.scores] == [True, False, False, False, False]
    assert "5-gram" in next(tile.note for tile in headline(story) if tile.note)


def test_metrics_samples_and_sources_are_those_of_the_artifacts(story: RunReport) -> None:
    assert [asdict(point) for point in story.metrics] == [
        {"step": 0, "loss": 6.2, "tokens_per_s": 900.0, "mfu": 0.1, "data_wait": 0.2},
        {"step": 2, "loss": 5.1, "tokens_per_s": 950.0, "mfu": 0.2, "data_wait": 0.1},
    ]
    assert [asdict(sample) for sample in story.samples] == FINDINGS["samples"]
    (nearest,) = story.nearest
    assert (nearest.file, nearest.line, nearest.shared) == ("a.csv", 3, "def r")
    assert story.parse_rates == {"model": 0.5, "5-gram": 0.25}


def test_serving_figures_survive_that_nothing_was_measured(story: RunReport) -> None:
    assert story.serving is not None
    assert (story.serving.requests, story.serving.errors) == (8, 1)
    assert (story.serving.ttft_p50_ms, story.serving.ttft_p99_ms) == (12.5, 40.0)
    assert story.serving.itl_p99_ms == 0.0  # one token each: there is no gap between two


def test_each_rule_tells_how_much_it_dropped_and_its_first_example(story: RunReport) -> None:
    assert [asdict(rule) for rule in story.dropped] == [
        {"rule": "a rule", "num_rows": 0, "num_bytes": 0, "example": ""},
        {"rule": "too short", "num_rows": 2, "num_bytes": 7, "example": "a.csv:3"},
    ]


def test_the_lineage_has_every_step_and_every_edge_between_them(story: RunReport) -> None:
    ids = {node.kind: node.id for node in story.nodes}
    assert list(ids) == list(STEPS)
    assert {(edge.parent, edge.child) for edge in story.edges} == {
        (ids[parent], ids[kind]) for kind, (parents, _, _) in STEPS.items() for parent in parents
    }
    notes = [node.note for node in story.nodes]
    assert notes == ["1,400 rows", "1,200 documents", "12 steps", "2.100 bits per byte", "8 requests"]


def test_a_cached_run_tells_the_same_story(tmp_path: Path, recipe: Recipe) -> None:
    with Store.open(tmp_path / "home") as store:
        first, again = (tell(recipe, store, run_steps(store), FINDINGS) for _ in range(2))
    assert {step.status for step in first.steps} == {"built"}
    assert {step.status for step in again.steps} == {"cached"}
    as_built = tuple(replace(step, status="built") for step in again.steps)
    assert replace(again, steps=as_built, when=first.when) == first


def test_a_run_cut_short_tells_what_it_has(tmp_path: Path, recipe: Recipe) -> None:
    with Store.open(tmp_path / "home") as store:
        story = tell(recipe, store, run_steps(store, ("ingest",)), {})
        nothing = tell(recipe, store, {}, {})
    assert [step.name for step in story.steps] == ["ingest"]
    assert (story.metrics, story.scores, story.samples, story.nearest, story.dropped) == ((), (), (), (), ())
    assert story.serving is None
    assert nothing.steps == ()


def test_what_a_step_cost_is_told_once(story: RunReport) -> None:
    for step in story.steps:
        assert COST not in step.facts
        assert step.ledger is not None
        parts = sum(part["seconds"] for part in step.ledger["parts"].values())
        assert parts == pytest.approx(step.wall_s)


def test_every_value_of_the_recipe_is_told_with_its_origin(story: RunReport, recipe: Recipe) -> None:
    values = {value.key: value for value in story.recipe_values}
    assert set(values) == set(recipe.origins)
    assert values["train.lr"].value == "0.01"
    assert values["train.lr"].origin == "--set train.lr=0.01"
    line = 1 + recipe.path.read_text(encoding="utf-8").splitlines().index("steps = 12")
    assert values["train.steps"].origin == f"{recipe.path}:{line}"
    assert values["serve.host"].origin == "default"
    assert values["report.prompts"].value == '["def read(self", "import "]'


def test_a_story_is_json_and_comes_back_whole(story: RunReport) -> None:
    assert json.loads(json.dumps(asdict(story)))["scores"][0]["name"] == "this model"


def test_findings_are_read_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "findings.json").write_text(json.dumps(FINDINGS), encoding="utf-8")
    assert read_findings(tmp_path) == FINDINGS


@pytest.mark.slow
def test_a_real_run_tells_the_same_story_again(home: Path, tiny: Path, csv_source: Path) -> None:
    """The artifacts of the miniature run, told twice, with nothing but the store to read from."""
    recipe = read_recipe(tiny, [f"data.source={csv_source}"])
    with Store.open(home) as store:
        run = store.runs.latest(recipe="tiny")[0]
        found = store.catalog.get_many([step.artifact_id or "" for step in run.steps])
        results: dict[str, StepResult] = {}
        for step in run.steps:
            artifact = found[step.artifact_id or ""]
            cost = artifact.facts[COST]
            results[step.name] = StepResult(
                artifact, "cached", 0.1, cost["cpu_s"], cost["peak_rss_bytes"], cost["ledger"]
            )
        findings = read_findings(store.view(results["report"].artifact))
        story = tell(recipe, store, results, findings)
    assert story.scores[0].ours
    assert "gram" in story.scores[1].name
    assert len(story.samples) == 2
    assert [point.step for point in story.metrics] == sorted(point.step for point in story.metrics)
    assert story.serving is not None and story.serving.errors == 0
    assert {edge.child for edge in story.edges} <= {node.id for node in story.nodes}
