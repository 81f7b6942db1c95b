"""xz and zlib as baselines: the sizes are those of the plain one-shot calls."""

import lzma
import random
import zlib

from marrow.train.compressors import xz_bytes_given, zlib_bytes

RANDOM = random.Random(0)
WORDS = ["".join(RANDOM.choices("abcdefghij", k=5)) for _ in range(200)]


def text(words: int) -> str:
    return " ".join(RANDOM.choices(WORDS, k=words))


def one_shot(data: bytes, dictionary: int) -> int:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": dictionary}]
    return len(lzma.compress(data, lzma.FORMAT_RAW, filters=filters))


def test_xz_given_a_text_is_the_exact_difference_of_two_streams():
    known, asked = [text(900), text(300)], [text(100), "ä" * 50]
    before = b"".join(t.encode() + b"\0" for t in known)
    after = b"".join(t.encode() + b"\0" for t in asked)
    size = len(before + after)
    expected = one_shot(before + after, 1 << 16) - one_shot(before, 1 << 16)
    assert xz_bytes_given(lambda: iter(known), lambda: iter(asked), size) == expected


def test_xz_remembers_the_whole_known_text_however_far_back():
    """A copy of the first document costs next to nothing behind 180 kB that have nothing to do with it."""
    first = RANDOM.randbytes(4000).hex()
    known = [first, *(RANDOM.randbytes(30_000).hex() for _ in range(3))]
    size = sum(map(len, known)) + len(first)
    given = xz_bytes_given(lambda: iter(known), lambda: iter([first]), size)
    assert given < 100
    assert xz_bytes_given(lambda: iter(known[1:]), lambda: iter([first]), size) > 3900


def test_zlib_compresses_each_document_by_itself():
    texts = [text(50), "", text(50)]
    assert zlib_bytes(texts) == sum(len(zlib.compress(t.encode() + b"\0", 9)) for t in texts)
