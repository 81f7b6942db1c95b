"""Pipelines played through: nothing waits for ever, nothing is done twice, little is kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.train.parallel.schedule import BACKWARD, FORWARD, Action, actions, bubble

shapes = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3)).map(
    # ranks, micro-batches (a multiple of ranks where interleaved), stages a rank
    lambda shape: (shape[0], shape[1] * (shape[0] if shape[2] > 1 else 1), shape[2])
)


def played(ranks: int, micros: int, stages_per_rank: int) -> int:
    """Play all ranks, an action a round; return the rounds. What waits for ever fails."""
    orders = [actions(rank, ranks, micros, stages_per_rank) for rank in range(ranks)]
    last = ranks * stages_per_rank - 1
    done: set[Action] = set()
    rounds = 0
    while any(orders):
        ready = []
        for order in orders:
            if not order:
                continue
            kind, stage, micro = order[0]
            if kind == FORWARD:
                needs = {Action(FORWARD, stage - 1, micro)} if stage else set()
            else:
                needs = {Action(FORWARD, stage, micro)}
                needs |= {Action(BACKWARD, stage + 1, micro)} if stage < last else set()
            if needs <= done:
                ready.append(order)
        assert ready, "every rank waits for another"
        done |= {order.pop(0) for order in ready}
        rounds += 1
    return rounds


@given(shapes)
def test_every_micro_batch_goes_through_every_stage_once_each_way(shape):
    ranks, micros, stages_per_rank = shape
    found = [action for rank in range(ranks) for action in actions(rank, ranks, micros, stages_per_rank)]
    assert sorted(found) == sorted(
        Action(kind, stage, micro)
        for kind in (FORWARD, BACKWARD)
        for stage in range(ranks * stages_per_rank)
        for micro in range(micros)
    )
    for rank in range(ranks):
        assert all(a.stage % ranks == rank for a in actions(rank, ranks, micros, stages_per_rank))


@given(shapes)
def test_no_rank_waits_for_ever(shape):
    assert played(*shape) >= 2 * shape[1] * shape[2]


@given(st.integers(1, 6), st.integers(1, 12))
def test_a_rank_keeps_no_more_activations_than_stages_behind_it(ranks, micros):
    for rank in range(ranks):
        kept = most = 0
        for action in actions(rank, ranks, micros):
            kept += 1 if action.kind == FORWARD else -1
            most = max(most, kept)
        assert most == min(ranks - rank, micros)


@pytest.mark.parametrize(("ranks", "micros"), [(1, 4), (2, 4), (4, 4), (4, 16)])
def test_the_bubble_is_what_the_formula_says(ranks, micros):
    """Forward and backward take a round each here: 2 micros of work, the rest is the bubble."""
    rounds = played(ranks, micros, 1)
    assert 1 - 2 * micros / rounds == pytest.approx(bubble(ranks, micros))


def test_more_stages_a_rank_make_the_bubble_smaller():
    # In rounds of one stage's work, of which interleaved ranks have twice as many, half as long.
    plain, interleaved = played(4, 8, 1), played(4, 8, 2) / 2
    assert interleaved < plain
    assert bubble(4, 8, 2) < bubble(4, 8)
