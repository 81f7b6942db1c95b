"""`marrow data merge`: three-way over files, past a quality gate."""

import dataclasses
from pathlib import Path
from typing import cast

import click

from marrow.cli import console
from marrow.cli.data.versions import as_data, echo_json, open_versions
from marrow.core.config import load_recipe
from marrow.core.errors import DataError, UsageError
from marrow.data.config import DataRecipe
from marrow.data.table_files import COLUMNAR, suffix_of
from marrow.store.datasets.manifests import Entry
from marrow.store.versions.merge import Side
from marrow.store.versions.versions import Gate, Versions


@click.command("merge")
@click.argument("source")
@click.argument("target")
@click.option("--take", type=click.Choice(["ours", "theirs"]), help="Whose file to keep where both did.")
@click.option(
    "--expect",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A recipe: its [data.expect] must hold for what the merge would give.",
)
@click.option("-m", "--message", default="", help="Why.")
@click.option("--json", "as_json", is_flag=True, help="Print the version as JSON.")
def merge(
    source: str, target: str, take: str | None, expect: Path | None, message: str, as_json: bool
) -> None:
    """Bring what changed in SOURCE since it left TARGET into the branch TARGET.

    Where both changed a file the merge stops and names it, unless --take says whose to keep.
    """
    with open_versions() as versions:
        gate = None if expect is None else quality_gate(versions, expect)
        done = versions.merge(source, target, take=cast(Side | None, take), gate=gate, message=message)
    words = {
        "nothing": f"{target} has everything of {source} already",
        "forward": f"{target} had nothing of its own: it now stands where {source} does",
        "merged": f"merged {source} into {target}",
    }
    console.say(f"{words[done.how]}: {done.version.label}")
    if done.taken:
        console.say(f"{len(done.taken):,} files changed in both: took {take}")
    if as_json:
        echo_json(as_data(done.version) | {"how": done.how, "taken": list(done.taken)})
    else:
        click.echo(done.version.label)


def quality_gate(versions: Versions, recipe_path: Path) -> Gate:
    """Return a gate that refuses files of which the recipe's expectations do not hold.

    Raises: RecipeError; UsageError if it expects nothing.
    """
    from marrow.cli.recipe import SCHEMA  # the tables of all layers

    data = load_recipe(recipe_path, SCHEMA, ()).section(DataRecipe)
    if not data.expect:
        raise UsageError(
            f"{recipe_path} has no expectations", hint="write some, as in [data.expect.price] min = 0"
        )

    def gate(entries: list[Entry]) -> None:
        if not entries:
            raise DataError("the merge would give no files", hint="compare them: marrow data diff")
        with versions.as_folder(entries) as folder, versions.scratch() as scratch:
            _check(data, folder, scratch)

    return gate


def _check(data: DataRecipe, folder: Path, scratch: Path) -> None:
    # Arrow's kernels; a merge without a gate never needs them.
    from marrow.data.ingest import ingest
    from marrow.data.quality.expectations import check, check_expectations

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if all(suffix_of(path) in COLUMNAR for path in files):
        with console.progress_of("expect") as progress:
            report = check_expectations(files, data.expect, progress, spill=scratch)
    else:
        # Text: dialects, types to be found, broken rows. It is read as a run would read it.
        with console.progress_of("ingest") as progress:
            facts = ingest(dataclasses.replace(data, source=str(folder)), scratch, progress)
        if broken := facts["broken_rows"]:
            console.say(f"warning: {broken:,} rows are broken: a run would put them into quarantine")
        report = check(scratch, data.expect)
    for told in report.left_out():
        console.say(f"warning: {told}")
    for result in report.of("warn"):
        console.say(f"warning: {result.told()}")
    report.refuse()
