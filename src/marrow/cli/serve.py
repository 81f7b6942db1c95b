"""`marrow serve`: a model behind the OpenAI HTTP API, with a page at /."""

import json
import os
import signal

import click

from marrow.cli import console
from marrow.cli.target import find_model
from marrow.core.config import load_recipe
from marrow.core.errors import Interrupted
from marrow.serve.config import ServeRecipe

DEFAULT_PORT = 8000


@click.command("serve")
@click.argument("target")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="0 takes a free one.  [default: 8000]")
@click.option("--name", help="What clients call the model.  [default: the target's name]")
@click.option("--set", "overrides", multiple=True, metavar="serve.KEY=VALUE", help="Override one value.")
@click.option("--json", "as_json", is_flag=True, help="Announce the address as JSON on stdout.")
@click.option("--parent-fd", type=int, hidden=True, help="A pipe; the server ends when it closes.")
def command(
    target: str,
    host: str | None,
    port: int | None,
    name: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    parent_fd: int | None,
) -> None:
    """Serve TARGET (a name such as quickstart, or a Hugging Face folder) until Ctrl-C."""
    where = [f"serve.port={DEFAULT_PORT if port is None else port}"] + [f'serve.host="{host}"'] * bool(host)
    recipe = load_recipe(None, {"serve": ServeRecipe}, [where[0], *overrides, *where[bool(port is None) :]])
    model = find_model(target)
    # torch loads only after the target is known to be a model
    from marrow.kernels.device import raise_malloc_thresholds
    from marrow.serve.server import run_server

    raise_malloc_thresholds()

    def announce(url: str) -> None:
        if as_json:
            click.echo(json.dumps({"url": url, "model": name or model.name, "pid": os.getpid()}))
        else:
            console.say(
                f"{name or model.name} is served at {url}  (page: {url}/, API: {url}/v1, Ctrl-C stops)"
            )

    ended_by = run_server(
        model.folder,
        recipe.section(ServeRecipe),
        name=name or model.name,
        announce=announce,
        parent_fd=parent_fd,
    )
    if ended_by == signal.SIGINT:
        console.say("drained and stopped")
        raise click.exceptions.Exit(Interrupted.exit_code)
