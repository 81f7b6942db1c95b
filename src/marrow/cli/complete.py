"""`marrow complete`: type a beginning, watch the model go on."""

import sys

import click

from marrow.cli.target import find_model
from marrow.core.errors import UsageError

MAX_TOKENS = 128


@click.command("complete")
@click.argument("target")
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=click.IntRange(1), help="[default: 128, or what the context holds]")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.6, show_default=True)
@click.option("--seed", type=int, help="The same seed draws the same completion.")
def command(
    target: str, prompt: str | None, max_tokens: int | None, temperature: float, seed: int | None
) -> None:
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
    with Engine.load(model.folder, ServeRecipe(), name=model.name) as engine:

        def complete(text: str) -> None:
            ids = engine.encode(text)
            room = max_tokens or max(1, min(MAX_TOKENS, engine.max_tokens(len(ids))))
            sampling = Sampling(max_tokens=room, temperature=temperature, seed=seed)
            for delta in engine.submit(Request(tuple(ids), sampling)):
                if delta.error is not None:
                    raise delta.error
                click.echo(delta.text, nl=False)
            click.echo()

        if prompt is not None or not sys.stdin.isatty():
            complete(prompt if prompt is not None else _read_stdin())
            return
        click.echo(f"{model.name}: type a beginning; an empty line or Ctrl-D ends.", err=True)
        while text := ask("> "):
            click.echo(text, nl=False)
            complete(text)


def ask(mark: str) -> str:
    """Read one line from the terminal; "" at its end. Raises: UsageError if it is not UTF-8."""
    try:
        return input(mark)
    except EOFError:
        return ""
    except UnicodeDecodeError as error:
        raise _no_text(error) from None


def _read_stdin() -> str:
    """Read the prompt that is piped in. Raises: UsageError if it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise _no_text(error) from None


def _no_text(error: UnicodeDecodeError) -> UsageError:
    return UsageError(f"stdin is not UTF-8: {error}", hint="convert it, as with iconv")
