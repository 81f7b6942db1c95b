"""What a layer may need from a layer above it. The command line wires the two together.

Generator   turns prompts into completions: an engine in this process, an HTTP client, an n-gram
"""

from collections.abc import Sequence
from typing import Protocol

from marrow.core.records import Completion, Sampling


class Generator(Protocol):
    """Completes prompts."""

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[Completion]:
        """Complete each prompt; the result is in the order of the prompts, without their text.

        Equal prompts and equal `sampling` (with a seed) give equal completions.
        """
