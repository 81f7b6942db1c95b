"""Line rules: the lines that go are told with their rule, the rest is left as it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core.config import load_recipe
from marrow.core.errors import RecipeError
from marrow.data.config import DataRecipe
from marrow.data.quality.lines import trimmer
from marrow.data.quality_config import LineRecipe


def trim(text: str, **recipe) -> tuple[str, list[tuple[str, str]]]:
    function = trimmer(LineRecipe(**recipe))
    assert function is not None
    found = function(text)
    return found.text, found.dropped


@pytest.mark.parametrize(
    ("recipe", "rule", "goes", "stays"),
    [
        ({"min_words": 2}, "line:few_words", "word", "two words"),
        ({"max_word_chars": 5}, "line:long_word", "a longer word", "short ones"),
        ({"terminal": True}, "line:terminal", "no end", "an end."),
        ({"terminal": True}, "line:terminal", "and so on...", "'quoted'"),
        ({"containing": ("Accept Cookies",)}, "line:containing", "  accept cookies now ", "accept them"),
        ({"patterns": (r"^\d+$", "^Page")}, "line:pattern", "Page 3", "A page 3"),
        ({"patterns": (r"^\d+$",)}, "line:pattern", " 17 ", "17 pages"),
    ],
)
def test_each_rule_drops_its_lines(recipe, rule, goes, stays):
    assert trim(f"{stays}\n{goes}\n{stays}", **recipe) == (f"{stays}\n{stays}", [(rule, goes.strip())])


def test_what_stays_keeps_its_indentation_and_blank_lines():
    text = "def f():\n    return 1.\n\n\tx.\nnot this\n"
    assert trim(text, terminal=True)[0] == "    return 1.\n\n\tx."


def test_citations_are_cut_out_and_nothing_else_in_brackets():
    text = "One.[1] Two.[23][edit] Three[citation needed]. a[i] [x] []"
    assert trim(text, citations=True) == ("One. Two. Three. a[i] [x] ", [])


def test_the_rule_that_a_line_meets_first_is_charged():
    assert trim("toolongword", terminal=True, max_word_chars=3, min_words=2)[1] == [
        ("line:long_word", "toolongword")
    ]


@given(st.text("ab .\n\r", max_size=60))
def test_lines_are_kept_or_dropped_once(text):
    left, dropped = trim(text, min_words=2)
    bare = [line.strip() for line in text.split("\n") if line.strip()]
    stayed = [line.strip() for line in left.split("\n") if line.strip()]
    assert sorted(stayed + [line for _, line in dropped]) == sorted(bare)
    if not dropped:
        assert left == text
    assert trim(left, min_words=2) == (left, [])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("patterns = ['(a']", "is no regular expression"),
        ("containing = ['']", "the empty text stands in every line"),
        ("min_word = 3", "did you mean 'min_words'?"),
    ],
)
def test_wrong_rules_are_refused_with_their_line(tmp_path, text, says):
    path = tmp_path / "r.toml"
    path.write_text(f"[data.quality.lines]\n{text}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, {"data": DataRecipe})
    assert says in str(caught.value)
    assert "r.toml:2" in str(caught.value)
