"""Special tokens: ours stand at their ids for ever; of foreign ones the first word that says it counts."""

from typing import Any

import pytest

from marrow.core.errors import ModelError
from marrow.text.special import (
    _KNOWN,
    BOS,
    EOS,
    NUM_SPECIAL,
    OURS,
    PAD,
    SPECIAL_TOKENS,
    TURN_END,
    TURN_START,
    foreign_specials,
)


def content(*names: str, plain: tuple[str, ...] = (), processor: Any = None) -> dict[str, Any]:
    tokens = [{"content": name, "id": 10 + i, "special": True} for i, name in enumerate(names)]
    tokens += [{"content": name, "id": 90 + i, "special": False} for i, name in enumerate(plain)]
    return {"added_tokens": tokens, "post_processor": processor}


def roles(*names: str, config: dict[str, Any] | None = None, **rest: Any) -> tuple[str, str, str]:
    found = foreign_specials(content(*names, **rest), config or {})
    texts = {number: text for text, number in found.ids.items()}
    return texts[found.bos_id], texts[found.eos_id], texts[found.pad_id]


def test_ours_keep_their_ids() -> None:
    """Every model ever trained has these numbers in its rows: they do not move."""
    assert len(SPECIAL_TOKENS) == len(set(SPECIAL_TOKENS)) == NUM_SPECIAL == 64
    assert [OURS.ids[name] for name in (BOS, EOS, PAD, TURN_START, TURN_END)] == [0, 1, 2, 3, 4]
    assert (OURS.bos_id, OURS.eos_id, OURS.pad_id) == (0, 1, 2)
    assert OURS.ids["<tool_call>"] == 5 and OURS.ids["<think>"] == 9 and OURS.ids["<|fim_prefix|>"] == 11
    assert SPECIAL_TOKENS[14] == "<|reserved_0|>" and SPECIAL_TOKENS[63] == "<|reserved_49|>"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("<s>", "</s>", "<pad>"), ("<s>", "</s>", "<pad>")),
        (
            ("<|begin_of_text|>", "<|end_of_text|>"),
            ("<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>"),
        ),
        (("[CLS]", "[SEP]", "[PAD]", "[MASK]"), ("[CLS]", "[SEP]", "[PAD]")),
        (("<bos>", "<eos>", "<pad>"), ("<bos>", "<eos>", "<pad>")),
        (("<|endoftext|>",), ("<|endoftext|>",) * 3),
        (("<s>",), ("<s>",) * 3),
        ((BOS, EOS, PAD), (BOS, EOS, PAD)),
        (("<|im_end|>", "</s>"), ("</s>", "</s>", "</s>")),  # the end of a document before that of a turn
        (("<|im_start|>", "<|im_end|>"), ("<|im_end|>",) * 3),
    ],
)
def test_known_names_have_their_roles(names: tuple[str, ...], expected: tuple[str, str, str]) -> None:
    assert roles(*names) == expected


@pytest.mark.parametrize("role", _KNOWN)
def test_every_known_name_is_enough_for_its_role(role: str) -> None:
    for name in _KNOWN[role]:
        marks = (name,) if role != "pad" else ("<s>", name)
        place = ("bos", "eos", "pad").index(role)
        assert roles(*marks)[place] == name


@pytest.mark.parametrize("form", [lambda text: text, lambda text: {"content": text, "lstrip": False}])
def test_the_configuration_has_the_first_word(form: Any) -> None:
    config = {"bos_token": form("<x>"), "eos_token": form("<y>"), "pad_token": form("<z>")}
    assert roles("<s>", "</s>", "<pad>", "<x>", "<y>", "<z>", config=config) == ("<x>", "<y>", "<z>")


def test_encoders_call_them_cls_and_sep() -> None:
    config = {"cls_token": "<x>", "sep_token": "<y>"}
    assert roles("<s>", "</s>", "<x>", "<y>", config=config) == ("<x>", "<y>", "<y>")
    both = config | {"bos_token": "<s>"}
    assert roles("<s>", "</s>", "<x>", "<y>", config=both)[0] == "<s>", "bos goes before cls"


@pytest.mark.parametrize("value", [None, "<gone>", {"content": None}, {}])
def test_a_configuration_that_names_none_of_its_tokens_is_passed_over(value: Any) -> None:
    assert roles("<s>", "</s>", config={"bos_token": value, "eos_token": value})[:2] == ("<s>", "</s>")


def single(*parts: str) -> dict[str, Any]:
    """A template, "A" being the text."""
    return {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}}
            if part == "A"
            else {"SpecialToken": {"id": part, "type_id": 0}}
            for part in parts
        ],
    }


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (single("<x>", "A", "<y>"), ("<x>", "<y>")),
        (single("<x>", "A"), ("<x>", "</s>")),
        (single("A", "<y>"), ("<s>", "<y>")),
        (single("<x>", "<w>", "A", "<w>", "<y>"), ("<x>", "<y>")),  # the outermost
        (
            {"type": "Sequence", "processors": [{"type": "ByteLevel"}, single("<x>", "A", "<y>")]},
            ("<x>", "<y>"),
        ),
        ({"type": "BertProcessing", "cls": ["<x>", 12], "sep": ["<y>", 13]}, ("<x>", "<y>")),
        ({"type": "ByteLevel"}, ("<s>", "</s>")),
        (None, ("<s>", "</s>")),
        (single("<gone>", "A", "<gone>"), ("<s>", "</s>")),
    ],
)
def test_the_template_has_the_second_word(processor: Any, expected: tuple[str, str]) -> None:
    assert roles("<s>", "</s>", "<x>", "<y>", "<w>", processor=processor)[:2] == expected


def test_the_configuration_goes_before_the_template() -> None:
    found = roles("<x>", "<y>", "<z>", processor=single("<x>", "A", "<y>"), config={"bos_token": "<z>"})
    assert found[:2] == ("<z>", "<y>")


def test_added_tokens_that_are_plain_words_have_no_role() -> None:
    with pytest.raises(ModelError):
        foreign_specials(content(plain=("<s>", "</s>")), {})
    found = foreign_specials(content("<s>", plain=("</s>",)), {})
    assert found.ids == {"<s>": 10}


@pytest.mark.parametrize("names", [(), ("[MASK]",), ("<pad>", "<unk>")])
def test_a_tokenizer_that_cannot_end_a_document_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match="no special token to begin or end a document") as caught:
        foreign_specials(content(*names), {})
    assert "name bos_token and eos_token in the tokenizer_config.json" in caught.value.hint
    assert str(sorted(names)) in str(caught.value)
