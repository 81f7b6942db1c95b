import math
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import UsageError
from marrow.loader.mixture import BLOCK, Mixture, Phase
from marrow.loader.plan import FullShuffle, WindowShuffle

WEIGHT = st.one_of(st.just(0.0), st.floats(0.01, 100))


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    num_sources = draw(st.integers(1, 6))
    starts = sorted(draw(st.sets(st.integers(1, 6000), max_size=3)))
    phases = []
    for start in (0, *starts):
        weights = draw(st.lists(WEIGHT, min_size=num_sources, max_size=num_sources))
        phases.append(Phase(start, tuple(weights) if any(weights) else (1.0,) * num_sources))
    # Every source has some weight in the last phase.
    last = phases[-1]
    phases[-1] = Phase(last.start, tuple(weight or 1.0 for weight in last.weights))
    orders = [FullShuffle(draw(st.integers(20, 3000)), seed) for seed in range(num_sources)]
    return Mixture(orders, phases, draw(st.integers(0, 99)))


def depth(sources: int) -> int:
    return math.ceil(math.log2(sources)) if sources > 1 else 0


@settings(deadline=None, max_examples=60)
@given(mixture=mixtures(), first=st.integers(0, 9000), count=st.integers(1, 3000))
def test_each_source_comes_in_its_own_order_without_a_gap(mixture: Mixture, first: int, count: int) -> None:
    """From position 0 on, what a source gave is a prefix of its own order, in every number of positions."""
    positions = np.arange(first + count)
    sources, places = mixture.places(positions)
    for source in range(len(mixture.phases[0].weights)):
        mine = places[sources == source]
        whole = mixture.counts(first + count)[source]
        assert len(mine) == whole
        # Inside a block of 1024 positions the order is mixed; a block that is not over yet may have
        # begun with later ones.
        assert len(set(mine.tolist())) == len(mine)
        assert mine.max(initial=-1) < whole + BLOCK
    starts = [phase.start for phase in mixture.phases]
    borders = {
        border
        for low, high in pairwise([*starts, first + count + 1])
        for border in (*range(low, high, BLOCK), *[start for start in starts if start == high])
    }
    for border in sorted(border for border in borders if border <= first + count):
        for source, number in enumerate(mixture.counts(border)):
            head = places[:border][sources[:border] == source]
            assert sorted(head.tolist()) == list(range(number))


@settings(deadline=None, max_examples=60)
@given(mixture=mixtures(), data=st.data())
def test_a_position_is_a_formula(mixture: Mixture, data: st.DataObject) -> None:
    every = mixture.rows(np.arange(3000))
    some = data.draw(st.lists(st.integers(0, 2999), min_size=1, max_size=30))
    assert mixture.rows(np.array(some)).tolist() == every[some].tolist()


@settings(deadline=None, max_examples=60)
@given(mixture=mixtures(), position=st.integers(0, 12_000))
def test_counts_are_those_of_going_there(mixture: Mixture, position: int) -> None:
    sources, _ = mixture.places(np.arange(position))
    expected = np.bincount(sources, minlength=len(mixture.phases[0].weights)).tolist()
    assert list(mixture.counts(position)) == expected
    assert sum(expected) == position


@settings(deadline=None, max_examples=40)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=9),
    blocks=st.one_of(st.integers(0, 10), st.integers(0, 10**12)),
)
def test_counts_follow_the_weights(weights: list[float], blocks: int) -> None:
    mixture = Mixture([FullShuffle(7, 0)] * len(weights), [Phase(0, tuple(weights))], 0)
    position = blocks * BLOCK
    for count, weight in zip(mixture.counts(position), weights, strict=True):
        exact = position * weight / sum(weights)
        # Half a position at each level of the tree, and the rounding of shares to 2^-31 each.
        assert abs(count - exact) <= 0.5 * depth(len(weights)) + 0.5 + position * depth(len(weights)) * 2**-30


def test_a_batch_has_about_its_share_of_each_source() -> None:
    mixture = Mixture([FullShuffle(1000, 0)] * 2, [Phase(0, (3, 1))], 0)
    sources, _ = mixture.places(np.arange(64 * 1024))
    of_batch = sources.reshape(-1, 64).sum(axis=1)
    assert abs(of_batch.mean() - 16) < 0.01
    # By chance alone: standard deviation sqrt(64 * 3/16) = 3.5; slightly less within blocks.
    assert 2.5 < of_batch.std() < 4
    # No beat: the source of a position says nothing about that of the next.
    assert abs(np.corrcoef(sources[:-1], sources[1:])[0, 1]) < 5 / math.sqrt(len(sources))


def test_a_source_is_gone_through_whole_before_it_repeats() -> None:
    """Upsampling: a small source comes again and again, every row once an epoch of its own."""
    mixture = Mixture([FullShuffle(100, 0), FullShuffle(10_000, 1)], [Phase(0, (1, 1))], 0)
    end = 2 * BLOCK
    assert mixture.epochs(end) == (BLOCK / 100, BLOCK / 10_000)
    rows = mixture.rows(np.arange(end))
    seen = Counter(rows[rows < 100].tolist())
    assert set(seen.values()) <= {10, 11} and sum(seen.values()) == BLOCK


def test_phases_change_the_weights_at_their_position() -> None:
    mixture = Mixture(
        [FullShuffle(10**6, 0)] * 3,
        [Phase(0, (1, 0, 0)), Phase(1500, (0, 1, 1)), Phase(4000, (1, 1, 2))],
        0,
    )
    assert mixture.counts(1500) == (1500, 0, 0)
    assert mixture.counts(4000) == (1500, 1250, 1250)
    assert mixture.counts(4000 + 4 * BLOCK) == (1500 + BLOCK, 1250 + BLOCK, 1250 + 2 * BLOCK)


def test_rows_of_sources_do_not_overlap() -> None:
    orders = [FullShuffle(10, 0), WindowShuffle([4, 4, 3], 1, 2), FullShuffle(5, 2)]
    mixture = Mixture(orders, [Phase(0, (1, 1, 1))], 0)
    assert mixture.num_rows == 26
    sources, places = mixture.places(np.arange(3000))
    rows = mixture.rows(np.arange(3000))
    firsts = [0, 10, 21]
    for source, order in enumerate(orders):
        mine = sources == source
        assert (rows[mine] - firsts[source]).tolist() == order.rows(places[mine]).tolist()


def test_what_comes_ahead_covers_every_source() -> None:
    orders = [WindowShuffle([10] * 8, seed, 2) for seed in range(3)]
    mixture = Mixture(orders, [Phase(0, (1, 2, 1)), Phase(2000, (0, 1, 1))], 0)
    for position in range(0, 5000, 500):
        soon = set((mixture.ahead(position, 500) // 10).tolist())
        wanted = set((mixture.rows(np.arange(position, position + 500)) // 10).tolist())
        # A block's inner order may reach up to a block farther than counts say.
        assert len(wanted - soon) <= 6
        if position >= 2000 + BLOCK:
            assert min(soon) >= 8


def test_any_position_of_a_trillion_in_microseconds() -> None:
    mixture = Mixture([FullShuffle(10**12, 0)] * 4, [Phase(0, (1, 2, 3, 4)), Phase(10**11, (4, 3, 2, 1))], 0)
    times = []
    for trial in range(20):
        start_s = time.perf_counter()
        mixture.rows(47_123_456_789 * trial + np.arange(1024))
        times.append((time.perf_counter() - start_s) / 1024)
    assert min(times) < 20e-6  # about 0.4 here
    times.clear()
    for _ in range(5):
        start_s = time.process_time()
        assert sum(mixture.counts(10**18)) == 10**18
        times.append(time.process_time() - start_s)
    assert min(times) < 10e-3


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([], "at least one"),
        ([Phase(1, (1, 1))], "begin at"),
        ([Phase(0, (1, 1)), Phase(5, (1, 1)), Phase(5, (1, 1))], "begin at"),
        ([Phase(0, (1,))], "1 weights for 2"),
        ([Phase(0, (1, -1))], "cannot be shares"),
        ([Phase(0, (1, math.nan))], "cannot be shares"),
        ([Phase(0, (1, math.inf))], "cannot be shares"),
        ([Phase(0, (0, 0))], "cannot be shares"),
        ([Phase(0, (1e308, 1e308))], "cannot be shares"),
        ([Phase(0, (1, 1e-12))], "smallest"),
        ([Phase(0, (1, 0)), Phase(9, (1, 0))], "source 1 has weight 0"),
    ],
)
def test_weights_that_make_no_sense_are_refused(phases: list[Phase], said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        Mixture([FullShuffle(5, 0)] * 2, phases, 0)
    assert error.value.hint


def test_no_sources_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one source"):
        Mixture([], [Phase(0, ())], 0)


def test_the_name_holds_what_the_order_depends_on() -> None:
    def name(*phases: Phase) -> str:
        return Mixture([FullShuffle(5, 0), FullShuffle(6, 0)], phases, 0).name

    names = [
        name(Phase(0, (1, 2))),
        name(Phase(0, (2, 1))),
        name(Phase(0, (1, 2)), Phase(9, (1, 1))),
        name(Phase(0, (1, 2)), Phase(8, (1, 1))),
    ]
    assert len(set(names)) == 4
    assert all(a != b for a, b in pairwise(names))


def test_the_mixed_order_is_golden() -> None:
    """A change would send every mixed run that resumes to other rows."""
    mixture = Mixture([FullShuffle(5, 0), FullShuffle(6, 1)], [Phase(0, (1, 2)), Phase(12, (1, 1))], 3)
    assert mixture.rows(np.arange(24)).tolist() == GOLDEN


GOLDEN = [7, 6, 0, 8, 2, 5, 4, 10, 9, 1, 8, 9, 4, 0, 4, 10, 1, 6, 5, 7, 7, 6, 4, 2]
