"""Byte-level byte-pair encoding in C: many texts in, one flat array of ids out.

    bpe, words = encoders_of(library)                # None where they cannot give the library's ids
    ids_N, offsets_D = bpe.encode(utf8, offsets_B)

One idea: a text is walked once, word by word, and nearly every word has been merged before. `encoders_of`
takes on what it can prove: the pattern of GPT-4 and Llama 3 (`text/pattern.py`), merges without
options, and equal ids on a probe text; everything else stays with the library. The classes of
characters beyond ASCII are asked of the library too, so that both know the same Unicode.
`WordCache` is the twin in Python: the oracle, and what serves where nothing can be compiled.
"""

import ctypes
import json
import warnings
import weakref
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, normalizers
from tokenizers import Tokenizer as Library

from marrow.core import native
from marrow.text.pattern import ASCII_WORDS, PATTERN

FlatIds = NDArray[np.uint32]
Offsets = NDArray[np.int64]
_Classes = tuple[NDArray[np.uint16], NDArray[np.uint8]]

_SOURCE = Path(__file__).parent / "csrc" / "bpe.c"
_SLOTS = 1 << 15  # of 64 bytes, for each thread
_CACHED_WORDS = 1 << 17
_CACHED_CHARACTERS = 64  # longer words are rare, and would let the cache grow without bound
# Planes 0 to 3 and the tags hold every letter, number and blank of Unicode.
_ASSIGNED = ((0, 0x34000), (0xE0000, 0xE1000))
_OTHER, _LETTER, _NUMBER, _BLANK = range(4)  # as in bpe.c
MAX_DIGITS = 3  # of a word of the pattern
_PROBE = (
    "def read(self, n=-1):\n    return self._f.read(n)  # it's WE'LL 12345 don't!?\r\n\r\n\t\t x\n \x00\x1c"
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa     "
)
_FOREIGN_PROBE = (
    "naïve café Привет, 你好世界 ١٢٣٤ Ⅷ½ 😀👍🏽\u200d x\u00a0y \u2028z 'ſ 'S a\u0301b \x85 𐐀𑄶𞥐 \ua000"
)


class InvalidUtf8(ValueError):
    """Bytes that are no UTF-8. `position`: of the first one."""

    def __init__(self, position: int) -> None:
        super().__init__(f"byte {position} is no UTF-8")
        self.position = position


def encoders_of(library: Library) -> "tuple[Bpe | None, WordCache | None]":
    """Return the encoders that give the library's ids, in C and in Python; None where there is none."""
    model = _model_of(json.loads(library.to_str()))
    if model is None:
        return None, None
    words = WordCache(library) if model.max_digits == MAX_DIGITS else None
    code = _load()
    if code is None:
        return None, words
    bpe = Bpe(code, model, library)
    return (bpe if bpe.agrees(_PROBE) else None), words


class Bpe:
    """The C encoder of one tokenizer. Safe from any thread; calls leave Python's lock."""

    def __init__(self, code: ctypes.CDLL, model: "_Model", library: Library) -> None:
        self._code = code
        self._library = library
        left, right, made = np.ascontiguousarray(model.merges.T)
        self._tables = code.bpe_tables_new(
            _at(left), _at(right), _at(made), len(left), _at(model.id_of_byte), model.max_digits
        )
        if not self._tables:
            raise MemoryError("no memory for a tokenizer's merges")
        weakref.finalize(self, code.bpe_tables_free, self._tables)
        self._classes: _Classes | None = None  # until a text needs them
        self._is_other_unicode = False  # than the library's: then such texts are left to it
        self._idle: list[int] = []  # caches that no call uses; append and pop are atomic

    def encode(
        self, utf8: Any, offsets: Offsets, *, bos: int | None = None, eos: int | None = None
    ) -> tuple[FlatIds, Offsets] | None:
        """Encode D texts that lie one behind the other.

        Args: utf8: a buffer. offsets: int64 [D + 1], where texts begin and end in it, ascending. bos,
            eos: ids to put around each text.
        Returns: ids of all texts, uint32 [N]; where each text's begin and end in them, int64 [D + 1].
            None for texts beyond ASCII, should the library know another Unicode than it tells.
        Raises: InvalidUtf8; MemoryError.
        Cost: one pass; 4 bytes for each byte of text are reserved, those of ids are used.
        """
        data = np.frombuffer(utf8, np.uint8) if len(utf8) else np.empty(0, np.uint8)
        offsets = np.ascontiguousarray(offsets, np.int64)
        assert offsets[0] >= 0 and offsets[-1] <= len(data), "offsets lie outside the text"
        count = len(offsets) - 1
        ids = np.empty(int(offsets[-1] - offsets[0]) + 2 * count + 8, np.uint32)
        ends = np.zeros(count + 1, np.int64)
        worker = self._idle.pop() if self._idle else self._new_worker()
        text = (_at(data), _at(offsets), count, _or_none(bos), _or_none(eos), _at(ids), _at(ends[1:]))
        classes = self._classes  # one for all of a call: another thread may learn them meanwhile
        made = self._code.bpe_encode(self._tables, worker, *_pointers(classes), *text)
        if made <= -2 and classes is None:
            classes = self._learn_classes()
            made = self._code.bpe_encode(self._tables, worker, *_pointers(classes), *text)
        self._idle.append(worker)
        if made <= -2 and classes is None:
            return None
        if made == -1:
            raise MemoryError("no memory to encode a long word")
        if made < 0:
            raise InvalidUtf8(-2 - made)
        return ids[:made], ends

    def agrees(self, probe: str) -> bool:
        """Tell whether a text has the library's ids; warn if not."""
        data = probe.encode()
        encoded = self.encode(data, np.array([0, len(data)], np.int64))
        expected = self._library.encode(probe, add_special_tokens=False).ids
        if encoded is not None and encoded[0].tolist() == expected:
            return True
        warnings.warn(
            f"{_SOURCE.name} and this version of tokenizers encode {probe[:20]!r} differently; "
            "a slower path is used",
            RuntimeWarning,
            stacklevel=2,
        )
        return False

    def _learn_classes(self) -> _Classes | None:
        """Learn the classes of all characters, unless they do not give the library's ids."""
        if self._classes is None and not self._is_other_unicode:
            self._classes = _unicode_classes()
            if not self.agrees(_FOREIGN_PROBE):
                self._classes, self._is_other_unicode = None, True
        return self._classes

    def _new_worker(self) -> int:
        worker: int | None = self._code.bpe_worker_new(_SLOTS)
        if not worker:
            raise MemoryError("no memory for a tokenizer's cache")
        weakref.finalize(self, self._code.bpe_worker_free, worker)
        return worker


class WordCache(dict[str, list[int]]):
    """The ids of ASCII words seen before; new ones are merged by the library's model.

    The model alone: its pre-tokenizer could cut a word again, now that nothing stands after it.
    """

    def __init__(self, library: Library) -> None:
        super().__init__()
        self._model = library.model
        self._alphabet = str.maketrans(dict(enumerate(byte_alphabet())))

    def ids(self, ascii_text: str) -> Iterator[int]:
        """Return the ids of an ASCII text."""
        return chain.from_iterable(map(self.__getitem__, ASCII_WORDS.findall(ascii_text)))

    def __missing__(self, word: str) -> list[int]:
        ids = [token.id for token in self._model.tokenize(word.translate(self._alphabet))]
        if len(word) <= _CACHED_CHARACTERS:
            if len(self) >= _CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


def byte_alphabet() -> list[str]:
    """Return the printable character that stands for each byte. Source: Radford et al. 2019."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


class _Model:
    """What the C encoder needs to know: ids [M, 3] of (left, right, made), ids of bytes, digits."""

    def __init__(self, merges: NDArray[np.uint32], id_of_byte: NDArray[np.uint32], max_digits: int) -> None:
        self.merges = merges
        self.id_of_byte = id_of_byte
        self.max_digits = max_digits


def _model_of(content: Mapping[str, Any]) -> _Model | None:
    """Return the merges of a tokenizer.json, or None if it asks for anything that bpe.c does not do."""
    model = content["model"]
    max_digits = _max_digits(content["pre_tokenizer"])
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    if (
        max_digits is None
        or content["normalizer"] is not None
        or model.get("type") != "BPE"
        or any(model.get(option) for option in options)
        or any(not token["special"] for token in content["added_tokens"])
    ):
        return None
    vocabulary: Mapping[str, int] = model["vocab"]
    alphabet = byte_alphabet()
    if any(character not in vocabulary for character in alphabet):
        return None
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merges = [(vocabulary[left], vocabulary[right], vocabulary[left + right]) for left, right in pairs]
    return _Model(
        np.array(merges, np.uint32).reshape(-1, 3),
        np.array([vocabulary[character] for character in alphabet], np.uint32),
        max_digits,
    )


def _max_digits(pre_tokenizer: Any) -> int | None:
    """Return how many digits a word of the pattern has at most; None for another pattern."""
    try:
        split, byte_level = pre_tokenizer["pretokenizers"]
        pattern = split["pattern"]["Regex"]
        is_ours = (
            (split["type"], split["behavior"], split["invert"]) == ("Split", "Isolated", False)
            and byte_level["type"] == "ByteLevel"
            and not byte_level["add_prefix_space"]
            and not byte_level["use_regex"]
        )
    except (TypeError, KeyError, ValueError):
        return None
    one_digit = PATTERN.replace(rf"\p{{N}}{{1,{MAX_DIGITS}}}", r"\p{N}")  # Qwen's
    digits = {PATTERN: MAX_DIGITS, one_digit: 1}
    return digits.get(pattern) if is_ours else None


@cache
def _unicode_classes() -> _Classes:
    """Ask the library which characters are letters, numbers and blanks.

    Returns: pages [0x1100], for each 256 characters the number of their page; classes [pages * 256].
    Cost: 40 ms, once a process that meets a text beyond ASCII.
    """
    points = np.concatenate([np.arange(first, end, dtype=np.uint32) for first, end in _ASSIGNED])
    points = points[(points < 0xD800) | (points >= 0xE000)]
    characters = points.tobytes().decode("utf-32-le")
    flat = np.full(0x110000, _OTHER, np.uint8)
    for value, others in ((_LETTER, r"[^\p{L}]+"), (_NUMBER, r"[^\p{N}]+"), (_BLANK, r"\S+")):
        found = normalizers.Replace(Regex(others), "").normalize_str(characters)
        flat[np.frombuffer(found.encode("utf-32-le"), np.uint32)] = value
    number_of: dict[bytes, int] = {}
    pages = [number_of.setdefault(page.tobytes(), len(number_of)) for page in flat.reshape(-1, 256)]
    return np.array(pages, np.uint16), np.frombuffer(b"".join(number_of), np.uint8)


@cache
def _load() -> ctypes.CDLL | None:
    code = native.load(_SOURCE)
    if code is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("bpe_tables_new", pointer, [pointer, pointer, pointer, number, pointer, number]),
        ("bpe_tables_free", None, [pointer]),
        ("bpe_worker_new", pointer, [number]),
        ("bpe_worker_free", None, [pointer]),
        ("bpe_encode", number, [pointer] * 6 + [number] * 3 + [pointer] * 2),
    ):
        function = getattr(code, name)
        function.restype, function.argtypes = result, arguments
    return code


def _at(array: NDArray[Any]) -> int:
    return array.ctypes.data


def _pointers(classes: _Classes | None) -> tuple[int | None, int | None]:
    return (None, None) if classes is None else (_at(classes[0]), _at(classes[1]))


def _or_none(token_id: int | None) -> int:
    return -1 if token_id is None else token_id
