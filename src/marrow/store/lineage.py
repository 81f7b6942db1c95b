"""Lineage: what an artifact was made from, and what was made from it.

`trace` walks the catalog's edges level by level (one query each) and gives a `Graph`; the rest
are pure functions of it: a nested tree for terminals, Graphviz text, plain data for JSON.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from marrow.core.records import Artifact
from marrow.store.catalog import Catalog, Edge
from marrow.store.datasets.refs import DATASET

Direction = Literal["ancestors", "descendants"]


@dataclass(frozen=True, slots=True)
class Graph:
    """Artifacts and the edges between them; `root` is where the walk began.

    `artifacts` are in order of distance from the root; `names` are "name@version" by id.
    """

    root: str
    direction: Direction
    artifacts: Mapping[str, Artifact]
    edges: tuple[Edge, ...]
    names: Mapping[str, tuple[str, ...]]


def trace(catalog: Catalog, artifact: Artifact, direction: Direction = "ancestors") -> Graph:
    """Walk the whole lineage of an artifact, upwards or downwards.

    Cost: two queries a level, O(edges) memory.
    """
    found = {artifact.id: artifact}
    edges: dict[tuple[str, str, str], Edge] = {}
    frontier = [artifact.id]
    while frontier:
        step = catalog.edges_up(frontier) if direction == "ancestors" else catalog.edges_down(frontier)
        edges |= {(edge.child_id, edge.role, edge.parent_id): edge for edge in step}
        ids = (edge.parent_id if direction == "ancestors" else edge.child_id for edge in step)
        frontier = [i for i in dict.fromkeys(ids) if i not in found]
        found |= catalog.get_many(frontier)
    named: dict[str, tuple[str, ...]] = {}
    for version in catalog.names():
        if version.artifact_id in found:
            named[version.artifact_id] = (*named.get(version.artifact_id, ()), str(version))
    return Graph(artifact.id, direction, found, tuple(edges.values()), named)


def tree(graph: Graph) -> dict[str, Any]:
    """Return the graph as nested plain data: node -> "children" in the direction of the walk.

    An artifact that is reached twice is unfolded the first time only; later it bears "seen": true.
    """
    down: dict[str, list[Edge]] = {}
    upward = graph.direction == "ancestors"
    for edge in graph.edges:
        down.setdefault(edge.child_id if upward else edge.parent_id, []).append(edge)
    seen: set[str] = set()

    def unfold(artifact_id: str, edge: Edge | None) -> dict[str, Any]:
        node = _node(graph, artifact_id)
        if edge is not None:
            node |= {"role": edge.role, "detail": dict(edge.detail)}
        node["seen"] = artifact_id in seen
        seen.add(artifact_id)
        node["children"] = (
            []
            if node["seen"]
            else [unfold(e.parent_id if upward else e.child_id, e) for e in down.get(artifact_id, ())]
        )
        return node

    return unfold(graph.root, None)


def to_data(graph: Graph) -> dict[str, Any]:
    """Return the graph as flat plain data: "root", "artifacts" with all they hold, "edges"."""
    return {
        "root": graph.root,
        "direction": graph.direction,
        "artifacts": [
            _node(graph, artifact.id)
            | {
                "key": artifact.key,
                "code_version": artifact.code_version,
                "recipe_hash": artifact.recipe_hash,
                "environment": dict(artifact.environment),
                "facts": dict(artifact.facts),
                "files": [
                    {"name": file.name, "sha256": file.sha256, "num_bytes": file.num_bytes}
                    for file in artifact.files
                ],
            }
            for artifact in graph.artifacts.values()
        ],
        "edges": [
            {"child": e.child_id, "role": e.role, "parent": e.parent_id, "detail": dict(e.detail)}
            for e in graph.edges
        ],
    }


def to_json(graph: Graph) -> str:
    """Return `to_data` as JSON text."""
    return json.dumps(to_data(graph), indent=2, sort_keys=True)


def to_dot(graph: Graph) -> str:
    """Return Graphviz text; arrows go from parent to child, the way the data flowed."""
    lines = ["digraph lineage {", "  rankdir=LR;", "  node [shape=box, fontname=monospace];"]
    for artifact in graph.artifacts.values():
        label = [artifact.kind, artifact.id[:12], *graph.names.get(artifact.id, ())]
        bold = ", penwidth=2" if artifact.id == graph.root else ""
        lines.append(f'  "{artifact.id[:12]}" [label={_quoted(label)}{bold}];')
    for edge in graph.edges:
        ends = f'"{edge.parent_id[:12]}" -> "{edge.child_id[:12]}"'
        lines.append(f"  {ends} [label={_quoted([edge.role])}];")
    return "\n".join([*lines, "}", ""])


def _node(graph: Graph, artifact_id: str) -> dict[str, Any]:
    artifact = graph.artifacts[artifact_id]
    is_dataset = artifact.kind == DATASET  # whose own files are only its manifest
    return {
        "id": artifact.id,
        "kind": artifact.kind,
        "names": list(graph.names.get(artifact_id, ())),
        "created_s": artifact.created_s,
        "num_files": artifact.facts["files"] if is_dataset else len(artifact.files),
        "num_bytes": artifact.facts["bytes"] if is_dataset else artifact.num_bytes,
    }


def _quoted(lines: list[str]) -> str:
    escaped = (line.replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return '"' + "\\n".join(escaped) + '"'
