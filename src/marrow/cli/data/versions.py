"""`marrow data commit|log|show|status|branch|tag|checkout`: the versions of a dataset in this store."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from marrow.cli import console
from marrow.core.errors import UsageError
from marrow.store.datasets.manifests import Change, Entry, printable
from marrow.store.store import Store
from marrow.store.versions.commits import Version
from marrow.store.versions.versions import Versions

SHOWN = 20  # files that a terminal is told of


@contextmanager
def open_versions(*, create: bool = False, reading: bool = False) -> Iterator[Versions]:
    """Open the store's dataset versions. reading: also of a store that may not be written."""
    with Store.open(create=create, reading=reading) as store:
        yield Versions(store)


def as_data(version: Version) -> dict[str, Any]:
    """Return a version as plain data."""
    artifact = version.artifact
    return {
        "version": version.label,
        "id": artifact.id,
        "parents": [parent.artifact_id for parent in artifact.parents],
        "created_s": artifact.created_s,
        **version.facts,
    }


def change_data(change: Change) -> dict[str, Any]:
    """Return a change of one file as plain data."""
    sides = {"old": change.old, "new": change.new}
    data: dict[str, Any] = {"change": change.letter, "name": printable(change.name)}
    return data | {
        side: None
        if entry is None
        else {"name": printable(entry.name), "sha256": entry.sha256, "bytes": entry.num_bytes}
        for side, entry in sides.items()
    }


def change_line(change: Change) -> str:
    """Show a change of one file."""
    old, new = change.old, change.new
    if old is not None and new is not None:
        if change.letter == "R":
            return f"R  {printable(old.name)} -> {printable(new.name)}  {console.size(new.num_bytes)}"
        return f"M  {printable(new.name)}  {console.size(old.num_bytes)} -> {console.size(new.num_bytes)}"
    entry = new or old
    assert entry is not None
    return f"{change.letter}  {printable(entry.name)}  {console.size(entry.num_bytes)}"


def echo_json(data: Any) -> None:
    """Print data as JSON."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=True))


@click.command("commit")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--to", "name", required=True, help="The dataset or branch; made if it is new.")
@click.option("-m", "--message", default="", help="What changed, and why.")
@click.option("--follow-links", is_flag=True, help="Commit the bytes that symbolic links point to.")
@click.option("--allow-empty", is_flag=True, help="Commit a folder without files.")
@click.option("--replace", is_flag=True, help="Commit even if others committed since; theirs is undone.")
@click.option("--json", "as_json", is_flag=True, help="Print the version as JSON.")
def commit(
    folder: Path,
    name: str,
    message: str,
    follow_links: bool,
    allow_empty: bool,
    replace: bool,
    as_json: bool,
) -> None:
    """Make the files of FOLDER the next version of a dataset. Unchanged files are not read."""
    started_s = time.perf_counter()
    with open_versions(create=True) as versions, console.progress_of("commit") as progress:
        done = versions.commit(
            folder,
            name,
            message,
            follow_links=follow_links,
            allow_empty=allow_empty,
            replace=replace,
            progress=progress,
        )
    facts = done.version.facts
    took = console.duration(time.perf_counter() - started_s)
    if done.is_new:
        console.say(
            f"{done.version.label}: {facts['files']:,} files, {console.size(facts['bytes'])} "
            f"({_counts(facts)}); read {console.size(done.bytes_read)}, "
            f"stored {console.size(done.stored_bytes)}, {took}"
        )
    else:
        console.say(f"nothing changed since {done.version.label}; {took}")
    if as_json:
        echo_json(
            as_data(done.version)
            | {"is_new": done.is_new, "files_read": done.num_read, "bytes_read": done.bytes_read}
            | {"bytes_stored": done.stored_bytes}
        )
    else:
        click.echo(done.version.label)


@click.command("log")
@click.argument("target")
@click.option(
    "-n", "--limit", type=click.IntRange(1), default=50, show_default=True, help="How many versions at most."
)
@click.option("--json", "as_json", is_flag=True, help="Print the versions as JSON.")
def log(target: str, limit: int, as_json: bool) -> None:
    """List TARGET and the versions that it was made from, newest first."""
    with open_versions(reading=True) as versions:
        found = list(versions.log(target, limit))
        absent = versions.refs.absent()
    if as_json:
        echo_json([as_data(v) | {"files_here": v.artifact.id not in absent} for v in found])
        return
    width = max(len(v.label) for v in found)
    for version in found:
        facts = version.facts
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(version.artifact.created_s))
        merged = "  (merge)" if len(version.artifact.parents) > 1 else ""
        gone = "  (its files are not kept here)" if version.artifact.id in absent else ""
        click.echo(
            f"{version.label:<{width}}  {version.artifact.id[:12]}  {when}  {facts['author']}  "
            f"{facts['files']:,} files, {console.size(facts['bytes'])} ({_counts(facts)})  "
            f"{printable(facts['message'])}{merged}{gone}"
        )


@click.command("show")
@click.argument("target")
@click.option("--json", "as_json", is_flag=True, help="Print version and files as JSON.")
def show(target: str, as_json: bool) -> None:
    """Show what TARGET is, and its files: SHA-256, bytes, name."""
    with open_versions(reading=True) as versions:
        artifact = versions.resolve(target)
        version = Version(versions.label_as(artifact, target), artifact)
        entries = versions.entries(artifact)
    if as_json:
        files = [{"name": printable(e.name), "sha256": e.sha256, "bytes": e.num_bytes} for e in entries]
        echo_json(as_data(version) | {"entries": files})
        return
    console.say(f"{version.label}  {artifact.id}  {printable(version.facts['message'])}")
    for entry in entries:
        click.echo(_entry_line(entry))


@click.command("status")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--to", "name", required=True, help="The version to compare with.")
@click.option("--follow-links", is_flag=True, help="As for commit.")
@click.option("--json", "as_json", is_flag=True, help="Print the changes as JSON.")
def status(folder: Path, name: str, follow_links: bool, as_json: bool) -> None:
    """Show what a commit of FOLDER would change."""
    with open_versions(reading=True) as versions:
        changes = versions.status(folder, name, follow_links=follow_links)
    if as_json:
        echo_json([change_data(change) for change in changes])
        return
    for change in changes:
        click.echo(change_line(change))
    console.say(f"{len(changes):,} files differ from {name}" if changes else f"as {name}")


@click.command("branch")
@click.argument("at", required=False)
@click.argument("name", required=False)
@click.option("--delete", "delete", metavar="NAME", help="Remove a branch or tag; its versions stay known.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def branch(at: str | None, name: str | None, delete: str | None, as_json: bool) -> None:
    """Begin branch NAME at version AT; without arguments list branches and tags."""
    with open_versions() as versions:
        if delete is not None:
            if at is not None:
                raise UsageError("--delete takes no other names", hint="one at a time")
            gone = versions.refs.remove(delete)
            console.say(f"removed {gone.kind} {delete}, which stood on {gone.artifact_id[:12]}")
            console.say("hint: marrow data gc then frees what only it needed")
        elif at is not None and name is not None:
            made = versions.branch(at, name)
            console.say(f"{made.label} is {made.artifact.id[:12]}")
            click.echo(made.label)
        elif at is not None:
            raise UsageError(
                "a branch needs a beginning and a name", hint=f"marrow data branch {at} NEW-NAME"
            )
        else:
            _list_refs(versions, as_json)


@click.command("tag")
@click.argument("at")
@click.argument("name")
def tag(at: str, name: str) -> None:
    """Give version AT the name NAME, which never moves (`branch` lists and removes tags)."""
    with open_versions() as versions:
        made = versions.tag(at, name)
    console.say(f"{name} is {made.artifact.id[:12]} ({at})")
    click.echo(name)


@click.command("checkout")
@click.argument("target")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite and delete changed files too.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def checkout(target: str, folder: Path, force: bool, as_json: bool) -> None:
    """Make FOLDER hold the files of TARGET; only files that differ are written."""
    from marrow.store.versions.checkout import checkout as write_out

    with open_versions() as versions, console.progress_of("checkout") as progress:
        artifact = versions.resolve(target)
        versions.require_files(artifact)
        name = target.partition("~")[0].partition("@")[0]
        done = write_out(versions.store, artifact, folder, name=name, force=force, progress=progress)
    console.say(
        f"{folder}: {done.num_written:,} files written ({console.size(done.bytes_written)}), "
        f"{done.num_deleted:,} deleted, {done.num_kept:,} as they were"
    )
    if as_json:
        echo_json(
            {
                "folder": str(done.folder),
                "id": artifact.id,
                "written": done.num_written,
                "deleted": done.num_deleted,
                "kept": done.num_kept,
                "bytes_written": done.bytes_written,
            }
        )
    else:
        click.echo(folder)


def _list_refs(versions: Versions, as_json: bool) -> None:
    found = versions.refs.all()
    if as_json:
        echo_json(
            [{"name": r.name, "kind": r.kind, "id": r.artifact_id, "updated_s": r.updated_s} for r in found]
        )
        return
    for ref in found:
        artifact = versions.store.get(ref.artifact_id)
        facts = artifact.facts
        label = versions.label_on(artifact, ref.name) if ref.kind == "branch" else ref.name
        click.echo(
            f"{ref.kind:<6}  {label}  {ref.artifact_id[:12]}  {facts['files']:,} files, "
            f"{console.size(facts['bytes'])}  {printable(facts['message'])}"
        )
    if not found:
        console.say("no datasets yet: marrow data commit FOLDER --to NAME makes one")


def _counts(facts: dict[str, Any]) -> str:
    return f"+{facts['added']:,} ~{facts['modified']:,} -{facts['deleted']:,}" + (
        f" {facts['renamed']:,} renamed" if facts["renamed"] else ""
    )


def _entry_line(entry: Entry) -> str:
    return f"{entry.sha256}  {entry.num_bytes:>12}  {printable(entry.name)}"
