"""Tokens per CPU-second of a training step: Marrow beside the Hugging Face Trainer, same tiny Llama.

    pip install --no-deps --target .bench/train_step -r bench/requirements-train_step.txt
    python bench/train_step.py [--shape small] [--rounds 8]

Four trainings live in one process, each on its own thread, and take turns of a few steps: Marrow and
the Trainer, each in bf16 (the Trainer's is autocast) and in fp32. Only one runs at a time, so the
process's CPU time during a turn is that training's, data, optimiser and all. Both sides have AdamW,
the same rows, one thread, gradient clipping, and malloc thresholds raised; nothing is saved or
logged. Marrow keeps the documents of a row apart, the Trainer lets them see each other.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when the libraries load
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# accelerate alone; all else is this environment's
sys.path.append(str(Path(__file__).resolve().parent.parent / ".bench" / "train_step"))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from marrow.core.progress import silent
from marrow.data.shards import train_tokenizer, write_shards
from marrow.data.shards_config import ShardsRecipe
from marrow.kernels.device import raise_malloc_thresholds
from marrow.loader.config import LoaderRecipe
from marrow.loader.reader import ShardReader
from marrow.models.config import ModelConfig
from marrow.text.config import TokenizerRecipe
from marrow.train.config import TrainRecipe
from marrow.train.decisions import Decisions
from marrow.train.loop import Run

RESULT = Path(__file__).parent / "results" / "train_step.json"
CONTEXT, ROWS, VOCABULARY = 512, 4, 2048
SHAPES = {
    "quickstart": ModelConfig(
        hidden_size=128,
        intermediate_size=352,
        num_layers=4,
        num_heads=2,
        num_kv_heads=2,
        qk_norm=False,
        vocab_size=VOCABULARY,
    ),
    "small": ModelConfig(
        hidden_size=256,
        intermediate_size=704,
        num_layers=8,
        num_heads=4,
        num_kv_heads=4,
        qk_norm=False,
        vocab_size=VOCABULARY,
    ),
}
GOALS = {"bf16": 1.3, "fp32": 1.8}
FOREVER = 1_000_000


class Turns:
    """One training on a thread of its own that runs a few steps when it is its turn."""

    def __init__(self, name: str, training: Callable[[Callable[[], None]], None]) -> None:
        self.name = name
        self.seconds_per_step: list[float] = []
        self._training = training
        self._steps_left = 0
        self._error: BaseException | None = None
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        torch.set_num_threads(1)
        self._go.acquire()
        try:
            self._training(self._after_step)
        except BaseException as error:  # noqa: BLE001 - raised again where the turn was asked for
            self._error = error
            self._done.release()

    def _after_step(self) -> None:
        self._steps_left -= 1
        if self._steps_left == 0:
            self._done.release()
            self._go.acquire()

    def take(self, steps: int) -> None:
        """Run some steps and note the CPU seconds of each."""
        self._steps_left = steps
        start = time.process_time()
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        self.seconds_per_step.append((time.process_time() - start) / steps)


def marrow_training(model: ModelConfig, dtype: str, shards: Path, work: Path) -> Callable[..., None]:
    """Return Marrow's loop, without its checkpoints."""
    work.mkdir()
    recipe = TrainRecipe(
        steps=FOREVER, batch_rows=ROWS, optimiser="adamw", adamw_lr=1e-3, log_every=FOREVER, seed=1
    )

    def training(after_step: Callable[[], None]) -> None:
        decisions = Decisions(dtype, 1, False, 1e12, {})
        loader = LoaderRecipe()
        run = Run(recipe, model, loader, [shards], work, decisions, silent, lambda step, figures: None)
        while True:
            run.take_step()
            after_step()

    return training


def trainer_training(model: ModelConfig, *, bf16: bool, rows: np.ndarray, work: Path) -> Callable[..., None]:
    """Return the Hugging Face Trainer's loop on the same rows."""

    class AfterStep(TrainerCallback):
        def __init__(self, after_step: Callable[[], None]) -> None:
            self.after_step = after_step

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.after_step()

    def training(after_step: Callable[[], None]) -> None:
        config = LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_size,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            use_cache=False,
        )
        arguments = TrainingArguments(
            output_dir=str(work),
            use_cpu=True,
            bf16=bf16,
            max_steps=FOREVER,
            per_device_train_batch_size=ROWS,
            learning_rate=1e-3,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            lr_scheduler_type="linear",
            optim="adamw_torch",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        inputs = torch.from_numpy(rows[:, :CONTEXT].astype(np.int64))
        dataset = [{"input_ids": row, "labels": row} for row in inputs]
        llama = LlamaForCausalLM(config)
        Trainer(llama, arguments, train_dataset=dataset, callbacks=[AfterStep(after_step)]).train()

    return training


def make_shards(folder: Path) -> np.ndarray:
    """Pack a part of the interpreter's own sources into `folder`; return the rows."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(library.glob("*.py"))]
    num_bytes = pa.array([len(text.encode()) for text in texts], pa.int64())
    table = {"document_id": pa.array(range(len(texts)), pa.int64()), "text": texts, "num_bytes": num_bytes}
    pq.write_table(pa.table(table), folder / "train.parquet")
    train_tokenizer(TokenizerRecipe(vocab_size=VOCABULARY), folder, folder)
    write_shards(ShardsRecipe(context=CONTEXT), folder, folder, folder)
    with ShardReader(folder) as reader:
        return np.array(reader.take(np.arange(reader.manifest.num_rows)).tokens)


def measure(shape: str, rounds: int, steps: int) -> dict[str, float]:
    """Return tokens per CPU-second of the four trainings of one shape, the median of the rounds."""
    model = SHAPES[shape]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = make_shards(folder)
        sides = [
            Turns("marrow bf16", marrow_training(model, "bfloat16", folder, folder / "one")),
            Turns("trainer bf16", trainer_training(model, bf16=True, rows=rows, work=folder / "two")),
            Turns("marrow fp32", marrow_training(model, "float32", folder, folder / "three")),
            Turns("trainer fp32", trainer_training(model, bf16=False, rows=rows, work=folder / "four")),
        ]
        for turn in range(rounds + 1):
            for side in sides if turn % 2 else reversed(sides):
                side.take(steps)
        # The first turn imports, allocates and warms up.
        return {s.name: CONTEXT * ROWS / statistics.median(s.seconds_per_step[1:]) for s in sides}


def report(shape: str, found: dict[str, float]) -> dict[str, float]:
    """Print one shape's table; return the ratios to the Trainer."""
    parameters = SHAPES[shape].num_parameters() / 1e6
    print(f"\n{shape}: {parameters:.1f} M parameters, {ROWS} rows of {CONTEXT} tokens a step")
    for name, speed in found.items():
        print(f"  {name:14}{speed:10,.0f} tok/CPU-s")
    ratios = {dtype: found["marrow bf16"] / found[f"trainer {dtype}"] for dtype in GOALS}
    for dtype, ratio in ratios.items():
        print(f"  marrow bf16 / trainer {dtype}: {ratio:.3f}x   (goal: at least {GOALS[dtype]}x)")
    return ratios


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    assert raise_malloc_thresholds(), "malloc is not glibc's: the two sides would not be tuned alike"
    result: dict[str, Any] = {"tokens_per_cpu_s": {}, "ratios": {}}
    for shape in options.shape or SHAPES:
        found = measure(shape, options.rounds, options.steps)
        result["tokens_per_cpu_s"][shape] = found
        result["ratios"][shape] = report(shape, found)
    result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    result["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # the trainings never end
