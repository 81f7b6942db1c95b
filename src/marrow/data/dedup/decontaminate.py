"""Training texts that hold what a model is going to be asked: found by shared n-grams of words.

    [data.decontaminate]
    against = ["evals/*.jsonl"]
    ngram = 13

Every text value of the evaluation files, in lower case, becomes n-grams of words. A document that
holds one of them word for word, whatever its case, white space and punctuation, is contaminated. An
evaluation text of fewer words than an n-gram has counts where it is all that a document says.

Only the evaluation side is in memory: its texts, and about 48 bytes per distinct n-gram. A hash finds, the
words decide: no document goes because two hashes are equal.
Source: Brown et al. 2020, appendix C (13-grams).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from marrow.core.errors import DataError, SourceError
from marrow.data.config import DecontaminateRecipe
from marrow.data.sources.delimited import Tally
from marrow.data.sources.formats import read_file
from marrow.data.sources.listing import SourceFile, find_files
from marrow.data.sources.streams import Broken
from marrow.kernels.search.minhash import shingle_hashes, word_spans

EXCERPT_CHARS = 200
_BATCH = 4096
_MAX_FILTER_BITS = 26

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Contamination:
    """A document that shares n-grams with an evaluation file.

    text: position in the array that was asked about. evaluation: file and line of the first text that
    it shares the longest stretch with. matches: distinct n-grams shared with that file. start, end:
    the longest stretch, in characters of the document; excerpt: how it begins. files: all evaluation
    files that it shares enough n-grams with; `evaluation` is of the one it shares most with.
    """

    text: int
    evaluation: str
    matches: int
    start: int
    end: int
    excerpt: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Grams:
    """The distinct n-grams of one file: hashes rising, and for each the first text and word that has it."""

    name: str
    hashes: U64
    texts: I64
    words: I64


class Evaluations:
    """The evaluation texts, ready to be looked for; can be sent to another process."""

    def __init__(self, recipe: DecontaminateRecipe) -> None:
        """Read the files.

        Raises: SourceError if a pattern finds no file or a file cannot be read; DataError if a row is
            broken, or nothing in them is text.
        Cost: a pass over the files; about 40 bytes of memory per word.
        """
        self._recipe = recipe
        self._texts: list[str] = []
        self._lines: list[int] = []
        self._files: list[_Grams] = []
        self._split: tuple[int, list[tuple[int, int]]] = (-1, [])
        for file in _files(recipe.against):
            self._add(file)
        if recipe.against and not any(len(file.hashes) for file in self._files):
            raise DataError(
                f"data.decontaminate.against: no text with words in {', '.join(recipe.against)}",
                hint="the columns of evaluation files that hold text are compared",
            )
        self._hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *(f.hashes for f in self._files)]))
        bits = min(_MAX_FILTER_BITS, max(16, len(self._hashes).bit_length() + 5))
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, bool)  # nearly every n-gram is ruled out by one look
        self._filter[self._hashes >> self._shift] = True

    def find(self, texts: pa.Array) -> list[Contamination]:
        """Return the contaminated ones of some texts, in their order.

        Args: texts: string array; nulls are no texts.
        Cost: about 70 ns a word beside 10^6 n-grams; a microsecond a word for texts that share any.
        """
        if not len(self._hashes):
            return []
        lowered = pc.utf8_lower(texts)
        hashes, starts = shingle_hashes(lowered, self._recipe.ngram)
        at = np.flatnonzero(self._filter[hashes >> self._shift])
        places = np.minimum(np.searchsorted(self._hashes, hashes[at]), len(self._hashes) - 1)
        at = at[self._hashes[places] == hashes[at]]
        owners = np.searchsorted(starts, at, "right") - 1
        found = []
        for text, hits in zip(*_runs(owners, at), strict=True):
            worst = self._judge(int(text), lowered[text].as_py() or "", hashes[hits], hits - starts[text])
            if worst is not None:
                found.append(worst)
        return found

    def figures(self) -> dict[str, Any]:
        """Return what the facts of a step say of the evaluation side, by file."""
        return {file.name: {"ngrams": len(file.hashes)} for file in self._files}

    def _add(self, file: SourceFile) -> None:
        first = len(self._texts)
        for line, text in _values(file):
            self._texts.append(text)
            self._lines.append(line)
        hashes, owners, words = [np.empty(0, np.uint64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for start in range(first, len(self._texts), _BATCH):
            batch = pa.array(self._texts[start : start + _BATCH], pa.large_string())
            values, starts = shingle_hashes(batch, self._recipe.ngram)
            counts = np.diff(starts)
            hashes.append(values)
            owners.append(np.repeat(np.arange(start, start + len(batch)), counts))
            words.append(np.arange(len(values)) - np.repeat(starts[:-1], counts))
        distinct, at = np.unique(np.concatenate(hashes), return_index=True)
        self._files.append(
            _Grams(file.where, distinct, np.concatenate(owners)[at], np.concatenate(words)[at])
        )

    def _judge(self, number: int, text: str, hashes: U64, places: I64) -> Contamination | None:
        """Check the hits of one text word by word; name the file that it shares most with."""
        spans = word_spans(text)
        width = min(self._recipe.ngram, len(spans))
        best: tuple[int, str, tuple[int, int]] | None = None
        files = []
        for file in filter(lambda file: len(file.hashes), self._files):
            at = np.searchsorted(file.hashes, hashes)
            at[at == len(file.hashes)] = 0
            kept: dict[int, int] = {}  # place of the n-gram in the text -> evaluation text
            grams: set[tuple[str, ...]] = set()
            for hit in np.flatnonzero(file.hashes[at] == hashes):
                place, owner = int(places[hit]), int(file.texts[at[hit]])
                words = tuple(text[a:b] for a, b in spans[place : place + width])
                if words and words == self._words(owner, int(file.words[at[hit]])):
                    kept[place] = owner
                    grams.add(words)
            if len(grams) < self._recipe.min_matches:
                continue
            files.append(file.name)
            if best is None or len(grams) > best[0]:
                first, last = _longest_run(list(kept))
                best = (len(grams), f"{file.name}:{self._lines[kept[first]]}", (first, last))
        if best is None:
            return None
        matches, evaluation, (first, last) = best
        start, end = spans[first][0], spans[last + width - 1][1]
        excerpt = text[start : min(end, start + EXCERPT_CHARS)]
        return Contamination(number, evaluation, matches, start, end, excerpt, tuple(files))

    def _words(self, text: int, place: int) -> tuple[str, ...]:
        """Return the n-gram of an evaluation text that begins at a word."""
        whole = self._texts[text]
        if self._split[0] != text:  # hits come in runs of one text
            self._split = (text, word_spans(whole))
        return tuple(whole[a:b] for a, b in self._split[1][place : place + self._recipe.ngram])


def _runs(owners: I64, values: I64) -> tuple[I64, list[I64]]:
    """Return the distinct owners, which rise, and the values of each."""
    distinct, begins = np.unique(owners, return_index=True)
    return distinct, np.split(values, begins[1:]) if len(distinct) else []


def _longest_run(places: list[int]) -> tuple[int, int]:
    """Return the first and the last place of the longest run of places one after the other."""
    best = (places[0], places[0])
    first = places[0]
    for previous, place in pairwise([*places, -1]):
        if place != previous + 1:
            best = max(best, (first, previous), key=lambda run: run[1] - run[0])
            first = place
    return best


def _files(patterns: tuple[str, ...]) -> list[SourceFile]:
    """Return the files of all patterns, each once."""
    files: dict[str, SourceFile] = {}
    for pattern in patterns:
        try:
            found = find_files(pattern).files
        except SourceError as error:
            message = error.message.replace("data.source", "data.decontaminate.against")
            raise SourceError(message, hint=error.hint) from error
        files |= {file.where: file for file in found}
    return list(files.values())


def _values(file: SourceFile) -> Iterator[tuple[int, str]]:
    """Yield the line and the lower case of every text in a file, in lists and objects too."""

    def refuse(broken: Broken) -> None:
        raise DataError(
            f"{file.where}:{broken.line}: an evaluation row is broken: {broken.reason}",
            hint="mend it: what cannot be read cannot be looked for",
        )

    for chunk in read_file(file, Tally(), refuse):
        batch, lines_N, _ = chunk.fit(chunk.schema())
        for column in batch.columns:
            for line, value in zip(lines_N.tolist(), column.to_pylist(), strict=True):
                yield from ((line, text) for text in _lowered(value))


def _lowered(value: Any) -> list[str]:
    """Return the texts within a value that have words, in lower case as Arrow makes it."""
    if isinstance(value, str):
        text = pc.utf8_lower(value).as_py()
        return [text] if word_spans(text) else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [text for one in inner for text in _lowered(one)]
