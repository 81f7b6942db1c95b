"""The pipeline's own part: keys of steps, what the catalog is told and when. Whole runs: test_run.py."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from marrow_process import TINY, Marrow, write_csv

from marrow.cli.pipeline import Pipeline, load
from marrow.cli.recipe import read_recipe
from marrow.core.errors import DataError
from marrow.core.progress import Progress
from marrow.core.span import Ledger
from marrow.data.config import DataRecipe
from marrow.store.steps import StepResult, Workspace
from marrow.store.store import Store
from marrow.store.versions.versions import Versions
from marrow.text.tokenizer import Tokenizer


class Runs:
    """Pipelines of one store, and what they said of finished steps."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.told: list[tuple[str, str]] = []
        self.built: list[str] = []

    def start(self, *overrides: str) -> Pipeline:
        """Begin a run of the miniature recipe."""
        recipe = read_recipe(TINY, overrides)
        run_id = self.store.runs.start(recipe.name, recipe.hash)
        return Pipeline(recipe, self.store, run_id, self.store.runs.log(run_id), self._finished)

    def build(self, module: Any, work: Workspace, progress: Progress) -> dict[str, Any]:
        """Write one file that holds the module's name."""
        self.built.append(module.__name__)
        (work.out / "file").write_text(module.__name__, encoding="utf-8")
        return {"inputs": sorted(work.inputs)}

    def _finished(self, kind: str, result: StepResult) -> None:
        self.told.append((kind, result.status))


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    with Store.open(tmp_path / "home") as store:
        yield Runs(store)


def test_the_catalog_is_told_of_each_step_as_it_goes(runs: Runs) -> None:
    pipeline = runs.start()
    seen: list[list[tuple[str, str]]] = []

    def look(module: Any, work: Workspace, progress: Progress) -> dict[str, Any]:
        steps = runs.store.runs.get(pipeline.run_id).steps
        seen.append([(step.name, step.status) for step in steps])
        return runs.build(module, work, progress)

    rows = pipeline.step("ingest", module="marrow.data.ingest", config=1, build=look)
    pipeline.step("clean", module="marrow.data.clean", config=1, build=look, parents={"rows": rows})
    assert seen == [[("ingest", "running")], [("ingest", "built"), ("clean", "running")]]
    steps = runs.store.runs.get(pipeline.run_id).steps
    assert [step.artifact_id for step in steps] == [r.artifact.id for r in pipeline.results.values()]
    assert runs.told == [("ingest", "built"), ("clean", "built")]
    assert pipeline.results["clean"].artifact.facts["inputs"] == ["rows"]


def test_a_cached_step_neither_builds_nor_imports_its_layer(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"module": "marrow.data.split", "config": {"a": 1}, "build": runs.build}
    first = runs.start().step("split", **arguments)
    assert runs.built == ["marrow.data.split"]
    monkeypatch.delitem(sys.modules, "marrow.data.split")
    again = runs.start().step("split", **arguments)
    assert again == first
    assert runs.built == ["marrow.data.split"]
    assert "marrow.data.split" not in sys.modules
    assert runs.told == [("split", "built"), ("split", "cached")]


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"a": 2}},
        {"environment": {"torch": "another"}},
        {"module": "marrow.data.clean"},
        {"also": "marrow.cli.serve"},
        {"parents": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_a_step_depends_on_makes_it_run_anew(change: dict[str, Any], runs: Runs) -> None:
    pipeline = runs.start()
    rows = pipeline.step("ingest", module="marrow.data.ingest", config=1, build=runs.build)
    same: dict[str, Any] = {
        "module": "marrow.data.split",
        "config": {"a": 1},
        "build": runs.build,
        "environment": {"torch": "one"},
        "parents": {"rows": rows},
    }
    keys = [pipeline.step("split", **arguments).key for arguments in (same, same, same | change)]
    assert keys[0] == keys[1] != keys[2]
    assert len(runs.built) == 3  # ingest, split, and the changed one


def test_a_setting_that_a_step_does_not_read_changes_nothing(runs: Runs) -> None:
    """Two recipes of different hashes share the artifacts of the steps that read the same."""
    arguments: dict[str, Any] = {"module": "marrow.data.split", "config": 1, "build": runs.build}
    one, other = runs.start("train.lr=0.01"), runs.start("train.lr=0.02")
    assert one.recipe.hash != other.recipe.hash
    assert one.step("split", **arguments).id == other.step("split", **arguments).id
    assert len(runs.built) == 1


def test_a_failed_step_leaves_no_artifact_and_the_next_run_builds_it(runs: Runs) -> None:
    pipeline = runs.start()

    def fail(module: Any, work: Workspace, progress: Progress) -> dict[str, Any]:
        (work.out / "half").write_text("done", encoding="utf-8")
        raise DataError("too few rows")

    arguments: dict[str, Any] = {"module": "marrow.data.split", "config": 1}
    with pytest.raises(DataError):
        pipeline.step("split", build=fail, **arguments)
    assert runs.told == [] and pipeline.results == {}
    assert runs.store.catalog.latest() == []
    assert list((runs.store.home / "staging").glob("*/*/*")) == []
    (step,) = runs.store.runs.get(pipeline.run_id).steps
    assert (step.status, step.artifact_id) == ("running", None)  # where the run stood when it failed
    runs.start().step("split", build=runs.build, **arguments)
    assert runs.told == [("split", "built")]


def test_loading_code_has_a_line_of_its_own_in_the_ledger() -> None:
    with Ledger("step") as ledger:
        assert load("marrow.data.split").__name__ == "marrow.data.split"
    assert ledger.summary().parts["load code"].count == 1


def test_metrics_reach_the_catalog_with_the_step_that_logged_them(runs: Runs) -> None:
    pipeline = runs.start()
    with pipeline.log as log:

        def build(module: Any, work: Workspace, progress: Progress) -> dict[str, Any]:
            log.add("train/loss", 3, 1.5)
            return runs.build(module, work, progress)

        pipeline.step("train", module="marrow.data.split", config=1, build=build)
        (point,) = runs.store.runs.points(pipeline.run_id, "train/loss")  # before the run ends
    assert (point.step, point.value) == (3, 1.5)


def test_a_dataset_version_is_read_once_whatever_the_recipe_calls_it(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_csv(tmp_path / "folder" / "notes.csv", 20)
    versions = Versions(runs.store)
    first = versions.commit(tmp_path / "folder", "notes").version.artifact
    versions.tag("notes", "paper")

    def ingest(source: str) -> str:
        pipeline = runs.start(f"data.source={source}")
        return pipeline.ingest(pipeline.recipe.section(DataRecipe)).id

    ids = [ingest(name) for name in ("notes@1", "notes", "paper", first.id[:12])]
    write_csv(tmp_path / "folder" / "notes.csv", 21)
    versions.commit(tmp_path / "folder", "notes")
    ids += [ingest("notes~1"), ingest("notes")]
    assert len(set(ids[:5])) == 1 and ids[5] != ids[0]
    assert [status for _, status in runs.told] == ["built", *["cached"] * 4, "built"]
    assert runs.store.get(ids[0]).facts["source"] == "notes@1"


def run_to_clean(runs: Runs, source: Path, *overrides: str) -> str:
    """Run ingest and clean; return the hint of the error that ends it."""
    pipeline = runs.start(f"data.source={source}", *overrides)
    with pytest.raises(DataError) as caught:
        pipeline.run()
    return str(caught.value.hint)


def test_a_failed_expectation_leaves_its_full_result(runs: Runs, tmp_path: Path) -> None:
    source = tmp_path / "notes.csv"
    write_csv(source, 30)
    hint = run_to_clean(runs, source, "data.expect.title.unique=true", "data.expect.body.max_length=10")
    path = Path(hint.rpartition(": ")[2])
    assert path.name == "expectations.json"
    results = {one["name"]: one for one in json.loads(path.read_text())["results"]}
    assert (results["body.length"]["status"], results["title.unique"]["status"]) == ("fail", "pass")
    assert results["body.length"]["failed"] == 30 and len(results["body.length"]["samples"]) == 5
    # Another limit is another key, which has a result of its own.
    hint = run_to_clean(runs, source, "data.expect.body.max_length=11")
    assert path.exists() and Path(hint.rpartition(": ")[2]) != path


def test_where_every_row_was_dropped_the_samples_stay(runs: Runs, tmp_path: Path) -> None:
    write_csv(tmp_path / "notes.csv", 30)
    hint = run_to_clean(runs, tmp_path / "notes.csv", "data.quality.min_chars=100000")
    samples = Path(hint.rpartition(": ")[2]).read_text().splitlines()
    assert {json.loads(line)["rule"] for line in samples} == {"too_short"}


@pytest.mark.slow
def test_a_run_reads_a_dataset_version_and_gc_keeps_it(
    marrow: Marrow, csv_source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "notes"
    shutil.copytree(csv_source, folder)
    assert marrow("data", "commit", folder, "--to", "notes").returncode == 0
    assert marrow("data", "branch", "notes", "work").returncode == 0
    write_csv(folder / "notes.csv", 300)
    assert marrow("data", "commit", folder, "--to", "work").returncode == 0
    done = marrow("run", TINY, "--set", "data.source=work@2")
    assert done.returncode == 0, done.stderr
    shown = json.loads(marrow("lineage", "tiny", "--json").stdout)
    kinds = {one["id"]: one["kind"] for one in shown["artifacts"]}
    (source,) = [
        e["parent"] for e in shown["edges"] if (kinds[e["child"]], e["role"]) == ("ingest", "source")
    ]
    (version,) = [one for one in shown["artifacts"] if one["id"] == source]
    assert (version["kind"], version["num_files"], version["names"]) == ("dataset", 1, ["work@2"])
    assert marrow("data", "branch", "--delete", "work").returncode == 0
    assert marrow("data", "gc").returncode == 0
    out = tmp_path / "out"
    assert marrow("data", "checkout", version["id"][:12], out).returncode == 0
    assert (out / "notes.csv").read_bytes() == (folder / "notes.csv").read_bytes()
    again = marrow("run", TINY, "--set", "data.source=work@2")
    assert again.returncode == 0, again.stderr
    assert "cached" in again.stdout + again.stderr


def test_a_tokenizer_that_is_taken_learned_nothing_and_is_known_by_its_bytes(
    runs: Runs, tmp_path: Path
) -> None:
    taken = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Tokenizer.train(["some text"], 330).save(tmp_path / name / "tokenizer.json")
        pipeline = runs.start(f"tokenizer.file={tmp_path / name}")
        (tmp_path / f"split-{name}").mkdir()
        split = runs.store.publish("split", f"split {name}", tmp_path / f"split-{name}")
        taken.append(pipeline.tokenizer(split))
    assert taken[0].id == taken[1].id
    assert taken[0].parents == ()
    assert runs.told == [("tokenizer", "built"), ("tokenizer", "cached")]
