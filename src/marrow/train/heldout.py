"""The texts of a split, as the evaluation reads them.

Long files are thinned to every k-th document, which keeps the mixture of groups and needs no
randomness.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from marrow.core.errors import DataError
from marrow.data.tables import stream
from marrow.text.tokenizer import Tokenizer

TRAIN, HELDOUT = "train.parquet", "heldout.parquet"
BATCH_BYTES = 1 << 20  # of text tokenised at once


@dataclass(frozen=True, slots=True)
class Texts:
    """Every `every`-th document of one file; iterating reads the file anew, in bounded memory."""

    path: Path
    every: int
    num_documents: int
    num_bytes: int

    @classmethod
    def open(cls, path: Path, max_bytes: int) -> "Texts":
        """Choose the documents of a file so that they hold about `max_bytes` at most."""
        lengths = np.concatenate(
            [
                np.zeros(0, np.int64),
                *(batch["num_bytes"].to_numpy() for _, batch in stream([path], ["num_bytes"])),
            ]
        )
        every = max(1, -(-int(lengths.sum()) // max_bytes))
        kept = lengths[::every]
        return cls(path, every, len(kept), int(kept.sum()))

    def __iter__(self) -> Iterator[str]:
        """Yield the texts."""
        return (text for text, _ in self.with_groups())

    def with_groups(self) -> Iterator[tuple[str, str]]:
        """Yield each text with the group it was split by."""
        place = 0
        for _, batch in stream([self.path], ["text", "group"]):
            first = -place % self.every
            if first < batch.num_rows:
                chosen = np.arange(first, batch.num_rows, self.every)
                kept = batch.take(chosen)
                yield from zip(kept["text"].to_pylist(), kept["group"].to_pylist(), strict=True)
            place += batch.num_rows


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out documents as tokens: bos + tokens + eos, one after another.

    tokens_N: int64 [N]. starts_D: int64 [D + 1], where each document begins, and N at the end.
    bytes_D: int64 [D], UTF-8 bytes of each text. groups: D names.
    """

    tokens_N: npt.NDArray[np.int64]
    starts_D: npt.NDArray[np.int64]
    bytes_D: npt.NDArray[np.int64]
    groups: tuple[str, ...]

    @classmethod
    def read(cls, texts: Texts, tokenizer: Tokenizer) -> "HeldOut":
        """Tokenise the texts. Raises: DataError if there is none, or no byte in them."""
        arrays: list[npt.NDArray[np.integer]] = []
        sizes: list[int] = []
        groups: list[str] = []
        for tokens_N, text, group in _encoded(texts, tokenizer):
            arrays.append(tokens_N)
            sizes.append(len(text.encode()))
            groups.append(group)
        if not sum(sizes):
            raise DataError(
                f"{texts.path} holds no text to measure a model on",
                hint="hold out a larger share: --set data.split.heldout_share=0.1",
            )
        starts_D = np.cumsum([0, *map(len, arrays)])
        return cls(np.concatenate(arrays).astype(np.int64), starts_D, np.array(sizes), tuple(groups))

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return int(self.bytes_D.sum())

    @property
    def num_predicted(self) -> int:
        """Tokens that a model has to predict: all but each document's bos."""
        return len(self.tokens_N) - len(self.groups)

    def nats_by_document(self, nats_N: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sum nats per token to nats per document."""
        return np.add.reduceat(nats_N, self.starts_D[:-1])


def tokens_of(texts: Texts, tokenizer: Tokenizer) -> npt.NDArray[np.integer]:
    """Return all documents as one array, each bos + tokens + eos, in the smallest type that fits."""
    arrays = [tokens_N for tokens_N, _, _ in _encoded(texts, tokenizer)]
    return np.concatenate(arrays) if arrays else np.zeros(0, np.uint16)


def _encoded(texts: Texts, tokenizer: Tokenizer) -> Iterator[tuple[npt.NDArray[np.integer], str, str]]:
    """Yield each document as bos + tokens + eos, with its text and group."""
    kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    for batch in _batches(texts.with_groups()):
        encoded = tokenizer.encode_batch([text for text, _ in batch])
        for ids, (text, group) in zip(encoded, batch, strict=True):
            yield np.concatenate([bos, ids, eos]).astype(kind), text, group


def _batches(pairs: Iterator[tuple[str, str]]) -> Iterator[Sequence[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    size = 0
    for pair in pairs:
        batch.append(pair)
        size += len(pair[0])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
