import re

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.text.pattern import ASCII_WORDS, PATTERN, cut_lines

ORACLE = regex.compile(PATTERN)  # a third engine: neither `re` nor the library's
TEXT = st.text(st.sampled_from("abZ09_ \t\n\r'sre(.):é中\u2028"), max_size=60)


@settings(deadline=None, max_examples=400)
@given(text=TEXT | st.text(max_size=60))
def test_words_make_up_the_text(text: str) -> None:
    assert "".join(ORACLE.findall(text)) == text
    ascii_text = text.encode("ascii", "ignore").decode()
    assert "".join(ASCII_WORDS.findall(ascii_text)) == ascii_text


@settings(deadline=None, max_examples=400)
@given(text=st.text(st.characters(max_codepoint=127), max_size=60))
def test_the_ascii_pattern_cuts_ascii_text_as_the_pattern_does(text: str) -> None:
    assert ASCII_WORDS.findall(text) == ORACLE.findall(text)


@settings(deadline=None, max_examples=400)
@given(text=TEXT)
def test_parts_are_cut_where_words_end(text: str) -> None:
    parts = list(cut_lines(text))
    assert "".join(parts) == text
    assert [word for part in parts for word in ORACLE.findall(part)] == ORACLE.findall(text)


def test_few_foreign_characters_make_few_parts() -> None:
    text = "def f():\n    return 1\n" * 100 + "x = 'é'\n" + "def g():\n    pass\n" * 100
    assert [part.isascii() for part in cut_lines(text)] == [True, False, True]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("    return x\n", ["   ", " return", " x", "\n"]),
        ("):\n\n        y", ["):\n\n", "       ", " y"]),
        ("\n        if x", ["\n", "       ", " if", " x"]),
        ("\n\t\tif", ["\n", "\t", "\tif"]),
        ("self.name_of", ["self", ".name", "_of"]),
        ("123456", ["123", "456"]),
        ("don't", ["don", "'t"]),
        ("x  \r\n\n", ["x", "  \r\n\n"]),
        (" == (1)", [" ==", " (", "1", ")"]),
    ],
)
def test_words_of_code(text: str, words: list[str]) -> None:
    assert ASCII_WORDS.findall(text) == words == ORACLE.findall(text)


def test_the_pattern_has_no_groups_that_findall_would_return() -> None:
    assert ASCII_WORDS.groups == 0
    assert re.compile(PATTERN.replace(r"\p{L}", "x").replace(r"\p{N}", "0")).groups == 0
