"""`marrow lineage`: what made an artifact, or what was made from it."""

from typing import Any

import click

from marrow.cli.target import find_artifact
from marrow.core.errors import UsageError
from marrow.store import lineage


@click.command("lineage")
@click.argument("target")
@click.option("--down", is_flag=True, help="Show what was made from it instead.")
@click.option("--json", "as_json", is_flag=True, help="Print nodes and edges as JSON.")
@click.option("--dot", "as_dot", is_flag=True, help="Print Graphviz text.")
def command(target: str, down: bool, as_json: bool, as_dot: bool) -> None:
    """Show the lineage of TARGET (a name such as quickstart, or the first digits of an id)."""
    if as_json and as_dot:
        raise UsageError("--json and --dot exclude each other", hint="ask for one of them")
    with find_artifact(target) as (store, artifact):
        graph = lineage.trace(store.catalog, artifact, "descendants" if down else "ancestors")
    if as_json:
        click.echo(lineage.to_json(graph))
    elif as_dot:
        click.echo(lineage.to_dot(graph))
    else:
        from marrow.cli.tables import lineage_tree  # rich draws it

        click.echo(lineage_tree(with_sources(lineage.tree(graph), graph)), nl=False)


def with_sources(node: dict[str, Any], graph: lineage.Graph) -> dict[str, Any]:
    """Put under each ingest what it read: not an artifact, but where every lineage begins."""
    for child in node["children"]:
        with_sources(child, graph)
    if node["kind"] == "ingest" and not node["seen"] and graph.direction == "ancestors":
        facts = graph.artifacts[node["id"]].facts
        read = [f"{facts['files']:,} files", f"{facts['rows']:,} rows"]
        node["children"].append(
            {"kind": f"source: {facts['source']}", "id": "", "names": read, "children": []}
        )
    return node
