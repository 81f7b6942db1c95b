"""The filters of Gopher and C4: the formulas, one by one and against brute force, and the presets.

The verdicts of the golden texts were those of datatrove 0.10.1 (GopherQualityFilter,
GopherRepetitionFilter, C4QualityFilter), with white space as its word tokeniser.
"""

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError
from marrow.data.quality.filters import Grams, filled, filters_of, sentence_count
from marrow.data.quality.lines import trimmer
from marrow.data.quality.rules import Rule, judge, rules_of
from marrow.data.quality_config import LineRecipe, QualityRecipe

PROSE = (
    "It was a bright cold day in April, and the clocks were striking thirteen. The man had come up to "
    "the door of the house with his chin in his coat, that he might be out of the wind, and some dust "
    "of the street came in with him. Inside there was a smell of boiled cabbage and old mats. On the "
    "wall hung a coloured poster, too large for such a room, of a face more than a metre wide."
)
LOREM = "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt."


def measures(**recipe) -> dict[str, Rule]:
    found = filters_of(filled(QualityRecipe(**recipe)))
    return {rule.name: rule for rule in (Rule(*one) for one in found)}


def verdict(text: str, **recipe) -> str | None:
    found = judge(text, list(measures(**recipe).values()))
    return found.rule if found else None


# Each rule


@pytest.mark.parametrize(
    ("recipe", "rule", "dropped", "kept"),
    [
        ({"min_words": 3}, "few_words", "two words", "three words now"),
        ({"min_words": 3}, "few_words", "two - words", "- three words now"),
        ({"max_words": 3}, "many_words", "four words are here", "three words now"),
        ({"min_word_chars": 3}, "short_words", "a bc def", "abc de fghi"),
        ({"max_word_chars": 4}, "long_words", "long words", "word here ab"),
        ({"max_symbols_per_word": 0.2}, "symbols", "# one # two three", "# one two three four"),
        ({"max_symbols_per_word": 0.2}, "symbols", "wait… what... no", "wait… what no yes now"),
        ({"max_bullet_lines": 0.5}, "bullets", "- a\n  • b\nc", "- a\nb"),
        ({"max_ellipsis_lines": 0.5}, "ellipses", "a...\nb… \nc", "a...\nb"),
        ({"min_alphabetic_words": 0.5}, "alphabetic", "one 2 3", "one 2"),
        ({"min_stop_words": 2}, "stop_words", "the cat", "the cat and dog"),
        ({"min_stop_words": 1, "stop_words": ("der", "die")}, "stop_words", "the cat", "die Katze"),
        ({"max_repeated_lines": 0.4}, "repeated_lines", "a\nb\na\na", "a\nb\nc\na"),
        ({"max_repeated_line_chars": 0.3}, "repeated_line_chars", "abc\nx\nabc", "abc\nx\nx"),
        ({"max_repeated_paragraphs": 0.4}, "repeated_paragraphs", "a\n\na\n\n\nb\n\na", "a\nb\n\nb\na"),
        ({"max_repeated_paragraph_chars": 0.3}, "repeated_paragraph_chars", "abcd\n\nabcd", "abc\nabc"),
        ({"max_top_ngram_chars": (0.5,)}, "top_2_gram", "a b a b x", "a b a c a d"),
        ({"max_repeated_ngram_chars": (0.2,)}, "repeated_5_grams", "a b c d e " * 2, "a b c d e a b c d"),
        ({"min_sentences": 2}, "sentences", "One only.", "One. Two!"),
        ({"containing": ("lorem ipsum",)}, "containing", "Lorem Ipsum dolor", "lorem and ipsum"),
        ({"script": "Latin"}, "script", "Привет, world", "Hello, мир"),
        ({"script": "Cyrillic", "min_script_share": 0.9}, "script", "Привет ab", "Привет, мир 123"),
        ({"script": "Japanese"}, "script", "hello world", "吾輩は猫である。名前はまだ無い。"),
        ({"script": "Han"}, "script", "12345", "你好"),
    ],
)
def test_each_rule_drops_what_it_is_for_and_keeps_its_limit(recipe, rule, dropped, kept):
    assert verdict(dropped, **recipe) == rule
    assert verdict(kept, **recipe) is None


def test_without_a_word_every_filter_is_off():
    assert measures() == {}
    assert len(rules_of(QualityRecipe())) == 6
    assert trimmer(filled(QualityRecipe()).lines) is None


def test_no_filter_fails_on_odd_texts():
    every = {**PRESET_GOPHER, **PRESET_C4, "script": "Latin"}
    for text in ("", " ", "\n\n", "\0", "\ud800", "a", "…", "🦴🦴", "e\u0301", "\u2028\u2028"):
        for rule in measures(**every).values():
            assert math.isfinite(rule.measure(text))


PRESET_GOPHER = {"preset": "gopher"}
PRESET_C4 = {"min_sentences": 5, "containing": ("x",)}


def test_an_unknown_script_is_refused_with_those_that_are_known():
    with pytest.raises(DataError, match="'Klingon' is no script") as caught:
        rules_of(QualityRecipe(script="Klingon"))
    assert "Latin" in str(caught.value.hint)


# N-grams against brute force

WORDS = st.lists(st.sampled_from(["a", "bb", "ccc", "d"]), max_size=40)


def top_by_force(words: list[str], n: int) -> int:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    if not grams:
        return 0
    gram, count = Counter(grams).most_common(1)[0]
    return (sum(map(len, gram)) + n - 1) * count if count > 1 else 0


def repeated_by_force(words: list[str], n: int) -> int:
    seen, chars, at = set(), 0, 0
    while at < len(words) - n + 1:
        gram = tuple(words[at : at + n])
        if gram in seen:
            chars += sum(map(len, gram))
            at += n
        else:
            seen.add(gram)
            at += 1
    return chars


@given(words=WORDS, n=st.integers(1, 10))
@settings(max_examples=80)
def test_ngrams_agree_with_brute_force(words, n):
    grams = Grams(words)
    assert grams.top(n) == top_by_force(words, n)
    assert grams.repeated(n) == repeated_by_force(words, n)


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), min_size=12, max_size=40))
def test_repeated_ngrams_are_no_more_than_the_text(words):
    grams = Grams(words)
    for n in range(2, 11):
        assert 0 <= grams.repeated(n) <= sum(map(len, words))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two? Three!", 3),
        ('He said: "Stop." Then he left', 2),
        ("No end", 1),
        ("", 0),
        ("A line\nAnother.\n\n", 2),
        ("Version 1.2 is out.", 1),
        ("吾輩は猫である。名前はまだ無い。", 2),
        ("Well... yes.", 2),
    ],
)
def test_sentences_are_counted(text, count):
    assert sentence_count(text) == count


# Presets


def gopher_texts() -> list[tuple[str, str | None]]:
    words = random.Random(4).choices(PROSE.split(), k=120)
    return [
        (PROSE, None),
        (" ".join(words), None),
        ("A short text that is fine but for its length.", "few_words"),
        (PROSE.replace(" ", "   \n"), None),
        ("\n".join(f"- {line}" for line in PROSE.split(". ") * 1 + words), "bullets"),
        ("\n".join(PROSE.split()[i] + "..." for i in range(60)), "ellipses"),
        (" ".join("# " + word for word in words), "symbols"),
        (" ".join(f"{i + 1000} 1111" for i in range(100)) + " the of and to", "alphabetic"),
        (PROSE.replace("the", "le").replace("of", "de").replace(" and", " et").replace(" to", " a")
         .replace("that", "que").replace(" be", " etre").replace("with", "avec"), "stop_words"),
        (PROSE + "\n\n" + PROSE, "repeated_paragraphs"),
        ("\n".join(PROSE.split(". ") * 2), "repeated_lines"),
        (" ".join(["internationalisation of telecommunications"] * 30 + ["the"] * 3), "long_words"),
        (" ".join(["a", "b", "the", "of"] * 30), "short_words"),
        (PROSE + " " + PROSE[:150], "repeated_5_grams"),
        (" ".join(["the and"] + [f"word{i} same pair" for i in range(30)]), "top_2_gram"),
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "rule"), gopher_texts(), ids=[str(rule) for _, rule in gopher_texts()])
def test_the_gopher_preset_gives_the_known_verdicts(text, rule):
    found = verdict(text, preset="gopher")
    if rule == "repeated_paragraphs":
        assert found in ("repeated_paragraphs", "repeated_paragraph_chars")
    else:
        assert found == rule


def test_a_preset_fills_what_is_left_out_and_no_more():
    own = filled(QualityRecipe(preset="gopher", min_words=10, max_top_ngram_chars=(), min_chars=3))
    assert (own.min_words, own.max_words, own.max_top_ngram_chars, own.min_chars) == (10, 100_000, (), 3)
    names = measures(preset="gopher", max_top_ngram_chars=())
    assert not any(name.startswith("top_") for name in names)
    lines = filled(QualityRecipe(preset="c4", lines=LineRecipe(min_words=1, terminal=False))).lines
    assert (lines.min_words, lines.terminal, lines.max_word_chars) == (1, False, 1000)


def c4(text: str) -> tuple[str, str | None]:
    recipe = filled(QualityRecipe(preset="c4"))
    trim = trimmer(recipe.lines)
    assert trim is not None
    left = trim(text).text
    found = judge(left, [Rule(*one) for one in filters_of(recipe)])
    return left, found.rule if found else None


C4_PAGE = [
    "Home | About | Contact",
    "The first sentence is here.[1] The second one stands behind it.",
    "Please enable Javascript to see this page.",
    "This line says something more, does it not?",
    "Too short.",
    "We value your privacy and our use of cookies is described here.",
    'And he said: "That is all."',
    "Read more of this story in the next part...",
    "One more sentence closes the page. And that is really all there is!",
]


def test_the_c4_preset_drops_the_known_lines():
    left, rule = c4("\n".join(C4_PAGE))
    assert left.split("\n") == [
        "The first sentence is here. The second one stands behind it.",
        *(C4_PAGE[i] for i in (3, 6, 8)),
    ]
    assert rule is None


@pytest.mark.parametrize(
    ("page", "rule"),
    [
        ([*C4_PAGE, LOREM], "containing"),
        ([*C4_PAGE, "This sentence has a { in the middle of it."], "containing"),
        (C4_PAGE[:3], "sentences"),
        (["no end of a sentence anywhere"] * 9, "sentences"),
    ],
)
def test_the_c4_preset_drops_the_known_pages(page, rule):
    assert c4("\n".join(page))[1] == rule
