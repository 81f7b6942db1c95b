"""Quality rules: what a model should not learn from, each with its measure and its limit.

A rule measures one text; the first rule whose limit is passed drops it and is charged with it.
They are few, cheap and explainable: every drop is counted under its rule and samples are kept.

    too_short  fewer characters than min_chars, white space at the ends aside
    not_text   a NUL, or a larger share of control characters and U+FFFD than allowed
    table      share of the text in lines that are data: they begin with a string or number and a
               comma, colon, bracket or comment follows (the tables of `encodings`)
    digits     share of digits among the characters that are not white space
    blob       share of the text in unbroken runs of 200 or more ASCII characters (base64, minified)
    repeated   share of the text in lines of 10 or more characters that it already had

Behind them stand those of `filters.py` that the recipe or its preset asks for.

Source: the line and character heuristics of Gopher (Rae et al. 2021, appendix A) and of the
StarCoder data (Li et al. 2023, section 3), with the table rule of our own.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from marrow.data.quality.filters import filled, filters_of
from marrow.data.quality_config import QualityRecipe

_CONTROL = re.compile(r"[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f\ufffd]")
_BLOB = re.compile(r"[!-~]{200,}")
_DATA_LINE = re.compile(
    r"""^[ \t]*[\[({]*
        (?: [rbuRBU]{0,2} (?: '(?!'')(?:[^'\\\n]|\\.)*' | "(?!"")(?:[^"\\\n]|\\.)*" )
                [ \t]* (?: [,)\]}\#] | :[ \t] )
          | [-+]?(?:0[xX][0-9a-fA-F]+|\d[\d_.]*(?:[eE][-+]?\d+)?)[ \t]* (?: [,)\]}\#] | :[ \t] | $ )
        ) [^\n]*""",
    re.MULTILINE | re.VERBOSE,
)
MIN_REPEATED_CHARS = 10


@dataclass(frozen=True, slots=True)
class Rule:
    """A measure and its limit: a text whose measure is above the limit is dropped."""

    name: str
    limit: float
    measure: Callable[[str], float]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a text is dropped."""

    rule: str
    value: float
    limit: float


def rules_of(recipe: QualityRecipe) -> list[Rule]:
    """Return the rules in the order in which they are asked, cheapest first."""
    recipe = filled(recipe)
    rules = [
        Rule("too_short", -recipe.min_chars, lambda text: -len(text.strip())),
        Rule("not_text", recipe.max_control_share, control_share),
        Rule("digits", recipe.max_digit_share, digit_share),
        Rule("blob", recipe.max_blob_share, blob_share),
        Rule("table", recipe.max_table_share, table_share),
        Rule("repeated", recipe.max_repeated_share, repeated_share),
    ]
    return rules + [Rule(*one) for one in filters_of(recipe)]


def judge(text: str, rules: Sequence[Rule]) -> Verdict | None:
    """Return the first rule that drops the text, or None."""
    for rule in rules:
        value = rule.measure(text)
        if value > rule.limit:
            return Verdict(rule.name, abs(value), abs(rule.limit))
    return None


def control_share(text: str) -> float:
    """Share of control characters (tab, newlines, form feed, escape aside) and U+FFFD; 2 with a NUL."""
    if "\0" in text:
        return 2.0
    return len(_CONTROL.findall(text)) / max(1, len(text))


def digit_share(text: str) -> float:
    """Share of ASCII digits among the characters that are not white space."""
    blank = sum(map(text.count, " \n\t\r"))
    return sum(map(text.count, "0123456789")) / max(1, len(text) - blank)


def blob_share(text: str) -> float:
    """Share of characters in ASCII runs without white space of 200 and more."""
    return sum(map(len, _BLOB.findall(text))) / max(1, len(text))


def table_share(text: str) -> float:
    """Share of characters in lines that are data."""
    return sum(len(match[0]) for match in _DATA_LINE.finditer(text)) / max(1, len(text.strip()))


def repeated_share(text: str) -> float:
    """Share of characters in lines that the text already had."""
    seen: set[str] = set()
    repeated = 0
    for line in text.splitlines():
        bare = line.strip()
        if len(bare) >= MIN_REPEATED_CHARS:
            if bare in seen:
                repeated += len(line) + 1
            seen.add(bare)
    return repeated / max(1, len(text))
