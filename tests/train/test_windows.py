"""Sliding windows: every token once, with enough before it, laid out without loss."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.train.windows import Window, batch_of, rows_of, windows_of

shapes = st.tuples(st.integers(0, 80), st.integers(1, 24), st.integers(1, 24)).filter(lambda s: s[2] <= s[1])


def test_the_windows_of_the_picture():
    found = list(windows_of(0, 13, context=6, stride=3))
    assert found == [Window(0, 6, 0), Window(3, 9, 6), Window(6, 12, 9)]


@given(shapes, st.integers(0, 1000))
def test_every_token_behind_bos_is_scored_once_with_enough_before_it(shape, start):
    num_tokens, context, stride = shape
    windows = list(windows_of(start, num_tokens, context, stride))
    scored = [i for window in windows for i in range(window.score_from, window.end)]
    assert scored == list(range(start, start + num_tokens - 1))
    for window in windows:
        assert start <= window.start <= window.score_from < window.end
        assert window.length <= context
        for i in range(window.score_from, window.end):
            assert i - window.start >= min(context - stride, i - start)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 12))
@settings(max_examples=60)
def test_rows_hold_every_window_once_and_never_too_much(lengths, context):
    windows, at = [], 0
    for length in lengths:
        windows += windows_of(at, length, context, max(1, context // 2))
        at += length
    rows = rows_of(windows, context)
    packed = [window for row in rows for window in row]
    assert sorted(packed, key=lambda w: (w.start, w.score_from)) == sorted(
        windows, key=lambda w: (w.start, w.score_from)
    )
    assert all(sum(window.length for window in row) <= context for row in rows)
    half_empty = [row for row in rows if sum(window.length for window in row) <= context / 2]
    assert len(half_empty) <= 1  # first fit leaves at most one, while all rows stay open


@given(st.lists(st.integers(2, 40), min_size=1, max_size=12), st.integers(1, 12))
@settings(max_examples=60)
def test_a_batch_shows_each_window_its_own_tokens(lengths, context):
    tokens = np.arange(1, sum(lengths) + 1)
    windows, at = [], 0
    for length in lengths:
        windows += windows_of(at, length, context, max(1, context // 2))
        at += length
    batch = batch_of(rows_of(windows, context), tokens, context)
    # A scored input is followed, in the text, by its target; its position counts inside its window.
    np.testing.assert_array_equal(batch.tokens_BT[batch.scored_N] + 1, tokens[batch.target_N])
    ends = np.cumsum(lengths)
    starts = np.concatenate([[0], ends[:-1]])
    assert sorted(batch.target_N.tolist()) == [
        i for start, end in zip(starts, ends, strict=True) for i in range(start + 1, end)
    ]
    # Walking back `position` places from a scored input stays in one window: tokens fall by one each.
    document_BT = batch.document_BT.reshape(-1, context)
    for place in batch.scored_N.tolist():
        first = place - batch.position_BT[place]
        assert first // context == place // context
        row, columns = place // context, slice(first % context, place % context + 1)
        assert len(set(document_BT[row, columns].tolist())) == 1
        if first % context:
            assert document_BT[row, first % context - 1] != document_BT[row, first % context]
        window = batch.tokens_BT[first : place + 1]
        np.testing.assert_array_equal(window, np.arange(window[0], window[0] + len(window)))
