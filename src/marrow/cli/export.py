"""`marrow export`: an artifact's files in a folder of your own, such as a model for transformers."""

from pathlib import Path

import click

from marrow.cli.target import find_artifact
from marrow.core.errors import UsageError


@click.command("export")
@click.argument("target")
@click.argument("folder", type=click.Path(path_type=Path))
def command(target: str, folder: Path) -> None:
    """Copy the files of TARGET (a name such as quickstart, or an id) to FOLDER."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty", hint="give a new folder")
    with find_artifact(target) as (store, artifact):
        store.checkout(artifact, folder)
    click.echo(folder)
