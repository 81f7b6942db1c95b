"""`marrow lineage`: what made an artifact, or what was made from it."""

import json

import click

from marrow.cli.target import find_artifact
from marrow.store import lineage


@click.command("lineage")
@click.argument("target")
@click.option("--down", is_flag=True, help="Show what was made from it instead.")
@click.option("--json", "form", flag_value="json", help="Print nodes and edges as JSON.")
@click.option("--dot", "form", flag_value="dot", help="Print Graphviz text.")
def command(target: str, down: bool, form: str | None) -> None:
    """Show the lineage of TARGET (a name such as quickstart, or the first digits of an id)."""
    with find_artifact(target) as (store, artifact):
        graph = lineage.trace(store.catalog, artifact, "descendants" if down else "ancestors")
    if form == "json":
        click.echo(json.dumps(json.loads(lineage.to_json(graph)), indent=2))
    elif form == "dot":
        click.echo(lineage.to_dot(graph))
    else:
        from marrow.cli.tables import lineage_tree  # rich draws it

        click.echo(lineage_tree(lineage.tree(graph)), nl=False)
