"""Messages to prompt tokens, by the chat template that the model's folder brings.

Nobody can end a turn by writing `<|im_end|>`: special strings in a message are swapped for
noncharacters before the template runs, and come back as plain text, so only the template's own
special strings become special tokens.

Source: Hugging Face chat templates (Jinja, sandboxed).
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from marrow.core.errors import DataError, ModelError, RequestError
from marrow.text.special import SPECIAL_TOKENS
from marrow.text.tokenizer import Tokenizer

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # Unicode noncharacters: no text for interchange holds them
_PLAIN = (*SPECIAL_TOKENS, _OPEN, _CLOSE)  # strings that a message may hold as plain text only
_FIND = re.compile("|".join(map(re.escape, _PLAIN)))
_FOUND = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


class ChatTemplate:
    """Renders conversations and encodes them. Raises: ModelError if the template is not Jinja."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = lambda value, **options: json.dumps(
            value, ensure_ascii=False, **options
        )
        self._variables = dict(variables)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ModelError(f"the chat template is damaged: {error}") from None

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate | None":
        """Read the template of a model folder; None for a base model, which has none."""
        config: dict[str, Any] = {}
        path = folder / "tokenizer_config.json"
        if path.exists():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ModelError(f"{path} is not JSON: {error}", hint="export the model again") from None
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
        if not source:
            return None
        if isinstance(source, list):  # several, by name
            source = {item["name"]: item["template"] for item in source}.get("default", "")
        names = [name for name in ("bos_token", "eos_token", "pad_token") if name in config]
        variables: dict[str, Any] = {name: config[name] for name in names}
        return cls(source, variables)

    def encode(self, messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[int]:
        """Return the prompt's token ids, up to where the assistant speaks.

        Raises: RequestError if the template refuses the conversation.
        """
        swapped = [{key: _swap(value) for key, value in message.items()} for message in messages]
        try:
            text = self._template.render(messages=swapped, add_generation_prompt=True, **self._variables)
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestError(f"the chat template refuses the messages: {error}", param="messages") from None
        ids: list[int] = []
        try:
            for at, part in enumerate(_FOUND.split(text)):
                if at % 2:
                    ids += tokenizer.encode(_PLAIN[int(part)])
                else:
                    ids += tokenizer.encode(part, allow_special=True)
        except DataError as error:
            raise RequestError(error.message, param="messages", hint=error.hint) from None
        return ids


def _swap(text: str) -> str:
    return _FIND.sub(lambda found: f"{_OPEN}{_PLAIN.index(found[0])}{_CLOSE}", text)


def _raise(message: str) -> None:
    raise TemplateError(message)
