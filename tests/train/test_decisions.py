"""A run decides about its machine once and keeps to it; another run's decisions are never taken."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from marrow.core.errors import SourceError, TrainError
from marrow.kernels import device, dispatch
from marrow.kernels.norms import rms_norm as rms_norm
from marrow.train import decisions as module
from marrow.train.config import TrainRecipe
from marrow.train.decisions import COMPILE_PAYS_STEPS, DTYPES, FILE_NAME, Decisions, decide, torch_threads

FASTER_IN_FP32 = device.DtypeChoice(torch.float32, 40.0, 10.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[device.DtypeChoice]:
    """Replace the measurement by a given one; give those that were made."""
    made: list[device.DtypeChoice] = []

    def measure() -> device.DtypeChoice:
        made.append(FASTER_IN_FP32)
        return made[-1]

    monkeypatch.setattr(device, "choose_dtype", measure)
    return made


@pytest.fixture
def recipe() -> TrainRecipe:
    return TrainRecipe(threads=1, steps=100)


def test_decisions_are_made_once_and_kept(measured, recipe: TrainRecipe, tmp_path: Path) -> None:
    first = decide(recipe, "run", tmp_path)
    assert first == Decisions("float32", 1, False, 40e9, dispatch.chosen("cpu", torch.float32))
    assert first.torch_dtype is torch.float32
    assert decide(recipe, "run", tmp_path) == first
    assert len(measured) == 1, "a resumed run measures nothing"
    kept = json.loads((tmp_path / FILE_NAME).read_text(encoding="utf-8"))
    assert (kept["identity"], kept["torch"]) == ("run", torch.__version__)


def test_a_resume_says_which_kernels_are_others_than_at_the_start(
    measured, recipe: TrainRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = decide(recipe, "run", tmp_path)
    assert first.kernels["rms_norm"] == "cpu"
    assert decide(recipe, "run", tmp_path) == first
    assert not caplog.messages
    dispatch.reset("reference")
    try:
        assert decide(recipe, "run", tmp_path) == first
    finally:
        dispatch.reset()
    assert "rms_norm: cpu, now reference" in caplog.text


def test_a_new_run_takes_nothing_of_the_old_one(measured, recipe: TrainRecipe, tmp_path: Path) -> None:
    decide(recipe, "run", tmp_path)
    for name in ("checkpoint-00000010", "snapshots"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tensors.safetensors").write_bytes(b"old")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    decide(recipe, "run", tmp_path, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert len(measured) == 2


def test_another_run_in_the_folder_is_said_and_begun_anew(
    measured, recipe: TrainRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    decide(recipe, "run", tmp_path)
    (tmp_path / "checkpoint-00000010").mkdir()
    with caplog.at_level(logging.WARNING):
        decide(recipe, "another", tmp_path)
    assert "is of another run" in caplog.text
    assert not (tmp_path / "checkpoint-00000010").exists()
    assert json.loads((tmp_path / FILE_NAME).read_text(encoding="utf-8"))["identity"] == "another"


DAMAGED = [
    "",
    "{",
    "[]",
    "{}",
    '"run"',
    '{"identity": "run"}',
    '{"identity": "run", "decisions": {"dtype": "float32"}}',
    '{"identity": "run", "decisions": {"surprise": 1}}',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_begins_anew_and_says_so(
    measured, recipe: TrainRecipe, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (tmp_path / FILE_NAME).write_text(text, encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        made = decide(recipe, "run", tmp_path)
    assert "damaged" in caplog.text
    assert decide(recipe, "run", tmp_path) == made
    assert len(measured) == 1


@pytest.mark.parametrize(("dtype", "gflops"), [("auto", 40.0), ("float32", 40.0), ("bfloat16", 10.0)])
def test_the_peak_is_that_of_the_dtype_that_is_used(measured, tmp_path: Path, dtype, gflops: float) -> None:
    made = decide(TrainRecipe(threads=1, dtype=dtype), "run", tmp_path)
    assert made.peak_flops == gflops * 1e9
    assert made.torch_dtype == DTYPES["float32" if dtype == "auto" else dtype]


@pytest.mark.parametrize("compiler", [False, True])
@pytest.mark.parametrize("steps", [COMPILE_PAYS_STEPS - 1, COMPILE_PAYS_STEPS])
def test_compiling_is_chosen_where_it_pays_and_can_be_done(
    measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: bool, steps: int
) -> None:
    monkeypatch.setattr(device, "compiler_available", lambda: compiler)
    made = decide(TrainRecipe(threads=1, steps=steps), "run", tmp_path)
    assert made.compile == (compiler and steps >= COMPILE_PAYS_STEPS)


def test_a_compiler_that_is_asked_for_and_missing_is_an_error_before_anything_is_written(
    measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "compiler_available", lambda: False)
    work = tmp_path / "work"
    with pytest.raises(TrainError, match="needs a C\\+\\+ compiler") as caught:
        decide(TrainRecipe(threads=1, compile="on"), "run", work)
    assert 'train.compile = "auto"' in caught.value.hint
    assert not work.exists()
    assert not decide(TrainRecipe(threads=1, compile="off"), "run", work).compile


def test_a_folder_that_cannot_be_made_is_an_error_with_a_hint(
    measured, recipe: TrainRecipe, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(
        SourceError, match=r"cannot begin a training run: .*taken/work: not a directory"
    ) as caught:
        decide(recipe, "run", tmp_path / "taken" / "work", resume=False)
    assert "check the path" in caught.value.hint


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
def test_threads_are_put_back_after_an_error_too() -> None:
    torch.set_num_threads(1)
    with torch_threads(2):
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="a step failed"), torch_threads(3):
            raise ValueError("a step failed")
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1


def test_all_cores_are_used_where_the_recipe_names_no_number(
    measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device, "available_cores", lambda: 1)
    assert decide(TrainRecipe(), "run", tmp_path).threads == 1
    assert TrainRecipe().steps < module.COMPILE_PAYS_STEPS, "the default run is too short to compile"
