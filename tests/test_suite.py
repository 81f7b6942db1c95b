"""The tests themselves: each one asserts something where its reader sees it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CLAIMS = {"raises", "warns", "fail", "opcheck"}  # and whatever is called assert_...


def claims(test: ast.AST) -> bool:
    """Tell whether a function holds an assert, or calls what raises if a claim does not hold."""
    for node in ast.walk(test):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in CLAIMS or called.startswith("assert_"):
                return True
    return False


def functions_that_test(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
            yield node


@pytest.mark.slow
def test_every_test_asserts_something_that_its_reader_sees() -> None:
    """A helper that asserts is not enough: what a test promises stands in the test."""
    files = sorted(HERE.rglob("test_*.py"))
    assert len(files) > 150
    silent = [
        f"{path.relative_to(HERE)}:{test.lineno} {test.name}"
        for path in files
        for test in functions_that_test(path.read_text(encoding="utf-8"))
        if not claims(test)
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("body", "yes"),
    [
        ("assert x", True),
        ("for y in x:\n        assert y", True),
        ("with pytest.raises(ValueError):\n        x()", True),
        ("torch.testing.assert_close(x, y)", True),
        ("check(x)", False),
        ("x == y", False),
        ("pass", False),
    ],
)
def test_what_counts_as_a_claim(body: str, yes: bool) -> None:
    [test] = functions_that_test(f"def helper():\n    assert False\n\ndef test_it():\n    {body}\n")
    assert claims(test) == yes


@pytest.mark.slow
def test_what_shares_a_name_hides_no_other() -> None:
    """Of two tests of one name in a file Python keeps the last, and nobody misses the first."""
    for path in sorted(HERE.rglob("test_*.py")):
        names = [test.name for test in functions_that_test(path.read_text(encoding="utf-8"))]
        assert sorted(names) == sorted(set(names)), path
