"""What a recipe may ask of its data: limits that contradict each other are refused, defaults ask nothing."""

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core.config import load_recipe
from marrow.core.errors import RecipeError
from marrow.data.config import DataRecipe
from marrow.data.quality_config import STOP_WORDS, Expectation, LineRecipe, PiiRecipe, QualityRecipe


@pytest.mark.parametrize("pair", ["", "_length", "_rows"])
@given(low=st.none() | st.integers(0, 9), high=st.none() | st.integers(0, 9))
def test_a_least_value_above_the_greatest_is_refused(pair: str, low: int | None, high: int | None) -> None:
    limits = {f"min{pair}": low, f"max{pair}": high}
    if low is not None and high is not None and low > high:
        with pytest.raises(ValueError, match=f"min{pair} = {low} is more than max{pair} = {high}"):
            Expectation(**limits)  # type: ignore[arg-type]
    else:
        made = Expectation(**limits)  # type: ignore[arg-type]
        assert (getattr(made, f"min{pair}"), getattr(made, f"max{pair}")) == (low, high)


@pytest.mark.parametrize(("low", "high"), [(1, "9"), ("1", 9), (0.5, "a")])
def test_limits_of_two_kinds_are_refused(low: object, high: object) -> None:
    with pytest.raises(ValueError, match="are not of one kind"):
        Expectation(min=low, max=high)  # type: ignore[arg-type]


def test_dates_and_texts_are_compared_as_texts() -> None:
    assert Expectation(min="2024-01-31", max="2024-02-01").min == "2024-01-31"
    with pytest.raises(ValueError, match="is more than"):
        Expectation(min="b", max="a")
    assert Expectation(min=1, max=1.5).max == 1.5, "whole numbers and fractions are of one kind"
    assert Expectation(min=-math.inf, max=math.inf).wants_column


@pytest.mark.parametrize("refers_to", ["file.csv", "file.csv:", ":column", ":", ""])
def test_a_reference_needs_a_file_and_a_column(refers_to: str) -> None:
    with pytest.raises(ValueError, match='is not "FILE:COLUMN"'):
        Expectation(refers_to=refers_to)


def test_a_reference_is_parted_at_its_last_colon(tmp_path: Path) -> None:
    (tmp_path / "a:b.csv").write_text("code\n1\n")
    files, column = Expectation(refers_to=f"{tmp_path}/a:b.csv:code").reference()
    assert (files, column) == ([tmp_path / "a:b.csv"], "code")
    assert Expectation(refers_to=f"{tmp_path}/gone.csv:code").reference() == ([], "code")
    assert Expectation().reference() == ([], "")


WANTS = {
    "column": "price", "type": "int64", "min": 0, "max": 0, "min_length": 0, "max_length": 0,
    "max_null_share": 0.0, "regex": "a", "values": (1,), "unique": True, "refers_to": "f:c",
    "max_failed_share": 0.1,
}  # fmt: skip
ROWS_ONLY = {"min_rows": 1, "max_rows": 1, "level": "warn"}


@pytest.mark.parametrize(("key", "value"), [*WANTS.items(), *ROWS_ONLY.items()])
def test_a_check_of_values_needs_its_column_and_one_of_rows_none(key: str, value: object) -> None:
    assert Expectation(**{key: value}).wants_column == (key in WANTS)  # type: ignore[arg-type]


def test_every_key_is_one_of_values_or_of_rows() -> None:
    """Whoever adds a key decides whether it looks into a column."""
    assert {field.name for field in dataclasses.fields(Expectation)} == WANTS.keys() | ROWS_ONLY.keys()
    assert not Expectation().wants_column


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "(?P<a>x)(?P<a>y)", "a{99999999999}"])
def test_what_is_no_regular_expression_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"regex = .* is no regular expression"):
        Expectation(regex=pattern)
    with pytest.raises(ValueError, match=r"patterns = .* is no regular expression"):
        LineRecipe(patterns=("fine", pattern))


@pytest.mark.parametrize("kind", [LineRecipe, QualityRecipe])
def test_the_empty_text_to_look_for_is_refused(kind: type) -> None:
    with pytest.raises(ValueError, match="the empty text stands in every"):
        kind(containing=("cookies", ""))
    assert kind(containing=()).containing == ()


@pytest.mark.parametrize("key", ["words", "word_chars"])
def test_quality_limits_that_leave_nothing_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"min_{key} = 5 is more than max_{key} = 4"):
        QualityRecipe(**{f"min_{key}": 5, f"max_{key}": 4})
    assert QualityRecipe(**{f"min_{key}": 5, f"max_{key}": 5})


def test_more_stop_words_than_there_are_cannot_be_asked_for() -> None:
    assert QualityRecipe(min_stop_words=len(STOP_WORDS)).min_stop_words == 8
    with pytest.raises(ValueError, match="min_stop_words = 9, but stop_words has 8 words"):
        QualityRecipe(min_stop_words=9)
    with pytest.raises(ValueError, match="stop_words has 1 words"):
        QualityRecipe(min_stop_words=2, stop_words=("und",))


def test_personal_data_is_looked_for_only_where_it_is_asked_for() -> None:
    assert list(PiiRecipe().actions()) == []
    assert list(PiiRecipe(iban="drop", email="count").actions()) == [("email", "count"), ("iban", "drop")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[data.expect.price]\nmin = 3\nmax = 2\n", "min = 3 is more than max = 2"),
        ("[data.expect.price]\nmax_null_share = 1.5\n", "max_null_share"),
        ("[data.expect.price]\nlevel = 'stop'\n", "level"),
        ("[data.expect.price]\nminimum = 3\n", "did you mean 'min'"),
        ("[data.expect.price]\nregex = '('\n", "is no regular expression"),
        ("[data.expect.price]\nmin_length = -1\n", "min_length"),
        ("[data.quality]\npreset = 'gofer'\n", "did you mean 'gopher'"),
        ("[data.quality]\nmax_digit_share = 2\n", "max_digit_share"),
        ("[data.quality.lines]\nmin_words = -1\n", "min_words"),
        ("[data.pii]\nemail = 'mask'\n", "email"),
        ("[data.pii]\ne_mail = 'drop'\n", "did you mean 'email'"),
    ],
)
def test_a_recipe_that_asks_wrongly_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"r\.toml:\d") as caught:
        load_recipe(path, {"data": DataRecipe})
    assert said in str(caught.value)


def test_expectations_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[data.expect.b]\nunique = true\n[data.expect."a (EUR)"]\nmin = 0\n')
    expect = load_recipe(path, {"data": DataRecipe}).section(DataRecipe).expect
    assert dict(expect) == {"a (EUR)": Expectation(min=0), "b": Expectation(unique=True)}
    assert list(expect) == ["a (EUR)", "b"]
