"""`marrow chat`: talk with a chat-tuned model on the terminal."""

import click

from marrow.cli.complete import ask
from marrow.cli.target import find_model
from marrow.core.errors import ModelError

MAX_TOKENS = 512


@click.command("chat")
@click.argument("target")
@click.option("--max-tokens", type=click.IntRange(1), help="[default: 512, or what the context holds]")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.7, show_default=True)
def command(target: str, max_tokens: int | None, temperature: float) -> None:
    """Chat with TARGET (a name, or a model folder that brings a chat template)."""
    from marrow.text.chat import ChatTemplate

    model = find_model(target)
    template = ChatTemplate.load(model.folder)
    if template is None:
        raise ModelError(
            f"{model.name} is a base model: it completes text, it was not tuned to chat",
            hint=f"marrow complete {target}",
        )
    # torch loads only after the target is known to chat
    from marrow.core.records import Sampling
    from marrow.serve.config import ServeRecipe
    from marrow.serve.engine import Engine
    from marrow.serve.sequence import Request

    messages: list[dict[str, str]] = []
    with Engine.load(model.folder, ServeRecipe(), name=model.name) as engine:
        click.echo(f"{model.name}: an empty line or Ctrl-D ends.", err=True)
        while text := ask("you: "):
            messages.append({"role": "user", "content": text})
            prompt = template.encode(messages, engine.tokenizer)
            answer = []
            room = max_tokens or max(1, min(MAX_TOKENS, engine.max_tokens(len(prompt))))
            sampling = Sampling(max_tokens=room, temperature=temperature)
            for delta in engine.submit(Request(tuple(prompt), sampling)):
                if delta.error is not None:
                    raise delta.error
                answer.append(delta.text)
                click.echo(delta.text, nl=False)
            click.echo()
            messages.append({"role": "assistant", "content": "".join(answer)})
