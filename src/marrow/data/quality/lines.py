"""Line rules: which lines of a text go, the rest of it staying.

    line:long_word  a word longer than max_word_chars
    line:terminal   the line does not end like a sentence: . ! ? " '
    line:few_words  fewer words than min_words
    line:containing it holds one of the phrases
    line:pattern    one of the patterns is found in it

The first rule that a line meets is charged with it. Blank lines stay, but not at the ends of a text
of which lines went. A text that no rule touches is the very same text.
Source: the line rules of C4 (Raffel et al. 2020, section 2.2 and its code).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from marrow.data.quality_config import LineRecipe

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_ENDS = (".", "?", "!", '"', "'")


@dataclass(slots=True)
class Trimmed:
    """What is left of a text, and the lines that went, by rule."""

    text: str
    dropped: list[tuple[str, str]] = field(default_factory=list)


def trimmer(recipe: LineRecipe) -> Callable[[str], Trimmed] | None:
    """Return the function that applies the rules to a text, or None if there is no rule.

    Args: recipe: with its preset filled in.
    """
    phrases = tuple(phrase.lower() for phrase in recipe.containing or ())
    patterns = [re.compile(pattern) for pattern in recipe.patterns]
    if not (phrases or patterns or recipe.terminal or recipe.citations) and all(
        limit is None for limit in (recipe.min_words, recipe.max_word_chars)
    ):
        return None

    def rule_of(line: str, words: list[str]) -> str | None:
        if recipe.max_word_chars is not None and any(len(word) > recipe.max_word_chars for word in words):
            return "line:long_word"
        if recipe.terminal and (not line.endswith(_ENDS) or line.endswith("...")):
            return "line:terminal"
        if recipe.min_words is not None and len(words) < recipe.min_words:
            return "line:few_words"
        if phrases:
            lower = line.lower()
            if any(phrase in lower for phrase in phrases):
                return "line:containing"
        if any(pattern.search(line) for pattern in patterns):
            return "line:pattern"
        return None

    def trim(text: str) -> Trimmed:
        kept: list[str] = []
        dropped: list[tuple[str, str]] = []
        for line in text.split("\n"):
            bare = line.strip()
            if not bare:
                kept.append(line)
                continue
            words = bare.split()  # with citations, as C4 counts them
            if recipe.citations and "[" in line:
                line = _CITATION.sub("", line)
                bare = line.strip()
            rule = rule_of(bare, words)
            if rule is None:
                kept.append(line)
            else:
                dropped.append((rule, bare))
        left = "\n".join(kept)
        return Trimmed(left.strip("\n") if dropped else left, dropped)

    return trim
