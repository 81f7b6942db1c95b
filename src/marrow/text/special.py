"""Special tokens: the 64 at ids 0..63 that Marrow reserves from the first day, and other people's.

A model trained without chat can be tuned for it later without growing its embedding: the slots
are there. The names of chat and tool tokens are those that ChatML and Qwen use. A tokenizer that
Marrow did not make keeps its own; `foreign_specials` finds which of them begin and end a document.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from marrow.core.errors import ModelError

NUM_SPECIAL = 64

BOS = "<|bos|>"
EOS = "<|eos|>"
PAD = "<|pad|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

_NAMED = (
    BOS,
    EOS,
    PAD,
    TURN_START,
    TURN_END,
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
)

SPECIAL_TOKENS = _NAMED + tuple(f"<|reserved_{n}|>" for n in range(NUM_SPECIAL - len(_NAMED)))
"""Their texts, in the order of their ids."""


@dataclass(frozen=True, slots=True)
class Specials:
    """The special tokens of one tokenizer: ids by text, and which have a role.

    Every document is bos + tokens + eos; where a tokenizer has but one mark, it is both.
    """

    ids: Mapping[str, int]
    bos_id: int
    eos_id: int
    pad_id: int


OURS = Specials({text: i for i, text in enumerate(SPECIAL_TOKENS)}, 0, 1, 2)

_KNOWN = {  # what the roles are called where no configuration says it
    "bos": (BOS, "<s>", "<|begin_of_text|>", "<bos>", "[CLS]", "<|startoftext|>"),
    "eos": (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "[SEP]", "<|im_end|>"),
    "pad": (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>"),
}


def foreign_specials(content: Mapping[str, Any], config: Mapping[str, Any]) -> Specials:
    """Find the special tokens of a tokenizer.json that Marrow did not make.

    Args: content: of tokenizer.json. config: of the tokenizer_config.json beside it, or empty; its
        word counts first, then the template that the library puts around a text, then known names.
    Raises: ModelError if no special token can end a document.
    """
    ids = {token["content"]: token["id"] for token in content["added_tokens"] if token["special"]}
    before, after = _template(content.get("post_processor"))
    templates = {"bos": before[:1], "eos": after[-1:], "pad": []}

    def find(role: str, *other: str) -> int | None:
        named = (_text_of(config.get(f"{name}_token")) for name in (role, *other))
        return next((ids[name] for name in (*named, *templates[role], *_KNOWN[role]) if name in ids), None)

    bos, eos, pad = find("bos", "cls"), find("eos", "sep"), find("pad")
    bos_id = eos if bos is None else bos
    eos_id = bos if eos is None else eos
    if bos_id is None or eos_id is None:
        raise ModelError(
            f"the tokenizer has no special token to begin or end a document: it has {sorted(ids)[:8]}",
            hint="name bos_token and eos_token in the tokenizer_config.json beside it",
        )
    return Specials(ids, bos_id, eos_id, eos_id if pad is None else pad)


def _template(processor: Any) -> tuple[list[str], list[str]]:
    """Return the special tokens that a post-processor puts before one text, and those behind it."""
    before: list[str] = []
    after: list[str] = []
    if not isinstance(processor, Mapping):
        return before, after
    for inner in processor.get("processors", ()):
        more_before, more_after = _template(inner)
        before, after = before + more_before, after + more_after
    side = before
    for item in processor.get("single", ()):
        if "SpecialToken" in item:
            side.append(item["SpecialToken"]["id"])
        else:
            side = after
    for name, side in (("cls", before), ("sep", after)):  # BertProcessing, RobertaProcessing: [text, id]
        if name in processor:
            side.append(processor[name][0])
    return before, after


def _text_of(token: Any) -> str | None:
    """Return a token as text: configurations write it bare, or in a table."""
    return token.get("content") if isinstance(token, Mapping) else token
