"""Which tokens end a text is read off generation_config.json, and odd ones are refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from marrow.core.errors import ModelError
from marrow.core.records import Sampling
from marrow.serve.engine import Engine
from marrow.serve.sequence import Request

GREEDY = Sampling(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of the model's folder without generation_config.json."""
    for path in llama.iterdir():
        if path.name != "generation_config.json":
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def drawn(engine: Engine, *, ignore_eos: bool) -> tuple[int, ...]:
    request = Request((70, 71, 72), dataclasses.replace(GREEDY, ignore_eos=ignore_eos))
    return engine.submit(request).result().token_ids


@pytest.mark.parametrize("form", ["one", "list", "several"])
def test_the_text_ends_with_the_first_token_that_is_named(
    model: Path, start: Callable[..., Engine], form: str
) -> None:
    whole = drawn(start(model), ignore_eos=True)
    stop = whole[3]
    ids = {"one": stop, "list": [stop], "several": [1, stop, whole[5]]}[form]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    engine = start(model)
    assert drawn(engine, ignore_eos=False) == whole[: whole.index(stop) + 1]
    assert drawn(engine, ignore_eos=True) == whole


@pytest.mark.parametrize("text", ["{}", '{"eos_token_id": null}', '{"eos_token_id": []}'])
def test_where_none_is_named_the_models_other_marks_decide(
    model: Path, start: Callable[..., Engine], text: str
) -> None:
    whole = drawn(start(model), ignore_eos=False)
    (model / "generation_config.json").write_text(text)
    assert drawn(start(model), ignore_eos=False) == whole


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "3",
        '{"eos_token_id": "</s>"}',
        '{"eos_token_id": 2.5}',
        '{"eos_token_id": [1, "x"]}',
        '{"eos_token_id": [[1]]}',
        '{"eos_token_id": {"id": 1}}',
    ],
)
def test_what_is_no_token_is_refused_with_the_file(
    model: Path, start: Callable[..., Engine], text: str
) -> None:
    (model / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"generation_config\.json") as caught:
        start(model)
    assert caught.value.hint == "export the model again"
