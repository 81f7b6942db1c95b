import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from marrow.core.errors import DataError, ModelError, SourceError
from marrow.text import bpe as bpe_module
from marrow.text import tokenizer as tokenizer_module
from marrow.text.special import BOS, EOS, NUM_SPECIAL, PAD, SPECIAL_TOKENS, TURN_END, TURN_START
from marrow.text.tokenizer import Detokenizer, Tokenizer

# The alphabet leans to what code is made of, and to what decides where words are cut.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
CODE_TEXT = st.text(
    st.sampled_from("ab_Z09 \t\n\r\v\f'sStTrReEdD(.):=\"#\x1c\x85\xa0é中😀\u2028ſ"), max_size=80
)
ASCII_TEXT = st.text(st.characters(max_codepoint=127), max_size=80)
TEXTS = ANY_TEXT | CODE_TEXT | ASCII_TEXT


@pytest.fixture(scope="module")
def library(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The library's own reading of the file we write: the oracle of ids."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(path)
    oracle = Library.from_file(str(path))
    oracle.encode_special_tokens = True
    return oracle


@pytest.fixture(scope="module")
def plain(library: Library) -> Tokenizer:
    """The same tokenizer as on a machine without a compiler."""
    made = Tokenizer(Library.from_str(library.to_str()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_module, "_load", lambda: None)
        assert made._bpe is None and made._encoders[1] is not None
    return made


# Encoding


@settings(deadline=None, max_examples=400)
@given(text=TEXTS)
def test_ids_are_those_of_the_library(tokenizer: Tokenizer, library: Library, text: str) -> None:
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids


def test_ids_are_those_of_the_library_on_real_code(
    tokenizer: Tokenizer, library: Library, corpus: list[str]
) -> None:
    for text, ids in zip(corpus, tokenizer.encode_batch(corpus), strict=True):
        assert ids.tolist() == library.encode(text, add_special_tokens=False).ids
        assert ids.dtype == np.int32


@pytest.mark.slow
def test_every_pair_of_ascii_characters_is_cut_as_the_library_cuts_it(
    tokenizer: Tokenizer, library: Library
) -> None:
    pairs = ["".join(pair) for pair in product(map(chr, range(128)), repeat=2)]
    pairs += [f"a{pair} \n" for pair in pairs]
    expected = library.encode_batch_fast(pairs, add_special_tokens=False)
    for pair, encoding in zip(pairs, expected, strict=True):
        assert tokenizer.encode(pair) == encoding.ids, repr(pair)


@settings(deadline=None)
@given(texts=st.lists(TEXTS, max_size=6))
def test_all_roads_of_a_batch_give_the_same_ids(
    tokenizer: Tokenizer, plain: Tokenizer, texts: list[str]
) -> None:
    expected = [plain.encode(text) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == expected
    for batch in (
        tokenizer.encode_batch(texts),
        plain.encode_batch(texts),
        plain._encode_parallel(texts),
    ):
        assert [ids.tolist() for ids in batch] == expected
        assert all(ids.dtype == np.int32 for ids in batch)


@settings(deadline=None)
@given(texts=st.lists(TEXTS, max_size=6), document=st.booleans())
def test_flat_ids_are_those_of_the_texts_one_after_the_other(
    tokenizer: Tokenizer, plain: Tokenizer, texts: list[str], document: bool
) -> None:
    bos, eos = ([tokenizer.bos_id], [tokenizer.eos_id]) if document else ([], [])
    expected = [[*bos, *plain.encode(text), *eos] for text in texts]
    encoded = [text.encode() for text in texts]
    places = np.cumsum([3, *map(len, encoded)])  # the buffer may hold something before the texts
    for made in (tokenizer, plain):
        for ids, offsets in (
            made.encode_flat(texts, document=document),
            made.encode_utf8(b"xxx" + b"".join(encoded) + b"yy", places, document=document),
            *made.encode_stream([texts], document=document),
        ):
            assert (ids.dtype, offsets.dtype) == (np.uint32, np.int64)
            assert offsets.tolist() == [0, *np.cumsum([len(one) for one in expected]).tolist()]
            assert ids.tolist() == [token for one in expected for token in one]


def test_a_stream_takes_one_batch_at_a_time(tokenizer: Tokenizer) -> None:
    taken = []

    def batches() -> Iterator[list[str]]:
        for number in range(3):
            taken.append(number)
            yield [f"batch {number}"]

    stream = tokenizer.encode_stream(batches())
    assert taken == []
    assert tokenizer.decode(next(stream)[0].tolist()) == "batch 0"
    assert taken == [0]


def test_without_a_compiler_many_cores_take_the_library_few_the_word_cache(
    plain: Tokenizer, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = plain._encoders[1]
    assert words is not None
    monkeypatch.setattr(tokenizer_module.os, "cpu_count", lambda: 2)
    few = plain.encode_batch(corpus)
    assert words, "the word cache was used"
    monkeypatch.setattr(tokenizer_module.os, "cpu_count", lambda: 64)
    words.clear()
    many = plain.encode_batch(corpus)
    assert not words, "the word cache was used, so the library's threads were not"
    assert all(np.array_equal(a, b) for a, b in zip(few, many, strict=True))


@settings(deadline=None)
@given(text=TEXTS)
def test_text_survives_encoding_and_decoding(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_stands_first_where_asked(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("x", bos=True) == [tokenizer.bos_id, *tokenizer.encode("x")]
    assert tokenizer.encode("") == []


def test_a_long_text_takes_time_in_proportion(tokenizer: Tokenizer, corpus: list[str]) -> None:
    text = "é = 1\n" + "\n".join(corpus) * 2
    times = []
    for repeat in (1, 4):
        start_s = time.process_time()
        tokenizer.encode(text * repeat)
        times.append(time.process_time() - start_s)
    assert times[1] < 12 * times[0], "4 times the text may cost 4 times as much; 12 leaves room for noise"


def test_the_word_cache_is_bounded_and_correct_when_it_overflows(
    plain: Tokenizer, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bpe_module, "_CACHED_WORDS", 8)
    words = plain._encoders[1]
    assert words is not None
    words.clear()
    text = " ".join(f"word{i} name_{i % 3}" for i in range(100)) + "x" * 1000
    assert plain.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert 0 < len(words) <= 8
    assert max(map(len, words)) <= bpe_module._CACHED_CHARACTERS


@pytest.mark.slow
@pytest.mark.parametrize("road", ["tokenizer", "plain"])
def test_threads_share_a_tokenizer(road: str, corpus: list[str], request: pytest.FixtureRequest) -> None:
    shared: Tokenizer = request.getfixturevalue(road)
    expected = [shared.encode(text, allow_special=True) for text in corpus]
    fresh = Tokenizer(Library.from_str(shared._library.to_str()))
    fresh.__dict__["_encoders"] = (
        bpe_module.encoders_of(fresh._library) if road == "tokenizer" else (None, None)
    )
    wrong: list[int] = []

    def work(index: int) -> None:
        for i, text in enumerate(corpus):
            if fresh.encode(text, allow_special=bool(index % 2)) != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# Special tokens


def test_the_64_slots_have_the_first_ids(tokenizer: Tokenizer, library: Library) -> None:
    assert len(SPECIAL_TOKENS) == len(set(SPECIAL_TOKENS)) == NUM_SPECIAL == 64
    assert [library.token_to_id(text) for text in SPECIAL_TOKENS] == list(range(64))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert SPECIAL_TOKENS[:5] == (BOS, EOS, PAD, TURN_START, TURN_END)


@settings(deadline=None)
@given(before=TEXTS, mark=st.sampled_from(SPECIAL_TOKENS), after=TEXTS)
def test_a_special_string_in_text_is_plain_text(
    tokenizer: Tokenizer, before: str, mark: str, after: str
) -> None:
    text = before + mark + after
    ids = tokenizer.encode(text)
    assert min(ids) >= NUM_SPECIAL
    assert tokenizer.decode(ids) == text
    assert min(tokenizer.encode_batch([text, text])[1]) >= NUM_SPECIAL


def test_a_special_string_is_a_special_token_where_allowed(tokenizer: Tokenizer) -> None:
    text = f"{TURN_START}user\nhi{TURN_END}"
    ids = tokenizer.encode(text, allow_special=True)
    assert ids == [3, *tokenizer.encode("user\nhi"), 4]
    assert tokenizer.decode(ids) == "user\nhi"
    assert tokenizer.decode(ids, skip_special=False) == text
    assert min(tokenizer.encode(text)) >= NUM_SPECIAL, "the switch must not stick"


# Training


def test_training_twice_gives_the_same_bytes(corpus: list[str], tmp_path: Path) -> None:
    for name in ("a", "b"):
        Tokenizer.train(iter(corpus), 512).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_training_in_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    program = (
        "import sys, inspect, textwrap; from pathlib import Path\n"
        "from marrow.text.tokenizer import Tokenizer\n"
        "Tokenizer.train([inspect.getsource(textwrap)], 512).save(Path(sys.argv[1]))\n"
    )
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-W", "error", "-c", program, tmp_path / name], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_vocabulary_has_the_size_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 1024


def test_a_small_text_gives_a_smaller_vocabulary_that_still_works() -> None:
    small = Tokenizer.train(["hello hello"], 4096)
    assert 320 < small.vocab_size < 330
    assert small.decode(small.encode("goodbye, 世界")) == "goodbye, 世界"


def test_an_indentation_is_one_token_and_words_are_shared_between_depths(tokenizer: Tokenizer) -> None:
    shallow, deep = (tokenizer.encode(f"\n{blanks}return self\n") for blanks in (" " * 4, " " * 8))
    assert len(shallow) == len(deep) == 5  # line end, blanks, " return", " self", line end
    assert shallow[2:] == deep[2:]


def test_no_text_and_a_tiny_vocabulary_are_refused() -> None:
    with pytest.raises(DataError, match="no text") as error:
        Tokenizer.train([], 512)
    assert error.value.hint
    with pytest.raises(DataError, match="at least 320"):
        Tokenizer.train(["hello"], 319)


# Decoding


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_decoding_replaces_invalid_bytes_as_the_library_does(
    tokenizer: Tokenizer, library: Library, data: st.DataObject
) -> None:
    ids = data.draw(_any_ids(tokenizer))
    assert tokenizer.decode(ids, skip_special=False) == library.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), skip=st.booleans())
def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(_any_ids(tokenizer))
    stream = Detokenizer(tokenizer, skip_special=skip)
    assert "".join(map(stream.push, ids)) + stream.finish() == tokenizer.decode(ids, skip_special=skip)


@settings(deadline=None)
@given(text=st.text(st.sampled_from("aé中😀👍🏽\u200d"), min_size=1, max_size=12))
def test_a_stream_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids_of_bytes = {tokenizer.token_bytes()[i]: i for i in range(NUM_SPECIAL, NUM_SPECIAL + 256)}
    stream = Detokenizer(tokenizer)
    shown = ""
    for byte in text.encode():
        shown += stream.push(ids_of_bytes[bytes([byte])])
        assert text.startswith(shown)
        assert "\ufffd" not in shown
    assert shown == text, "a whole character is shown at once, not with the next token"
    assert stream.finish() == ""


def test_streaming_costs_the_same_whatever_came_before(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(tokenizer)
    ids = tokenizer.encode("    return naïve(self)\n") * 2000
    start_s = time.process_time()
    for token_id in ids:
        stream.push(token_id)
    # A detokenizer that decodes from the start each time needs minutes for these 20k tokens.
    assert time.process_time() - start_s < 1


@pytest.mark.parametrize("token_id", [-1, -1024, 1024, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(DataError, match=f"no token {token_id}") as error:
        tokenizer.decode([70, token_id])
    assert error.value.hint
    with pytest.raises(DataError, match=f"no token {token_id}"):
        Detokenizer(tokenizer).push(token_id)


# Bad text


@pytest.mark.parametrize("text", ["\ud800", "ab\udfffc", "é\ud83d", "x\n" * 99 + "\ude00"])
def test_half_a_surrogate_pair_is_a_clear_error(tokenizer: Tokenizer, plain: Tokenizer, text: str) -> None:
    for act in (
        lambda: tokenizer.encode(text),
        lambda: tokenizer.encode(text, allow_special=True),
        lambda: tokenizer.encode_batch(["fine", text]),
        lambda: tokenizer.encode_flat(["fine", text]),
        lambda: plain.encode(text),
        lambda: plain.encode_batch(["fine", text]),
        lambda: plain._encode_parallel(["fine", text]),
        lambda: Tokenizer.train(["fine", text], 512),
    ):
        with pytest.raises(DataError, match=r"half of a surrogate pair") as error:
            act()
        bad = next(i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff")
        assert f"U+{ord(text[bad]):04X} at character {bad}:" in error.value.message
        assert "UTF-8" in str(error.value.hint)


@pytest.mark.parametrize(
    "bad", [b"\xff", b"\xc3", b"\xe4\xbd", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\x80"]
)
@pytest.mark.parametrize("before", ["", "fine ", "é"])
def test_bytes_that_are_no_utf8_are_a_clear_error_with_their_place(
    tokenizer: Tokenizer, plain: Tokenizer, bad: bytes, before: str
) -> None:
    texts = [b"good", before.encode() + bad + b" x", b"good"]
    offsets = np.cumsum([0, *map(len, texts)])
    for made in (tokenizer, plain):
        with pytest.raises(DataError, match="no UTF-8") as error:
            made.encode_utf8(b"".join(texts), offsets)
        assert error.value.message == f"text 1 of 3 is no UTF-8 at byte {len(before.encode())}"
        assert "encoding" in str(error.value.hint)


# Files


def test_a_saved_tokenizer_is_the_same(tokenizer: Tokenizer, corpus: list[str], tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.load(place)
        assert loaded.vocab_size == tokenizer.vocab_size
        assert [loaded.encode(text) for text in corpus] == [tokenizer.encode(text) for text in corpus]
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@settings(deadline=None, max_examples=50)
@given(text=TEXTS)
def test_transformers_reads_the_file_and_gives_the_same_ids(
    oracle: object, tokenizer: Tokenizer, text: str
) -> None:
    ids = oracle(text, split_special_tokens=True).input_ids  # type: ignore[operator]
    assert ids == tokenizer.encode(text)
    assert oracle.decode(ids, clean_up_tokenization_spaces=False) == text  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def oracle(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> object:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("export")
    tokenizer.save(folder / "tokenizer.json")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


def test_transformers_knows_the_special_tokens(oracle: object, tokenizer: Tokenizer) -> None:
    assert (oracle.bos_token_id, oracle.eos_token_id, oracle.pad_token_id) == (0, 1, 2)  # type: ignore[attr-defined]
    assert len(oracle) == tokenizer.vocab_size  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["", "{}", "[1, 2", '{"model": {"type": "BPE"}}', "\0\0"])
def test_a_damaged_file_is_a_clear_error(tmp_path: Path, damage: str) -> None:
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(ModelError, match=r"tokenizer\.json") as error:
        Tokenizer.load(tmp_path)
    assert error.value.hint


@pytest.mark.slow
def test_a_tokenizer_with_another_pattern_keeps_it(
    tokenizer: Tokenizer, corpus: list[str], tmp_path: Path
) -> None:
    """Models made before the pattern changed must go on to work."""
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\s+|\S"}
    path.write_text(json.dumps(content))
    oracle, loaded = Library.from_file(str(path)), Tokenizer.load(path)
    for text in (*corpus, "a b", "é \n x"):
        ids = oracle.encode(text, add_special_tokens=False).ids
        assert loaded.encode(text) == ids
        assert loaded.encode_batch([text])[0].tolist() == ids
        assert loaded.decode(ids) == text
    assert loaded.encode(corpus[0]) != tokenizer.encode(corpus[0])


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="tokenizer"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("road", ["tokenizer", "plain"])
def test_encoding_costs_no_more_than_the_library_alone(
    road: str, request: pytest.FixtureRequest, library: Library, corpus: list[str]
) -> None:
    """C takes a tenth of the library's CPU time, the word cache a third; anything under it passes."""
    texts = [text for text in corpus if text.isascii()]
    ours: Tokenizer = request.getfixturevalue(road)

    def cpu_s(encode: object) -> float:
        start_s = time.process_time()
        encode(texts)  # type: ignore[operator]
        return time.process_time() - start_s

    pairs = [
        (
            cpu_s(ours.encode_batch),
            cpu_s(lambda batch: [e.ids for e in library.encode_batch_fast(batch, add_special_tokens=False)]),
        )
        for _ in range(5)
    ]
    assert min(ours for ours, _ in pairs) < min(theirs for _, theirs in pairs)


def _any_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids of every kind; the single bytes often, since they make what is no UTF-8."""
    single_bytes = st.integers(NUM_SPECIAL, NUM_SPECIAL + 255)
    return st.lists(single_bytes | st.integers(0, tokenizer.vocab_size - 1), max_size=40)
