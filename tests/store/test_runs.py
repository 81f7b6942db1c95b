from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from marrow.core.errors import ArtifactNotFound
from marrow.core.records import Artifact
from marrow.store.catalog import Catalog
from marrow.store.database import Database
from marrow.store.runs import Runs, RunStep

START = """
import sys
from pathlib import Path
from marrow.store.database import Database
from marrow.store.runs import Runs
runs = Runs(Database(Path(sys.argv[1]), sys.argv[2]), Path(sys.argv[1]) / "locks")
print(runs.start("quickstart", "h"))
sys.stdin.readline()
"""


@pytest.fixture
def runs(database: Database, home: Path) -> Iterator[Runs]:
    opened = Runs(database, home / "locks")
    yield opened
    opened.close()


def test_a_run_tells_its_steps_in_order_and_how_it_ended(
    runs: Runs, database: Database, make_artifact: Callable[..., Artifact]
) -> None:
    artifact = Catalog(database).add(make_artifact("rows"))
    run_id = runs.start("quickstart", "hash")
    runs.record(run_id, 1, RunStep("clean", "running"))
    runs.record(run_id, 0, RunStep("ingest", "cached", artifact.id, 0.5))
    run = runs.get(run_id)
    assert (run.recipe, run.recipe_hash, run.status, run.ended_s) == ("quickstart", "hash", "running", None)
    assert run.steps == (RunStep("ingest", "cached", artifact.id, 0.5), RunStep("clean", "running"))
    runs.record(run_id, 1, RunStep("clean", "failed", None, 2.0))
    runs.finish(run_id, "failed")
    run = runs.get(run_id)
    assert run.status == "failed" and run.steps[1] == RunStep("clean", "failed", None, 2.0)
    assert run.ended_s is not None and run.ended_s >= run.started_s


def test_latest_runs_come_first(runs: Runs) -> None:
    ids = [runs.start(recipe, "h") for recipe in ("a", "b", "a")]
    assert [run.id for run in runs.latest(limit=9)] == ids[::-1]
    assert [run.id for run in runs.latest(recipe="a")] == [ids[2]]
    assert runs.latest(recipe="c") == []
    assert len(set(ids)) == 3


def test_an_artifact_knows_the_runs_that_used_it(
    runs: Runs, database: Database, make_artifact: Callable[..., Artifact]
) -> None:
    artifact = Catalog(database).add(make_artifact("rows"))
    first, other, last = (runs.start("a", "h") for _ in range(3))
    for run_id in (first, last):
        runs.record(run_id, 0, RunStep("ingest", "built", artifact.id))
    assert [run.id for run in runs.containing(artifact.id)] == [last, first]
    assert other not in {run.id for run in runs.containing(artifact.id)}


def test_an_unknown_run_is_said(runs: Runs) -> None:
    with pytest.raises(ArtifactNotFound, match="no run 'x'"):
        runs.get("x")


@pytest.mark.parametrize(
    "catalog_url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True
)
def test_a_killed_run_reads_as_killed_and_a_live_one_as_running(
    runs: Runs, home: Path, catalog_url: str, spawn: Callable[..., Any]
) -> None:
    child = spawn(START, home, catalog_url)
    run_id = child.line()
    assert runs.get(run_id).status == "running"
    child.kill()
    assert runs.get(run_id).status == "killed"
    assert runs.latest()[0].status == "killed"
    assert list((home / "locks").glob("run-*")) == []


def test_a_run_of_another_machine_is_taken_at_its_word(
    runs: Runs, database: Database, tmp_path: Path
) -> None:
    there = Runs(database, tmp_path / "other home" / "locks")
    run_id = there.start("quickstart", "h")
    assert runs.get(run_id).status == "running"
    there.finish(run_id, "done")
    assert runs.get(run_id).status == "done"


def test_closing_ends_what_is_still_open(runs: Runs) -> None:
    done, left = runs.start("a", "h"), runs.start("b", "h")
    runs.finish(done, "done")
    runs.close()
    runs.close()
    assert (runs.get(done).status, runs.get(left).status) == ("done", "failed")
