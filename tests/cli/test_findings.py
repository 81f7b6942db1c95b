"""What the model is asked, where the recipe names nothing: beginnings of held-out documents."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.cli.findings import NUM_PROMPTS, PROMPT_CHARS, beginning, prompts_of
from marrow.cli.recipe import ReportRecipe


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("", ""),
        (" \n\t ", ""),
        ("a", ""),  # no half to show
        ("ab", "a"),
        ("internationalisation", "internatio"),  # one word: half of it
        ("  the loader reads every row  ", "the loader"),
        ("a b", "a"),
    ],
)
def test_a_short_text_gives_its_first_half(text: str, prompt: str) -> None:
    assert beginning(text) == prompt


def test_a_long_text_gives_its_first_words() -> None:
    prompt = beginning("word " * 1_000)
    assert prompt == ("word " * 16).strip()
    assert len(prompt) <= PROMPT_CHARS


@given(st.text())
def test_a_prompt_is_a_beginning_and_leaves_something_to_complete(text: str) -> None:
    prompt = beginning(text)
    assert text.strip().startswith(prompt)
    assert len(prompt) <= PROMPT_CHARS
    assert 2 * len(prompt) <= len(text.strip())


def heldout(folder: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"text": texts, "file": [""] * len(texts)}), folder / "heldout.parquet")
    return folder


def test_the_recipe_goes_before_the_documents(tmp_path: Path) -> None:
    folder = heldout(tmp_path, ["the loader reads every row"])
    assert prompts_of(ReportRecipe(prompts=("def ", "")), folder) == ["def ", ""]


def test_documents_too_short_for_a_prompt_are_passed_over(tmp_path: Path) -> None:
    folder = heldout(tmp_path, ["", "x", "the loader reads", " ", "a shard keeps"])
    assert prompts_of(ReportRecipe(), folder) == ["the", "a"]


def test_enough_prompts_are_found_behind_many_short_documents(tmp_path: Path) -> None:
    folder = heldout(tmp_path, ["x"] * 200 + [f"number {n} reads all its rows" for n in range(9)])
    found = prompts_of(ReportRecipe(), folder)
    assert found == [f"number {n} reads"[: len("number 0")] for n in range(NUM_PROMPTS)]


def test_texts_of_a_letter_still_give_a_prompt(tmp_path: Path) -> None:
    assert prompts_of(ReportRecipe(), heldout(tmp_path, ["x", "y"])) == [""]


def test_the_first_documents_are_taken_in_order_and_no_more_than_needed(tmp_path: Path) -> None:
    folder = heldout(tmp_path, [f"{n:03d} words of a document" for n in range(100)])
    assert [prompt[:3] for prompt in prompts_of(ReportRecipe(), folder)] == [
        "000",
        "001",
        "002",
        "003",
        "004",
    ]
