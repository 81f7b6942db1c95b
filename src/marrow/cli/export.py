"""`marrow export`: an artifact's files in a place of your own: a folder, or a bucket.

A model's folder opens in transformers; shards at s3://bucket/prefix are streamed by the loader.
"""

from pathlib import Path

import click

from marrow.cli.console import progress_of, say, size
from marrow.cli.target import find_artifact
from marrow.core.errors import UsageError


@click.command("export")
@click.argument("target")
@click.argument("place")
def command(target: str, place: str) -> None:
    """Copy the files of TARGET (a name such as quickstart, or an id) to PLACE, a new folder or s3://...

    To a URL, what is there already with the same bytes is not sent again, and the manifest comes
    last: the same command goes on after an interruption.
    """
    from marrow.store.remote.client import is_url

    if is_url(place):
        _upload(target, place)
        return
    folder = Path(place)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty", hint="give a new folder")
    with find_artifact(target) as (store, artifact):
        store.checkout(artifact, folder)
    click.echo(folder)


def _upload(target: str, url: str) -> None:
    from marrow.store.remote.client import Remote
    from marrow.store.remote.upload import upload

    with (
        find_artifact(target) as (store, artifact),
        Remote.open(url) as remote,
        progress_of("export") as progress,
    ):
        sent = upload(store.view(artifact), remote, progress)
    say(f"{sent.num_files} files sent, {size(sent.num_bytes)}; {sent.num_equal} were there already")
    click.echo(remote.url)
