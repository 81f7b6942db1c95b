"""`marrow data push|pull|verify|gc`: the stored bytes, here and elsewhere."""

from typing import Any

import click

from marrow.cli import console
from marrow.cli.data.versions import SHOWN, echo_json, open_versions
from marrow.core.errors import DamagedBlob


@click.command("push")
@click.argument("name")
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="Print what was sent as JSON.")
def push(name: str, url: str, as_json: bool) -> None:
    """Bring branch or tag NAME with all its versions to URL (s3://bucket/prefix, or a folder)."""
    from marrow.store.versions.transfer import push as send

    with open_versions() as versions, console.progress_of("push") as progress:
        done = send(versions.store, name, url, progress=progress)
    _tell("sent", name, done, as_json)


@click.command("pull")
@click.argument("name")
@click.argument("url")
@click.option("--as", "into", default="", help="What to call it here.")
@click.option("--newest", is_flag=True, help="Only the newest version's files.")
@click.option("--json", "as_json", is_flag=True, help="Print what came as JSON.")
def pull(name: str, url: str, into: str, newest: bool, as_json: bool) -> None:
    """Bring branch or tag NAME from URL; also files that this store has lost."""
    from marrow.store.versions.transfer import pull as receive

    with open_versions(create=True) as versions, console.progress_of("pull") as progress:
        done = receive(versions.store, name, url, into=into, newest=newest, progress=progress)
    _tell("received", into or name, done, as_json)


@click.command("verify")
@click.argument("target", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def verify(target: str | None, as_json: bool) -> None:
    """Hash every stored byte anew, set aside what is damaged, and say which versions lack files.

    With TARGET only that version's files are looked for afterwards.
    """
    with open_versions() as versions, console.progress_of("verify") as progress:
        found = versions.verify(target, progress=progress)
    missing: list[dict[str, Any]] = [
        {"version": label, "missing": len(names), "names": names[:SHOWN]}
        for label, names in found.missing.items()
    ]
    if as_json:
        echo_json(
            {
                "checked": found.damage.num_checked,
                "bytes": found.damage.num_bytes,
                "set_aside": list(found.damage.aside),
                "damaged_artifacts": found.artifacts,
                "versions": missing,
            }
        )
    else:
        for one in missing:
            click.echo(
                f"{one['version']}: {one['missing']:,} files are missing: {', '.join(one['names'][:3])}"
            )
        for line in found.artifacts:
            click.echo(f"{line}: damaged; its recipe rebuilds it")
    console.say(
        f"checked {found.damage.num_checked:,} files, {console.size(found.damage.num_bytes)}; "
        f"{len(found.damage.aside):,} set aside in damaged/"
    )
    if missing or found.damage.aside:
        raise DamagedBlob(
            f"{len(missing):,} versions lack files, {len(found.damage.aside):,} damaged files were set aside",
            hint="marrow data pull NAME URL brings missing files back; so does a commit of the same folder",
        )


@click.command("gc")
@click.option("--json", "as_json", is_flag=True, help="Print what was freed as JSON.")
def gc(as_json: bool) -> None:
    """Remove stored bytes that no branch, tag or artifact needs; waits for whoever writes."""
    with open_versions() as versions:
        freed = versions.store.collect(say=console.say)
    if as_json:
        echo_json({"files": freed.num_blobs, "bytes": freed.num_bytes})
    else:
        click.echo(f"freed {console.size(freed.num_bytes)} in {freed.num_blobs:,} files")


def _tell(verb: str, name: str, done: Any, as_json: bool) -> None:
    console.say(f"{verb} {console.size(done.num_bytes)} in {done.num_files:,} files")
    if as_json:
        echo_json({"versions": list(done.versions), "files": done.num_files, "bytes": done.num_bytes})
        return
    for label in done.versions:
        click.echo(label)
    if not done.versions:
        console.say(f"{name} had every version already")
