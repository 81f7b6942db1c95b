"""The training run, read top to bottom: batches, loss, gradients, optimiser, checkpoints.

    loader -> forward -> backward -> optimiser -> figures -> checkpoint -> ... -> model.safetensors

The weights after a step are a function of recipe, model and data alone. A run that was killed,
or stopped with Ctrl-C, goes on from its last checkpoint in `work` and reaches the bits that an
unbroken run reaches (same machine, same number of threads: see `train/decisions.py`).

Axes: N tokens of a micro-batch, C channels.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from marrow.core.errors import Interrupted, ModelError, TrainError, explain_os_errors
from marrow.core.files import publish, temporary_beside
from marrow.core.hashes import hash_file, hash_value
from marrow.core.progress import Progress, silent
from marrow.core.span import span
from marrow.data.manifest import FILE_NAME as MANIFEST_FILE
from marrow.data.manifest import Manifest
from marrow.kernels.device import raise_malloc_thresholds
from marrow.loader.batch import Batch
from marrow.loader.config import LoaderRecipe, settings_of
from marrow.loader.loader import Loader, LoaderState
from marrow.models import huggingface
from marrow.models.config import ModelConfig
from marrow.text.tokenizer import FILE_NAME as TOKENIZER_FILE
from marrow.train.checkpoint import (
    Checkpoint,
    explain_write_errors,
    load_latest,
    save_checkpoint,
    write_state,
)
from marrow.train.config import TrainRecipe
from marrow.train.decisions import Decisions, decide, torch_threads
from marrow.train.meter import FILE_NAME as METRICS_FILE
from marrow.train.meter import Meter, MetricsFile
from marrow.train.parallel.config import ParallelRecipe
from marrow.train.parallel.mesh import Mesh
from marrow.train.schedule import lr_factor
from marrow.train.step import Trained
from marrow.train.stop import StopRequest

CHECKPOINT_SHARE = 0.02  # of the time, at most
Log = Callable[[int, Mapping[str, float]], None]


def train(
    recipe: TrainRecipe,
    model: ModelConfig,
    shards_folder: Path,
    tokenizer_folder: Path,
    out: Path,
    work: Path,
    progress: Progress = silent,
    log: Log = lambda step, figures: None,
    *,
    loader: LoaderRecipe = LoaderRecipe(),  # noqa: B008 - frozen, so one may be shared
    resume: bool = True,
) -> dict[str, Any]:
    """Train a decoder on token shards, or go on with a run that was broken off.

    Args: out: an empty folder; gets model.safetensors and config.json (Hugging Face's), the
        snapshots of step 0 and of the middle, metrics.jsonl, and state/ (masters, moments, place
        in the data). work: keeps checkpoints over kills; of one run alone. log: gets the figures
        of `train/meter.py` every `recipe.log_every` steps. loader: the order of samples, a mixture of
        several folders, a budget of tokens.
    Returns: facts: steps, losses, speed, MFU, shares of waiting and of checkpoints, decisions.
    Raises: ModelError if model, shards and tokenizer do not fit; TrainError if the loss is not
        finite; Interrupted after Ctrl-C or SIGTERM, a checkpoint written; DiskFull, NotPermitted.
    """
    raise_malloc_thresholds()
    folders = loader.folders(shards_folder)
    for folder in folders:
        model = check_inputs(model, folder, tokenizer_folder)
    recipe = within_budget(recipe, loader, Manifest.read(folders[0]).context)
    with span("start"):
        decisions = decide(recipe, identity(recipe, model, loader, folders), work, resume=resume)
    with ExitStack() as stack:
        stack.enter_context(torch_threads(decisions.threads))
        stop = stack.enter_context(StopRequest())
        run = Run(recipe, model, loader, folders, work, decisions, progress, log)
        stack.callback(run.close)
        while run.step < recipe.steps:
            run.take_step()
            if stop.is_asked:
                run.checkpoint()
                raise Interrupted(f"stopped after step {run.step} of {recipe.steps}; it is kept")
            run.checkpoint_if_due()
        with span("checkpoint"), explain_write_errors("write the trained model", out):
            run.publish(out)
        return run.facts()


def check_inputs(model: ModelConfig, shards_folder: Path, tokenizer_folder: Path) -> ModelConfig:
    """Return the model's shape with its vocabulary.

    Raises: ModelError if shards, tokenizer and model do not fit one another.
    """
    manifest = Manifest.read(shards_folder)
    with explain_os_errors("read the tokenizer", tokenizer_folder):
        tokenizer_sha256 = hash_file(tokenizer_folder / TOKENIZER_FILE)
    if tokenizer_sha256 != manifest.tokenizer_sha256:
        raise ModelError(
            f"the shards in {shards_folder} were written with another tokenizer than {tokenizer_folder}",
            hint="write the shards again with this tokenizer",
        )
    if manifest.context > model.max_positions:
        raise ModelError(
            f"shards.context = {manifest.context} is more than model.max_positions = {model.max_positions}",
            hint=f"set model.max_positions = {manifest.context}",
        )
    try:
        return model.with_vocab_size(manifest.vocab_size)
    except ValueError as error:
        raise ModelError(str(error), hint="set model.vocab_size = 0 to take the tokenizer's") from None


def within_budget(recipe: TrainRecipe, loader: LoaderRecipe, context: int) -> TrainRecipe:
    """Return the recipe with no more steps than `loader.stop_after` tokens make whole batches of.

    Raises: TrainError if they make none.
    """
    stop = loader.stop(context)
    if stop is None or stop >= recipe.num_samples:
        return recipe
    steps = stop // recipe.batch_rows
    if steps == 0:
        raise TrainError(
            f"loader.stop_after = {loader.stop_after} tokens are less than one step of {recipe.batch_rows} "
            f"rows of {context} tokens",
            hint="raise loader.stop_after, or lower train.batch_rows",
        )
    return replace(recipe, steps=steps, warmup_steps=min(recipe.warmup_steps, steps))


def identity(recipe: TrainRecipe, model: ModelConfig, loader: LoaderRecipe, folders: Sequence[Path]) -> str:
    """Hash what decides the weights; how often to save and how batches are made ready do not."""
    lasting = replace(recipe, checkpoint_every=0.0, checkpoint_every_steps=0)
    manifests = [hash_file(folder / MANIFEST_FILE) for folder in folders]
    return hash_value([lasting, model, settings_of(loader), manifests])


def open_loader(
    recipe: TrainRecipe, loader: LoaderRecipe, folders: Sequence[Path], state: LoaderState | None
) -> Loader[Batch]:
    """Open the loader of a run, at a checkpoint's state or at the beginning."""
    rows = recipe.batch_rows // recipe.micro_batches
    options: dict[str, Any] = {"prefetch": loader.prefetch, "workers": loader.workers, "order": loader.order}
    if state is None:
        return Loader(list(folders), rows, recipe.seed, **options)
    return Loader.resume(list(folders), rows, state, **options)


class Run:
    """A run between two steps: the loader, the decoder, its optimiser, and the figures so far."""

    def __init__(
        self,
        recipe: TrainRecipe,
        model: ModelConfig,
        loader: LoaderRecipe,
        folders: Sequence[Path],
        work: Path,
        decisions: Decisions,
        progress: Progress,
        log: Log,
    ) -> None:
        self.recipe, self.work, self.decisions = recipe, work, decisions
        self.progress, self.log = progress, log
        with span("start", kernels=decisions.kernels):
            self.trained = Trained.make(
                model, recipe, ParallelRecipe(), Mesh.alone(), dtype=decisions.torch_dtype
            )
            self.optimiser = self.trained.optimiser
            self.decoder = self.trained.stages[0].decoder
            if decisions.compile:
                for layer in self.decoder.layers.values():  # all share one graph, and one for masked batches
                    layer.compile(dynamic=False)
            manifest = Manifest.read(folders[0])
            flops = model.flops_per_token(manifest.context, backward=True)
            self.meter = Meter(flops, decisions.peak_flops)
            self.last_figures: dict[str, float] = {}
            found, self.damaged_checkpoints = load_latest(work)
            self.step = self.resumed_from = found.step if found else 0
            self.loader = open_loader(recipe, loader, folders, self._restore(found) if found else None)
            self.metrics = MetricsFile(work, self.step)
        self.checkpoint_cost_s = 0.0
        self.checkpoint_s = time.perf_counter()  # when the last one was written, or the run began
        self.checkpoint_step = self.step

    def take_step(self) -> None:
        """Move the weights once."""
        if self.step in self.snapshot_steps:
            self._snapshot()
        started_s = time.perf_counter()
        batches = [next(self.loader) for _ in range(self.recipe.micro_batches)]
        wait_s = time.perf_counter() - started_s
        targets = sum(batch.num_targets for batch in batches)
        loss = self.trained.gradients(batches, targets)
        if loss - loss != 0.0:  # inf and nan
            raise self._not_finite("loss", loss, batches)
        with span("optimiser"):
            factor = lr_factor(self.recipe, self.step)
            norm = self.optimiser.step(factor)
        if norm - norm != 0.0:
            raise self._not_finite("gradient norm", norm, batches)
        self.step += 1
        tokens = sum(batch.rows * batch.T for batch in batches)
        self.meter.add(loss, tokens=tokens, targets=targets, wait_s=wait_s)
        self._report(factor, norm)

    def _report(self, factor: float, norm: float) -> None:
        if self.step % self.recipe.log_every and self.step != self.recipe.steps:
            return
        figures = self.meter.read()
        figures |= {"lr": self.recipe.lr * factor, "gradient_norm": norm}
        self.last_figures = figures
        with explain_os_errors("write the metrics", self.work):
            self.metrics.write(self.step, figures)
        self.log(self.step, figures)
        shown = {
            "loss": f"{figures['loss']:.3f}",
            "tok/s": f"{figures['tokens_per_s']:,.0f}",
            "MFU": f"{figures['mfu']:.1%}",
            "data wait": f"{figures['data_wait_share']:.1%}",
        }
        self.progress(self.step, self.recipe.steps, "step", shown)

    def _not_finite(self, what: str, value: float, batches: list[Batch]) -> TrainError:
        first, last = batches[0].samples.start, batches[-1].samples.stop - 1
        return TrainError(
            f"the {what} is {value} at step {self.step} (samples {first} to {last} of the order with "
            f"seed {self.recipe.seed})",
            hint="lower train.lr and train.adamw_lr, or lengthen train.warmup_steps; going on from the "
            "last checkpoint meets the same step again",
        )

    def checkpoint_if_due(self) -> None:
        """Write a checkpoint when the recipe's time or number of steps has passed."""
        by_steps = self.recipe.checkpoint_every_steps
        # Put off while checkpoints would take more than their share of the time.
        every_s = max(self.recipe.checkpoint_every, self.checkpoint_cost_s / CHECKPOINT_SHARE)
        is_due = time.perf_counter() - self.checkpoint_s >= every_s
        if is_due or (by_steps and self.step - self.checkpoint_step >= by_steps):
            self.checkpoint()

    def checkpoint(self) -> None:
        """Write a checkpoint of the state between two steps."""
        started_s = time.perf_counter()
        with span("checkpoint"):
            state = {
                "loader": asdict(self.loader.state()),
                "meter": self.meter.state(),
                "figures": self.last_figures,
            }
            save_checkpoint(self.work, self.step, self.optimiser.state(), state)
        self.checkpoint_s = time.perf_counter()
        self.checkpoint_step = self.step
        self.checkpoint_cost_s = self.checkpoint_s - started_s
        self.meter.checkpoint_s += self.checkpoint_cost_s

    def _restore(self, checkpoint: Checkpoint) -> LoaderState:
        self.optimiser.load_state(checkpoint.tensors, checkpoint.step)
        self.meter.load_state(checkpoint.state["meter"])
        self.last_figures = checkpoint.state["figures"]
        state = checkpoint.state["loader"]
        return LoaderState(**(state | {"skip": tuple(map(tuple, state["skip"]))}))

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """Steps before which the weights are kept to be looked at: the first and the middle one."""
        return (0, self.recipe.steps // 2)

    def _snapshot(self) -> None:
        path = self.work / "snapshots" / f"step-{self.step:06d}.safetensors"
        with span("checkpoint"), explain_write_errors("write a snapshot", path):
            path.parent.mkdir(exist_ok=True)
            temporary = temporary_beside(path)
            huggingface.save_weights(temporary, self.decoder)
            publish(temporary, path)

    def publish(self, out: Path) -> None:
        """Write the results of a finished run."""
        huggingface.save(out, self.decoder)
        (out / "snapshots").mkdir()
        for step in sorted(set(self.snapshot_steps)):
            name = f"step-{step:06d}.safetensors"
            shutil.copyfile(self.work / "snapshots" / name, out / "snapshots" / name)
        (out / "state").mkdir()
        state = {"step": self.step, "loader": asdict(self.loader.state())}
        write_state(out / "state", self.optimiser.state(), state)
        shutil.copyfile(self.work / METRICS_FILE, out / METRICS_FILE)

    def facts(self) -> dict[str, Any]:
        """Return the numbers worth showing."""
        return {
            "steps": self.step,
            "num_parameters": self.decoder.config.num_parameters(),
            "loss": self.last_figures["loss"],
            **self.meter.facts(),
            "samples": [0, self.loader.state().position],
            "seed": self.recipe.seed,
            "order": self.loader.state().order,
            "resumed_from": self.resumed_from,
            "damaged_checkpoints": self.damaged_checkpoints,
            "decisions": asdict(self.decisions),
        }

    def close(self) -> None:
        """Stop the loader and close the files."""
        self.loader.close()
        self.metrics.close()
