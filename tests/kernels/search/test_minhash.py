import itertools
import os
import subprocess
import sys
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from marrow.kernels.search import minhash

TEXTS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("aaabc \n.-日本ก")), max_size=80)


def strings(texts: list[bytes]) -> pa.Array:
    """Make a string array of any bytes, as a file with wrong declarations could bring them."""
    return pa.Array.from_buffers(pa.string(), len(texts), [None, *pa.array(texts, pa.binary()).buffers()[1:]])


@pytest.mark.parametrize("width", [1, 2, 5, 13])
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(TEXTS, max_size=6))
@example(texts=["", " ", "a", "a b c d e f", "aaaaaaaa", "aaaaaaaaa b", "\x00", "ß" * 50])
def test_c_and_reference_give_the_same_bits(texts, width):
    array = pa.array(texts, pa.string())
    for function in (minhash.shingle_hashes, minhash.shingle_sets):
        reference = getattr(minhash, f"{function.__name__}_reference")
        ours, oracle = function(array, width), reference(array, width)
        assert ours[0].dtype == oracle[0].dtype
        np.testing.assert_array_equal(ours[0], oracle[0])
        np.testing.assert_array_equal(ours[1], oracle[1])
    values, starts = minhash.shingle_sets(array, width)
    np.testing.assert_array_equal(
        minhash.signatures(values, starts), minhash.signatures_reference(values, starts)
    )


@settings(max_examples=80, deadline=None)
@given(st.lists(st.binary(max_size=24), min_size=1, max_size=5))
@example([b"\xed\xa0\x80a"])  # a surrogate
@example([b"a\xc0\x80b", b"\xe0\x80\x80", b"\xf4\x90\x80\x80", b"\xf0\x8f\xbf\xbf"])  # overlong, too high
@example([b"ab\xe6", b"\x97\xa5"])  # a character cut between two texts
def test_bytes_that_are_no_utf8_separate_words_on_both_sides_alike(texts):
    array = strings(texts)
    for width in (1, 3):
        ours, oracle = minhash.shingle_hashes(array, width), minhash.shingle_hashes_reference(array, width)
        np.testing.assert_array_equal(ours[1], oracle[1])
        np.testing.assert_array_equal(ours[0], oracle[0])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sets(st.integers(0, 40), min_size=1), min_size=2, max_size=8), st.integers(50, 99))
@example([{1, 2, 3, 4}, {1, 2, 3, 4, 5}, {5}, {9}], 80)
def test_near_is_exact_to_the_edge(members, percent):
    sets = [np.array(sorted(one), np.uint32) * np.uint32(104_000_000) for one in members]
    values, starts = np.concatenate(sets), np.cumsum([0, *map(len, sets)])
    pairs = np.array(list(itertools.product(range(len(sets)), repeat=2)))
    expected = [
        len(members[a] & members[b]) / len(members[a] | members[b]) >= percent / 100 for a, b in pairs
    ]
    for function in (minhash.are_near, minhash.are_near_reference):
        assert function(values, starts, pairs[:, 0], pairs[:, 1], percent / 100).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 60), min_size=1), min_size=1, max_size=9),
    st.lists(st.sets(st.integers(0, 60), min_size=1), max_size=64),
    st.integers(0, 8),
)
def test_shared_counts_are_those_of_python_sets(members, queries, first):
    scale = np.uint32(70_000_001)
    sets, asked = ([np.array(sorted(one), np.uint32) * scale for one in some] for some in (members, queries))
    values, starts = np.concatenate(sets), np.cumsum([0, *map(len, sets)])
    first = min(first, len(sets) - 1)
    expected = np.zeros((len(sets) - first, minhash.MAX_QUERIES), int)
    for i, one in enumerate(members[first:]):
        expected[i, : len(queries)] = [len(one & query) for query in queries]
    for function in (minhash.shared_counts, minhash.shared_counts_reference):
        np.testing.assert_array_equal(function(values, starts[first:], asked), expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 300), st.data())
def test_words_are_found_across_the_blocks_of_the_fast_path(size, data):
    """Blocks of 64 ASCII bytes, with other characters at any place in between."""
    letters = data.draw(st.lists(st.sampled_from("ab_Z9 -.\n\0"), min_size=size, max_size=size))
    for place in data.draw(st.lists(st.integers(0, 320), max_size=3)):
        letters.insert(place, data.draw(st.sampled_from("é日—\u200b")))
    text = "".join(letters)
    words = ["".join(w) for w in split_by_table(text)]
    assert minhash.split_words(text.encode()) == words
    alone = [minhash.shingle_hashes(pa.array([word]), 1)[0][0] for word in words]
    if words:
        assert minhash.shingle_hashes(pa.array([text]), 1)[0].tolist() == alone


def split_by_table(text: str) -> list[str]:
    """The rule, one character at a time."""
    words, word = [], ""
    for character in text:
        kind = minhash.kinds()[ord(character)]
        if kind == minhash.LETTER:
            word += character
            continue
        words += [word] if word else []
        words += [character] if kind == minhash.ALONE else []
        word = ""
    return [*words, word] if word else words


@given(st.lists(TEXTS, min_size=1, max_size=8), st.data())
def test_a_text_has_the_same_set_wherever_it_stands(texts, data):
    """In slices, among others, as large strings; and nothing is read past its end."""
    whole = pa.array(texts, pa.string())
    first = data.draw(st.integers(0, len(texts) - 1))
    sliced = whole.slice(first)
    alone = [minhash.shingle_sets(pa.array([text], pa.large_string()), 5)[0] for text in texts[first:]]
    values, starts = minhash.shingle_sets(sliced, 5)
    assert [values[a:b].tolist() for a, b in itertools.pairwise(starts)] == [one.tolist() for one in alone]


def test_a_shingle_is_five_words_whatever_stands_between_them():
    one, other = "The quick brown fox jumps over the dog.", " The quick,brown\tfox -- jumps over(the) dog"
    values, starts = minhash.shingle_sets(pa.array([one, other, one.lower()]), 5)
    assert values[: starts[1]].tolist() == values[starts[1] : starts[2]].tolist()
    assert starts.tolist() == [0, 4, 8, 12]
    assert len(set(values[:4].tolist()) & set(values[8:].tolist())) == 3  # but for the one with "The"


def test_different_words_have_different_hashes():
    """Padding and order are not lost: no two of these 200,000 words collide in 64 bits."""
    words = (
        [f"w{i}" for i in range(199_000)]
        + ["a" * n for n in range(1, 500)]
        + ["\u00e9" * n for n in range(1, 502)]
    )
    hashes, starts = minhash.shingle_hashes(pa.array(words), 1)
    assert (np.diff(starts) == 1).all()
    assert len(np.unique(hashes)) == len(words)
    ab, ba = (minhash.shingle_hashes(pa.array([text]), 2)[0][0] for text in ("a b", "b a"))
    assert ab != ba


def test_short_texts_and_texts_without_words_have_a_shingle_of_their_own():
    texts = ["", " ", "!", "?", "a", "a b", "b a", "a b c d", "日"]
    values, starts = minhash.shingle_sets(pa.array([*texts, None]), 5)
    sets = [tuple(values[a:b].tolist()) for a, b in itertools.pairwise(starts)]
    assert all(len(one) == 2 for one in sets)  # both halves of the hash
    assert len(set(sets[:-1])) == len(texts)
    assert sets[-1] == sets[0]


def test_signatures_estimate_the_jaccard_similarity():
    generator = np.random.Generator(np.random.PCG64(0))
    for similarity in (0.2, 0.5, 0.8, 0.95):
        errors = []
        for _ in range(60):
            shared = generator.integers(0, 1 << 32, 900, np.uint32)
            own = round(900 * (1 / similarity - 1) / 2)
            sets = [
                np.unique(np.concatenate([shared, generator.integers(0, 1 << 32, own, np.uint32)]))
                for _ in "ab"
            ]
            one, other = minhash.signatures(np.concatenate(sets), np.cumsum([0, *map(len, sets)]))
            errors.append((one == other).mean() - similarity)
        deviation = (similarity * (1 - similarity) / minhash.NUM_HASHES) ** 0.5
        assert abs(np.mean(errors)) < 4 * deviation / 60**0.5  # no bias
        assert 0.7 * deviation < np.std(errors) < 1.4 * deviation  # 4 standard errors of a deviation over 60


def test_letters_are_letters_and_separators_separate():
    """Against this Python's own Unicode tables: what is missed is rare and listed nowhere."""
    kinds = minhash.kinds()
    letters = separators = wrong_letters = wrong_separators = 0
    for code in itertools.chain(range(0xD800), range(0xE000, 0x1FFFF)):
        kind = unicodedata.category(chr(code))
        if kind[0] in "LM" or kind == "Nd":
            letters += 1
            wrong_letters += kinds[code] == minhash.SEPARATOR
        elif kind[0] == "Z" or kind in ("Cc", "Po", "Pd", "Ps", "Pe", "Pi", "Pf", "Sm", "Sc"):
            separators += 1
            wrong_separators += kinds[code] != minhash.SEPARATOR
    assert wrong_letters / letters < 0.001
    assert wrong_separators / separators < 0.2  # dots and dandas of scripts that are seldom written
    ascii_words = [chr(i) for i in range(128) if kinds[i] == minhash.LETTER]
    assert "".join(ascii_words) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"


def test_without_a_compiler_the_answer_is_the_same():
    code = (
        "import pyarrow as pa, hashlib; from marrow.kernels import native;"
        "from marrow.kernels.search import minhash;"
        "v, s = minhash.shingle_sets(pa.array(['some words that are here', 'é 日本 x', '']), 3);"
        "print(native.load('minhash') is None, hashlib.sha256(v.tobytes() + s.tobytes()"
        " + minhash.signatures(v, s).tobytes()"
        " + minhash.shingle_hashes(pa.array(['a b c d']), 2)[0].tobytes()"
        " + minhash.are_near(v, s, s[:1], s[:1], 0.5).tobytes()).hexdigest())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "MARROW_KERNELS": mode},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for mode in ("auto", "reference")
    ]
    assert outputs[1][0] == "True"
    assert outputs[0][1] == outputs[1][1]


def test_a_line_of_ten_megabytes_is_a_text_like_any_other():
    text = " ".join(f"{i % 5003}" for i in range(2_000_000))
    values, starts = minhash.shingle_sets(pa.array([text, "end"]), 5)
    assert len(text) > 9_000_000 and starts.tolist() == [0, 5003, 5005]
    assert (np.diff(values[:5003].astype(np.int64)) > 0).all()
