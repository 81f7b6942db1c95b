"""`marrow lineage` of a small chain: up and down, as a tree, JSON and Graphviz, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from marrow.cli.lineage import with_sources
from marrow.cli.main import run
from marrow.core.records import Artifact, Parent
from marrow.store import lineage
from marrow.store.steps import Step, Workspace, run_step
from marrow.store.store import Store

Capture = pytest.CaptureFixture[str]


def writes(text: str, **facts: object) -> Callable[[Workspace], dict[str, object]]:
    def build(workspace: Workspace) -> dict[str, object]:
        (workspace.out / "file").write_text(text)
        return dict(facts)

    return build


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Artifact]]:
    """ingest -> clean -> shards, and clean -> tokenizer -> shards; shards are named."""
    home = tmp_path_factory.mktemp("lineage") / "home"
    with Store.open(home) as store:
        facts = {"files": 3, "rows": 1200, "source": "reviews/*.csv"}
        rows = run_step(store, Step("ingest", writes("rows", **facts))).artifact
        clean = run_step(store, Step("clean", writes("clean"), (Parent("rows", rows.id),))).artifact
        tokens = run_step(store, Step("tokenizer", writes("bpe"), (Parent("texts", clean.id),))).artifact
        parents = (Parent("documents", clean.id), Parent("tokenizer", tokens.id))
        shards = run_step(store, Step("shards", writes("shards"), parents)).artifact
        store.catalog.name(shards.id, "reviews")
    return home, {"ingest": rows, "clean": clean, "tokenizer": tokens, "shards": shards}


@pytest.fixture
def chain(made: tuple[Path, dict[str, Artifact]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Artifact]:
    """Point the command line at the store of the chain, which no test changes."""
    monkeypatch.setenv("MARROW_HOME", str(made[0]))
    monkeypatch.delenv("MARROW_CATALOG", raising=False)
    return made[1]


def test_the_tree_begins_at_the_target_and_ends_at_the_source(
    chain: dict[str, Artifact], capsys: Capture
) -> None:
    assert run(["lineage", "reviews"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    places = [told.out.index(word) for word in ("shards", "clean", "ingest", "source: reviews/*.csv")]
    assert places == sorted(places)
    assert "3 files" in told.out and "1,200 rows" in told.out
    assert chain["shards"].id[:12] in told.out


def test_down_shows_what_was_made_from_it(chain: dict[str, Artifact], capsys: Capture) -> None:
    assert run(["lineage", chain["ingest"].id[:12], "--down"]) == 0
    out = capsys.readouterr().out
    assert all(chain[kind].id[:12] in out for kind in chain)
    assert "source:" not in out
    assert run(["lineage", chain["shards"].id[:12], "--down"]) == 0
    assert chain["clean"].id[:12] not in capsys.readouterr().out


@pytest.mark.parametrize(("target", "down"), [("shards", False), ("clean", True), ("ingest", False)])
def test_json_has_every_node_and_edge(
    chain: dict[str, Artifact], capsys: Capture, target: str, down: bool
) -> None:
    assert run(["lineage", chain[target].id[:12], "--json", *(["--down"] if down else [])]) == 0
    told = json.loads(capsys.readouterr().out)
    edges = {("ingest", "clean"), ("clean", "tokenizer"), ("clean", "shards"), ("tokenizer", "shards")}
    reached = {target}
    for _ in chain:
        reached |= {(b if down else a) for a, b in edges if (a if down else b) in reached}
    kind_of = {artifact.id: kind for kind, artifact in chain.items()}
    assert {kind_of[one["id"]] for one in told["artifacts"]} == reached
    assert {(kind_of[e["parent"]], kind_of[e["child"]]) for e in told["edges"]} == {
        (a, b) for a, b in edges if {a, b} <= reached
    }
    assert told["root"] == chain[target].id


def test_dot_is_a_graph_of_the_same_edges(chain: dict[str, Artifact], capsys: Capture) -> None:
    assert run(["lineage", "reviews", "--dot"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("digraph lineage {")
    assert out.count(" -> ") == 4


WRONG = [
    ([], "give one of TARGET, --file and --forget"),
    (["reviews", "--file", "a.csv"], "give one of TARGET"),
    (["--file", "a.csv", "--forget", "a.csv"], "give one of TARGET"),
    (["reviews", "--json", "--dot"], "--json and --dot exclude each other"),
    (["--file", "a.csv", "--dot"], "--down and --dot are for a TARGET"),
    (["--forget", "a.csv", "--down"], "--down and --dot are for a TARGET"),
    (["reviews", "--row", "3"], "--row goes with --file"),
    (["--forget", "a.csv", "--row", "3"], "--row goes with --file"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG)
def test_a_wrong_combination_is_refused_before_any_store_is_opened(
    arguments: list[str], said: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARROW_HOME", str(tmp_path / "none"))
    assert run(["lineage", *arguments]) == 2
    told = capsys.readouterr()
    assert f"error: {said}" in told.err
    assert "hint: " in told.err
    assert told.out == ""
    assert not (tmp_path / "none").exists()


def test_a_row_is_counted_from_one(capsys: Capture) -> None:
    assert run(["lineage", "--file", "a.csv", "--row", "0"]) == 2
    assert "--row" in capsys.readouterr().err


def test_a_target_that_is_not_there_is_an_error(chain: dict[str, Artifact], capsys: Capture) -> None:
    assert run(["lineage", "nobody"]) == 1
    told = capsys.readouterr().err
    assert "nobody" in told and "hint: " in told


def test_a_source_stands_under_each_ingest_once(chain: dict[str, Artifact]) -> None:
    with Store.open(create=False) as store:
        graph = lineage.trace(store.catalog, chain["shards"])
        tree = with_sources(lineage.tree(graph), graph)
        below = lineage.trace(store.catalog, chain["ingest"], "descendants")
        down = with_sources(lineage.tree(below), below)

    def kinds(node: dict) -> list[str]:
        return [node["kind"], *(kind for child in node["children"] for kind in kinds(child))]

    assert sum(kind.startswith("source: ") for kind in kinds(tree)) == 1
    assert not any(kind.startswith("source: ") for kind in kinds(down))
