"""The tokenizer: byte-level byte-pair encoding over Hugging Face `tokenizers`.

    tokenizer = Tokenizer.train(texts, 4096)
    ids = tokenizer.encode("def read(self):")
    tokenizer.decode(ids)                       # the text again, byte for byte
    tokenizer.save(folder / "tokenizer.json")   # loads in transformers, with the same ids

One idea: the library trains and merges, but most words of a text have been merged before. Words
are cut by one `re` pattern and looked up, and only new ones reach the library: the same ids for a
third of its CPU time. Text that is not ASCII takes the library's own road.

Special tokens have ids 0..63 (`text/special.py`). A special string inside a text is plain text
unless `allow_special` asks otherwise, so that nobody can end a turn by writing `<|im_end|>`.
Source: Sennrich et al. 2016 (byte-pair encoding); Radford et al. 2019 (byte level).
"""

import codecs
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from marrow.core.errors import DataError, ModelError, explain_os_errors
from marrow.core.files import atomic_file
from marrow.text.pattern import ASCII_WORDS, PATTERN, cut_lines
from marrow.text.special import BOS, EOS, NUM_SPECIAL, PAD, SPECIAL_TOKENS

IdArray = NDArray[np.int32]

FILE_NAME = "tokenizer.json"
_CACHED_WORDS = 1 << 17
_CACHED_CHARACTERS = 64  # longer words are rare, and would let the cache grow without bound
# Our road takes a third of the library's CPU time on one core, the library's takes all cores.
_CORES_WHERE_LIBRARY_WINS = 8


class Tokenizer:
    """Turns text into token ids and back. Immutable; safe from any thread."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._library.encode_special_tokens = True
        self._words = _Words(library)
        # Tokenizers made with another pattern keep it, and take the library's road alone.
        self._has_our_pattern = repr(library.pre_tokenizer) == repr(_untrained().pre_tokenizer)
        self.bos_id = SPECIAL_TOKENS.index(BOS)
        self.eos_id = SPECIAL_TOKENS.index(EOS)
        self.pad_id = SPECIAL_TOKENS.index(PAD)
        self.vocab_size: int = library.get_vocab_size(with_added_tokens=True)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> "Tokenizer":
        """Learn the merges from texts.

        Args: vocab_size: tokens in all, at least 320 (64 special ones and 256 bytes).
        Returns: a tokenizer of at most `vocab_size` tokens: fewer when the texts hold too few
            pairs that occur `min_frequency` times. Equal texts give an equal tokenizer.
        Raises: DataError for a text that holds half a surrogate pair, or no text at all.
        Cost: about 4 MB of text a CPU-second; memory grows with the distinct words.
        """
        if vocab_size < NUM_SPECIAL + 256:
            raise DataError(
                f"a vocabulary of {vocab_size} is too small, at least {NUM_SPECIAL + 256} are needed",
                hint="64 special tokens and one for each byte come first; set tokenizer.vocab_size",
            )
        library = _untrained()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            show_progress=False,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        try:
            library.train_from_iterator(_at_least_one(texts), trainer)
        except UnicodeEncodeError as error:
            raise _not_unicode(error) from None
        return cls(library)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a `tokenizer.json`, or the one in a folder.

        Raises: SourceError if there is none; ModelError if it is damaged or not one of Marrow's.
        """
        file = path / FILE_NAME if path.is_dir() else path
        with explain_os_errors("read the tokenizer", file):
            data = file.read_bytes()
        try:
            library = Library.from_buffer(data)
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            raise ModelError(
                f"{file} is not a tokenizer: {error}", hint="the file is damaged; make or copy it anew"
            ) from None
        ids = [library.token_to_id(text) for text in SPECIAL_TOKENS]
        if ids != list(range(NUM_SPECIAL)) or not isinstance(library.decoder, decoders.ByteLevel):
            raise ModelError(
                f"{file} was not made by Marrow: it lacks the 64 special tokens, or is not byte-level",
                hint="train one with a recipe's [tokenizer] table",
            )
        return cls(library)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json` (equal tokenizers write equal bytes)."""
        with explain_os_errors("write the tokenizer", path), atomic_file(path, "w") as file:
            file.write(self._library.to_str(pretty=True))

    def encode(self, text: str, *, bos: bool = False, allow_special: bool = False) -> list[int]:
        """Turn a text into ids.

        Args: bos: put the begin-of-document token first. allow_special: read special strings in
            the text as special tokens; never for text that a user wrote.
        Raises: DataError for half a surrogate pair, which no UTF-8 file can hold.
        """
        ids = _library_ids(self._library_with_special, text) if allow_special else list(self._ids(text))
        return [self.bos_id, *ids] if bos else ids

    def encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        """Turn texts into int32 arrays of ids, as `encode` does with each.

        Cost: about 10 MB of text a CPU-second, on one core; a machine with 8 cores or more uses
        them all instead (the library's threads, which leave Python's lock).
        """
        if (os.cpu_count() or 1) >= _CORES_WHERE_LIBRARY_WINS and len(texts) > 1:
            return self._encode_parallel(texts)
        return [np.fromiter(self._ids(text), dtype=np.int32) for text in texts]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Turn ids into text; bytes that are no UTF-8 become U+FFFD, as the library does it.

        Raises: DataError for an id outside the vocabulary.
        """
        table = self.token_bytes(skip_special=skip_special)
        try:
            # A negative index would read the table from its end.
            return b"".join([table[i] if i >= 0 else table[len(table)] for i in ids]).decode(
                "utf-8", "replace"
            )
        except IndexError:
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise _no_such_id(bad, self.vocab_size) from None

    def token_bytes(self, *, skip_special: bool = True) -> tuple[bytes, ...]:
        """Return each token's bytes by id; special tokens have none if they are skipped."""
        return self._plain_bytes if skip_special else self._all_bytes

    def _ids(self, text: str) -> Iterator[int]:
        if not self._has_our_pattern:
            return iter(_library_ids(self._library, text))
        if text.isascii():
            return self._words.ids(text)
        _check_unicode(text)
        return chain.from_iterable(
            self._words.ids(part) if part.isascii() else _library_ids(self._library, part)
            for part in cut_lines(text)
        )

    def _encode_parallel(self, texts: Sequence[str]) -> list[IdArray]:
        try:
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                _check_unicode(text)
            raise
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    @cached_property
    def _all_bytes(self) -> tuple[bytes, ...]:
        byte_of = {character: byte for byte, character in enumerate(_byte_alphabet())}
        special = [text.encode() for text in SPECIAL_TOKENS]
        tokens = (str(self._library.id_to_token(i)) for i in range(NUM_SPECIAL, self.vocab_size))
        return (*special, *(bytes(byte_of[character] for character in token) for token in tokens))

    @cached_property
    def _plain_bytes(self) -> tuple[bytes, ...]:
        return (b"",) * NUM_SPECIAL + self._all_bytes[NUM_SPECIAL:]

    @cached_property
    def _library_with_special(self) -> Library:
        # A second copy: a switch on the shared one would change other threads' ids.
        return Library.from_str(self._library.to_str())


class Detokenizer:
    """Turns a stream of ids into text as it comes, never half a character.

    What `push` returned so far, with `finish` at the end, is `decode` of all ids.
    Cost: O(1) per token, whatever came before.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._table = tokenizer.token_bytes(skip_special=skip_special)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Take one id; return the text that is certain now, often one word, sometimes none.

        Raises: DataError for an id outside the vocabulary.
        """
        if not 0 <= token_id < len(self._table):
            raise _no_such_id(token_id, len(self._table))
        return self._decoder.decode(self._table[token_id])

    def finish(self) -> str:
        """Return what is left: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


class _Words(dict[str, list[int]]):
    """The ids of words seen before; new ones are merged by the library's model.

    The model alone: its pre-tokenizer could cut a word again, now that nothing stands after it.
    """

    def __init__(self, library: Library) -> None:
        super().__init__()
        self._model = library.model
        self._alphabet = str.maketrans(dict(enumerate(_byte_alphabet())))

    def ids(self, ascii_text: str) -> Iterator[int]:
        return chain.from_iterable(map(self.__getitem__, ASCII_WORDS.findall(ascii_text)))

    def __missing__(self, word: str) -> list[int]:
        ids = [token.id for token in self._model.tokenize(word.translate(self._alphabet))]
        if len(word) <= _CACHED_CHARACTERS:
            if len(self) >= _CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _untrained() -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    return library


def _byte_alphabet() -> list[str]:
    """Return the printable character that stands for each byte. Source: Radford et al. 2019."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _at_least_one(texts: Iterable[str]) -> Iterable[str]:
    empty = True
    for text in texts:
        empty = False
        yield text
    if empty:
        raise DataError("there is no text to train a tokenizer on", hint="check [data] source and its rules")


def _library_ids(library: Library, text: str) -> list[int]:
    try:
        ids: list[int] = library.encode(text, add_special_tokens=False).ids
        return ids
    except (TypeError, UnicodeEncodeError):
        _check_unicode(text)
        raise


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _not_unicode(error) from None


def _not_unicode(error: UnicodeEncodeError) -> DataError:
    return DataError(
        f"the text holds U+{ord(error.object[error.start]):04X} at character {error.start}: "
        "half of a surrogate pair, which is no character",
        hint="decode the source as UTF-8 (JSON: both halves of a \\uD83D\\uDE00 escape), "
        'or replace it: text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")',
    )


def _no_such_id(token_id: int, vocab_size: int) -> DataError:
    return DataError(
        f"there is no token {token_id}, ids are 0 to {vocab_size - 1}",
        hint="the ids come from another tokenizer, or from a model with a larger vocabulary",
    )
