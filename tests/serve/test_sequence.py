"""A sequence counts its tokens, and each second of its life belongs to exactly one stage."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core.records import Sampling
from marrow.serve.sequence import Request, Sequence

STAGES = ["queue", "prefill", "decode", "preempted"]
TIMES = st.lists(
    st.tuples(st.sampled_from(STAGES), st.integers(0, 5000).map(lambda ms: ms / 1024)), max_size=20
)


def sequence(prompt: tuple[int, ...] = (5, 6, 7), arrived_s: float = 10.0) -> Sequence:
    return Sequence(1, Request(prompt, Sampling()), seed=0, arrived_s=arrived_s)


@given(TIMES)
def test_the_stages_add_up_to_the_time_it_took(moves: list[tuple[str, float]]) -> None:
    one = sequence()
    now_s, spent, stage = 10.0, dict.fromkeys(STAGES, 0.0), "queue"
    for later, after_s in moves:
        now_s += after_s
        spent[stage] += after_s
        one.enter(later, now_s)  # type: ignore[arg-type]
        stage = later
    one.enter(None, now_s + 1)
    spent[stage] += 1
    assert one.ledger == {name: seconds for name, seconds in spent.items() if name in one.ledger}
    assert sum(one.ledger.values()) == sum(spent.values()) == now_s + 1 - 10.0


def test_after_the_end_no_time_is_charged() -> None:
    one = sequence()
    one.enter(None, 12.0)
    one.enter("decode", 20.0)
    one.enter(None, 30.0)
    assert one.ledger == {"queue": 2.0}


def test_entering_the_stage_it_is_in_does_not_cut_it() -> None:
    one = sequence()
    one.enter("queue", 11.0)
    assert one.ledger == {}
    one.enter("prefill", 12.0)
    assert one.ledger == {"queue": 2.0}


def test_a_new_one_waits_with_its_whole_prompt_missing() -> None:
    one = sequence()
    assert (one.status, one.stage, one.stage_since_s) == ("waiting", "queue", 10.0)
    assert (one.num_prompt, one.num_drawn, one.num_missing) == (3, 0, 3)
    assert not one.is_decoding
    assert one.deadline_s == math.inf
    assert one.finish_reason is None


@pytest.mark.parametrize(
    ("num_computed", "drawn", "missing", "decoding"),
    [
        (0, 0, 3, False),
        (2, 0, 1, False),  # the last of the prompt is computed by a prefill
        (3, 1, 1, True),
        (3, 2, 2, False),
        (0, 2, 5, False),  # preempted: all of it is computed again
        (5, 3, 1, True),
    ],
)
def test_decoding_is_one_missing_token_after_the_prompt(
    num_computed: int, drawn: int, missing: int, decoding: bool
) -> None:
    one = sequence()
    one.tokens += range(drawn)
    one.num_computed = num_computed
    assert (one.num_drawn, one.num_missing, one.is_decoding) == (drawn, missing, decoding)


def test_drawn_tokens_do_not_reach_the_request_nor_another_sequence() -> None:
    request = Request((1, 2), Sampling())
    one, other = (Sequence(number, request, seed=0, arrived_s=0.0) for number in (1, 2))
    one.tokens.append(3)
    one.blocks.append(9)
    one.enter(None, 1.0)
    assert (request.prompt, other.tokens, other.blocks, other.ledger) == ((1, 2), [1, 2], [], {})
    assert one != other, "two sequences of one request are two"
