"""What a client is sent: pieces that add up to the whole, in the shapes of OpenAI's API."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core.errors import RequestError
from marrow.serve.answers import ChatChoice, Choice
from marrow.serve.sequence import TokenLogprobs
from marrow.serve.stream import Delta, Stream

WORDS = ["", "a", " b", "größer", "\n", "\ufffd", "🙂"]


class Tokens:
    """The bytes of token ids without end."""

    def __getitem__(self, token_id: int) -> bytes:
        return WORDS[token_id % len(WORDS)].encode()


TOKENS: Any = Tokens()


def text_of(token_id: int) -> str:
    return WORDS[token_id % len(WORDS)]


def played(
    kind: type[Choice], deltas: Sequence[Delta], **options: Any
) -> tuple[Choice, list[dict[str, Any]]]:
    """Send pieces through a real stream; return the choice and its events, the opening first."""
    stream = Stream(3, lambda: None, None)
    for delta in deltas:
        stream.put(delta)
    choice = kind(0, stream, TOKENS, **options)
    events = choice.opening()
    events += [event for delta in stream if (event := choice.take(delta)) is not None]
    return choice, events


scores = st.builds(
    TokenLogprobs,
    st.integers(0, 20),
    st.none() | st.floats(-30, 0),
    st.lists(st.tuples(st.integers(0, 20), st.floats(-30, 0)), max_size=3, unique_by=lambda one: one[0]).map(
        tuple
    ),
)
pieces = st.lists(
    st.builds(
        Delta,
        st.sampled_from(WORDS),
        st.lists(st.integers(0, 9), max_size=3).map(tuple),
        st.lists(scores, max_size=2).map(tuple),
        st.lists(scores, max_size=2).map(tuple),
    ),
    max_size=8,
)
ends = st.builds(
    Delta,
    st.sampled_from(WORDS),
    finish_reason=st.sampled_from(["stop", "length"]),
    num_shared=st.integers(0, 3),
)


@given(pieces, ends, st.sampled_from(["", "the prompt ", "ü"]), st.booleans())
def test_streamed_pieces_of_a_completion_add_up_to_the_whole(
    middle: list[Delta], end: Delta, echo: str, with_logprobs: bool
) -> None:
    deltas = [*middle, end]
    choice, events = played(Choice, deltas, echo=echo, with_logprobs=with_logprobs)
    whole = choice.whole()
    assert (
        "".join(event["text"] for event in events) == whole["text"] == echo + "".join(d.text for d in deltas)
    )
    assert [event["finish_reason"] for event in events if event["finish_reason"]] == [end.finish_reason]
    assert events[-1]["finish_reason"] == whole["finish_reason"] == end.finish_reason
    assert choice.num_drawn == sum(len(delta.token_ids) for delta in deltas)
    assert choice.num_shared == end.num_shared
    if not with_logprobs:
        assert whole["logprobs"] is None and all(event["logprobs"] is None for event in events)
        return
    told = [event["logprobs"] for event in events if event["logprobs"] is not None]
    for name, values in whole["logprobs"].items():
        assert [value for one in told for value in one[name]] == values, name
    all_scores = [score for d in deltas for score in (*d.prompt_logprobs, *d.logprobs)]
    assert whole["logprobs"]["token_logprobs"] == [score.logprob for score in all_scores]


@given(pieces, ends)
def test_offsets_say_where_each_token_begins(middle: list[Delta], end: Delta) -> None:
    choice, _ = played(Choice, [*middle, end], with_logprobs=True)
    told = choice.whole()["logprobs"]
    assert told["text_offset"] == list(accumulate(map(len, told["tokens"]), initial=0))[:-1]
    assert choice.whole()["logprobs"] == told, "asked twice, said twice"


@given(pieces, ends)
def test_streamed_pieces_of_a_chat_add_up_to_the_message(middle: list[Delta], end: Delta) -> None:
    choice, events = played(ChatChoice, [*middle, end], with_logprobs=True)
    whole = choice.whole()
    assert events[0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in event["delta"] for event in events[1:])
    said = "".join(event["delta"].get("content", "") for event in events)
    assert whole["message"] == {"role": "assistant", "content": said, "refusal": None}
    told = [one for event in events if event["logprobs"] for one in event["logprobs"]["content"]]
    assert whole["logprobs"] == {"content": told, "refusal": None}
    for one in told:
        assert bytes(one["bytes"]).decode() == one["token"]


def test_likeliest_tokens_are_told_by_their_text() -> None:
    score = TokenLogprobs(1, -0.5, ((1, -0.5), (2, -1.5)))
    end = Delta("a", (1,), (score,), finish_reason="stop")
    whole = played(Choice, [end], with_logprobs=True)[0].whole()
    assert whole["logprobs"]["top_logprobs"] == [{"a": -0.5, " b": -1.5}]
    chat = played(ChatChoice, [end], with_logprobs=True)[0].whole()
    (told,) = chat["logprobs"]["content"]
    assert (told["token"], told["logprob"]) == ("a", -0.5)
    assert [(one["token"], one["logprob"]) for one in told["top_logprobs"]] == [("a", -0.5), (" b", -1.5)]


def test_the_first_token_of_a_prompt_has_no_likelihood() -> None:
    first = Delta(prompt_logprobs=(TokenLogprobs(1, None),))
    _, events = played(Choice, [first, Delta(finish_reason="length")], with_logprobs=True)
    assert events[0]["logprobs"]["token_logprobs"] == [None]
    assert events[0]["logprobs"]["top_logprobs"] == [None]


@pytest.mark.parametrize("kind", [Choice, ChatChoice])
def test_a_piece_that_shows_nothing_is_not_sent(kind: type[Choice]) -> None:
    """Half a character, or the beginning of a stop string: tokens that have no text yet."""
    choice, events = played(kind, [Delta(token_ids=(5,)), Delta("🙂", (6,), finish_reason="stop")])
    assert len(events) == len(choice.opening()) + 1
    assert choice.num_drawn == 2


@pytest.mark.parametrize("kind", [Choice, ChatChoice])
def test_a_server_that_stops_says_so_and_what_to_do(kind: type[Choice]) -> None:
    choice = kind(0, Stream(1, lambda: None, None), TOKENS)
    with pytest.raises(RequestError, match="shutting down") as caught:
        choice.take(Delta("half an ans", finish_reason="abort"))
    assert caught.value.status == 503 and caught.value.hint == "try another replica"


def test_a_choice_that_has_not_ended_names_no_reason() -> None:
    stream = Stream(1, lambda: None, None)
    choice = ChatChoice(4, stream, TOKENS)
    choice.take(Delta("so far"))
    assert choice.whole()["finish_reason"] is None and choice.num_shared == 0
    assert choice.whole()["message"]["content"] == "so far" and choice.whole()["index"] == 4
