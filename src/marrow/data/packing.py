"""Packing: documents of any length into rows of T + 1 tokens, with little padding.

    T = 8   | b 1 2 3 e | b 4 e |.|        two documents and one token of padding
            | b 5 6 7 8 9 a b c |          a long document's first piece ...
            | c d e | b f e |.|.|.|        ... and the next, which begins with the former's last

A row of T + 1 tokens predicts all of a piece but its first token, so pieces of a document overlap
by one: every token but bos is predicted exactly once. Documents that fit a row stay whole where
best fit finds rows for them; only what it packs badly is laid end to end and cut at row ends.
Memory is bounded: pieces wait in a window, and rows that are well filled leave it.
Source: best-fit decreasing (Johnson 1974), for training rows Ding et al. 2024.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW_TOKENS = 4 << 20
_WELL_FILLED = 0.99  # of a row; such rows leave the window at once


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one document from `offset` on; the first of them is input only."""

    document_id: int
    offset: int
    tokens: NDArray[Any]


Row = tuple[Piece, ...]


def pack(
    documents: Iterable[tuple[int, NDArray[Any]]],
    context: int,
    *,
    max_padding: float = 0.03,
    window_tokens: int = WINDOW_TOKENS,
) -> Iterator[Row]:
    """Fill rows of `context` + 1 tokens with documents.

    Args: documents: (document id, its tokens from bos to eos, at least 2). max_padding: share of
        padding above which documents that fit a row are cut to fill others.
    Returns: rows; the pieces of a document hold each of its neighbouring pairs exactly once.
    Cost: O(1) per token and O(log pieces) per piece; memory for `window_tokens` and a document.
    """
    capacity = context + 1
    waiting: list[Piece] = []
    waiting_tokens = 0
    stored = cells = 0

    def count(row: Row) -> Row:
        nonlocal stored, cells
        stored += _length(row)
        cells += capacity
        return row

    def settle(rows: Sequence[Row]) -> Iterator[Row]:
        """Let rows go that nothing better comes for; cut pieces if they hold too much padding."""
        used = sum(map(_length, rows))
        if (stored + used) < (1 - max_padding) * (cells + len(rows) * capacity):
            rows = list(lay_end_to_end([piece for row in rows for piece in row], capacity))
        yield from map(count, rows)

    for document_id, tokens in documents:
        for piece in cut(document_id, tokens, context):
            if len(piece.tokens) == capacity:
                yield count((piece,))
            else:
                # A copy, or the short end of a long document keeps all of it in memory.
                waiting.append(replace(piece, tokens=piece.tokens.copy()))
                waiting_tokens += len(piece.tokens)
        if waiting_tokens >= window_tokens:
            rows = best_fit([len(piece.tokens) for piece in waiting], capacity)
            packed = [tuple(waiting[i] for i in row) for row in rows]
            loose = [row for row in packed if _length(row) < _WELL_FILLED * capacity]
            yield from (count(row) for row in packed if _length(row) >= _WELL_FILLED * capacity)
            if sum(map(_length, loose)) > window_tokens // 2:
                yield from settle(loose)
                loose = []
            waiting = [piece for row in loose for piece in row]
            waiting_tokens = sum(len(piece.tokens) for piece in waiting)
    rows = best_fit([len(piece.tokens) for piece in waiting], capacity)
    packed = [tuple(waiting[i] for i in row) for row in rows]
    yield from (count(row) for row in packed if _length(row) >= _WELL_FILLED * capacity)
    yield from settle([row for row in packed if _length(row) < _WELL_FILLED * capacity])


def cut(document_id: int, tokens: NDArray[Any], context: int) -> Iterator[Piece]:
    """Cut a document in pieces of at most `context` + 1 tokens that overlap by one."""
    assert len(tokens) >= 2, "a document is at least bos and eos"
    for start in range(0, len(tokens) - 1, context):
        yield Piece(document_id, start, tokens[start : start + context + 1])


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into as few rows as a simple rule can: the longest first, each where it fits best.

    Args: lengths: of the items, 1 to `capacity` each.
    Returns: the items' indices by row.
    Cost: O(N log N + N capacity / 64): the open rows are one integer with a bit per free space.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # free space -> rows
    mask = 0
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        fitting = mask >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                mask &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        if left := room - length:
            with_room[left].append(row)
            mask |= 1 << left
    return rows


def lay_end_to_end(pieces: Iterable[Piece], capacity: int) -> Iterator[Row]:
    """Fill each row to its end, cutting the piece that crosses it; the rest goes to the next row."""
    row: list[Piece] = []
    room = capacity
    for whole in pieces:
        piece = whole
        while len(piece.tokens) > room:
            if room >= 2:  # one token predicts nothing
                row.append(replace(piece, tokens=piece.tokens[:room]))
                piece = replace(piece, offset=piece.offset + room - 1, tokens=piece.tokens[room - 1 :])
            yield tuple(row)
            row, room = [], capacity
        row.append(piece)
        room -= len(piece.tokens)
    if row:
        yield tuple(row)


def _length(row: Row) -> int:
    return sum(len(piece.tokens) for piece in row)


def join(ids: NDArray[Any], bos_id: int, eos_id: int, dtype: type[np.unsignedinteger[Any]]) -> NDArray[Any]:
    """Make a document of a text's ids: bos + ids + eos."""
    tokens = np.empty(len(ids) + 2, dtype=dtype)
    tokens[0], tokens[1:-1], tokens[-1] = bos_id, ids, eos_id
    return tokens
