"""`marrow why`: where the time of a run went, step by step, and what limits it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from marrow.cli.tables import bottleneck, ledger_table
from marrow.core.errors import DataError, explain_os_errors
from marrow.core.records import Artifact
from marrow.store import lineage
from marrow.store.steps import COST
from marrow.store.store import Store

SMALL_SHARE = 0.03  # a step with less of the time is named in the overview only


@click.command("why")
@click.argument("target")
@click.option("--all", "show_all", is_flag=True, help="Show the ledger of every step, however small.")
@click.option("--json", "as_json", is_flag=True, help="Print the ledgers as JSON.")
def command(target: str, show_all: bool, as_json: bool) -> None:
    """Show where the time went in TARGET: the last run of a recipe, or what made an artifact.

    TARGET may also be a JSON file of a ledger (`Ledger.summary().as_dict()`), as a training loop of your
    own writes it.
    """
    if Path(target).is_file():
        ledgers = [ledger_of(Path(target))]
        whole = ledgers[0]
    else:
        with Store.open(create=False, reading=True) as store:
            artifacts = artifacts_of(store, target)
        ledgers = [
            artifact.facts[COST]["ledger"] | {"cpu_s": artifact.facts[COST]["cpu_s"]}
            for artifact in artifacts
        ]
        whole = overview(target, ledgers)
    if as_json:
        shown = ledgers if whole in ledgers else [whole, *ledgers]
        found = [{"ledger": ledger, "bottleneck": named(ledger)} for ledger in shown]
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(ledger_table(whole), nl=False)
    if whole in ledgers:
        return
    largest = max(ledgers, key=lambda ledger: ledger["wall_s"], default=None)
    if largest and (inner := bottleneck(largest)):
        click.echo(f"in {largest['name']}: {inner.part}, {inner.share:.0%} of its time: {inner.advice}")
    for ledger in ledgers:
        if show_all or ledger["wall_s"] >= SMALL_SHARE * whole["wall_s"]:
            click.echo()
            click.echo(ledger_table(ledger), nl=False)


def ledger_of(path: Path) -> dict[str, Any]:
    """Read a ledger that `LedgerSummary.as_dict` wrote as JSON. Raises: DataError if it is something else."""
    with explain_os_errors("read a ledger", path):
        text = path.read_bytes()
    try:
        ledger: dict[str, Any] = json.loads(text)
        for part in [*ledger["parts"].values(), *ledger["overlapped"].values()]:
            part["seconds"], part["count"] = float(part["seconds"]), int(part["count"])
        ledger["name"], ledger["wall_s"] = str(ledger["name"]), float(ledger["wall_s"])
        ledger["cpu_s"] = float(ledger["cpu_s"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no ledger: {error!r}", hint="write json.dumps(ledger.summary().as_dict()) to it"
        ) from error
    return ledger


def artifacts_of(store: Store, target: str) -> list[Artifact]:
    """Return the artifacts of a recipe's last finished run, or those that made an artifact.

    Raises: ArtifactNotFound.
    """
    for run in store.runs.latest(recipe=target, limit=20):
        ids = [step.artifact_id for step in run.steps if step.artifact_id]
        if run.status == "done" and ids:
            found = store.catalog.get_many(ids)
            return [found[artifact_id] for artifact_id in ids]
    graph = lineage.trace(store.catalog, store.resolve(target))
    return [artifact for artifact in reversed(list(graph.artifacts.values())) if COST in artifact.facts]


def overview(name: str, ledgers: list[dict[str, Any]]) -> dict[str, Any]:
    """Add ledgers up to one whose parts are the steps."""
    parts: dict[str, dict[str, Any]] = {}
    for ledger in ledgers:  # a lineage may hold several artifacts of one kind
        part = parts.setdefault(ledger["name"], {"seconds": 0.0, "count": 0})
        part["seconds"] += ledger["wall_s"]
        part["count"] += 1
    return {
        "name": name,
        "wall_s": sum(ledger["wall_s"] for ledger in ledgers),
        "cpu_s": sum(ledger["cpu_s"] for ledger in ledgers),
        "parts": parts,
        "overlapped": {},
    }


def named(ledger: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the bottleneck as plain data."""
    found = bottleneck(ledger)
    return None if found is None else {"part": found.part, "share": found.share, "advice": found.advice}
