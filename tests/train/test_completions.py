"""The rule by which a completion counts as Python, and its share."""

import ast
import inspect
import json
import tokenize
from collections.abc import Sequence
from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.records import Completion, Sampling
from marrow.train.completions import logical_lines, parses_as_python, share_of_python


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\n",
        "x = 1\ny = = 2",  # the last line is cut: not judged
        "x = 1\ny = foo(1,\n  2,\n",  # an open bracket
        'x = 1\ny = """an open\n\ntext\n',
        "x = 1\ny = 2 + \\\n",
        "def f(a):\n",  # a header, its body still to come
        "class A:\n    def f(self):\n        # nothing yet\n",
        "@decorated\n",
        "class A:\n    @property\n",
        "try:\n    x()\n",
        "try:\n",
        "def f():\n    try:\n        for i in x:\n            try:\n                y()\n",
        "try:\n    x()\nexcept ValueError:\n",
        "try:\n    x()\nexcept ValueError:\n    pass\n",
        "match x:\n",
        "match x:\n    case 1:\n",
        "if x:\n    pass\nelse:\n",
        "x = '#'  # (\ny = 1\n",
        "x = r'\\d' '\\d'\n",
        "x = {\n  # ]\n  'a': ')'}\n",
        "f'{x[1]}'\n",
        "if x: pass\n",
        "\tx = 1\n".lstrip() + "if x:\n\ty = 2\n",
        "x = 'a\\\nb'\n",
    ],
)
def test_beginnings_of_programs_parse(text):
    assert parses_as_python(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x = 1",  # no whole line
        "\n\n\n",
        "# only a comment\n\n",
        "x = = 1\n",
        "x = = 1\ny = 2\n",
        "x = 'open\ny = 1\n",
        "def f():\nx = 1\n",
        "if x:\n        y = 1\n    z = 2\n",
        "x = 1\n    y = 2\n",
        "except ValueError:\n    pass\n",
        "try:\n    x()\ny = 2\n",
        "@decorated\nx = 1\n",
        "x = )\ny = 1\n",
        "x = (]\ny = 1\n",
        "x = 1\0\n",
        "return = 1\n",
        "(" * 300 + ")" * 300 + "\n",
    ],
)
def test_what_is_no_program_does_not_parse(text):
    assert not parses_as_python(text)


def test_the_prompt_alone_is_no_success():
    prompt = "import os\n\ndef read(self"
    assert not parses_as_python("", prompt=prompt)
    assert not parses_as_python(", path", prompt=prompt)
    assert not parses_as_python("\n# a comment\n", prompt="import os\n")
    assert parses_as_python(", path):\n", prompt=prompt)
    assert not parses_as_python(", path)\n", prompt=prompt)
    assert parses_as_python(", path):\n    return path\nand so on", prompt=prompt)


SOURCES = [inspect.getsource(module) for module in (ast, json, json.decoder, tokenize, inspect)]


@given(st.sampled_from(SOURCES), st.data())
@settings(max_examples=60, deadline=None)
def test_any_beginning_of_real_source_parses(source, data):
    """Real modules cut anywhere behind their first statement: the rule forgives every cut."""
    first = logical_lines(source)
    start = next(line.end for line in first if line.text.strip())
    cut = data.draw(st.integers(start, len(source)))
    assert parses_as_python(source[:cut])


@pytest.mark.parametrize("source", SOURCES)
def test_logical_lines_are_those_of_the_tokenizer(source):
    """The oracle is the standard library's tokenizer: where its NEWLINE tokens stand."""
    offsets = [0]
    for line in source.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    expected = [
        offsets[token.end[0] - 1] + token.end[1]
        for token in tokenize.generate_tokens(StringIO(source).readline)
        if token.type == tokenize.NEWLINE
    ]
    assert [line.end for line in logical_lines(source) if line.text.strip()] == expected


@given(st.text("ab:()[]{}'\"\\\n \t#@=", max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_judged_without_an_error(text):
    lines = logical_lines(text)
    assert [line.end for line in lines] == sorted({line.end for line in lines})
    assert isinstance(parses_as_python(text), bool)


class Parrot:
    """A generator with known answers: each seed takes the next line of its list."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = answers

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[Completion]:
        return [Completion(self.answers[sampling.seed or 0], (), "length", 0) for _ in prompts]


def test_the_share_counts_each_prompt_with_each_seed():
    judged, completions = share_of_python(Parrot([" 1\n", " = 1\n"]), ["x =", "x ="], Sampling(), samples=2)
    assert judged.parses == (True, True, False, False)
    assert judged.share == 0.5
    assert [c.text for c in completions] == [" 1\n", " 1\n", " = 1\n", " = 1\n"]
