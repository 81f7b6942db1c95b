"""What the finished model is asked: prompts before, midway and after training, and where answers come from.

Everything here goes through the engine that serves: the three ages of the model are the same
engine with other weights.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from marrow.cli.recipe import ReportRecipe
from marrow.cli.story import FINDINGS
from marrow.core.files import atomic_file
from marrow.core.progress import Progress
from marrow.core.records import Completion, Sampling
from marrow.core.span import span
from marrow.data.attribution import nearest_documents
from marrow.kernels.device import raise_malloc_thresholds
from marrow.serve.config import ServeRecipe
from marrow.serve.engine import Engine
from marrow.text.tokenizer import Tokenizer
from marrow.train.completions import NgramGenerator, share_of_python
from marrow.train.evaluate import train_ngram
from marrow.train.evaluate_config import EvaluateRecipe

NUM_PROMPTS = 5
PROMPT_CHARS = 80


def find(
    recipe: ReportRecipe,
    serve: ServeRecipe,
    evaluate: EvaluateRecipe,
    folders: Mapping[str, Path],
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Complete the prompts at three ages of the model, judge and trace what it wrote.

    Args: recipe: resolved by `for_source`. folders: "model" (Hugging Face), "checkpoint" (with
        snapshots), "tokenizer", "split".
    Returns: {"samples", "parse_rates", "nearest"}, also in out/findings.json.
    """
    raise_malloc_thresholds()
    tokenizer = Tokenizer.load(folders["tokenizer"])
    prompts = prompts_of(recipe, folders["split"])
    sampling = Sampling(max_tokens=recipe.max_tokens, temperature=recipe.temperature, seed=1)
    with Engine.load(folders["model"], serve) as engine:
        room = engine.max_tokens(max(len(engine.encode(prompt)) for prompt in prompts))
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        before, midway = (_at(engine, path, prompts, sampling) for path in _snapshots(folders["checkpoint"]))
        engine.update_weights(folders["model"] / "model.safetensors")
        with span("complete"):
            after = engine.generate(prompts, sampling)
        rates = {}
        if recipe.python:
            with span("judge"):
                judged, _ = share_of_python(engine, prompts, sampling, samples=recipe.samples)
                rates["model"] = judged.share
    if recipe.python:
        with span("5-gram"):
            model = NgramGenerator(train_ngram(evaluate, tokenizer, folders["split"]), tokenizer)
            judged, _ = share_of_python(model, prompts, sampling, samples=recipe.samples)
            rates[f"{evaluate.ngram_order}-gram"] = judged.share
    with span("attribution"):
        texts = [prompt + completion.text for prompt, completion in zip(prompts, after, strict=True)]
        nearest = nearest_documents(folders["split"], tokenizer, texts, progress=progress)
    found = {
        "samples": [
            {"prompt": prompt, "before": b.text, "midway": m.text, "after": a.text}
            for prompt, b, m, a in zip(prompts, before, midway, after, strict=True)
        ],
        "parse_rates": rates,
        "nearest": [
            {"prompt": prompt, "completion": completion.text, **asdict(matches[0])}
            for prompt, completion, matches in zip(prompts, after, nearest, strict=True)
            if matches
        ],
    }
    with atomic_file(out / FINDINGS, "w") as file:
        json.dump(found, file, indent=2, ensure_ascii=False)
    return found


def prompts_of(recipe: ReportRecipe, split: Path) -> list[str]:
    """Return the recipe's prompts, or else the beginnings of the first held-out documents."""
    if recipe.prompts:
        return list(recipe.prompts)
    file = pq.ParquetFile(split / "heldout.parquet")
    found: list[str] = []
    for batch in file.iter_batches(64, columns=["text"]):
        found += filter(None, map(beginning, batch.column("text").to_pylist()))
        if len(found) >= NUM_PROMPTS:
            break
    return found[:NUM_PROMPTS] or [""]  # "": no text has more than a letter or two


def beginning(text: str) -> str:
    """Cut a text to a prompt: its first words, or its first half if it is short."""
    text = text.strip()
    cut = text[: min(PROMPT_CHARS, len(text) // 2)]
    words, space, _ = cut.rpartition(" ")
    return words if space else cut


def _at(engine: Engine, weights: Path, prompts: Sequence[str], sampling: Sampling) -> list[Completion]:
    engine.update_weights(weights)
    with span("complete"):
        return engine.generate(prompts, sampling)


def _snapshots(checkpoint: Path) -> tuple[Path, Path]:
    """Return the weights before the first step and at the middle of the training."""
    found = sorted((checkpoint / "snapshots").glob("step-*.safetensors"))
    return found[0], found[-1]
