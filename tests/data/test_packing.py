import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from marrow.data.packing import Piece, Row, best_fit, cut, join, lay_end_to_end, pack

Documents = list[tuple[int, NDArray[np.uint16]]]


@st.composite
def documents(draw: st.DrawFn) -> Documents:
    """Documents whose tokens are all different, so that each can be told from the others."""
    lengths = draw(st.lists(st.integers(2, 60), max_size=25))
    ends = np.cumsum([0, *lengths])
    return [(i * 7, np.arange(low, high, dtype=np.uint16)) for i, (low, high) in enumerate(pairwise(ends))]


def predicted(rows: list[Row]) -> Counter[tuple[int, int, int]]:
    """What a model trained on the rows sees: (document, token, next token)."""
    return Counter(
        (piece.document_id, int(a), int(b))
        for row in rows
        for piece in row
        for a, b in pairwise(piece.tokens)
    )


def expected(given_documents: Documents) -> Counter[tuple[int, int, int]]:
    return Counter(
        (document_id, int(a), int(b)) for document_id, tokens in given_documents for a, b in pairwise(tokens)
    )


@settings(deadline=None, max_examples=300)
@given(
    documents=documents(),
    context=st.integers(2, 40),
    max_padding=st.sampled_from([0.0, 0.03, 0.5, 1.0]),
    window_tokens=st.sampled_from([1, 20, 200, 1 << 20]),
)
def test_every_token_is_predicted_exactly_once(
    documents: Documents, context: int, max_padding: float, window_tokens: int
) -> None:
    rows = list(pack(documents, context, max_padding=max_padding, window_tokens=window_tokens))
    assert predicted(rows) == expected(documents)
    tokens_of = dict(documents)
    for row in rows:
        assert 2 <= sum(len(piece.tokens) for piece in row) <= context + 1
        for piece in row:
            assert len(piece.tokens) >= 2, "a piece of one token predicts nothing"
            whole = tokens_of[piece.document_id]
            assert np.array_equal(piece.tokens, whole[piece.offset : piece.offset + len(piece.tokens)])


@settings(deadline=None)
@given(documents=documents(), context=st.integers(2, 40), window_tokens=st.sampled_from([1, 50, 1 << 20]))
def test_a_document_that_fits_is_never_cut_where_padding_is_free(
    documents: Documents, context: int, window_tokens: int
) -> None:
    rows = list(pack(documents, context, max_padding=1, window_tokens=window_tokens))
    pieces = Counter(piece.document_id for row in rows for piece in row)
    for document_id, tokens in documents:
        assert pieces[document_id] == -(-(len(tokens) - 1) // context)


@settings(deadline=None)
@given(documents=documents(), context=st.integers(2, 40))
def test_packing_is_deterministic(documents: Documents, context: int) -> None:
    def places() -> list[list[tuple[int, int, int]]]:
        rows = pack(documents, context, window_tokens=100)
        return [[(p.document_id, p.offset, len(p.tokens)) for p in row] for row in rows]

    assert places() == places()


@pytest.mark.parametrize(
    ("low", "high"),
    [(2, 40), (20, 2000), (300, 320), (513, 513), (514, 514), (340, 340), (2, 2)],
    ids=["short", "mixed", "none fit together", "exact", "one over", "two thirds", "smallest"],
)
def test_padding_stays_under_the_limit(low: int, high: int) -> None:
    lengths = np.random.default_rng(0).integers(low, high + 1, size=4000)
    texts = ((i, np.zeros(length, dtype=np.uint16)) for i, length in enumerate(lengths))
    rows = list(pack(texts, 512, max_padding=0.03, window_tokens=1 << 18))
    stored = sum(len(piece.tokens) for row in rows for piece in row)
    assert 1 - stored / (513 * len(rows)) <= 0.03


@pytest.mark.parametrize("longest", [100, 300, 513])
def test_best_fit_needs_hardly_more_rows_than_any_packing(longest: int) -> None:
    lengths = np.random.default_rng(0).integers(2, longest + 1, size=2000).tolist()
    # No packing needs fewer rows than these: all tokens in full rows, or a row for each large item.
    fewest = max(-(-sum(lengths) // 513), sum(length > 513 // 2 for length in lengths))
    assert len(best_fit(lengths, 513)) <= 1.01 * fewest


@settings(deadline=None, max_examples=200)
@given(data=st.data(), capacity=st.integers(1, 200))
def test_best_fit_puts_each_item_into_one_row(data: st.DataObject, capacity: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    rows = best_fit(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= capacity for row in rows)
    # Any two rows hold more than one row's worth, or the rule would have put them together.
    sizes = [sum(lengths[item] for item in row) for row in rows]
    assert len(sizes) < 2 or sum(sorted(sizes)[:2]) > capacity


def test_best_fit_chooses_the_fullest_row_with_room() -> None:
    assert best_fit([7, 5, 3, 5], 10) == [[0, 2], [1, 3]]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(2, 20), max_size=20), capacity=st.integers(3, 20))
def test_rows_laid_end_to_end_leave_at_most_one_place_empty(lengths: list[int], capacity: int) -> None:
    pieces = [Piece(i, 0, np.arange(length)) for i, length in enumerate(lengths)]
    rows = list(lay_end_to_end(pieces, capacity))
    sizes = [sum(len(piece.tokens) for piece in row) for row in rows]
    assert all(size >= capacity - 1 for size in sizes[:-1])


def test_pieces_overlap_by_one_token() -> None:
    pieces = list(cut(5, np.arange(8), context=3))
    assert [(piece.offset, piece.tokens.tolist()) for piece in pieces] == [
        (0, [0, 1, 2, 3]),
        (3, [3, 4, 5, 6]),
        (6, [6, 7]),
    ]
    assert [piece.tokens.tolist() for piece in cut(5, np.arange(4), context=3)] == [[0, 1, 2, 3]]


def test_a_document_is_bos_ids_eos() -> None:
    document = join(np.array([70, 80], dtype=np.int32), 0, 1, np.uint16)
    assert document.tolist() == [0, 70, 80, 1]
    assert document.dtype == np.uint16
    assert join(np.array([], dtype=np.int32), 0, 1, np.uint32).tolist() == [0, 1]


def test_memory_is_bounded_by_the_window() -> None:
    rng = np.random.default_rng(0)
    documents = ((i, np.zeros(int(rng.integers(2, 900)), np.uint16)) for i in range(4000))
    tracemalloc.start()
    try:
        stored = sum(len(piece.tokens) for row in pack(documents, 64, window_tokens=1000) for piece in row)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 3.6 MB of tokens go through a window of 2 kB; pieces are objects of some hundred bytes each.
    assert peak_bytes < 2 * stored / 10
