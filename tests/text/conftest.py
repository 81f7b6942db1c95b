import ast
import inspect
import textwrap

import pytest

from marrow.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Real code of this interpreter, about 250 kB, and a little that is not ASCII."""
    sources = [inspect.getsource(module) for module in (ast, inspect, textwrap)]
    return [*sources, "naïve café, Привет мир, 你好世界, 😀👍🏽\n" * 4]


@pytest.fixture(scope="session")
def tokenizer(corpus: list[str]) -> Tokenizer:
    return Tokenizer.train(corpus, 1024)
