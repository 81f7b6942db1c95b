"""`marrow why`: the parts add up to the whole, and the largest one is named with what to do about it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.cli.main import run
from marrow.cli.tables import bottleneck
from marrow.cli.why import artifacts_of, named, overview
from marrow.core.errors import ArtifactNotFound
from marrow.core.records import Artifact, Parent
from marrow.core.span import span
from marrow.store.runs import RunStep
from marrow.store.steps import Step, Workspace, run_step
from marrow.store.store import Store


def ledger(name: str, cpu_s: float = 0.0, **parts: float) -> dict[str, Any]:
    return {
        "name": name,
        "wall_s": sum(parts.values()),
        "cpu_s": cpu_s,
        "parts": {part.replace("_", " "): {"seconds": s, "count": 1} for part, s in parts.items()},
        "overlapped": {},
    }


names = st.sampled_from(["ingest", "clean", "train", "serve"])
seconds = st.floats(0, 1e6)


@given(st.lists(st.builds(lambda name, cpu_s, a: ledger(name, cpu_s, a=a), names, seconds, seconds)))
def test_the_overview_adds_up(ledgers: list[dict[str, Any]]) -> None:
    whole = overview("run", ledgers)
    for kind in {entry["name"] for entry in ledgers}:
        mine = [entry["wall_s"] for entry in ledgers if entry["name"] == kind]
        assert whole["parts"][kind]["seconds"] == pytest.approx(sum(mine))
        assert whole["parts"][kind]["count"] == len(mine)
    # Additions in another order: a few ulp.
    assert sum(part["seconds"] for part in whole["parts"].values()) == pytest.approx(whole["wall_s"])
    assert whole["cpu_s"] == pytest.approx(sum(entry["cpu_s"] for entry in ledgers))


def test_two_artifacts_of_one_kind_are_both_counted() -> None:
    whole = overview("model", [ledger("train", a=3.0), ledger("clean", a=4.0), ledger("train", a=2.0)])
    assert whole["parts"]["train"] == {"seconds": 5.0, "count": 2}
    assert named(whole) == {
        "part": "train",
        "share": pytest.approx(5 / 9),
        "advice": "most of the time is spent in train",
    }


LAYERS = {  # a ledger as each layer's step leaves it -> the part to be named, a word of the advice
    "ingest": (ledger("ingest", survey=0.2, parse=0.4, write_rows=3.0), "write rows", "faster disk"),
    "clean": (ledger("clean", quality=1.0, near_duplicates=2.0, signatures=0.5), "near duplicates", "cached"),
    "tokenizer": (ledger("tokenizer", tokenizer=2.0, other=0.1), "tokenizer", "cached"),
    "shards": (ledger("shards", encode=0.4, write_shard=0.5), "write shard", "MARROW_HOME"),
    "loader": (ledger("train", data_wait=5.0, forward=1.0, backward=2.0), "data wait", "loader"),
    "model": (ledger("train", data_wait=0.1, forward=1.0, backward=2.0), "backward", "matrix products"),
    "optimiser": (ledger("train", optimiser=3.0, forward=1.0), "optimiser", "larger batches"),
    "checkpoints": (ledger("train", checkpoint=3.0, forward=1.0), "checkpoint", "checkpoint_every"),
    "evaluate": (ledger("evaluate", xz=3.0, ngram=1.0), "xz", "baseline"),
    "engine": (ledger("serve", schedule=3.0, forward=1.0), "schedule", "bug report"),
    "unknown": (ledger("serve", forward=1.0, other=2.0), "other", "no span covers"),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_has_its_bottleneck_named(layer: str) -> None:
    found, part, word = LAYERS[layer]
    told = named(found)
    assert told is not None
    assert told["part"] == part
    assert word in told["advice"]
    assert told["share"] == pytest.approx(found["parts"][part]["seconds"] / found["wall_s"])


def test_where_no_time_passed_nothing_is_to_blame() -> None:
    assert named(overview("run", [])) is None
    assert bottleneck(ledger("x", a=0.0)) is None


def build(store: Store, kind: str, *parents: Artifact, config: int = 0) -> Artifact:
    def make(work: Workspace) -> dict[str, Any]:
        with span("write rows"):
            (work.out / "file").write_text(f"{kind} {config}", encoding="utf-8")
        return {}

    edges = [Parent(parent.kind, parent.id) for parent in parents]
    return run_step(store, Step(kind=kind, build=make, parents=edges, config=config)).artifact


def record(store: Store, recipe: str, status: Any, *artifacts: Artifact) -> None:
    run_id = store.runs.start(recipe, "hash")
    for position, artifact in enumerate(artifacts):
        store.runs.record(run_id, position, RunStep(artifact.kind, "built", artifact.id))
    store.runs.finish(run_id, status)


def test_a_recipe_means_its_last_finished_run(tmp_path: Path) -> None:
    with Store.open(tmp_path / "home") as store:
        rows = build(store, "ingest")
        old, new = (build(store, "train", rows, config=config) for config in (1, 2))
        record(store, "tiny", "done", rows, old)
        record(store, "tiny", "done", rows, new)
        record(store, "tiny", "failed", rows)
        record(store, "other", "done", rows, old)
        assert artifacts_of(store, "tiny") == [rows, new]
        assert artifacts_of(store, "other") == [rows, old]


def test_an_artifact_means_all_that_made_it_the_source_first(tmp_path: Path) -> None:
    with Store.open(tmp_path / "home") as store:
        rows = build(store, "ingest")
        clean = build(store, "clean", rows)
        model = build(store, "train", clean)
        build(store, "evaluate", model)  # made from it, not what made it
        store.name(model, "mine")
        assert artifacts_of(store, "mine") == [rows, clean, model]
        assert artifacts_of(store, model.id[:10]) == [rows, clean, model]
        with pytest.raises(ArtifactNotFound):
            artifacts_of(store, "nothing")


def test_json_holds_the_overview_then_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MARROW_HOME", str(tmp_path / "home"))
    with Store.open() as store:
        rows = build(store, "ingest")
        record(store, "tiny", "done", rows, build(store, "clean", rows))
    assert run(["why", "tiny", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry["ledger"]["name"] for entry in told] == ["tiny", "ingest", "clean"]
    for entry in told:
        parts = sum(part["seconds"] for part in entry["ledger"]["parts"].values())
        assert parts == pytest.approx(entry["ledger"]["wall_s"], rel=1e-6)
        assert entry["bottleneck"]["part"] in entry["ledger"]["parts"]
    assert run(["why", "tiny", "--all"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("bottleneck: ") == 3


def starved(**waits: float) -> dict[str, Any]:
    """A ledger as `loader/prefetch/supply.py` leaves it: 20 s of steps, and waits by stage."""
    parts = {f"data wait: {stage}": {"seconds": s, "count": 9} for stage, s in waits.items()}
    parts |= {"data wait": {"seconds": 0.01, "count": 9}, "step": {"seconds": 20.0, "count": 9}}
    whole = sum(part["seconds"] for part in parts.values())
    work = {f"data: {stage}": {"seconds": 2 * s, "count": 9} for stage, s in waits.items()}
    return {"name": "train", "wall_s": whole, "cpu_s": 1.0, "parts": parts, "overlapped": work}


@pytest.mark.parametrize(
    ("stage", "setting"),
    [
        ("fetch", "max_bytes"),
        ("verify", "loader.prefetch"),
        ("decode", "window"),
        ("transform", "loader.workers"),
        ("collate", "loader.workers"),
        ("copy", "on_device"),
        ("queue", "loader.prefetch"),
    ],
)
def test_each_stage_of_a_starved_loader_is_named_with_its_setting(stage: str, setting: str) -> None:
    waits = dict.fromkeys(["fetch", "decode", "transform", "collate"], 1.0) | {stage: 30.0}
    told = named(starved(**waits))
    assert told is not None
    assert told["part"] == "data wait"
    assert told["share"] == pytest.approx((sum(waits.values()) + 0.01) / (sum(waits.values()) + 20.01))
    assert told["advice"].startswith(f"{stage} takes {30 / (sum(waits.values()) + 20.01):.0%} of the time: ")
    assert setting in told["advice"]


def test_the_number_of_workers_that_would_do_is_told() -> None:
    told = named(starved(transform=30.0))
    assert told is not None
    assert told["advice"].endswith("3 workers would hide it")  # 60 s of work beside 20 s of steps


def test_a_wait_that_is_not_the_most_is_still_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps(starved(transform=8.0)))
    assert run(["why", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "bottleneck: step, 71% of the time" in shown
    assert "data wait: 29% of the time" in shown
    assert "raise loader.workers" in shown
    path.write_text(json.dumps(starved(transform=0.5)))
    assert run(["why", str(path)]) == 0
    assert "data wait:  " not in capsys.readouterr().out


def test_a_ledger_file_is_read_as_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(json.dumps(starved(fetch=30.0)))
    assert run(["why", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told) == 1
    assert told[0]["ledger"] == starved(fetch=30.0)
    assert told[0]["bottleneck"]["part"] == "data wait"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "x", "parts": {"a": 1}, "overlapped": {}}'])
def test_what_is_no_ledger_file_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(text)
    assert run(["why", str(path)]) == 1
    assert "is no ledger" in capsys.readouterr().err
