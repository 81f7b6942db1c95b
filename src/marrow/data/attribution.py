"""Attribution: which training documents stand nearest to a text, and on which line.

Nearest is the document with the longest run of tokens in common, then the one that holds the
larger share of the text's n-grams: what was copied shows as a long run, what was learned from many
places as a short one. The training text is streamed once past the texts that are asked about, so
that memory does not grow with it.

Every n-gram (4 tokens) of the documents is hashed and looked up among those of the texts. Hits of
one text and one document with the same distance between their positions lie on a diagonal; hits
that follow one another on it are one common run. Hits are checked token by token: a hash that
collides claims nothing.
"""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marrow.core.progress import Progress, silent
from marrow.core.span import span
from marrow.data.tables import parts, stream
from marrow.text.tokenizer import Tokenizer

IntArray = NDArray[np.int64]

NGRAM = 4
_MAX_REPEATS = 16  # places in one text at which the same n-gram is followed up
_FILTER_BITS = 22  # a table of 4 MB that turns most n-grams away before the exact look-up
_NONE = np.empty(0, np.int64)  # so that no documents make an empty array too
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio (Fibonacci hashing, Knuth 1973)

# Files of rows: a document of such a file stands on one row, whatever line ends its text has.
_ROW_FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather", ".ipc")


@dataclass(frozen=True, slots=True)
class Match:
    """A training document that shares tokens with a text.

    line: of `file`, counted from 1, where the shared run begins (its first character that is no
    blank); for a file of rows, the row. span_text: the run as text. num_shared_tokens: its length.
    text_start: the token of the text at which it begins. overlap: share of the text's distinct
    n-grams that the document holds.
    """

    document_id: int
    file: str
    line: int
    group: str
    span_text: str
    num_shared_tokens: int
    text_start: int
    overlap: float


def nearest_documents(
    split: Path,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    top: int = 1,
    progress: Progress = silent,
) -> list[list[Match]]:
    """Find for each text the training documents that share the longest run of tokens with it.

    Args: split: folder with `train.parquet`. top: how many documents a text gets at most.
    Returns: for each text its matches, nearest first; none if no 4 tokens in a row are shared. In
        a text that goes round in a loop, only the first 16 rounds are compared.
    Raises: DataError if there is no split or it cannot be read.
    Cost: about 0.2 CPU-seconds for a MB of training text, most of it to encode it.
    """
    queries = _Queries([ids.astype(np.int64) for ids in tokenizer.encode_batch(texts)])
    best: list[list[Match]] = [[] for _ in texts]
    if not len(queries.hashes):
        return best
    paths = parts(split, "train.parquet")
    columns = ["document_id", "text", "file", "line", "group"]
    done = 0
    for _, batch in stream(paths, columns):
        rows = batch.to_pydict()
        with span("attribution"):
            documents = [ids.astype(np.int64) for ids in tokenizer.encode_batch(rows["text"])]
            for text, of_text in groupby(_search(queries, documents), key=lambda found: found.text):
                for found in heapq.nsmallest(top, of_text, key=_rank):
                    row = {name: values[found.document] for name, values in rows.items()}
                    best[text].append(_match(found, row, documents[found.document], tokenizer))
                best[text] = heapq.nsmallest(top, best[text], key=_rank)
        done += batch.num_rows
        progress(done, None, "documents")
    return best


@dataclass(frozen=True, slots=True)
class _Found:
    """The longest common run of a text and a document of the batch."""

    text: int
    document: int
    text_start: int
    document_start: int
    num_shared_tokens: int
    overlap: float


def _rank(match: "_Found | Match") -> tuple[int, float]:
    return (-match.num_shared_tokens, -match.overlap)


class _Queries:
    """The texts' n-grams: sorted hashes with the places where each stands, and a quick filter."""

    def __init__(self, texts: Sequence[IntArray]) -> None:
        self.tokens = np.concatenate([_NONE, *texts])
        bounds = np.cumsum([0, *map(len, texts)])
        self.start_of = bounds[:-1]
        starts = [np.arange(low, high - NGRAM + 1) for low, high in pairwise(bounds)]
        places = np.concatenate([_NONE, *starts])
        text_of = np.repeat(np.arange(len(texts)), [len(start) for start in starts])
        hashes = _hash(self.tokens)[places] if len(places) else np.empty(0, np.uint64)
        order = np.lexsort((places, text_of, hashes))
        places, text_of, hashes = places[order], text_of[order], hashes[order]
        new_pair = np.ones(len(places), dtype=bool)
        new_pair[1:] = (hashes[1:] != hashes[:-1]) | (text_of[1:] != text_of[:-1])
        first = np.maximum.accumulate(np.where(new_pair, np.arange(len(places)), 0))
        self.num_distinct = np.bincount(text_of[new_pair], minlength=len(texts))
        kept = np.arange(len(places)) - first < _MAX_REPEATS
        self.place, self.text_of = places[kept], text_of[kept]
        self.hashes, self.begin = np.unique(hashes[kept], return_index=True)
        self.count = np.diff(np.append(self.begin, kept.sum()))
        self.filter = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self.filter[_slot(self.hashes)] = True


@dataclass(frozen=True, slots=True)
class _Hits:
    """Equal n-grams: at `position` of the batch (in `document`), at `place` of the texts (in `text`)."""

    document: IntArray
    position: IntArray
    text: IntArray
    place: IntArray
    ngram: IntArray

    def __getitem__(self, index: NDArray[np.generic]) -> "_Hits":
        columns = (self.document, self.position, self.text, self.place, self.ngram)
        return _Hits(*(column[index] for column in columns))

    def __len__(self) -> int:
        return len(self.position)


def _search(queries: _Queries, documents: Sequence[IntArray]) -> Iterator[_Found]:
    """Yield the longest common run of each text and document that have one."""
    tokens = np.concatenate([_NONE, *documents])
    bounds = np.cumsum([0, *map(len, documents)])
    hits = _hits(queries, tokens, bounds)
    if not len(hits):
        return
    pair = hits.text * len(documents) + hits.document
    order = np.lexsort((hits.position, hits.position - hits.place, pair))
    hits, pair = hits[order], pair[order]
    begins = np.ones(len(hits), dtype=bool)
    begins[1:] = (np.diff(pair) != 0) | (np.diff(hits.position) != 1) | (np.diff(hits.place) != 1)
    run = np.flatnonzero(begins)
    length = np.diff(np.append(run, len(hits))) + NGRAM - 1
    longest = np.lexsort((hits.position[run], -length, pair[run]))
    pairs, first = np.unique(pair[run][longest], return_index=True)
    run, length = run[longest][first], length[longest][first]
    # An n-gram counts once for a pair, however often the document holds it.
    distinct = np.unique(pair * len(queries.hashes) + hits.ngram) // len(queries.hashes)
    overlap = np.unique(distinct, return_counts=True)[1] / queries.num_distinct[hits.text[run]]
    assert len(pairs) == len(overlap)
    best = hits[run]
    for i in range(len(run)):
        text, document = int(best.text[i]), int(best.document[i])
        yield _Found(
            text=text,
            document=document,
            text_start=int(best.place[i] - queries.start_of[text]),
            document_start=int(best.position[i] - bounds[document]),
            num_shared_tokens=int(length[i]),
            overlap=float(overlap[i]),
        )


def _hits(queries: _Queries, tokens: IntArray, bounds: IntArray) -> _Hits:
    """Find every n-gram of the documents that a text holds too, once for each place in a text."""
    hashes = _hash(tokens)
    position = np.flatnonzero(queries.filter[_slot(hashes)])
    document = np.searchsorted(bounds, position, side="right") - 1
    inside = position + NGRAM <= bounds[document + 1]
    position, document = position[inside], document[inside]
    ngram = np.minimum(np.searchsorted(queries.hashes, hashes[position]), len(queries.hashes) - 1)
    known = queries.hashes[ngram] == hashes[position]
    position, document, ngram = position[known], document[known], ngram[known]
    repeats = queries.count[ngram]
    shift = queries.begin[ngram] - (np.cumsum(repeats) - repeats)
    entry = np.arange(repeats.sum()) + np.repeat(shift, repeats)
    hits = _Hits(
        document=np.repeat(document, repeats),
        position=np.repeat(position, repeats),
        text=queries.text_of[entry],
        place=queries.place[entry],
        ngram=np.repeat(ngram, repeats),
    )
    same = np.ones(len(hits), dtype=bool)
    for i in range(NGRAM):
        same &= tokens[hits.position + i] == queries.tokens[hits.place + i]
    return hits[same]


def _match(found: _Found, row: Mapping[str, Any], document: IntArray, tokenizer: Tokenizer) -> Match:
    end = found.document_start + found.num_shared_tokens
    before = tokenizer.decode(document[: found.document_start].tolist())
    text = tokenizer.decode(document[found.document_start : end].tolist())
    is_row = str(row["file"]).lower().removesuffix(".gz").endswith(_ROW_FORMATS)
    blanks = text[: len(text) - len(text.lstrip())]
    return Match(
        document_id=row["document_id"],
        file=row["file"],
        line=row["line"] + (0 if is_row else before.count("\n") + blanks.count("\n")),
        group=row["group"],
        span_text=text,
        num_shared_tokens=found.num_shared_tokens,
        text_start=found.text_start,
        overlap=found.overlap,
    )


def _hash(tokens: IntArray) -> NDArray[np.uint64]:
    """Hash the n-gram that begins at each token; the last few hold less than an n-gram."""
    wide = np.append(tokens, np.zeros(NGRAM - 1, np.int64)).astype(np.uint64)
    hashes = np.zeros(len(tokens), dtype=np.uint64)
    for i in range(NGRAM):
        hashes = (hashes + wide[i : i + len(tokens)] + np.uint64(1)) * _MIX
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _slot(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return hashes >> np.uint64(64 - _FILTER_BITS)
