"""The training run on a tiny corpus: learning, resuming, stopping, refusing."""

import hashlib
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from marrow.core.config import load_recipe
from marrow.core.errors import DiskFull, Interrupted, ModelError, RecipeError, TrainError
from marrow.core.frozen_map import FrozenMap
from marrow.core.span import Ledger
from marrow.kernels import device
from marrow.kernels.attention.attention import attention, pack
from marrow.loader.config import LoaderRecipe, SourceRecipe
from marrow.loader.loader import Loader
from marrow.models import huggingface
from marrow.models.config import ModelConfig
from marrow.models.decoder import Decoder
from marrow.train.config import TrainRecipe
from marrow.train.loop import Run, train
from marrow.train.loss import Loss

Make = Callable[..., TrainRecipe]
RESULTS = (
    "model.safetensors",
    "config.json",
    "snapshots/step-000000.safetensors",
    "snapshots/step-000006.safetensors",
    "state/tensors.safetensors",
    "state/state.json",
)


def run(
    corpus: Path, recipe: TrainRecipe, model: ModelConfig, folder: Path, name: str = "out", **more: Any
) -> Any:
    """Train into folder/name, with folder/work to resume from."""
    (folder / name).mkdir(parents=True)
    facts = train(
        recipe, model, corpus / "shards", corpus / "tokenizer", folder / name, folder / "work", **more
    )
    return folder / name, facts


def results(folder: Path) -> dict[str, str]:
    """Give the hash of each result: the bytes of a model make no readable difference."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in RESULTS}


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


@pytest.mark.slow
def test_the_loss_goes_down(corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path) -> None:
    recipe = tiny_recipe(steps=60, batch_rows=8, log_every=10)
    out, facts = run(corpus, recipe, tiny_model, tmp_path)
    seen = losses(out)
    assert [step for step, _ in seen] == [10, 20, 30, 40, 50, 60]
    # ln(352) = 5.9 nats is to know nothing, 2.5 are 12 tokens to choose from.
    assert seen[0][1] > 5 and seen[-1][1] < 2.5
    assert facts["loss"] == seen[-1][1]
    assert facts["steps"] == 60 and facts["samples"] == [0, 480]


def test_the_results_load_and_are_what_was_trained(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    out, facts = run(corpus, tiny_recipe(), tiny_model, tmp_path)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == sorted(
        [*RESULTS, "metrics.jsonl"]
    )
    decoder = huggingface.load(out)
    assert decoder.config.num_parameters() == facts["num_parameters"]
    first = Decoder(decoder.config, seed=1)
    huggingface.load_weights(decoder, out / "snapshots/step-000000.safetensors")
    for mine, other in zip(first.parameters(), decoder.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_same_bits(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path, dtype: str
) -> None:
    recipe = tiny_recipe(dtype=dtype, log_every=1)
    whole, _ = run(corpus, recipe, tiny_model, tmp_path / "whole")

    def interrupt_at_5(step: int, figures: Mapping[str, float]) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="after step 5 of 12"):
        run(corpus, recipe, tiny_model, tmp_path / "broken", log=interrupt_at_5)
    assert signal.getsignal(signal.SIGINT) is handler
    broken, facts = run(corpus, recipe, tiny_model, tmp_path / "broken", "again")
    assert facts["resumed_from"] == 5
    assert results(whole) == results(broken)
    assert losses(whole) == losses(broken)


def test_sigterm_is_a_stop_too(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(
            corpus,
            tiny_recipe(log_every=1),
            tiny_model,
            tmp_path,
            log=lambda step, figures: os.kill(os.getpid(), signal.SIGTERM),
        )
    assert (tmp_path / "work" / "checkpoint-00000001").is_dir()


CHILD = """
import json, os, pickle, random, signal, sys
from pathlib import Path
from marrow.train.loop import train

corpus, folder, settings, kill_at = sys.argv[1:]
recipe, model = pickle.loads(bytes.fromhex(settings))
out = Path(folder) / f"out-{os.getpid()}"
out.mkdir(parents=True)

def die(step, figures):
    if step == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)

facts = train(recipe, model, Path(corpus, "shards"), Path(corpus, "tokenizer"), out,
              Path(folder, "work"), log=die)
print(json.dumps([str(out), facts["resumed_from"]]))
"""


def start_child(corpus: Path, recipe: TrainRecipe, model: ModelConfig, folder: Path, kill_at: int) -> Any:
    arguments = [
        str(corpus),
        str(folder),
        pickle.dumps((recipe, model)).hex(),
        str(kill_at),
    ]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    recipe = tiny_recipe(log_every=1, checkpoint_every_steps=3)
    whole, _ = run(corpus, recipe, tiny_model, tmp_path / "whole")
    child = start_child(corpus, recipe, tiny_model, tmp_path / "killed", kill_at=8)
    child.communicate(timeout=100)
    assert child.returncode == -signal.SIGKILL
    out, facts = run(corpus, recipe, tiny_model, tmp_path / "killed")
    assert facts["resumed_from"] == 6
    assert results(whole) == results(out)
    assert losses(whole) == losses(out)


@pytest.mark.slow
def test_a_run_killed_at_any_instant_goes_on_to_the_same_bits(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    """Not at a chosen line but at a chosen time, in the middle of checkpoints too: one every step."""
    recipe = tiny_recipe(steps=120, dtype="bfloat16", threads=2, checkpoint_every_steps=1, log_every=10)
    model = replace(tiny_model, hidden_size=64)
    whole, _ = run(corpus, recipe, model, tmp_path / "whole")
    for round_ in range(4):
        child = start_child(corpus, recipe, model, tmp_path / "killed", kill_at=-1)
        work = tmp_path / "killed" / "work"
        before = set(work.glob("checkpoint-*"))
        deadline = time.monotonic() + 100
        while set(work.glob("checkpoint-*")) == before and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.037 * (round_ + 1))
        child.kill()
        child.communicate(timeout=100)
        if child.returncode == 0:
            break
    _, facts = run(corpus, recipe, model, tmp_path / "killed", "last")
    assert facts["resumed_from"] > 0
    for name in ("model.safetensors", "state/tensors.safetensors", "state/state.json"):
        assert (whole / name).read_bytes() == (tmp_path / "killed" / "last" / name).read_bytes()
    assert losses(whole) == losses(tmp_path / "killed" / "last")


@pytest.mark.slow
def test_two_trainings_side_by_side_do_not_touch(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    """Two threads of one process, one after the other and both at once, reach the same weights."""
    recipes = {"one": tiny_recipe(seed=1), "two": tiny_recipe(seed=2)}
    alone = {
        name: run(corpus, recipe, tiny_model, tmp_path / f"{name}-alone")[0]
        for name, recipe in recipes.items()
    }
    together: dict[str, Path] = {}

    def work(name: str) -> None:
        together[name] = run(corpus, recipes[name], tiny_model, tmp_path / name)[0]

    threads = [threading.Thread(target=work, args=(name,)) for name in recipes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in recipes:
        assert results(alone[name]) == results(together[name])


def test_a_damaged_checkpoint_costs_steps_not_the_run(
    corpus: Path,
    tiny_recipe: Make,
    tiny_model: ModelConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = tiny_recipe(checkpoint_every_steps=4)
    whole, _ = run(corpus, recipe, tiny_model, tmp_path)
    path = tmp_path / "work" / "checkpoint-00000012" / "tensors.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        again, facts = run(corpus, recipe, tiny_model, tmp_path, "again")
    assert facts["resumed_from"] == 8
    assert [word.split(":")[0] for word in facts["damaged_checkpoints"]] == ["checkpoint-00000012"]
    assert "checkpoint-00000012 is damaged" in caplog.text
    assert results(whole) == results(again)


@pytest.mark.parametrize(
    "change",
    ["recipe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("model", "resume=False"))],
)
def test_checkpoints_of_another_run_are_not_used(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path, change: str
) -> None:
    recipe = tiny_recipe(checkpoint_every_steps=4)
    run(corpus, recipe, tiny_model, tmp_path)
    if change == "recipe":
        recipe = replace(recipe, lr=0.01)
    elif change == "model":
        tiny_model = replace(tiny_model, num_layers=1)
    _, facts = run(corpus, recipe, tiny_model, tmp_path, "again", resume=change != "resume=False")
    assert facts["resumed_from"] == 0


def test_how_often_to_save_does_not_begin_a_new_run(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    run(corpus, tiny_recipe(checkpoint_every_steps=4), tiny_model, tmp_path)
    _, facts = run(corpus, tiny_recipe(checkpoint_every_steps=5), tiny_model, tmp_path, "again")
    assert facts["resumed_from"] == 12


def test_dtype_and_threads_are_decided_once(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    recipe = tiny_recipe(dtype="auto", log_every=1)
    with pytest.raises(Interrupted):
        run(
            corpus,
            recipe,
            tiny_model,
            tmp_path,
            log=lambda step, figures: os.kill(os.getpid(), signal.SIGINT),
        )
    path = tmp_path / "work" / "run.json"
    kept = json.loads(path.read_text())
    assert kept["decisions"]["threads"] >= 1
    kept["decisions"]["dtype"] = "float32" if kept["decisions"]["dtype"] == "bfloat16" else "bfloat16"
    path.write_text(json.dumps(kept))
    threads = torch.get_num_threads()
    _, facts = run(corpus, recipe, tiny_model, tmp_path, "again")
    assert facts["decisions"] == kept["decisions"]
    assert torch.get_num_threads() == threads


def test_micro_batches_do_not_change_the_run(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    """Rows have different numbers of targets: a mean of means would differ by more than rounding."""
    whole, _ = run(corpus, tiny_recipe(steps=3, log_every=1), tiny_model, tmp_path / "one")
    parts, _ = run(corpus, tiny_recipe(steps=3, log_every=1, micro_batches=4), tiny_model, tmp_path / "four")
    # fp32 sums in another order; three steps of Newton-Schulz multiply that by up to some hundreds.
    for (_, one), (_, four) in zip(losses(whole), losses(parts), strict=True):
        assert one == pytest.approx(four, rel=1e-5)
    one, four = huggingface.load(whole), huggingface.load(parts)
    for mine, other in zip(one.parameters(), four.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


def test_the_loss_is_that_of_each_document_alone(corpus: Path, tiny_model: ModelConfig) -> None:
    """Packing is only a layout: the batch's loss is the sum over its documents, each by itself."""
    with Loader(corpus / "shards", 4, seed=3) as loader:
        batch = next(loader)
        model = tiny_model.with_vocab_size(loader.manifest.vocab_size)
    decoder = Decoder(model, seed=0, dtype=torch.float64)
    together = Loss(decoder)(batch).nats
    apart = 0.0
    for document in batch.document_N.unique():
        chosen = batch.document_N == document
        packing = pack(batch.document_N[chosen], int(chosen.sum()))
        hidden = decoder(
            batch.tokens_N[chosen],
            batch.positions_N[chosen],
            lambda layer, q, k, v, packing=packing: attention(q, k, v, packing),
        )
        loss = torch.nn.functional.cross_entropy(
            decoder.logits(hidden), batch.targets_N[chosen], ignore_index=-100, reduction="sum"
        )
        apart += float(loss.nan_to_num(0.0).detach())
    assert together == pytest.approx(apart, rel=1e-9)
    assert batch.document_N.unique().numel() > 4


def test_a_loss_that_is_not_finite_names_step_and_samples(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    recipe = tiny_recipe(lr=1e30, adamw_lr=1e30, warmup_steps=0, seed=7)
    with pytest.raises(TrainError, match=r"is (nan|inf) at step 1 \(samples 4 to 7 .* seed 7\)") as caught:
        run(corpus, recipe, tiny_model, tmp_path)
    assert "lower train.lr" in (caught.value.hint or "")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_another_tokenizer_is_refused(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="another tokenizer"):
        train(tiny_recipe(), tiny_model, corpus / "shards", tmp_path, tmp_path, tmp_path / "work")


def test_a_context_above_the_models_is_refused(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"context = 32 is more than model.max_positions = 16") as caught:
        run(corpus, tiny_recipe(), replace(tiny_model, max_positions=16), tmp_path)
    assert caught.value.hint == "set model.max_positions = 32"


def test_the_ledger_names_the_parts_and_adds_up(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    with Ledger("train") as ledger:
        run(corpus, tiny_recipe(checkpoint_every_steps=4), tiny_model, tmp_path)
    summary = ledger.summary()
    assert {"data wait", "forward", "backward", "optimiser", "checkpoint"} <= set(summary.parts)
    assert sum(part.seconds for part in summary.parts.values()) == pytest.approx(summary.wall_s, rel=1e-6)
    assert summary.parts["forward"].count == 12


def test_progress_and_log_tell_the_figures(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    logged: list[tuple[int, Mapping[str, float]]] = []
    shown: list[Any] = []
    run(
        corpus,
        tiny_recipe(),
        tiny_model,
        tmp_path,
        progress=lambda done, total, unit, figures=None: shown.append((done, total, unit, figures)),
        log=lambda step, figures: logged.append((step, figures)),
    )
    assert [step for step, _ in logged] == [4, 8, 12]
    assert all(
        figures.keys() >= {"loss", "lr", "tokens_per_s", "mfu", "data_wait_share", "seconds"}
        for _, figures in logged
    )
    assert shown[-1][:3] == (12, 12, "step")
    assert set(shown[-1][3]) == {"loss", "tok/s", "MFU", "data wait"}


def test_a_full_disk_is_an_error_with_a_hint_wherever_it_is_met(
    corpus: Path,
    tiny_recipe: Make,
    tiny_model: ModelConfig,
    tmp_path: Path,
    small_disk: Callable[[str], Path],
) -> None:
    """The snapshot of the first step, then the results, do not fit; the run goes on when they do."""
    disk = small_disk("256k")
    large = replace(tiny_model, hidden_size=160)
    folders = corpus / "shards", corpus / "tokenizer"
    (tmp_path / "out").mkdir()
    with pytest.raises(DiskFull, match="cannot write a snapshot: no space left"):
        train(tiny_recipe(), large, *folders, tmp_path / "out", disk / "work")
    (disk / "out").mkdir()
    recipe = tiny_recipe(checkpoint_every_steps=6)
    with pytest.raises(DiskFull, match="cannot write the trained model: no space left"):
        train(recipe, large, *folders, disk / "out", tmp_path / "work")
    out, facts = run(corpus, recipe, large, tmp_path, "again")
    assert facts["resumed_from"] == 12
    assert (out / "model.safetensors").exists()


def test_rows_that_do_not_divide_are_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[train]\nbatch_rows = 6\nmicro_batches = 4\n")
    with pytest.raises(RecipeError, match=r"recipe.toml:2.* batch_rows = 6 does not divide"):
        load_recipe(path, {"train": TrainRecipe})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns itself while it traces
def test_compiled_layers_learn_the_same(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    if not device.compiler_available():
        pytest.skip("needs a C++ compiler")
    eager, _ = run(corpus, tiny_recipe(log_every=1), tiny_model, tmp_path / "eager")
    compiled, facts = run(corpus, tiny_recipe(log_every=1, compile="on"), tiny_model, tmp_path / "compiled")
    assert facts["decisions"]["compile"]
    # Fused fp32 operations round elsewhere; Newton-Schulz multiplies that over twelve steps.
    for (_, one), (_, other) in zip(losses(eager), losses(compiled), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_compile_on_without_a_compiler_is_refused(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TrainError, match=r"needs a C\+\+ compiler"):
        run(corpus, tiny_recipe(compile="on"), tiny_model, tmp_path)
    _, facts = run(corpus, tiny_recipe(compile="auto"), tiny_model, tmp_path, "auto")
    assert not facts["decisions"]["compile"]


MIXED = LoaderRecipe(
    phases=(0, 20),
    window=1,
    mixture=FrozenMap({"a": SourceRecipe("", (1.0, 3.0)), "b": SourceRecipe("", (1.0, 1.0))}),
)


def test_a_mixture_trains_and_is_resumed_to_the_same_bits(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(steps=12, checkpoint_every_steps=5)
    whole, facts = run(corpus, recipe, tiny_model, tmp_path / "whole", loader=MIXED)
    assert facts["order"].startswith("mixture from 0: 1.0, 1.0; from 20: 3.0, 1.0")
    taken = Run.take_step

    def stop_at_eight(self: Run) -> None:
        if self.step == 8:
            raise InterruptedError("as if killed")
        taken(self)

    monkeypatch.setattr(Run, "take_step", stop_at_eight)
    with pytest.raises(InterruptedError):
        run(corpus, recipe, tiny_model, tmp_path / "broken", loader=MIXED)
    monkeypatch.setattr(Run, "take_step", taken)
    quicker = replace(MIXED, prefetch=0)  # how batches are made ready decides nothing
    resumed, again = run(corpus, recipe, tiny_model, tmp_path / "broken", "again", loader=quicker)
    assert again["resumed_from"] == 5
    assert results(whole) == results(resumed)


@pytest.mark.slow
def test_another_order_is_another_run(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    full, _ = run(corpus, tiny_recipe(), tiny_model, tmp_path / "full")
    windowed, facts = run(
        corpus, tiny_recipe(), tiny_model, tmp_path / "window", loader=LoaderRecipe(window=1)
    )
    assert facts["order"] == "window of 1 shards"
    assert losses(full) != losses(windowed)


def test_a_budget_of_tokens_ends_the_run_after_whole_steps(
    corpus: Path, tiny_recipe: Make, tiny_model: ModelConfig, tmp_path: Path
) -> None:
    recipe = tiny_recipe(steps=12, batch_rows=4, warmup_steps=12)
    loader = LoaderRecipe(stop_after=5 * 4 * 32 + 31)  # five steps of 4 rows of 32 tokens, and a part
    _, facts = run(corpus, recipe, tiny_model, tmp_path, loader=loader)
    assert facts["steps"] == 5 and facts["samples"] == [0, 20]
    with pytest.raises(TrainError, match=r"stop_after = 64 tokens are less than one step") as caught:
        run(corpus, recipe, tiny_model, tmp_path / "less", loader=LoaderRecipe(stop_after=64))
    assert "raise loader.stop_after" in str(caught.value.hint)
