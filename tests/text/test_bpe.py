"""The C encoder against the library: every way a text can be cut, every length of a word, every Unicode."""

import json
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers
from tokenizers import Tokenizer as Library

from marrow.text import bpe as bpe_module
from marrow.text.bpe import Bpe, encoders_of
from marrow.text.pattern import PATTERN
from marrow.text.tokenizer import Tokenizer

# What decides where words are cut: marks, contractions in every case, blanks and digits of all kinds.
TRICKY = (
    "ab_Z09 \t\n\r\v\f'sStTrReEvVmMlLdD(.):=\"#\x00\x1c\x7f\x85\xa0é中😀\u2028\u3000ſKⅧ½١\u0301\u200d\ufeff𐐀"
)
TEXTS = st.text(st.sampled_from(TRICKY), max_size=60) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=60
)


@pytest.fixture(scope="module")
def library(tokenizer: Tokenizer) -> Library:
    oracle = Library.from_str(tokenizer._library.to_str())
    oracle.encode_special_tokens = True
    return oracle


@pytest.fixture(scope="module")
def bpe(library: Library) -> Bpe:
    made = encoders_of(library)[0]
    if made is None:
        pytest.skip("no C compiler")
    return made


def ids_of(bpe: Bpe, text: str) -> list[int]:
    data = text.encode()
    encoded = bpe.encode(data, np.array([0, len(data)], np.int64))
    assert encoded is not None
    return encoded[0].tolist()


def expected(library: Library, text: str) -> list[int]:
    return list(library.encode(text, add_special_tokens=False).ids)


# The ids


@settings(deadline=None, max_examples=1000)
@given(text=TEXTS)
def test_ids_are_those_of_the_library(bpe: Bpe, library: Library, text: str) -> None:
    assert ids_of(bpe, text) == expected(library, text)


@settings(deadline=None, max_examples=100)
@given(texts=st.lists(TEXTS, max_size=8))
def test_a_text_ends_where_its_bytes_end(bpe: Bpe, library: Library, texts: list[str]) -> None:
    """No word may look beyond its text: (?!\\S) and the cache's wide reads are tempted to."""
    data = [text.encode() for text in texts]
    encoded = bpe.encode(b"".join(data), np.cumsum([0, *map(len, data)]), bos=7, eos=9)
    assert encoded is not None
    ids, offsets = encoded
    for text, start, end in zip(texts, offsets, offsets[1:], strict=False):
        assert ids[start:end].tolist() == [7, *expected(library, text), 9]


@pytest.mark.parametrize("unit", ["a", "ab", "the", "!", " ", "\n", "\t ", "é", "中", "0", "\0", "x'"])
def test_words_of_every_length_around_the_borders_of_the_roads(bpe: Bpe, library: Library, unit: str) -> None:
    """31 bytes fit the cache's key, 48 the short merge; the heap takes the rest."""
    for length in [*range(1, 70), 255, 1000, 4097]:
        text = (unit * length)[:length]
        assert ids_of(bpe, text) == expected(library, text), length
        assert ids_of(bpe, f"{text}x") == expected(library, f"{text}x"), length


@settings(deadline=None, max_examples=100)
@given(word=st.text(st.sampled_from("abcdefghinorst"), min_size=40, max_size=400))
def test_long_words_merge_as_the_library_merges_them(bpe: Bpe, library: Library, word: str) -> None:
    assert ids_of(bpe, word) == expected(library, word)


def test_a_cache_that_overflows_changes_no_id(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe_module, "_SLOTS", 4)
    small = encoders_of(library)[0]
    if small is None:
        pytest.skip("no C compiler")
    text = " ".join(f"word{i % 17} name{i % 5} {i}" for i in range(400))
    for _ in range(2):
        assert ids_of(small, text) == expected(library, text)


def test_every_character_has_the_librarys_class() -> None:
    """All of Unicode, not only the planes that are asked for: what is left out must be neither."""
    pages, classes = bpe_module._unicode_classes()
    ours = classes.reshape(-1, 256)[pages].reshape(-1)
    assert len(classes) < 1 << 18, "the table stays in the cache of a core"
    everything = "".join(chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000)
    for value, others in ((1, r"[^\p{L}]+"), (2, r"[^\p{N}]+"), (3, r"\S+")):
        found = normalizers.Replace(Regex(others), "").normalize_str(everything)
        assert np.array_equal(np.flatnonzero(ours == value), [ord(character) for character in found])


@pytest.mark.slow
def test_every_character_is_cut_as_the_library_cuts_it(bpe: Bpe, library: Library) -> None:
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for start in range(0, len(points), 4096):
        text = "".join(f"a{chr(p)}b 1{chr(p)} {chr(p)}\n'{chr(p)}" for p in points[start : start + 4096 : 3])
        assert ids_of(bpe, text) == expected(library, text), hex(points[start])


def test_threads_that_meet_unicode_at_once_all_know_it(library: Library) -> None:
    """One is in the midst of a text, without the classes, when another has just learned them."""
    text = "def read(self): return n\n" * 4000 + "naïve café Привет, 你好世界 " * 2000
    whole = expected(library, text)
    for _ in range(10):
        fresh = encoders_of(library)[0]
        if fresh is None:
            pytest.skip("no C compiler")
        together = threading.Barrier(4)

        def work(made: Bpe = fresh, barrier: threading.Barrier = together) -> bool:
            barrier.wait()
            return ids_of(made, text) == whole

        with ThreadPoolExecutor(4) as pool:
            assert all([future.result() for future in [pool.submit(work) for _ in range(4)]])  # noqa: C419


# The cost


@pytest.mark.parametrize("unit", ["xyzab", pytest.param(" ", marks=pytest.mark.slow), "é"])
@pytest.mark.slow
def test_a_huge_word_takes_time_in_proportion(bpe: Bpe, unit: str) -> None:
    """10 MB without a cut: a merge that tries all pairs again for each would take days."""
    text = (unit * 10_000_000)[:10_000_000]
    start_s = time.process_time()
    ids_of(bpe, text)
    assert time.process_time() - start_s < 30, "up to 3 s here; ten times that for a slow machine"


def test_a_huge_word_has_the_librarys_ids(bpe: Bpe, library: Library) -> None:
    text = "abcdefgh the return " * 3 + "thereturnself" * 20_000
    assert ids_of(bpe, text) == expected(library, text)


# What it takes on


def changed(library: Library, change: Any) -> Library:
    content = json.loads(library.to_str())
    change(content)
    made = Library.from_str(json.dumps(content))
    made.encode_special_tokens = True
    return made


def set_pattern(pattern: str) -> Any:
    def change(content: dict[str, Any]) -> None:
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}

    return change


@settings(deadline=None, max_examples=200)
@given(text=TEXTS | st.text(st.sampled_from("1234567890a "), max_size=30))
def test_the_pattern_with_single_digits_is_known_too(single: tuple[Library, Bpe], text: str) -> None:
    library, bpe = single
    assert ids_of(bpe, text) == expected(library, text)


@pytest.fixture(scope="module")
def single(library: Library) -> tuple[Library, Bpe]:
    """Qwen's pattern."""
    made = changed(library, set_pattern(PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")))
    bpe, words = encoders_of(made)
    if bpe is None:
        pytest.skip("no C compiler")
    assert words is None, "the cache of words knows the pattern of three digits alone"
    return made, bpe


@pytest.mark.parametrize(
    "change",
    [
        set_pattern(r"\s+|\S+"),
        lambda content: content["model"].update(dropout=0.5),
        lambda content: content["model"].update(ignore_merges=True),
        lambda content: content["model"].update(end_of_word_suffix="</w>"),
        lambda content: content.update(normalizer={"type": "NFC"}),
        lambda content: content["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(invert=True),
        lambda content: content.update(pre_tokenizer=None),
        lambda content: content["added_tokens"][5].update(special=False),
    ],
    ids=["pattern", "dropout", "whole words", "suffix", "normaliser", "prefix", "inverted", "none", "added"],
)
def test_what_it_does_not_know_stays_with_the_library(library: Library, change: Any) -> None:
    assert encoders_of(changed(library, change)) == (None, None)


def test_merges_with_ids_in_any_order_are_known(library: Library) -> None:
    """The rank of a merge is its place in the file, not the id of what it makes."""

    def reverse_ids(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        free = sorted(set(vocabulary.values()) - set(range(64)))
        names = sorted((n for n, i in vocabulary.items() if i >= 64), key=lambda n: -vocabulary[n])
        vocabulary.update(zip(names, free, strict=True))

    other = changed(library, reverse_ids)
    bpe = encoders_of(other)[0]
    if bpe is None:
        pytest.skip("no C compiler")
    text = Path(__file__).read_text(encoding="utf-8")
    assert ids_of(bpe, text) == expected(other, text)
    assert ids_of(bpe, text) != expected(library, text)


def test_an_encoder_that_differs_from_the_library_is_not_used(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a later version of the library cut words otherwise."""
    model = bpe_module._model_of(json.loads(library.to_str()))
    assert model is not None
    model.merges = model.merges[::-1]
    monkeypatch.setattr(bpe_module, "_model_of", lambda _: model)
    if bpe_module._load() is None:
        pytest.skip("no C compiler")
    with pytest.warns(RuntimeWarning, match="differently"):
        bpe, words = encoders_of(library)
    assert bpe is None and words is not None


def test_another_unicode_than_the_librarys_leaves_such_texts_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages, classes = bpe_module._unicode_classes()
    monkeypatch.setattr(bpe_module, "_unicode_classes", lambda: (pages, np.zeros_like(classes)))
    tokenizer = Tokenizer.train(["naïve café"] * 9, 400)  # whole words become tokens
    library = tokenizer._library
    if tokenizer._bpe is None:
        pytest.skip("no C compiler")
    with pytest.warns(RuntimeWarning, match="differently"):
        assert tokenizer.encode("naïve café") == expected(library, "naïve café")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer.encode("naïve café") == expected(library, "naïve café"), "said once"
        assert tokenizer.encode("plain") == expected(library, "plain")


def test_an_empty_batch_and_empty_texts(bpe: Bpe) -> None:
    for offsets, ends in (([0], [0]), ([0, 0, 0], [0, 2, 4])):
        encoded = bpe.encode(b"", np.array(offsets, np.int64), bos=1, eos=2)
        assert encoded is not None
        assert encoded[1].tolist() == ends
        assert encoded[0].tolist() == [1, 2] * (len(offsets) - 1)
