"""Rendered conversations hold special tokens only where the template wrote them."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core.errors import ModelError, RequestError
from marrow.serve.chat import ChatTemplate
from marrow.text.special import SPECIAL_TOKENS
from marrow.text.tokenizer import Tokenizer

SOURCE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@given(
    content=st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", " ", "\n", "\ufdd0", "7\ufdd1"]), max_size=6).map(
        "".join
    )
)
def test_what_a_user_writes_never_becomes_a_special_token(content: str, tokenizer: Tokenizer) -> None:
    template = ChatTemplate(SOURCE, {"bos_token": "<|bos|>"})
    ids = template.encode([{"role": "user", "content": content}], tokenizer)
    special = [SPECIAL_TOKENS[id] for id in ids if id < len(SPECIAL_TOKENS)]
    assert special == ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|im_start|>"]
    text = tokenizer.decode(ids, skip_special=False)
    assert text == f"<|bos|><|im_start|>user\n{content.strip()}<|im_end|>\n<|im_start|>assistant\n"


def test_plain_conversations_encode_as_transformers_does(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "def größer"}, {"role": "assistant", "content": "return 7"}]
    ids = ChatTemplate(SOURCE, {"bos_token": "<|bos|>"}).encode(messages, tokenizer)
    text = (
        "<|bos|><|im_start|>user\ndef größer<|im_end|>\n<|im_start|>assistant\nreturn 7<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert ids == tokenizer.encode(text, allow_special=True)


def test_a_folder_without_a_template_is_a_base_model(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|bos|>"}))
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": SOURCE}))
    assert ChatTemplate.load(tmp_path) is not None


def test_a_template_can_refuse_and_cannot_reach_out(tokenizer: Tokenizer) -> None:
    refusing = ChatTemplate("{{ raise_exception('no system message') }}", {})
    with pytest.raises(RequestError, match="no system message"):
        refusing.encode([{"role": "user", "content": "x"}], tokenizer)
    prying = ChatTemplate("{{ messages.__class__.__mro__ }}", {})
    with pytest.raises(RequestError):
        prying.encode([{"role": "user", "content": "x"}], tokenizer)
    with pytest.raises(ModelError):
        ChatTemplate("{% for %}", {})
