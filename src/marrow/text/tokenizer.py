"""The tokenizer: byte-level byte-pair encoding over Hugging Face `tokenizers`.

    tokenizer = Tokenizer.train(texts, 4096)
    ids = tokenizer.encode("def read(self):")
    tokenizer.decode(ids)                       # the text again, byte for byte
    tokenizer.save(folder / "tokenizer.json")   # loads in transformers, with the same ids
    ids_N, offsets_D = tokenizer.encode_flat(texts, document=True)      # no object for each text

One idea: the library trains, and its ids are the truth; what encodes is the fastest that is proved
to give them. That is C (`text/bpe.py`), without a compiler a cache of words, and the library itself
for all that these do not know: `load` takes any tokenizer.json (WordPiece, Unigram, other patterns).

Marrow's special tokens have ids 0..63, other tokenizers keep their own (`text/special.py`). A special
string inside a text is plain text unless `allow_special` asks otherwise, so that nobody can end a
turn by writing `<|im_end|>`.
Source: Sennrich et al. 2016 (byte-pair encoding); Radford et al. 2019 (byte level).
"""

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from marrow.core.errors import DataError, ModelError, explain_os_errors
from marrow.core.files import atomic_file
from marrow.text.bpe import Bpe, FlatIds, InvalidUtf8, Offsets, WordCache, byte_alphabet, encoders_of
from marrow.text.pattern import PATTERN, cut_lines
from marrow.text.special import NUM_SPECIAL, OURS, SPECIAL_TOKENS, Specials, foreign_specials

IdArray = NDArray[np.int32]

FILE_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
# The word cache takes a third of the library's CPU time on one core, the library takes all cores.
_CORES_WHERE_LIBRARY_WINS = 8


class Tokenizer:
    """Turns text into token ids and back. Immutable; safe from any thread.

    `specials`: its special tokens; `bos_id`, `eos_id` and `pad_id` are theirs. `is_byte_level`: each
    token is some bytes; others (WordPiece, Unigram) only encode, and decode whole texts.
    """

    def __init__(self, library: Library, specials: Specials = OURS) -> None:
        self._library = library
        self._library.encode_special_tokens = True
        # A file may ask for texts to be cut at 512 tokens and filled up to them: nothing may be lost.
        self._library.no_truncation()
        self._library.no_padding()
        self.specials = specials
        self.bos_id = specials.bos_id
        self.eos_id = specials.eos_id
        self.pad_id = specials.pad_id
        self.is_byte_level = isinstance(library.decoder, decoders.ByteLevel)
        self.vocab_size: int = 1 + max(library.get_vocab(with_added_tokens=True).values(), default=-1)

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
        """Read a `tokenizer.json`, or the one in a folder: Marrow's own, or any other.

        Raises: SourceError if there is none; ModelError if it is damaged, or if neither it nor the
            tokenizer_config.json beside it says which tokens begin and end a document.
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
        if [library.token_to_id(text) for text in SPECIAL_TOKENS] == list(range(NUM_SPECIAL)):
            return cls(library)
        return cls(library, foreign_specials(json.loads(data), _read_config(file.with_name(CONFIG_NAME))))

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
        if allow_special:
            ids = _library_ids(self._library_with_special, text)
        elif self._bpe is not None:
            ids = self.encode_flat([text])[0].tolist()
        else:
            ids = list(self._ids(text))
        return [self.bos_id, *ids] if bos else ids

    def encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        """Turn texts into int32 arrays of ids, as `encode` does with each. Cost: see `encode_flat`."""
        if self._bpe is None:
            return self._encode_batch(texts)
        ids, offsets = self.encode_flat(texts)
        signed, ends = ids.view(np.int32), offsets.tolist()
        return [signed[start:end] for start, end in pairwise(ends)]

    def encode_flat(self, texts: Sequence[str], *, document: bool = False) -> tuple[FlatIds, Offsets]:
        """Turn D texts into one array of ids.

        Args: document: put the begin and the end of a document around each text.
        Returns: the ids, uint32 [N]; where each text's begin and end in them, int64 [D + 1].
        Raises: DataError for half a surrogate pair.
        Cost: with C about 100 MB of text a CPU-second and thread, outside Python's lock; without a
            compiler 10, and 4 for tokenizers that only the library knows.
        """
        if self._bpe is None:
            return self._flat(self._encode_batch(texts), document)
        try:
            encoded = [text.encode() for text in texts]
        except UnicodeEncodeError as error:
            raise _not_unicode(error) from None
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)), out=offsets[1:])
        return self.encode_utf8(b"".join(encoded), offsets, document=document)

    def encode_utf8(self, utf8: Any, offsets: Offsets, *, document: bool = False) -> tuple[FlatIds, Offsets]:
        """Do as `encode_flat` with texts that lie in a buffer, such as a column of Arrow.

        Args: utf8: a buffer. offsets: int64 [D + 1], where texts begin and end in it, ascending.
        Raises: DataError for bytes that are no UTF-8.
        """
        marks = {"bos": self.bos_id, "eos": self.eos_id} if document else {}
        try:
            encoded = None if self._bpe is None else self._bpe.encode(utf8, offsets, **marks)
            if encoded is None:
                data = memoryview(utf8)
                texts = [_decoded(data, start, end) for start, end in pairwise(offsets.tolist())]
                return self._flat(self._encode_batch(texts), document)
            return encoded
        except InvalidUtf8 as error:
            index = int(np.searchsorted(offsets, error.position, "right")) - 1
            raise DataError(
                f"text {index} of {len(offsets) - 1} is no UTF-8 at byte {error.position - offsets[index]}",
                hint="decode the source with its own encoding (data.encoding), or leave the row out",
            ) from None

    def encode_stream(
        self, batches: Iterable[Sequence[str]], *, document: bool = False
    ) -> Iterator[tuple[FlatIds, Offsets]]:
        """Encode one batch after the other as `encode_flat` does; memory holds one batch."""
        return (self.encode_flat(texts, document=document) for texts in batches)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Turn ids into text; bytes that are no UTF-8 become U+FFFD, as the library does it.

        Raises: DataError for an id outside the vocabulary.
        """
        if not self.is_byte_level:
            return self._library_text(list(ids), skip_special)
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
        """Return each token's bytes by id; special tokens have none if they are skipped.

        Raises: ModelError if the tokens are not bytes.
        """
        if not self.is_byte_level:
            raise ModelError(
                "the tokenizer is not byte-level: its tokens have no bytes of their own",
                hint="decode whole texts with it; streaming and serving need a byte-level one",
            )
        return self._plain_bytes if skip_special else self._all_bytes

    @cached_property
    def _encoders(self) -> tuple[Bpe | None, WordCache | None]:
        return encoders_of(self._library)

    @property
    def _bpe(self) -> Bpe | None:
        return self._encoders[0]

    def _ids(self, text: str) -> Iterator[int]:
        """Encode without C."""
        words = self._encoders[1]
        if words is None:
            return iter(_library_ids(self._library, text))
        if text.isascii():
            return words.ids(text)
        _check_unicode(text)
        return chain.from_iterable(
            words.ids(part) if part.isascii() else _library_ids(self._library, part)
            for part in cut_lines(text)
        )

    def _encode_batch(self, texts: Sequence[str]) -> list[IdArray]:
        """Encode without C."""
        many_cores = (os.cpu_count() or 1) >= _CORES_WHERE_LIBRARY_WINS
        if len(texts) > 1 and (many_cores or self._encoders[1] is None):
            return self._encode_parallel(texts)
        return [np.fromiter(self._ids(text), dtype=np.int32) for text in texts]

    def _encode_parallel(self, texts: Sequence[str]) -> list[IdArray]:
        try:
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                _check_unicode(text)
            raise
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def _flat(self, batch: Sequence[IdArray], document: bool) -> tuple[FlatIds, Offsets]:
        """Lay arrays of ids one behind the other."""
        marks = ([self.bos_id], [self.eos_id]) if document else ([], [])
        pieces = [np.array(piece, np.uint32) for ids in batch for piece in (marks[0], ids, marks[1])]
        offsets = np.zeros(len(batch) + 1, np.int64)
        np.cumsum([len(ids) + len(marks[0]) + len(marks[1]) for ids in batch], out=offsets[1:])
        return np.concatenate(pieces) if pieces else np.empty(0, np.uint32), offsets

    def _library_text(self, ids: list[int], skip_special: bool) -> str:
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise _no_such_id(token_id, self.vocab_size)
        text: str = self._library.decode(ids, skip_special_tokens=skip_special)
        return text

    @cached_property
    def _all_bytes(self) -> tuple[bytes, ...]:
        byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
        added = self._library.get_added_tokens_decoder()

        def bytes_of(token_id: int) -> bytes:
            if token_id in added:
                return str(added[token_id].content).encode()
            token = str(self._library.id_to_token(token_id) or "")  # a vocabulary may have gaps
            try:
                return bytes(byte_of[character] for character in token)
            except KeyError:  # and tokens that no text can make
                return token.encode()

        return tuple(map(bytes_of, range(self.vocab_size)))

    @cached_property
    def _plain_bytes(self) -> tuple[bytes, ...]:
        special = set(self.specials.ids.values())
        return tuple(b"" if i in special else data for i, data in enumerate(self._all_bytes))

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


def _at_least_one(texts: Iterable[str]) -> Iterable[str]:
    empty = True
    for text in texts:
        empty = False
        yield text
    if empty:
        raise DataError("there is no text to train a tokenizer on", hint="check [data] source and its rules")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        with explain_os_errors("read the tokenizer's configuration", path):
            config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not a table")
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}", hint="copy or export the model again") from error
    return config


def _decoded(data: memoryview, start: int, end: int) -> str:
    try:
        return str(data[start:end], "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidUtf8(int(start) + error.start) from None


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
