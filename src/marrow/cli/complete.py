"""`marrow complete`: type a beginning, watch the model go on."""

import sys

import click

from marrow.cli.target import find_model


@click.command("complete")
@click.argument("target")
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.6, show_default=True)
@click.option("--seed", type=int, help="The same seed draws the same completion.")
def command(target: str, prompt: str | None, max_tokens: int, temperature: float, seed: int | None) -> None:
    """Complete PROMPT with TARGET (a name such as quickstart, or a model folder).

    Without PROMPT, reads stdin whole if it is a pipe, and asks line by line on a terminal.
    """
    model = find_model(target)
    # torch loads only after the target is known to be a model
    from marrow.core.records import Sampling
    from marrow.kernels.device import raise_malloc_thresholds
    from marrow.serve.config import ServeRecipe
    from marrow.serve.engine import Engine
    from marrow.serve.sequence import Request

    raise_malloc_thresholds()
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, seed=seed)
    with Engine.load(model.folder, ServeRecipe(), name=model.name) as engine:

        def complete(text: str) -> None:
            for delta in engine.submit(Request(tuple(engine.encode(text)), sampling)):
                if delta.error is not None:
                    raise delta.error
                click.echo(delta.text, nl=False)
            click.echo()

        if prompt is not None or not sys.stdin.isatty():
            complete(prompt if prompt is not None else sys.stdin.read())
            return
        click.echo(f"{model.name}: type a beginning; an empty line or Ctrl-D ends.", err=True)
        while text := _ask():
            click.echo(text, nl=False)
            complete(text)


def _ask() -> str:
    """Read one line from the terminal; "" at its end."""
    try:
        return input("> ")
    except EOFError:
        return ""
