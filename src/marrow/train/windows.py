"""Sliding windows over long documents, packed in rows: who scores which token, with what before it.

    document  . . . . . . . . . . . .        context 6, stride 3
    window 1  S S S S S S
    window 2        c c c S S S              S scores the next token, c only gives context
    window 3              c c c S S S

Every token behind bos is scored exactly once, with at least context - stride tokens before it
where the document has that many. Inputs of a document of L tokens are its first L - 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

OPEN_ROWS = 64  # rows that may still be filled while packing; more gains nothing


@dataclass(frozen=True, slots=True)
class Window:
    """Inputs [start, end) of a flat token array; the successors of [score_from, end) are scored."""

    start: int
    end: int
    score_from: int

    @property
    def length(self) -> int:
        """Inputs in the window."""
        return self.end - self.start


def windows_of(start: int, num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Yield the windows of one document of `num_tokens` tokens that begins at `start`.

    Args: context: inputs of a window at most, >= 1. stride: in [1, context].
    """
    stop = start + num_tokens - 1
    scored = start
    while scored < stop:
        first = max(start, scored - (context - stride))
        end = min(first + context, stop)
        yield Window(first, end, scored)
        scored = end


def rows_of(windows: Sequence[Window], context: int) -> list[list[Window]]:
    """Pack windows in rows of `context` inputs: longest first, each in the first row with room."""
    rows: list[list[Window]] = []
    still_open: list[tuple[int, list[Window]]] = []
    for window in sorted(windows, key=lambda window: (-window.length, window.start)):
        for i, (room, row) in enumerate(still_open):
            if window.length <= room:
                row.append(window)
                still_open[i] = (room - window.length, row)
                break
        else:
            rows.append([window])
            still_open = [*still_open[-OPEN_ROWS + 1 :], (context - window.length, rows[-1])]
    return rows


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of windows as flat arrays of B * T; N = scored inputs.

    position counts from the window's start; document is the window's number in its row (padding
    takes its predecessor's). scored_N: places in the flat arrays; target_N: where the scored
    token stands in the text.
    """

    tokens_BT: npt.NDArray[np.int64]
    position_BT: npt.NDArray[np.int64]
    document_BT: npt.NDArray[np.int64]
    scored_N: npt.NDArray[np.int64]
    target_N: npt.NDArray[np.int64]


def batch_of(rows: Sequence[Sequence[Window]], tokens: npt.NDArray[np.int64], context: int) -> Batch:
    """Lay rows out. Padding repeats token 0 behind the row's last window, where nobody sees it."""
    shape = (len(rows), context)
    tokens_BT, position_BT, document_BT = (np.zeros(shape, np.int64) for _ in range(3))
    scored: list[npt.NDArray[np.int64]] = []
    targets: list[npt.NDArray[np.int64]] = []
    for b, row in enumerate(rows):
        at = 0
        for number, window in enumerate(row):
            end = at + window.length
            tokens_BT[b, at:end] = tokens[window.start : window.end]
            position_BT[b, at:end] = np.arange(window.length)
            document_BT[b, at:] = number
            inputs = np.arange(window.score_from, window.end)
            scored.append(b * context + at + inputs - window.start)
            targets.append(inputs + 1)
            at = end
    return Batch(
        tokens_BT.ravel(),
        position_BT.ravel(),
        document_BT.ravel(),
        np.concatenate(scored),
        np.concatenate(targets),
    )
