"""Texts to sets of word shingles, MinHash signatures and exact comparisons: Arrow memory in, arrays out.

    word       a run of letters; a letter of a script that writes no spaces is a word of its own
    shingle    `width` words in a row, hashed to 64 bits; a text of fewer words is one shingle, and one
               without words is a shingle of its bytes, so that every text has at least one
    set        a text's distinct shingles, the upper 32 bits of each, rising; a lone one gives its lower
               bits too, for a set of one would be taken for another one in 2^32
    signature  for each of 128 hash functions the least value over the set; two sets agree in a
               share of them that estimates their Jaccard similarity

What separates words is a table of code points, made here from a short list of blocks and given to
the C code, so that both sides split alike, whatever Python's Unicode version. Bytes that are no
UTF-8 separate. No text costs a line of Python: `csrc/minhash.c` walks the bytes; the references
below give the same bits and serve where there is no compiler.
Source: Broder 1997; the hash functions are multiply-add modulo 2^32 over well-mixed values.
"""

import ctypes
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from marrow.kernels import native

NUM_HASHES = 128
MAX_QUERIES = 64
SEPARATOR, LETTER, ALONE = 0, 1, 2

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Whatever is in none of these ranges, such as a combining mark, is a letter.
_SEPARATORS = (
    "00-2F 3A-40 5B-5E 60 7B-A9 AB-B1 B4 B6-B8 BB BF D7 F7 2C2-2C5 2D2-2DF 2E5-2EB 37E 387 55A-55F "
    "589-58F 5BE 5C0 5C3 5C6 5F3-5F4 600-60F 61B-61F 66A-66D 6D4 6DD-6DE 6E9 700-70F 7F7-7F9 830-83E "
    "964-965 970 DF4 E3F E4F E5A-E5B F01-F17 F34 F36 F38 F3A-F3D F85 104A-104F 10FB 1360-1368 "
    "1390-1399 166D-166E 1680 169B-169C 16EB-16ED 17D4-17D6 17D8-17DB 1800-180A 180E 2000-206F "
    "207A-207E 208A-208E 20A0-20CF 2100-2101 2103-2106 2116-2118 211E-2123 2140-2144 2190-245F "
    "249C-24E9 2500-2775 2794-2BFF 2E00-2E7F 2FF0-2FFF 3000-3004 3008-3020 3030 3036-3037 303D-303F "
    "A4FE-A4FF A60D-A60F A874-A877 A8CE-A8CF AAF0-AAF1 FD3E-FD4F FDFC-FDFF FE10-FE19 FE30-FE6F "
    "FEFF-FF0F FF1A-FF20 FF3B-FF40 FF5B-FF65 FFE0-FFFF 10100-10102 1D000-1D164 1F000-1FAFF E0000-E00FF"
)
_ALONE = "E01-E3E E40-E4E E50-E59 E81-EDF 1000-1049 1780-17D3 3040-30FF 31F0-31FF 3400-4DBF 4E00-9FFF "
_ALONE += "AC00-D7AF F900-FAFF 20000-323AF"


def signature_functions(num_hashes: int = NUM_HASHES) -> tuple[U32, U32]:
    """Return what the hash functions multiply by (odd) and add, uint32 [K] each; always the same."""
    numbers = np.random.Generator(np.random.PCG64(0x4D6172726F77)).integers(
        0, 1 << 32, (2, num_hashes), np.uint32
    )
    return numbers[0] | np.uint32(1), numbers[1]


def shingle_sets(texts: pa.Array, width: int) -> tuple[U32, I64]:
    """Return the shingle sets of texts, one after the other, and where each begins.

    Args: texts: string or large_string [N]; a null counts as an empty text. width: words, 1 or more.
    Returns: uint32 [S], rising and distinct within a set; int64 [N + 1], the starts in it.
    Cost: one pass over the bytes, 2 to 6 ns each by script, and a radix sort per text; room for 2 bytes a
        byte of text, of which the pages that are written to count: about 4 bytes a word.
    """
    library = _library()
    if library is None:
        return shingle_sets_reference(texts, width)
    data, offsets = text_memory(texts)
    longest = int(np.diff(offsets).max(initial=0))
    out, starts = (
        np.empty(_room(int(offsets[-1] - offsets[0]), len(texts)), np.uint32),
        np.empty(len(offsets), np.int64),
    )
    hashes, other = (np.empty(_room(longest, 1), kind) for kind in (np.uint64, np.uint32))
    library.shingle_sets(data, offsets, len(texts), kinds(), width, hashes, other, out, starts)
    return out[: starts[-1]], starts


def shingle_sets_reference(texts: pa.Array, width: int) -> tuple[U32, I64]:
    """Do as `shingle_sets`, in numpy."""
    hashes, starts = shingle_hashes_reference(texts, width)
    sets = []
    for a, b in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        members = np.unique((hashes[a:b] >> np.uint64(32)).astype(np.uint32))
        sets.append(members if len(members) > 1 else np.unique(hashes[a : a + 1].view(np.uint32)))
    return _joined(sets, np.dtype(np.uint32))


def shingle_hashes(texts: pa.Array, width: int) -> tuple[U64, I64]:
    """Return the 64-bit shingle hashes of texts in the order of their words, and where each text begins.

    Args: as `shingle_sets`. Returns: uint64 [S], int64 [N + 1].
    """
    library = _library()
    if library is None:
        return shingle_hashes_reference(texts, width)
    data, offsets = text_memory(texts)
    out, starts = (
        np.empty(_room(int(offsets[-1] - offsets[0]), len(texts)), np.uint64),
        np.empty(len(offsets), np.int64),
    )
    library.shingle_hashes(data, offsets, len(texts), kinds(), width, out, starts)
    return out[: starts[-1]], starts


def shingle_hashes_reference(texts: pa.Array, width: int) -> tuple[U64, I64]:
    """Do as `shingle_hashes`, in Python and numpy. Cost: about 1 microsecond a word."""
    data, offsets = text_memory(texts)
    known: dict[str, int] = {}
    hashes = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        raw = data[start:end].tobytes()
        words = split_words(raw)
        for word in set(words).difference(known):
            known[word] = _hash_bytes(word.encode())
        if not words:
            hashes.append(_finish(np.array([_hash_bytes(raw)], np.uint64)))
            continue
        word_hashes = np.fromiter(map(known.__getitem__, words), np.uint64, len(words))
        used = min(width, len(words))
        count = len(words) - used + 1
        mixed = np.zeros(count, np.uint64)
        for offset in range(used):
            mixed = mixed * np.uint64(_NEXT) + word_hashes[offset : offset + count]
        hashes.append(_finish(mixed))
    return _joined(hashes, np.dtype(np.uint64))


def signatures(values: U32, starts: I64) -> U32:
    """Return the MinHash signatures of sets.

    Args: values: uint32 [S], starts: int64 [N + 1], as `shingle_sets` returns them; no empty set.
    Returns: uint32 [N, 128]. Cost: 128 multiply-adds a member, 6 to 8 ns with 512-bit vectors.
    """
    library = _library()
    if library is None:
        return signatures_reference(values, starts)
    out = np.empty((len(starts) - 1, NUM_HASHES), np.uint32)
    multiply_K, add_K = signature_functions()
    library.signatures(values, starts, len(starts) - 1, multiply_K, add_K, NUM_HASHES, out)
    return out


def signatures_reference(values: U32, starts: I64) -> U32:
    """Do as `signatures`, in numpy."""
    multiply_K, add_K = signature_functions()
    out = np.empty((len(starts) - 1, NUM_HASHES), np.uint32)
    for i in range(len(starts) - 1):
        least = np.full(NUM_HASHES, 0xFFFFFFFF, np.uint32)
        for start in range(int(starts[i]), int(starts[i + 1]), _CHUNK):
            part = values[start : min(start + _CHUNK, int(starts[i + 1]))]
            values_KN = part[None] * multiply_K[:, None] + add_K[:, None]
            np.minimum(least, values_KN.min(axis=1), out=least)
        out[i] = least
    return out


def are_near(values: U32, starts: I64, one: I64, other: I64, similarity: float) -> Bools:
    """Tell which pairs of sets have at least this Jaccard similarity, exactly; bool [M].

    Args: values, starts: sets as above, in memory or mapped from a file. one, other: int64 [M].
    Cost: a step per member of the two sets at most; far fewer for sets that are far apart.
    """
    library = _library()
    if library is None:
        return are_near_reference(values, starts, one, other, similarity)
    out = np.empty(len(one), np.bool_)
    one, other = np.ascontiguousarray(one), np.ascontiguousarray(other)
    library.are_near(values, starts, one, other, len(one), similarity, out)
    return out


def are_near_reference(values: U32, starts: I64, one: I64, other: I64, similarity: float) -> Bools:
    """Do as `are_near`, in numpy."""
    near = np.empty(len(one), np.bool_)
    for i, (a, b) in enumerate(zip(one.tolist(), other.tolist(), strict=True)):
        set_a, set_b = values[starts[a] : starts[a + 1]], values[starts[b] : starts[b + 1]]
        shared = len(np.intersect1d(set_a, set_b, assume_unique=True))
        near[i] = shared / (len(set_a) + len(set_b) - shared) >= similarity
    return near


def shared_counts(values: U32, starts: I64, queries: Sequence[U32]) -> U16:
    """Return how many members sets share with each of up to 64 query sets, uint16 [N, 64].

    Args: values, starts: sets as above; starts may begin and end anywhere in them. queries: sets of
        fewer than 65,536 members. Cost: a look at a table for each member, a search for those in it.
    """
    members, owners = _owners(queries)
    library = _library()
    if library is None or not len(members):
        return shared_counts_reference(values, starts, queries)
    is_known = np.zeros(1 << 20, np.uint8)
    is_known[members >> np.uint32(12)] = 1
    out = np.empty((len(starts) - 1, MAX_QUERIES), np.uint16)
    starts = np.ascontiguousarray(starts)
    library.shared_counts(values, starts, len(starts) - 1, members, owners, len(members), is_known, out)
    return out


def shared_counts_reference(values: U32, starts: I64, queries: Sequence[U32]) -> U16:
    """Do as `shared_counts`, in numpy."""
    out = np.zeros((len(starts) - 1, MAX_QUERIES), np.uint16)
    members, owners = _owners(queries)
    at = np.flatnonzero(np.isin(values[starts[0] : starts[-1]], members)) + starts[0]
    owners_of, places = owners[np.searchsorted(members, values[at])], np.searchsorted(at, starts)
    for column in range(len(queries)):
        has = owners_of >> np.uint64(column) & np.uint64(1)
        out[:, column] = np.diff(np.concatenate([[0], np.cumsum(has)])[places])
    return out


def _owners(queries: Sequence[U32]) -> tuple[U32, U64]:
    """Return the members of all queries, rising, and a bit for each query that has one."""
    assert len(queries) <= MAX_QUERIES
    members = np.unique(np.concatenate([np.empty(0, np.uint32), *queries]))
    owners = np.zeros(len(members), np.uint64)
    for bit, query in enumerate(queries):
        owners[np.searchsorted(members, query)] |= np.uint64(1 << bit)
    return members, owners


def split_words(text: bytes) -> list[str]:
    """Return the words of a text in UTF-8."""
    return _words().findall(text.decode("utf-8", "replace"))


def word_spans(text: str) -> list[tuple[int, int]]:
    """Return where the words of a text begin and end, in characters."""
    return [match.span() for match in _words().finditer(text)]


@cache
def kinds() -> U8:
    """Return what each code point is: SEPARATOR, LETTER or ALONE; uint8 [0x110000]."""
    table = np.full(0x110000, LETTER, np.uint8)
    for blocks, kind in ((_ALONE, ALONE), (_SEPARATORS, SEPARATOR)):
        for first, last in _blocks(blocks):
            table[first : last + 1] = kind
    return table


def text_memory(texts: pa.Array) -> tuple[U8, I64]:
    """Return the bytes of a string array, without a copy, and the offsets of its texts in them."""
    if texts.null_count:
        texts = texts.fill_null("")
    if len(texts) == 0:
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    _, offset_buffer, data_buffer = texts.buffers()
    kind = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    offsets = np.frombuffer(offset_buffer, kind, len(texts) + 1, texts.offset * np.dtype(kind).itemsize)
    data = np.empty(0, np.uint8) if data_buffer is None else np.frombuffer(data_buffer, np.uint8)
    return data, offsets.astype(np.int64)


_LENGTH, _WORD, _NEXT = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_CHUNK = 1024


def _hash_bytes(data: bytes) -> int:
    mixed = (len(data) + 1) * _LENGTH & _MASK
    for start in range(0, len(data), 8):
        mixed ^= int.from_bytes(data[start : start + 8], "little")
        mixed = (mixed ^ mixed >> 32) * _WORD & _MASK
        mixed ^= mixed >> 29
    return mixed


def _finish(mixed: U64) -> U64:
    mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(_WORD)
    return mixed ^ mixed >> np.uint64(29)


@cache
def _words() -> re.Pattern[str]:
    separators = "".join(f"{_escape(a)}-{_escape(b)}" for a, b in _blocks(_SEPARATORS))
    alone = "".join(f"{_escape(a)}-{_escape(b)}" for a, b in _blocks(_ALONE))
    return re.compile(f"[^{separators}{alone}]+|(?![{separators}])[{alone}]")


def _escape(code: int) -> str:
    return f"\\U{code:08x}"


def _blocks(text: str) -> list[tuple[int, int]]:
    ends = (block.split("-") for block in text.split())
    return [(int(pair[0], 16), int(pair[-1], 16)) for pair in ends]


def _room(num_bytes: int, num_texts: int) -> int:
    """Bound the members of sets: words are two bytes apart at least, a text without any has two halves."""
    return num_bytes // 2 + 2 * num_texts


def _joined(parts: list[NDArray[Any]], kind: np.dtype[Any]) -> tuple[NDArray[Any], I64]:
    starts = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=starts[1:])
    return (np.concatenate(parts) if parts else np.empty(0, kind)), starts


@cache
def _pointer(kind: type) -> Any:
    return np.ctypeslib.ndpointer(kind, flags="C")


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load("minhash")
    if library is not None:
        u8, u32, u64, i64 = (_pointer(kind) for kind in (np.uint8, np.uint32, np.uint64, np.int64))
        number = ctypes.c_int64
        texts = [u8, i64, number, u8, number]
        library.shingle_sets.argtypes = [*texts, u64, u32, u32, i64]
        library.shingle_hashes.argtypes = [*texts, u64, i64]
        library.signatures.argtypes = [u32, i64, number, u32, u32, number, u32]
        library.are_near.argtypes = [u32, i64, i64, i64, number, ctypes.c_double, _pointer(np.bool_)]
        library.shared_counts.argtypes = [u32, i64, number, u32, u64, number, u8, _pointer(np.uint16)]
        for name in ("shingle_hashes", "signatures", "are_near", "shared_counts", "shingle_sets"):
            getattr(library, name).restype = None
    return library
