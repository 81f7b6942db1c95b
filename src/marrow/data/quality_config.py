r"""The parts of a recipe that judge the data: expectations, quality rules, personal data.

    [data.expect.price]          # of the rows, before they become documents
    type = "number"
    min = 0
    max_null_share = 0.01
    [data.expect.country]
    refers_to = "countries.parquet:code"
    level = "warn"

    [data.quality]               # of the documents
    preset = "gopher"
    [data.quality.lines]
    containing = ["accept all cookies"]
    [data.pii]
    email = "replace"

A limit that is left out (None) comes from the preset; without one the rule is off.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from marrow.core.config import Range
from marrow.data.table_files import table_files

Share = Annotated[float, Range(0.0, 1.0)]
Number = Annotated[float, Range(0.0)]
Whole = Annotated[int, Range(0)]
Scalar = bool | int | float | str
Level = Literal["warn", "fail"]
Preset = Literal["none", "gopher", "c4"]
Action = Literal["off", "count", "replace", "drop"]
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


@dataclass(frozen=True, slots=True)
class Expectation:
    """What is expected of one column (`data/quality/expectations.py`); each key is a check of its own.

    column: its name; empty: the name of the table, as in [data.expect.price]. type: a kind (text,
    integer, number, boolean, timestamp, date, binary, list, struct) or an Arrow type such as
    "int64". min, max: inclusive; numbers, or text for dates ("2024-01-31") and texts; NaN is
    outside every range. min_length, max_length: characters of a text, items of a list.
    max_null_share: share of rows that may be null; nulls are passed over by all other checks.
    regex: what a whole text must match (RE2). values: all that may stand there. unique: no value
    twice. refers_to: "FILE:COLUMN", whose values are all that may stand there; a Parquet, Arrow or
    CSV file, a folder or a glob. max_failed_share: share of the rows that may fail a check of
    values. min_rows, max_rows: of the whole table; they need no column. level: "fail" ends the
    step, "warn" is told.
    """

    column: str = ""
    type: str | None = None
    min: int | float | str | None = None
    max: int | float | str | None = None
    min_length: Whole | None = None
    max_length: Whole | None = None
    max_null_share: Share | None = None
    regex: str | None = None
    values: tuple[Scalar, ...] = ()
    unique: bool = False
    refers_to: str | None = None
    max_failed_share: Share = 0.0
    min_rows: Whole | None = None
    max_rows: Whole | None = None
    level: Level = "fail"

    def __post_init__(self) -> None:
        for low, high in (("min", "max"), ("min_length", "max_length"), ("min_rows", "max_rows")):
            a, b = getattr(self, low), getattr(self, high)
            if a is None or b is None:
                continue
            if isinstance(a, str) != isinstance(b, str):
                raise ValueError(f"{low} = {a!r} and {high} = {b!r} are not of one kind")
            if a > b:
                raise ValueError(f"{low} = {a!r} is more than {high} = {b!r}")
        if self.regex is not None:
            _check_pattern("regex", self.regex)
        if self.refers_to is not None and not all(self.refers_to.rpartition(":")[::2]):
            raise ValueError(f'refers_to = {self.refers_to!r} is not "FILE:COLUMN"')

    def reference(self) -> tuple[list[Path], str]:
        """Return the files and the column that `refers_to` means; no files where there are none."""
        if self.refers_to is None:
            return [], ""
        where, _, column = self.refers_to.rpartition(":")
        return table_files(where), column

    @property
    def wants_column(self) -> bool:
        """Tell whether a check looks into a column."""
        rows_only = {"column", "min_rows", "max_rows", "level"}
        default = Expectation()
        return bool(self.column) or any(
            getattr(self, f.name) != getattr(default, f.name) for f in fields(self) if f.name not in rows_only
        )


@dataclass(frozen=True, slots=True)
class LineRecipe:
    """Rules that drop lines of a text and keep the rest (`data/quality/lines.py`).

    min_words: fewer words, and the line goes. max_word_chars: a longer word, and it goes.
    terminal: a line must end in . ! ? " or ' and not in an ellipsis. containing: a line that holds
    one of these goes, capitals or not. patterns: a line in which one of these regular expressions
    is found goes. citations: [3], [edit] and [citation needed] are cut out.
    """

    min_words: Whole | None = None
    max_word_chars: Whole | None = None
    terminal: bool | None = None
    containing: tuple[str, ...] | None = None
    patterns: tuple[str, ...] = ()
    citations: bool | None = None

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            _check_pattern("patterns", pattern)
        if "" in (self.containing or ()):
            raise ValueError("containing: the empty text stands in every line")


@dataclass(frozen=True, slots=True)
class QualityRecipe:
    """Thresholds of the quality rules (`data/quality/rules.py`, `data/quality/filters.py`).

    A share of 1 switches its rule off. preset: "gopher" or "c4" fill what is None with the limits
    of those data sets (`PRESETS`). min_word_chars, max_word_chars: of the mean word.
    max_symbols_per_word: hashes, or ellipses, for each word. max_top_ngram_chars: of the most
    frequent 2-, 3-, 4-gram (and so on); max_repeated_ngram_chars: of all repeated 5-, 6-, ... 10-grams;
    both as shares of the text. containing: a text that holds one of these goes, capitals or not.
    script: as in "Latin" or "Cyrillic"; empty: any.
    """

    min_chars: Whole = 16
    max_control_share: Share = 0.01
    max_table_share: Share = 0.55
    max_digit_share: Share = 0.3
    max_blob_share: Share = 0.2
    max_repeated_share: Share = 0.5
    preset: Preset = "none"
    min_words: Whole | None = None
    max_words: Whole | None = None
    min_word_chars: Number | None = None
    max_word_chars: Number | None = None
    max_symbols_per_word: Number | None = None
    max_bullet_lines: Share | None = None
    max_ellipsis_lines: Share | None = None
    min_alphabetic_words: Share | None = None
    min_stop_words: Whole | None = None
    stop_words: tuple[str, ...] = STOP_WORDS
    max_repeated_lines: Share | None = None
    max_repeated_line_chars: Share | None = None
    max_repeated_paragraphs: Share | None = None
    max_repeated_paragraph_chars: Share | None = None
    max_top_ngram_chars: tuple[Share, ...] | None = None
    max_repeated_ngram_chars: tuple[Share, ...] | None = None
    min_sentences: Whole | None = None
    containing: tuple[str, ...] | None = None
    script: str = ""
    min_script_share: Share = 0.5
    lines: LineRecipe = LineRecipe()

    def __post_init__(self) -> None:
        for low, high in (("min_words", "max_words"), ("min_word_chars", "max_word_chars")):
            a, b = getattr(self, low), getattr(self, high)
            if a is not None and b is not None and a > b:
                raise ValueError(f"{low} = {a} is more than {high} = {b}")
        if self.min_stop_words is not None and self.min_stop_words > len(self.stop_words):
            raise ValueError(
                f"min_stop_words = {self.min_stop_words}, but stop_words has {len(self.stop_words)} words"
            )
        if "" in (self.containing or ()):
            raise ValueError("containing: the empty text stands in every text")


@dataclass(frozen=True, slots=True)
class PiiRecipe:
    """What becomes of personal data and secrets in texts (`data/quality/pii.py`), kind by kind.

    "replace" puts a placeholder such as [EMAIL] in its place, "drop" drops the document, "count"
    only counts. Only what has a fixed form or a checksum is looked for: no names, no addresses.
    """

    email: Action = "off"
    phone: Action = "off"
    ip: Action = "off"
    card: Action = "off"
    iban: Action = "off"
    national_id: Action = "off"
    url_credentials: Action = "off"
    secret: Action = "off"

    def actions(self) -> Iterator[tuple[str, Action]]:
        """Yield the kinds that are looked for, and what becomes of them."""
        for field in fields(self):
            action: Action = getattr(self, field.name)
            if action != "off":
                yield field.name, action


def _check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{key} = {pattern!r} is no regular expression: {error}") from None
