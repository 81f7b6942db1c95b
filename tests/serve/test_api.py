"""Bodies are read strictly: what is accepted is exactly what was meant."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core.errors import RequestError
from marrow.serve.api import CompletionBody, error_body, parse

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*CompletionBody.model_fields, "other"]), values, max_size=6))
def test_any_json_is_taken_or_refused_never_a_crash(body: dict[str, Any]) -> None:
    refused: RequestError | None = None
    try:
        taken = parse(CompletionBody, json.dumps({"model": "m", "prompt": "x"} | body).encode(), "m")
    except RequestError as error:
        refused = error
    if refused is None:
        names = [name for name in body if name != "stream_options"]
        assert [getattr(taken, name) for name in names] == [body[name] for name in names]
    else:
        assert refused.status in (400, 404)
        assert json.loads(json.dumps(error_body(refused)))["error"]["message"]


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_as_json_or_as_a_body(data: bytes) -> None:
    with pytest.raises(RequestError):
        parse(CompletionBody, data, "m")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(RequestError):
        parse(CompletionBody, b"[" * 500_000, "m")
