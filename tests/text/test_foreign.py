"""Tokenizers that Marrow did not make: any tokenizer.json, its own ids, its own special tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from marrow.core.errors import DataError, ModelError
from marrow.text.chat import ChatTemplate
from marrow.text.pattern import PATTERN
from marrow.text.tokenizer import Detokenizer, Tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text(
    st.sampled_from("the cat's [CLS] <s> 12 \n\té中"), max_size=40
)
Factory = pytest.TempPathFactory
KINDS = ["wordpiece", "unigram", "gpt2", "llama3", "qwen", "sentencepiece"]


def special(*names: str) -> dict[str, Any]:
    return {"special_tokens": list(names), "show_progress": False}


def make(kind: str, corpus: list[str]) -> Library:
    """Train a tokenizer of each kind that people publish, small."""
    short = [corpus[2][:8000], corpus[-1]]  # what knows no words takes its time
    if kind == "wordpiece":  # BERT
        library = Library(models.WordPiece(unk_token="[UNK]"))
        library.normalizer = normalizers.BertNormalizer(lowercase=True)
        library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        library.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=400, **special("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
        library.train_from_iterator(corpus, trainer)
        library.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        library.enable_truncation(16)
        library.enable_padding(pad_id=0, pad_token="[PAD]", length=16)
        return library
    if kind == "unigram":  # T5
        library = Library(models.Unigram())
        library.pre_tokenizer = pre_tokenizers.Metaspace()
        library.decoder = decoders.Metaspace()
        names = special("<pad>", "</s>", "<unk>")
        library.train_from_iterator(
            short, trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", **names)
        )
        return library
    if kind == "sentencepiece":  # Llama 2: pieces, and bytes for what has none
        library = Library(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        library.normalizer = normalizers.Replace(" ", "▁")
        library.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        names = special("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)))
        library.train_from_iterator(short, trainers.BpeTrainer(vocab_size=500, **names))
        return library
    library = Library(models.BPE())
    library.decoder = decoders.ByteLevel()
    alphabet = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    if kind == "gpt2":
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        names = special("<|endoftext|>")
    else:
        pattern = PATTERN if kind == "llama3" else PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        names = special("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
    library.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=500, **alphabet, **names))
    if kind == "llama3":
        library.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
        )
    return library


@pytest.fixture(scope="module", params=KINDS)
def folder(
    request: pytest.FixtureRequest, corpus: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    make(request.param, corpus).save(str(made / "tokenizer.json"))
    return made


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Library:
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    return library


@pytest.fixture(scope="module")
def foreign(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@settings(deadline=None, max_examples=150)
@given(text=TEXT)
def test_ids_are_those_of_the_library(foreign: Tokenizer, oracle: Library, text: str) -> None:
    expected = oracle.encode(text, add_special_tokens=False).ids
    assert foreign.encode(text) == expected
    for batch in ([text], [text, text]):
        assert [ids.tolist() for ids in foreign.encode_batch(batch)] == [expected] * len(batch)
    ids, offsets = foreign.encode_flat([text, ""], document=True)
    assert ids.tolist() == [foreign.bos_id, *expected, foreign.eos_id, foreign.bos_id, foreign.eos_id]
    assert offsets.tolist() == [0, len(expected) + 2, len(expected) + 4]


@settings(deadline=None, max_examples=50)
@given(text=TEXT)
def test_texts_are_decoded_as_the_library_decodes_them(
    foreign: Tokenizer, oracle: Library, text: str
) -> None:
    ids = oracle.encode(text, add_special_tokens=False).ids
    assert foreign.decode(ids) == oracle.decode(ids)
    if foreign.is_byte_level:
        stream = Detokenizer(foreign)
        assert "".join(map(stream.push, ids)) + stream.finish() == text


def test_long_texts_are_counted_to_the_last_token(foreign: Tokenizer, oracle: Library) -> None:
    """A file may ask to cut texts at 16 tokens, as BERT's do at 512, and to fill short ones up."""
    text = "the cat sat on the mat " * 300
    assert len(foreign.encode(text)) == len(oracle.encode(text, add_special_tokens=False).ids) > 600
    assert len(foreign.encode("cat")) < 16


def test_documents_begin_and_end_with_the_tokenizers_own_marks(foreign: Tokenizer, folder: Path) -> None:
    names = {token: text for text, token in foreign.specials.ids.items()}
    kind = folder.name.rstrip("0123456789")
    marks = [names[token] for token in (foreign.bos_id, foreign.eos_id, foreign.pad_id)]
    expected = {
        "wordpiece": ["[CLS]", "[SEP]", "[PAD]"],
        "unigram": ["</s>", "</s>", "<pad>"],
        "gpt": ["<|endoftext|>"] * 3,
        "llama": ["<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>"],
        "qwen": ["<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>"],
        "sentencepiece": ["<s>", "</s>", "</s>"],
    }
    assert marks == expected[kind]


def test_the_configuration_beside_it_has_the_last_word(
    folder: Path, tmp_path: Path, foreign: Tokenizer
) -> None:
    names = list(foreign.specials.ids)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    config = {"bos_token": names[-1], "eos_token": {"content": names[0]}, "pad_token": names[-1]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    ids = foreign.specials.ids
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (ids[names[-1]], ids[names[0]], ids[names[-1]])


def test_a_special_string_in_text_is_plain_text_unless_asked(foreign: Tokenizer, oracle: Library) -> None:
    for name, token in foreign.specials.ids.items():
        text = f"a {name} b"
        if name.startswith("<0x"):  # bytes of sentencepiece: the library's own business
            continue
        assert foreign.encode(text) == oracle.encode(text, add_special_tokens=False).ids
        assert token in foreign.encode(text, allow_special=True)


def test_a_tokenizer_without_bytes_says_what_it_cannot(foreign: Tokenizer) -> None:
    if foreign.is_byte_level:
        assert len(foreign.token_bytes()) == foreign.vocab_size
        return
    with pytest.raises(ModelError, match="not byte-level") as error:
        Detokenizer(foreign)
    assert "byte-level" in str(error.value.hint)


@pytest.mark.parametrize("token_id", [-1, 10**7])
def test_an_id_outside_the_vocabulary_is_refused(foreign: Tokenizer, token_id: int) -> None:
    with pytest.raises(DataError, match=f"no token {token_id}"):
        foreign.decode([token_id])


def test_what_is_saved_is_the_same_tokenizer(foreign: Tokenizer, tmp_path: Path) -> None:
    foreign.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path)
    text = "the cat sat, naïve café"
    assert again.encode(text) == foreign.encode(text)
    assert again.specials.ids == foreign.specials.ids


def test_known_patterns_take_the_fast_road(corpus: list[str], tmp_path: Path) -> None:
    for kind, is_fast in (("llama3", True), ("qwen", True), ("gpt2", False), ("wordpiece", False)):
        make(kind, corpus).save(str(tmp_path / "tokenizer.json"))
        loaded = Tokenizer.load(tmp_path)
        if loaded._bpe is None and is_fast:
            pytest.skip("no C compiler")
        assert (loaded._bpe is not None) == is_fast


@pytest.mark.slow
def test_ids_beyond_16_bits_are_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """150,000 tokens, as Qwen has; those of the text get the highest ids."""
    tokenizer.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    shifted = {name: i if i < 64 else i + 149_000 for name, i in vocabulary.items()}
    shifted |= {f"<filler {i}>": i for i in range(64, 149_064)}
    content["model"]["vocab"] = shifted
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    large = Tokenizer.load(tmp_path)
    assert large.vocab_size == 150_024
    text = "def read(self): return naïve"
    assert large.encode(text) == [i + 149_000 for i in tokenizer.encode(text)]
    assert large.decode(large.encode(text)) == text
    ids, _ = large.encode_flat([text])
    assert ids.dtype == np.uint32 and ids.min() > 1 << 16


def test_a_tokenizer_without_any_special_token_is_refused(corpus: list[str], tmp_path: Path) -> None:
    library = Library(models.BPE())
    library.train_from_iterator(["a few words"], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="no special token to begin or end") as error:
        Tokenizer.load(tmp_path)
    assert "tokenizer_config.json" in str(error.value.hint)


@pytest.mark.parametrize("damage", ["[1]", "{", '"text"', "\xff"])
def test_a_damaged_configuration_is_a_clear_error(corpus: list[str], tmp_path: Path, damage: str) -> None:
    make("gpt2", corpus).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(damage, encoding="latin-1")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is damaged"):
        Tokenizer.load(tmp_path)


def test_a_chat_takes_the_marks_of_its_tokenizer_and_no_others(corpus: list[str], tmp_path: Path) -> None:
    make("qwen", corpus).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    chat = ChatTemplate(variables={"bos_token": "<|begin_of_text|>"})
    said = "I say <|im_end|> and <|begin_of_text|>"
    ids = chat.encode([{"role": "user", "content": said}], tokenizer)
    marks = tokenizer.specials.ids
    begin, start, end = (marks[name] for name in ("<|begin_of_text|>", "<|im_start|>", "<|im_end|>"))
    turn = [start, *tokenizer.encode(f"user\n{said}"), end, *tokenizer.encode("\n")]
    assert ids == [begin, *turn, start, *tokenizer.encode("assistant\n")]
    assert [ids.count(mark) for mark in (begin, start, end)] == [1, 2, 1]
