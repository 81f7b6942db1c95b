"""How work reports that it moves: one callable, drawn by whoever runs the work.

Layers take `progress: Progress = silent` and call it a few times a second; the command line
draws a bar on a terminal and prints a line every ten seconds elsewhere.
"""

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Receives how far the work is."""

    def __call__(
        self, done: float, total: float | None, unit: str, figures: Mapping[str, str] | None = None
    ) -> None:
        """Report progress.

        Args: done, total: in `unit`s; total None where it is not known. figures: the numbers
            that matter just now, ready to print, such as {"loss": "2.31"}.
        """


def silent(done: float, total: float | None, unit: str, figures: Mapping[str, str] | None = None) -> None:
    """Ignore progress."""
