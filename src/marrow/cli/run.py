"""`marrow run`: a recipe from raw rows to a served, measured model."""

import json
import shlex
import shutil
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import click

from marrow.cli import console
from marrow.cli.data_notes import notes_of
from marrow.cli.engine import engine_of, engine_options
from marrow.cli.pipeline import REPORT, Pipeline
from marrow.cli.recipe import read_recipe
from marrow.cli.story import read_findings, tell
from marrow.cli.tables import run_table
from marrow.cli.telling import events_of
from marrow.core.errors import Interrupted, explain_os_errors
from marrow.core.files import atomic_file
from marrow.store.runs import RunStatus
from marrow.store.steps import StepResult
from marrow.store.store import Store


@click.command("run")
@click.argument("path", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one value.")
@engine_options("does the data steps; the artifacts are the same")
@click.option("--json", "as_json", is_flag=True, help="Print all results as JSON on stdout.")
def command(path: Path, overrides: tuple[str, ...], engine_name: str, workers: int, as_json: bool) -> None:
    """Run RECIPE: every step, or only those whose inputs changed since the last run."""
    recipe = read_recipe(path, overrides)
    with closing(engine_of(engine_name, workers)) as engine, Store.open() as store:
        run_id = store.runs.start(recipe.name, recipe.hash)
        status: RunStatus = "failed"
        try:
            with store.runs.log(run_id) as log, events_of(recipe.name, run_id, store) as events:
                results = Pipeline(recipe, store, run_id, log, finished, engine, events).run()
            status = "done"
        except (KeyboardInterrupt, Interrupted):
            status = "interrupted"
            raise
        finally:
            store.runs.finish(run_id, status)
        report = store.view(results["report"].artifact)
        story = tell(recipe, store, results, read_findings(report))
        page = store.home / f"{recipe.name}.html"
        with explain_os_errors("write the report", page), atomic_file(page) as file:
            file.write((report / REPORT).read_bytes())
    if as_json:
        click.echo(json.dumps(asdict(story), indent=2))
        return
    click.echo(run_table(story), nl=False)
    console.say(f"\nreport: {page}")
    marrow = "marrow" if shutil.which("marrow") else sys.argv[0]
    prompt = shlex.quote(story.samples[0].prompt) if story.samples else ""
    for verb, rest in (("serve", ""), ("complete", prompt), ("lineage", ""), ("why", "")):
        console.say(f"{'next:' if verb == 'serve' else '':<7} {marrow} {verb} {recipe.name} {rest}".rstrip())


def finished(kind: str, result: StepResult) -> None:
    """Say that a step is done."""
    what = {"built": "done in", "cached": "cached, verified in", "rebuilt": "rebuilt in"}[result.status]
    console.say(f"{kind:<11} {what} {console.duration(result.wall_s)}")
    for line in notes_of(result.artifact):
        console.say(f"{'':<11} {line}")
