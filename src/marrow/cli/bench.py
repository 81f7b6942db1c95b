"""`marrow bench`: measure what runs, with the measuring module of the layer itself."""

import json
import sys
from typing import Any

import click

from marrow.cli import console
from marrow.core.errors import ServeError


@click.group("bench")
def command() -> None:
    """Measure a layer, or any OpenAI-compatible server."""


@command.command("serve")
@click.argument("url")
@click.option("--prompt", "prompts", multiple=True, help="A prompt to send; several are taken in turn.")
@click.option("--requests", type=click.IntRange(1), default=64, show_default=True)
@click.option("--concurrency", type=click.IntRange(1), default=8, show_default=True)
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests a second: an open loop.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--model", help="By default the first that the server lists.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def serve(
    url: str,
    prompts: tuple[str, ...],
    requests: int,
    concurrency: int,
    rate: float | None,
    max_tokens: int,
    model: str | None,
    as_json: bool,
) -> None:
    """Load the OpenAI-compatible server at URL and print what its clients felt."""
    from marrow.serve.load import Load, drive

    load = Load(prompts or ("def read(self",), requests, concurrency, rate, max_tokens, model)
    with console.progress_of("bench") as progress:
        measured, _ = drive(url, load, progress)
    if measured["failed"] == measured["requests"]:
        raise ServeError(
            f"all {measured['requests']} requests to {url} failed: {next(iter(measured['errors']))}",
            hint="is it a server of the OpenAI API, and does it serve that model?",
        )
    if as_json:
        click.echo(json.dumps(measured, indent=2))
        return
    wall = console.duration(measured["wall_s"])
    click.echo(f"{measured['requests']} requests, {measured['failed']} failed, in {wall}")
    click.echo(f"{console.quantity(measured['completion_tokens_per_s'])} completion tokens/s")
    for name in ("ttft_ms", "itl_ms", "e2e_ms"):
        if found := measured[name]:
            figures = "  ".join(f"{rank} {found[rank]:.1f}" for rank in ("p50", "p90", "p99"))
            click.echo(f"{name:<8} {figures}")


@command.command("kernels")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def kernels(as_json: bool) -> None:
    """Measure each operator against this machine's roofline."""
    from marrow.kernels import roofline

    rows: list[dict[str, Any]] = roofline.measure()
    if as_json:
        json.dump(rows, sys.stdout, indent=2)
        click.echo()
        return
    for row in rows:
        click.echo(roofline.describe(row))
