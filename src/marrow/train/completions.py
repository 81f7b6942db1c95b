"""How many of a model's completions are Python.

A completion is cut where its token budget ends, almost always inside a statement. So a text is
judged as the beginning of a program, by this rule:

1. Keep whole logical lines only. A logical line ends at a newline outside brackets and triple
   quotes and without a backslash before it. What follows the last such newline is dropped.
2. Close what is still open after them: a block header, a `try` without a handler, a decorator.
3. The rest has to parse with the grammar of the running interpreter.
4. At least one logical line that is neither blank nor a comment must end after the prompt: to
   add nothing is a failure.

Every generator is judged by the same rule: the decoder and, beside it, the n-gram.
"""

import ast
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from marrow.core.protocols import Generator
from marrow.core.records import Completion, FinishReason, Sampling
from marrow.text.tokenizer import Tokenizer
from marrow.train.ngram import NgramModel


@dataclass(frozen=True, slots=True)
class PythonShare:
    """How many of `num_completions` parse, and which."""

    parses: tuple[bool, ...]

    @property
    def share(self) -> float:
        """Parsing completions / all completions."""
        return sum(self.parses) / len(self.parses)


def share_of_python(
    generator: Generator, prompts: Sequence[str], sampling: Sampling, *, samples: int = 1
) -> tuple[PythonShare, list[Completion]]:
    """Complete each prompt `samples` times, with seeds 0, 1, ... added to the sampling's, and judge.

    Returns: the judgement and the completions, both prompt by prompt within each seed.
    """
    completions: list[Completion] = []
    for seed in range(samples):
        drawn = replace(sampling, seed=(sampling.seed or 0) + seed)
        completions += generator.generate(prompts, drawn)
    parses = [
        parses_as_python(completion.text, prompt=prompts[i % len(prompts)])
        for i, completion in enumerate(completions)
    ]
    return PythonShare(tuple(parses)), completions


def parses_as_python(text: str, *, prompt: str = "") -> bool:
    """Tell whether prompt + text begins a Python program; see the head of this file for the rule."""
    whole = prompt + text
    lines = [line for line in logical_lines(whole) if line.text.strip()]
    if not lines or lines[-1].end <= len(prompt):
        return False
    program = whole[: lines[-1].end] + _closing(lines)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # "\d" and `1 is 2` are odd, but Python
            warnings.simplefilter("ignore", DeprecationWarning)
            ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class LogicalLine:
    """A whole logical line: its column, its text without comments, and where it ends in the source."""

    column: int
    text: str
    end: int


_PIECE = re.compile(
    r"""(?P<comment>\#[^\n]*)
    |(?P<triple>\"\"\"|''')
    |(?P<string>"(?:\\.|\\\n|[^"\\\n])*"|'(?:\\.|\\\n|[^'\\\n])*')
    |(?P<open>[(\[{])|(?P<close>[)\]}])
    |(?P<joined>\\\n)|(?P<newline>\n)|(?P<other>[^\#"'()\[\]{}\\\n]+|.)""",
    re.VERBOSE,
)
_TRIPLE_END = {quotes: re.compile(rf"(?:\\[\s\S]|[^\\])*?{quotes}") for quotes in ('"""', "'''")}


def logical_lines(source: str) -> list[LogicalLine]:
    """Split a source text, which need not be valid, into its whole logical lines."""
    lines: list[LogicalLine] = []
    depth, start, at = 0, 0, 0
    kept: list[str] = []
    while at < len(source):
        piece = _PIECE.match(source, at)
        assert piece is not None, "one of the alternatives takes any character"
        kind, at = piece.lastgroup, piece.end()
        if kind == "triple":
            closed = _TRIPLE_END[piece[0]].match(source, at)
            if closed is None:
                break
            at = closed.end()
            kept.append('""')
        elif kind == "newline" and depth == 0:
            text = "".join(kept)
            indent = source[start:at]
            lines.append(LogicalLine(len(indent) - len(indent.lstrip(" \t\f")), text, at))
            start, kept = at, []
        else:
            depth = max(0, depth + (kind == "open") - (kind == "close"))
            kept.append("" if kind == "comment" else piece[0])
    return lines


def _closing(lines: Sequence[LogicalLine]) -> str:
    """Write the lines that close what the last of `lines` leaves open."""
    blocks: list[tuple[int, str, str]] = []  # column, indentation and first word of each open block
    header = False
    for line in lines:
        indent = line.text[: len(line.text) - len(line.text.lstrip())]
        while blocks and blocks[-1][0] > line.column:
            blocks.pop()
        word = re.match(r"\w*", line.text.lstrip())
        first = word[0] if word and word[0] else line.text.lstrip()[:1]
        header = line.text.rstrip().endswith(":")
        entry = (line.column, indent, first)
        if blocks and blocks[-1][0] == line.column:
            blocks[-1] = entry
        else:
            blocks.append(entry)
    _, indent, first = blocks[-1]
    closing = ""
    if header:
        closing += f"{indent} case _: pass\n" if first == "match" else f"{indent} pass\n"
    elif first == "@":
        closing += f"{indent}def _(): pass\n"
    for _, indent, first in reversed(blocks):
        if first == "try":
            closing += f"{indent}finally: pass\n"
    return closing


@dataclass(frozen=True, slots=True)
class NgramGenerator:
    """An n-gram model as a `Generator`, for comparison. It knows temperature, max_tokens and seed."""

    model: NgramModel
    tokenizer: Tokenizer

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[Completion]:
        """Complete each prompt."""
        completions = []
        for prompt in prompts:
            prompt_N = np.array(self.tokenizer.encode(prompt, bos=True))
            tokens_N = self.model.sample(
                prompt_N,
                sampling.max_tokens,
                seed=sampling.seed or 0,
                temperature=sampling.temperature,
                stop_id=self.tokenizer.eos_id,
            )
            ids = [int(token) for token in tokens_N]
            reason: FinishReason = "length" if len(ids) == sampling.max_tokens else "stop"
            completions.append(
                Completion(self.tokenizer.decode(ids), tuple(ids), reason, prompt_tokens=len(prompt_N))
            )
        return completions
