"""`marrow lineage`: what made an artifact, what was made from it, and what became of a source file."""

import json
from typing import Any

import click

from marrow.cli.target import find_artifact
from marrow.core.errors import UsageError
from marrow.store import lineage
from marrow.store.store import Store


@click.command("lineage")
@click.argument("target", required=False)
@click.option("--down", is_flag=True, help="Show what was made from it instead.")
@click.option("--file", "file", metavar="FILE", help="Show what became of a source file.")
@click.option("--row", type=click.IntRange(min=1), help="With --file: one row of it, by its line.")
@click.option(
    "--forget", metavar="FILE[:ROW]", help="Say what a request to delete it asks for; changes nothing."
)
@click.option("--json", "as_json", is_flag=True, help="Print nodes and edges as JSON.")
@click.option("--dot", "as_dot", is_flag=True, help="Print Graphviz text.")
@click.pass_context
def command(
    context: click.Context,
    target: str | None,
    down: bool,
    file: str | None,
    row: int | None,
    forget: str | None,
    as_json: bool,
    as_dot: bool,
) -> None:
    """Show the lineage of TARGET (a name such as quickstart, or the first digits of an id).

    Or, with --file or --forget, of a source file: which rows, documents, models and servers have it.
    --file ends with status 1 if no ingest ever saw it, as grep does.
    """
    if sum(given is not None for given in (target, file, forget)) != 1:
        raise UsageError("give one of TARGET, --file and --forget", hint="such as: marrow lineage quickstart")
    if as_json and as_dot:
        raise UsageError("--json and --dot exclude each other", hint="ask for one of them")
    if target is None and (as_dot or down):
        raise UsageError("--down and --dot are for a TARGET", hint="leave them out, or ask for --json")
    if row is not None and file is None:
        raise UsageError("--row goes with --file", hint="with --forget write FILE:ROW")
    if file is not None:
        context.exit(0 if _show_file(file, row, as_json) else 1)
    elif forget is not None:
        _show_forget(forget, as_json)
    else:
        _show_artifact(str(target), down, as_json, as_dot)


def _show_artifact(target: str, down: bool, as_json: bool, as_dot: bool) -> None:
    with find_artifact(target, reading=True) as (store, artifact):
        graph = lineage.trace(store.catalog, artifact, "descendants" if down else "ancestors")
    if as_json:
        click.echo(lineage.to_json(graph))
    elif as_dot:
        click.echo(lineage.to_dot(graph))
    else:
        from marrow.cli.tables import lineage_tree  # rich draws it

        click.echo(lineage_tree(with_sources(lineage.tree(graph), graph)), nl=False)


def _show_file(file: str, row: int | None, as_json: bool) -> bool:
    """Show what became of a source file; return whether it was ever seen."""
    from marrow.cli.source_lineage import as_text, trace_file  # reads Parquet

    with Store.open(create=False, reading=True) as store:
        told = trace_file(store, file, row)
    click.echo(json.dumps(told, indent=2) if as_json else _visible(as_text(told)))
    return bool(told["seen"])


def _show_forget(place: str, as_json: bool) -> None:
    from marrow.cli.source_lineage import forget_as_text, split_place, to_forget, trace_file

    with Store.open(create=False, reading=True) as store:
        answer = to_forget(trace_file(store, *split_place(place)))
    click.echo(json.dumps(answer, indent=2) if as_json else _visible(forget_as_text(answer)))


def _visible(text: str) -> str:
    from marrow.core.page import visible

    return "\n".join(visible(line) for line in text.splitlines())


def with_sources(node: dict[str, Any], graph: lineage.Graph) -> dict[str, Any]:
    """Put under each ingest what it read, if that is no artifact: there its lineage begins."""
    reads_files = node["kind"] == "ingest" and not node["seen"] and not node["children"]
    for child in node["children"]:
        with_sources(child, graph)
    if reads_files and graph.direction == "ancestors":
        facts = graph.artifacts[node["id"]].facts
        read = [f"{facts['files']:,} files", f"{facts['rows']:,} rows"]
        node["children"].append(
            {"kind": f"source: {facts['source']}", "id": "", "names": read, "children": []}
        )
    return node
