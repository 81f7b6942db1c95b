import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marrow.core.records import Artifact
from marrow.store.catalog import Catalog
from marrow.store.database import Database
from marrow.store.lineage import to_data, to_dot, to_json, trace, tree
from marrow.store.versions.versions import Versions

Make = Callable[..., Artifact]


@pytest.fixture
def catalog(database: Database) -> Catalog:
    return Catalog(database)


@pytest.fixture
def diamond(catalog: Catalog, make_artifact: Make) -> dict[str, Artifact]:
    """rows -> tokenizer, rows -> shards, tokenizer -> shards, shards -> model; and a stranger."""
    rows = catalog.add(make_artifact("rows", kind="rows"))
    tokenizer = catalog.add(make_artifact("tokenizer", rows, kind="tokenizer"))
    shards = catalog.add(make_artifact("shards", rows, tokenizer, kind="shards"))
    model = catalog.add(make_artifact("model", shards, kind="model"))
    stranger = catalog.add(make_artifact("stranger", kind="rows"))
    catalog.name(model.id, "quickstart")
    return {"rows": rows, "tokenizer": tokenizer, "shards": shards, "model": model, "stranger": stranger}


def test_ancestors_and_descendants_are_all_found_and_no_more(
    catalog: Catalog, diamond: dict[str, Artifact]
) -> None:
    up = trace(catalog, diamond["model"])
    assert [artifact.kind for artifact in up.artifacts.values()] == ["model", "shards", "rows", "tokenizer"]
    assert len(up.edges) == 4 and up.names == {diamond["model"].id: ("quickstart@1",)}
    down = trace(catalog, diamond["rows"], "descendants")
    assert {a.kind for a in down.artifacts.values()} == {"rows", "tokenizer", "shards", "model"}
    assert diamond["stranger"].id not in down.artifacts
    assert trace(catalog, diamond["stranger"]).edges == ()


def test_the_tree_nests_by_role_and_unfolds_each_artifact_once(
    catalog: Catalog, diamond: dict[str, Artifact]
) -> None:
    root = tree(trace(catalog, diamond["model"]))
    assert (root["kind"], root["names"], root["seen"]) == ("model", ["quickstart@1"], False)
    (shards,) = root["children"]
    assert (shards["kind"], shards["role"], shards["detail"]) == ("shards", "role-0", {"part": 0})
    rows, tokenizer = shards["children"]
    assert (rows["kind"], rows["seen"], tokenizer["kind"]) == ("rows", False, "tokenizer")
    (again,) = tokenizer["children"]
    assert (again["kind"], again["seen"], again["children"]) == ("rows", True, [])
    down = tree(trace(catalog, diamond["rows"], "descendants"))
    assert {child["kind"] for child in down["children"]} == {"tokenizer", "shards"}


def test_json_holds_everything_and_is_plain(catalog: Catalog, diamond: dict[str, Artifact]) -> None:
    graph = trace(catalog, diamond["model"])
    data = json.loads(to_json(graph))
    assert data == to_data(graph)
    assert data["root"] == diamond["model"].id and len(data["artifacts"]) == len(data["edges"]) == 4
    assert {"child": diamond["model"].id, "role": "role-0", "parent": diamond["shards"].id} == {
        key: value for key, value in data["edges"][0].items() if key != "detail"
    }
    assert data["artifacts"][0]["facts"]["rows"] == 3


def test_dot_flows_from_parent_to_child(catalog: Catalog, diamond: dict[str, Artifact]) -> None:
    text = to_dot(trace(catalog, diamond["model"]))
    model, shards = diamond["model"].id[:12], diamond["shards"].id[:12]
    assert f'"{shards}" -> "{model}" [label="role-0"];' in text
    assert f'"{model}" [label="model\\n{model}\\nquickstart@1", penwidth=2];' in text
    assert text.count("->") == 4


def test_graphviz_reads_it_whatever_the_names_are(
    catalog: Catalog, make_artifact: Make, tmp_path: Path
) -> None:
    if shutil.which("dot") is None:
        pytest.skip("needs Graphviz: no dot in PATH")
    artifact = catalog.add(make_artifact("odd", kind='a "quoted\\ kind'))
    text = to_dot(trace(catalog, artifact))
    subprocess.run(["dot", "-Tsvg", "-o", tmp_path / "x.svg"], input=text, text=True, check=True)
    assert "quoted" in (tmp_path / "x.svg").read_text(encoding="utf-8")


def test_quotes_in_labels_are_escaped(catalog: Catalog, make_artifact: Make) -> None:
    artifact = catalog.add(make_artifact("odd", kind='a "b\\c'))
    assert '[label="a \\"b\\\\c\\n' in to_dot(trace(catalog, artifact))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parents=st.lists(st.sets(st.integers(0, 7), max_size=3), min_size=1, max_size=8), data=st.data())
def test_tracing_equals_the_closure_of_the_edges(
    catalog: Catalog, make_artifact: Make, parents: list[set[int]], data: st.DataObject
) -> None:
    made: list[Artifact] = []
    edges: list[tuple[int, int]] = []
    for i, wanted in enumerate(parents):
        chosen = sorted(w for w in wanted if w < i)
        edges += [(i, parent) for parent in chosen]
        made.append(catalog.add(make_artifact(f"{parents}-{i}", *[made[parent] for parent in chosen])))
    start = data.draw(st.integers(0, len(made) - 1))
    for direction in ("ancestors", "descendants"):
        reached = {start}
        for _ in made:
            reached |= {
                (parent if direction == "ancestors" else child)
                for child, parent in edges
                if (child if direction == "ancestors" else parent) in reached
            }
        graph = trace(catalog, made[start], direction)  # type: ignore[arg-type]
        assert set(graph.artifacts) == {made[i].id for i in reached}
        assert len(graph.edges) == sum(1 for c, p in edges if c in reached and p in reached)


def test_a_dataset_has_the_size_of_its_files_not_of_its_manifest(versions: Versions, folder: Path) -> None:
    made = versions.commit(folder, "d").version
    node = tree(trace(versions.store.catalog, made.artifact))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert (node["num_files"], node["num_bytes"]) == (len(files), sum(p.stat().st_size for p in files))
