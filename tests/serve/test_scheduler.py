"""The scheduler's promises, checked against a model that only counts."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.records import Sampling
from marrow.serve.blocks import BlockManager
from marrow.serve.scheduler import Chunk, Scheduler
from marrow.serve.sequence import Request, Sequence


def make(num_blocks: int = 100, *, budget: int = 16, places: int = 4, size: int = 4) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, size, "m"), max_batch_tokens=budget, max_sequences=places)


def sequence(id: int, prompt: list[int], max_tokens: int = 4) -> Sequence:
    return Sequence(id, Request(tuple(prompt), Sampling(max_tokens=max_tokens)), seed=0, arrived_s=0.0)


def next_token(tokens: list[int]) -> int:
    return (sum(tokens) * 31 + len(tokens)) % 5


def step(scheduler: Scheduler) -> list[Chunk]:
    """Plan, "compute" (a token is a function of those before it), commit, finish."""
    chunks = scheduler.plan()
    scheduler.check()
    for chunk in chunks:
        scheduler.commit(chunk)
        if chunk.draws:
            s = chunk.sequence
            s.tokens.append(next_token(s.tokens))
            if s.num_drawn == s.request.sampling.max_tokens:
                scheduler.finish(s, "length")
    scheduler.check()
    return chunks


def shape(chunks: list[Chunk]) -> list[tuple[int, int, int]]:
    return [(c.sequence.id, c.start, c.count) for c in chunks]


def test_decoding_goes_first_and_prefill_takes_the_rest() -> None:
    scheduler = make(budget=8)
    scheduler.add(sequence(1, [1] * 5))
    assert shape(step(scheduler)) == [(1, 0, 5)]
    scheduler.add(sequence(2, [2] * 20))
    assert shape(step(scheduler)) == [(1, 5, 1), (2, 0, 7)]
    assert shape(step(scheduler)) == [(1, 6, 1), (2, 7, 7)]
    assert shape(step(scheduler)) == [(1, 7, 1), (2, 14, 6)]


def test_a_long_prompt_does_not_hold_up_a_short_one_behind_it_for_ever() -> None:
    scheduler = make(budget=8)
    scheduler.add(sequence(1, [1] * 12))
    scheduler.add(sequence(2, [2] * 3))
    assert shape(step(scheduler)) == [(1, 0, 8)]
    assert shape(step(scheduler)) == [(1, 8, 4), (2, 0, 3)]


def test_places_are_bounded() -> None:
    scheduler = make(places=2)
    for id in range(1, 5):
        scheduler.add(sequence(id, [id]))
    assert {c.sequence.id for c in step(scheduler)} == {1, 2}


def test_the_youngest_yields_and_comes_back_first() -> None:
    scheduler = make(num_blocks=5, budget=32, size=4)  # 4 blocks to use
    first, second = sequence(1, [1] * 7, 9), sequence(2, [2] * 7, 9)
    third = sequence(3, [3] * 7, 2)
    for s in (first, second):
        scheduler.add(s)
    step(scheduler)  # both fill 2 blocks with 7 tokens, and draw the 8th
    scheduler.add(third)
    step(scheduler)  # the 8th has a place
    chunks = step(scheduler)  # the 9th of the first needs a block: the second gives way
    assert [c.sequence.id for c in chunks] == [1]
    assert second.status == "waiting" and second.num_preemptions == 1 and not second.blocks
    assert [s.id for s in scheduler.waiting] == [2, 3]
    while not scheduler.is_idle:
        step(scheduler)
    assert [len(s.tokens) for s in (first, second, third)] == [16, 16, 9]


def test_the_second_of_two_equal_prompts_computes_the_rest_only() -> None:
    scheduler = make()
    scheduler.add(sequence(1, list(range(10))))
    step(scheduler)
    scheduler.add(sequence(2, list(range(10))))
    assert (2, 8, 2) in shape(step(scheduler))


def test_prompt_logprobs_share_nothing() -> None:
    scheduler = make()
    scheduler.add(sequence(1, list(range(10))))
    step(scheduler)
    request = Request(tuple(range(10)), Sampling(), num_logprobs=0, prompt_logprobs=True)
    scheduler.add(Sequence(2, request, seed=0, arrived_s=0.0))
    assert (2, 0, 10) in shape(step(scheduler))


def test_new_weights_recompute_everything() -> None:
    scheduler = make()
    first, second = sequence(1, list(range(10)), 8), sequence(2, list(range(10)), 8)
    scheduler.add(first)
    step(scheduler)
    scheduler.add(second)
    step(scheduler)
    scheduler.restart("other")
    scheduler.check()
    assert scheduler.blocks.num_available == scheduler.blocks.num_usable
    assert shape(step(scheduler)) == [(1, 0, 12), (2, 0, 4)]


def test_what_can_never_run_is_known_before() -> None:
    scheduler = make(num_blocks=5, size=4)
    assert scheduler.fits(17)  # the 17th token is drawn, never computed
    assert not scheduler.fits(18)


traffic = st.lists(
    st.tuples(
        st.integers(0, 3),  # steps before it comes
        st.integers(1, 20),  # prompt
        st.integers(1, 8),  # max_tokens
        st.integers(0, 2),  # which beginning it shares
        st.integers(-1, 6),  # aborted after so many steps; -1 never
    ),
    min_size=1,
    max_size=14,
)


def play(
    requests: list[tuple[int, int, int, int, int]],
) -> tuple[list[list[tuple[int, int, int]]], Scheduler]:
    """Run the traffic through a cache that is far too small; return every plan."""
    scheduler = make(num_blocks=9, budget=7, places=3, size=4)
    pending = [
        (delay, sequence(id, [shared] * length, most), abort)
        for id, (delay, length, most, shared, abort) in enumerate(requests, 1)
        if scheduler.fits(length + most)
    ]
    live: list[tuple[Sequence, int]] = []
    plans = []
    clock = 0
    while pending or not scheduler.is_idle:
        while pending and pending[0][0] <= 0:
            _, s, abort = pending.pop(0)
            scheduler.add(s)
            live.append((s, clock + abort if abort >= 0 else 10_000))
        pending = [(delay - (i == 0), s, abort) for i, (delay, s, abort) in enumerate(pending)]
        for s, end in live:
            if clock >= end:
                scheduler.finish(s, "abort")
        chunks = step(scheduler)
        assert sum(c.count for c in chunks) <= 7
        assert len({c.sequence.id for c in chunks}) == len(chunks)
        plans.append(shape(chunks))
        clock += 1
        assert clock < 2_000, "the scheduler does not get on"
    for s, end in live:
        assert s.status == "finished"
        alone = list(s.request.prompt)
        while len(alone) < len(s.tokens):
            alone.append(next_token(alone))
        assert s.tokens == alone, "a preempted sequence drew something else"
        if end == 10_000:
            assert s.num_drawn == s.request.sampling.max_tokens
    return plans, scheduler


@settings(deadline=None)
@given(traffic)
def test_any_traffic_ends_within_the_budget_and_leaks_nothing(
    requests: list[tuple[int, int, int, int, int]],
) -> None:
    _, scheduler = play(requests)
    assert scheduler.blocks.num_available == scheduler.blocks.num_usable


@settings(deadline=None, max_examples=20)
@given(traffic)
def test_the_same_day_can_be_replayed(requests: list[tuple[int, int, int, int, int]]) -> None:
    assert play(requests)[0] == play(requests)[0]


def test_a_crowded_day_does_preempt() -> None:
    """The two properties above say little if the small cache is never short."""
    rng = random.Random(0)
    requests = [(0, rng.randrange(8, 20), 8, i % 3, -1) for i in range(30)]
    assert play(requests)[1].num_preemptions > 3
