"""What can never run is refused by the name of its field; what can run passes, up to the last token."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core.errors import RequestError
from marrow.core.records import Sampling
from marrow.models.config import ModelConfig
from marrow.serve.sequence import Request
from marrow.serve.validation import MAX_LOGPROBS, MAX_STOP, validate

CONFIG = ModelConfig(vocab_size=100, max_positions=32)
ROOMY = 1 << 20


def refusal(request: Request, cache_tokens: int = ROOMY) -> RequestError:
    with pytest.raises(RequestError) as caught:
        validate(request, CONFIG, cache_tokens)
    assert caught.value.hint
    return caught.value


SAMPLINGS = [
    ({"max_tokens": -1}, "max_tokens", "at least 0"),
    ({"temperature": -0.1}, "temperature", "0 to 100"),
    ({"temperature": 100.1}, "temperature", "0 to 100"),
    ({"temperature": math.nan}, "temperature", "0 to 100"),
    ({"temperature": math.inf}, "temperature", "0 to 100"),
    ({"top_k": -1}, "top_k", "at least 0"),
    ({"top_p": 0.0}, "top_p", "above 0, up to 1"),
    ({"top_p": 1.01}, "top_p", "above 0, up to 1"),
    ({"top_p": math.nan}, "top_p", "above 0, up to 1"),
    ({"stop": ("x",) * (MAX_STOP + 1)}, "stop", f"at most {MAX_STOP}"),
    ({"stop": ("x", "")}, "stop", "not empty"),
    ({"seed": 1 << 64}, "seed", "64-bit"),
    ({"seed": -(1 << 63) - 1}, "seed", "64-bit"),
]


@pytest.mark.parametrize(("fields", "param", "allowed"), SAMPLINGS)
def test_what_cannot_be_drawn_is_refused_with_what_is_allowed(fields, param: str, allowed: str) -> None:
    error = refusal(Request((1,), Sampling(**fields)))
    assert error.param == param
    assert repr(fields[param]) in str(error)
    assert allowed in error.hint


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"temperature": 0.0},
        {"temperature": 100.0},
        {"top_k": 10**9},
        {"top_p": 1e-9},
        {"top_p": 1.0},
        {"stop": ("x",) * MAX_STOP},
        {"seed": -(1 << 63)},
        {"seed": (1 << 64) - 1},
    ],
)
def test_the_last_allowed_value_is_allowed(fields) -> None:
    request = Request((0, 99), Sampling(**fields))
    assert validate(request, CONFIG, ROOMY) is None


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
def test_just_what_fits_model_and_cache_passes(length: int, wanted: int, cache_tokens: int) -> None:
    """The last token drawn is never computed, so it needs no place in the cache."""
    request = Request((7,) * length, Sampling(max_tokens=wanted))
    fits = length > 0 and length + wanted <= CONFIG.max_positions and length + wanted - 1 <= cache_tokens
    if fits:
        assert validate(request, CONFIG, cache_tokens) is None
    else:
        most = CONFIG.max_positions if length + wanted > CONFIG.max_positions else cache_tokens + 1
        # At fault is the prompt where no number of new tokens would do.
        assert refusal(request, cache_tokens).param == ("prompt" if not 0 < length < most else "max_tokens")


def test_a_prompt_that_the_cache_cannot_hold_is_at_fault_itself() -> None:
    assert refusal(Request((7,) * 32, Sampling(max_tokens=0)), cache_tokens=1).param == "prompt"
    assert refusal(Request((7,) * 9, Sampling(max_tokens=1)), cache_tokens=8).param == "prompt"
    assert refusal(Request((7,) * 8, Sampling(max_tokens=2)), cache_tokens=8).param == "max_tokens"


def test_a_prompt_that_leaves_no_room_is_at_fault_itself() -> None:
    assert refusal(Request((1,) * 32, Sampling(max_tokens=1))).param == "prompt"
    error = refusal(Request((1,) * 31, Sampling(max_tokens=2)))
    assert (error.param, error.hint) == ("max_tokens", "at most 32 together")


def test_a_small_cache_says_what_to_change() -> None:
    error = refusal(Request((1,) * 8, Sampling(max_tokens=8)), cache_tokens=14)
    assert "do not fit the KV cache of 14" in str(error)
    assert "serve.kv_memory" in error.hint


@pytest.mark.parametrize(
    ("prompt", "named"), [((5, -1), "-1"), ((5, 100), "100"), ((10**9, 5), "1000000000")]
)
def test_a_token_outside_the_vocabulary_is_named(prompt: tuple[int, ...], named: str) -> None:
    error = refusal(Request(prompt, Sampling()))
    assert (error.param, error.hint) == ("prompt", "token ids are 0 to 99")
    assert f"token {named} is not in the vocabulary of 100" in str(error)


@pytest.mark.parametrize("count", [-1, MAX_LOGPROBS + 1])
def test_a_number_of_logprobs_out_of_range_is_refused(count: int) -> None:
    error = refusal(Request((1,), Sampling(), num_logprobs=count))
    assert (error.param, error.hint) == ("logprobs", f"allowed: 0 to {MAX_LOGPROBS}")


@pytest.mark.parametrize("count", [None, 0, MAX_LOGPROBS])
def test_logprobs_in_range_pass(count: int | None) -> None:
    assert validate(Request((1,), Sampling(), num_logprobs=count), CONFIG, ROOMY) is None


def test_every_field_that_can_be_refused_is_refused_here() -> None:
    """Whoever adds a field to Sampling decides here whether any value of it is impossible."""
    checked = {param for _, param, _ in SAMPLINGS}
    assert set(Sampling.__dataclass_fields__) - checked == {"ignore_eos"}
