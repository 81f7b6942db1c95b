r"""Chats as tokens, by the Jinja template that a model's folder brings.

    template = ChatTemplate.load(folder)        # None: a base model, which completes text only
    ids = template.encode([{"role": "user", "content": "Hello"}], tokenizer)

`CHATML` is the template of Marrow's own chat models:

    <|bos|><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n

Only the marks that the template itself writes become special tokens. What somebody said is always
plain text, even if it spells a mark: a user cannot end their turn and speak as the system. To that
end special strings in messages pass through the template as Unicode noncharacters, and come back
before the text between the template's marks is encoded.
Source: Hugging Face chat templates (Jinja, sandboxed); ChatML (OpenAI 2023).
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from marrow.core.errors import ModelError, RequestError, explain_os_errors
from marrow.text.special import BOS, EOS, PAD, TURN_END, TURN_START
from marrow.text.tokenizer import Tokenizer

CHATML = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '" + TURN_START + "' + message['role'] + '\n' + message['content'] + '" + TURN_END + "' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + TURN_START + "assistant\n' }}{% endif %}"
)

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: no text for interchange holds them
_FIND = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


class ChatTemplate:
    """Renders conversations and encodes them. Raises: ModelError if the template is not Jinja."""

    def __init__(self, source: str = CHATML, variables: Mapping[str, str] | None = None) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = _to_json
        self.source = source
        self._variables = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, **(variables or {})}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ModelError(
                f"the chat template is damaged: {error}", hint="copy or export the model again"
            ) from error

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate | None":
        """Read the template of a Hugging Face folder; None for a base model, which has none.

        Raises: ModelError if the folder's tokenizer_config.json or its template is damaged.
        """
        path = folder / "tokenizer_config.json"
        config: Any = {}
        try:
            if path.exists():
                with explain_os_errors("read the tokenizer's configuration", path):
                    config = json.loads(path.read_bytes())
                if not isinstance(config, dict):
                    raise ValueError(f"it holds a {type(config).__name__}, not a table")
            source = config.get("chat_template")
            if isinstance(source, list):  # several, by name
                source = {item["name"]: item["template"] for item in source}.get("default")
            if (file := folder / "chat_template.jinja").exists():
                path = file
                with explain_os_errors("read the chat template", path):
                    source = path.read_text(encoding="utf-8")
            if not isinstance(source, str | None):
                raise ValueError(f"its chat template is a {type(source).__name__}, not a text")
            names = [name for name in ("bos_token", "eos_token", "pad_token") if config.get(name)]
            variables = {name: _text_of(config[name]) for name in names}
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path} is damaged: {error}", hint="copy or export the model again") from error
        return cls(source, variables) if source else None

    def render(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True) -> str:
        """Write a chat as text, for people to read; `encode` makes the tokens.

        Args: messages: each with a `role` and a `content`, as the template wants them. answer: end
            with the start of the assistant's turn.
        Raises: RequestError if the template refuses the messages.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=answer, **self._variables)
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestError(
                f"the chat template refuses the messages: {error}",
                hint="give each message a role (system, user, assistant) and a text as content",
                param="messages",
            ) from error

    def encode(
        self, messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, answer: bool = True
    ) -> list[int]:
        """Turn a chat into ids; marks in what was said stay text. Args, Raises: as `render`."""
        marks = tokenizer.specials.ids
        hidden = (*sorted(marks, key=len, reverse=True), _OPEN, _CLOSE)  # the longest first: <|a|> in <|a|>b
        hide = _any_of(hidden)
        text = self.render([_hide(message, hide, hidden) for message in messages], answer=answer)
        ids: list[int] = []
        for index, part in enumerate(_any_of(hidden[:-2]).split(text)):  # text, mark, ..., mark, text
            if index % 2:
                ids.append(marks[part])
            else:
                ids += tokenizer.encode(_FIND.sub(lambda found: hidden[int(found[1])], part))
        return ids


def _hide(value: Any, hide: re.Pattern[str], hidden: Sequence[str]) -> Any:
    """Put special strings out of sight, in all texts of a message."""
    if isinstance(value, str):
        return hide.sub(lambda found: f"{_OPEN}{hidden.index(found[0])}{_CLOSE}", value)
    if isinstance(value, Mapping):
        return {key: _hide(item, hide, hidden) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(item, hide, hidden) for item in value]
    return value


@lru_cache(maxsize=16)
def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("(" + "|".join(map(re.escape, texts)) + ")")


def _text_of(token: Any) -> str:
    """Return a token as text: configurations write it bare, or in a table."""
    return str(token["content"] if isinstance(token, Mapping) else token)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)
