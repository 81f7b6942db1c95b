"""The text filters of Gopher and C4: each a measure of a text and the limit it must not pass.

They are off until the recipe sets a limit or a preset. Words are what white space parts.

    containing            a banned phrase: "lorem ipsum", "{"
    script                share of letters that are of the asked script
    few_words, many_words; short_words, long_words (the mean word's characters)
    symbols               hashes, or ellipses, for each word
    bullets, ellipses     share of lines that begin with a bullet, or end in an ellipsis
    alphabetic            share of words with a letter
    stop_words            how many of the stop words are there
    repeated_lines, repeated_paragraphs (and _chars)   those that the text already had
    top_N_gram            share of the text in its most frequent N-gram
    repeated_N_grams      share of the text in N-grams that it already had, none counted twice
    sentences             how many there are

Source: Rae et al. 2021 (Gopher), section A.1.1 and table A1; Raffel et al. 2020 (C4), section 2.2.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marrow.core.errors import DataError
from marrow.data.quality.scripts import SCRIPTS, script_share
from marrow.data.quality_config import LineRecipe, Preset, QualityRecipe

Measure = Callable[[str], float]
Limit = tuple[str, float, Measure]  # its name, what is allowed, the measure
I64 = NDArray[np.int64]

_LETTER = re.compile(r"[^\W\d_]")
_WORD_CHARACTER = re.compile(r"\w")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)|[。！？]")
_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile(r"\n+")
_COOKIES = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)

PRESETS: dict[Preset, dict[str, Any]] = {
    "none": {},
    "gopher": {
        "min_words": 50,
        "max_words": 100_000,
        "min_word_chars": 3.0,
        "max_word_chars": 10.0,
        "max_symbols_per_word": 0.1,
        "max_bullet_lines": 0.9,
        "max_ellipsis_lines": 0.3,
        "min_alphabetic_words": 0.8,
        "min_stop_words": 2,
        "max_repeated_lines": 0.3,
        "max_repeated_line_chars": 0.2,
        "max_repeated_paragraphs": 0.3,
        "max_repeated_paragraph_chars": 0.2,
        "max_top_ngram_chars": (0.2, 0.18, 0.16),
        "max_repeated_ngram_chars": (0.15, 0.14, 0.13, 0.12, 0.11, 0.10),
    },
    "c4": {
        "min_sentences": 5,
        "containing": ("lorem ipsum", "{"),
        "lines": LineRecipe(
            min_words=3,
            max_word_chars=1000,
            terminal=True,
            containing=("javascript", *_COOKIES),
            citations=True,
        ),
    },
}


def filled(recipe: QualityRecipe) -> QualityRecipe:
    """Return the recipe with what it leaves out taken from its preset."""
    preset = dict(PRESETS[recipe.preset])
    lines = recipe.lines
    if whole := preset.pop("lines", None):
        given = {f.name: getattr(lines, f.name) for f in fields(lines)}
        lines = replace(whole, **{name: value for name, value in given.items() if value not in (None, ())})
    missing = {name: value for name, value in preset.items() if getattr(recipe, name) is None}
    return replace(recipe, **missing, lines=lines)


def filters_of(recipe: QualityRecipe) -> Iterator[Limit]:
    """Yield the filters that are asked for, cheapest first. A limit that cannot be passed is off.

    Args: recipe: with its preset filled in. Raises: DataError for a script that is not known.
    """
    words = _Words()
    if recipe.containing:
        phrases = tuple(phrase.lower() for phrase in recipe.containing)
        yield "containing", 0, lambda text: _count(text.lower(), phrases)
    if recipe.script:
        if recipe.script not in SCRIPTS:
            raise DataError(
                f"data.quality.script = {recipe.script!r} is no script that is known",
                hint=f"write one of {', '.join(sorted(SCRIPTS))}",
            )
        yield "script", -recipe.min_script_share, lambda text: -script_share(text, recipe.script)
    if recipe.max_bullet_lines is not None:
        yield "bullets", recipe.max_bullet_lines, bullet_share
    if recipe.max_ellipsis_lines is not None:
        yield "ellipses", recipe.max_ellipsis_lines, ellipsis_share
    if recipe.min_sentences is not None:
        yield "sentences", -recipe.min_sentences, lambda text: -sentence_count(text)
    yield from words.limits(recipe)
    repeated = {
        "repeated_paragraphs": (recipe.max_repeated_paragraphs, _PARAGRAPHS, 0),
        "repeated_paragraph_chars": (recipe.max_repeated_paragraph_chars, _PARAGRAPHS, 1),
        "repeated_lines": (recipe.max_repeated_lines, _LINES, 0),
        "repeated_line_chars": (recipe.max_repeated_line_chars, _LINES, 1),
    }
    for name, (limit, pattern, which) in repeated.items():
        if limit is not None:
            yield name, limit, partial(_repeated, pattern, which)
    yield from words.ngram_limits(recipe)


class _Words:
    """The words of the text at hand, parted once for all filters that ask."""

    def __init__(self) -> None:
        self._text = ""
        self._words: list[str] = []
        self._lengths: list[int] = []
        self._grams: Grams | None = None

    def limits(self, recipe: QualityRecipe) -> Iterator[Limit]:
        """Yield the filters over words."""
        if recipe.min_words is not None:
            yield "few_words", -recipe.min_words, lambda text: -len(self.lengths(text))
        if recipe.max_words is not None:
            yield "many_words", recipe.max_words, lambda text: len(self.lengths(text))
        if recipe.min_word_chars is not None:
            yield "short_words", -recipe.min_word_chars, lambda text: -self.mean_chars(text)
        if recipe.max_word_chars is not None:
            yield "long_words", recipe.max_word_chars, self.mean_chars
        if recipe.max_symbols_per_word is not None:
            yield "symbols", recipe.max_symbols_per_word, self.symbols
        if recipe.min_alphabetic_words is not None:
            yield "alphabetic", -recipe.min_alphabetic_words, lambda text: -self.with_letter(text)
        if recipe.min_stop_words:
            stop_words = frozenset(recipe.stop_words)
            yield "stop_words", -recipe.min_stop_words, lambda text: -len(stop_words & set(self.of(text)))

    def ngram_limits(self, recipe: QualityRecipe) -> Iterator[Limit]:
        """Yield the filters over n-grams."""
        for n, limit in enumerate(recipe.max_top_ngram_chars or (), 2):
            yield f"top_{n}_gram", limit, partial(self.top_share, n)
        for n, limit in enumerate(recipe.max_repeated_ngram_chars or (), 5):
            yield f"repeated_{n}_grams", limit, partial(self.repeated_share, n)

    def of(self, text: str) -> list[str]:
        if text is not self._text:
            self._text, self._words, self._lengths, self._grams = text, text.split(), [], None
        return self._words

    def lengths(self, text: str) -> list[int]:
        """Return the lengths of the words that are not symbols alone."""
        words = self.of(text)
        if not self._lengths:
            is_word = _WORD_CHARACTER.search
            self._lengths = [len(word) for word in words if word.isalnum() or is_word(word)]
        return self._lengths

    def grams(self, text: str) -> "Grams":
        words = self.of(text)
        if self._grams is None:
            self._grams = Grams(words)
        return self._grams

    def top_share(self, n: int, text: str) -> float:
        return self.grams(text).top(n) / max(1, len(text))

    def repeated_share(self, n: int, text: str) -> float:
        return self.grams(text).repeated(n) / max(1, len(text))

    def mean_chars(self, text: str) -> float:
        lengths = self.lengths(text)
        return sum(lengths) / max(1, len(lengths))

    def symbols(self, text: str) -> float:
        most = max(text.count("#"), text.count("...") + text.count("…"))
        return most / max(1, len(self.of(text)))

    def with_letter(self, text: str) -> float:
        words = self.of(text)
        has_letter = _LETTER.search
        return sum(word.isalpha() or has_letter(word) is not None for word in words) / max(1, len(words))


class Grams:
    """The n-grams of a list of words, numbered so that equal ones have equal numbers.

    PERF: numbers of n-grams come from those one shorter by one sort each; texts that repeat no
    5-gram, most of them, need no more than that. 3.6x as fast as sets of joined words on 300 texts
    of 2 to 20 kB of Python source, all n from 2 to 10.
    """

    def __init__(self, words: list[str]) -> None:
        known: dict[str, int] = {}
        self._ids: I64 = np.fromiter((known.setdefault(w, len(known)) for w in words), np.int64, len(words))
        self._num_words = len(known)
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        self._ends: I64 = np.concatenate([[0], np.cumsum(lengths)])
        self._numbers: dict[int, I64] = {1: self._ids}

    def top(self, n: int) -> int:
        """Return the characters in the most frequent n-gram, with its spaces; 0 if none repeats."""
        numbers = self._number(n)
        if not len(numbers):
            return 0
        counts = np.bincount(numbers)
        most = int(counts.max())
        if most < 2:
            return 0
        first = int(np.argmax(counts[numbers] == most))
        return (int(self._ends[first + n] - self._ends[first]) + n - 1) * most

    def repeated(self, n: int) -> int:
        """Return the characters in n-grams that came before, from the left, none counted twice."""
        numbers = self._number(n)
        if not len(numbers) or int(numbers.max()) + 1 == len(numbers):
            return 0
        seen: set[int] = set()
        chars, at, all_numbers, ends = 0, 0, numbers.tolist(), self._ends.tolist()
        while at < len(all_numbers):
            if all_numbers[at] in seen:
                chars += ends[at + n] - ends[at]
                at += n
            else:
                seen.add(all_numbers[at])
                at += 1
        return chars

    def _number(self, n: int) -> I64:
        if n not in self._numbers:
            shorter = self._number(n - 1)
            if len(shorter) < 2:
                self._numbers[n] = np.empty(0, np.int64)
            elif int(shorter.max()) + 1 == len(shorter):  # nothing repeats any more
                self._numbers[n] = np.arange(len(shorter) - 1)
            else:
                pairs = shorter[:-1] * self._num_words + self._ids[n - 1 :]
                self._numbers[n] = np.unique(pairs, return_inverse=True)[1]
        return self._numbers[n]


def bullet_share(text: str) -> float:
    """Share of lines that begin with a bullet or a hyphen."""
    lines = text.splitlines()
    return sum(line.lstrip().startswith(("•", "-")) for line in lines) / max(1, len(lines))


def ellipsis_share(text: str) -> float:
    """Share of lines that end in an ellipsis."""
    lines = text.splitlines()
    return sum(line.rstrip().endswith(("...", "…")) for line in lines) / max(1, len(lines))


def sentence_count(text: str) -> int:
    """Count the ends of sentences, and line ends that none stands before; "Mr." counts as one."""
    return sum(
        len(ends) + (not ends or ends[-1].end() < len(line))
        for line in filter(None, map(str.strip, text.splitlines()))
        for ends in [list(_SENTENCE_END.finditer(line))]
    )


def repeated_parts(text: str, pattern: re.Pattern[str]) -> tuple[float, float]:
    """Return the share of parts (lines, paragraphs) that came before, and of characters in them."""
    parts = pattern.split(text.strip())
    seen: set[str] = set()
    count = chars = 0
    for part in parts:
        if part in seen:
            count += 1
            chars += len(part)
        else:
            seen.add(part)
    return count / len(parts), chars / max(1, len(text))


def _repeated(pattern: re.Pattern[str], which: int, text: str) -> float:
    return repeated_parts(text, pattern)[which]


def _count(text: str, phrases: tuple[str, ...]) -> int:
    return sum(phrase in text for phrase in phrases)
