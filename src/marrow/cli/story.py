"""A run's results as one record: what the report shows, the terminal prints and --json gives.

Everything is read from the artifacts, so a run whose steps were all cached tells the same story.
"""

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marrow import __version__
from marrow.cli import config as config_verb
from marrow.cli.results import (
    DroppedRule,
    LineageEdge,
    LineageNode,
    MetricPoint,
    NearestRow,
    RecipeValue,
    RunReport,
    Sample,
    Score,
    ServingFigures,
    StepReport,
)
from marrow.core.config import Recipe
from marrow.core.flat_toml import join_key
from marrow.core.hashes import canonical_json
from marrow.store.steps import COST, StepResult
from marrow.store.store import Store
from marrow.store.version import package_versions

FINDINGS = "findings.json"
NAMES = {"model": "this model", "unigram": "unigram", "xz": "xz, given the training text", "zlib": "zlib"}
NOTES = {
    "unigram": "token frequencies alone",
    "xz": "copies at any distance",
    "zlib": "each document alone",
}


def tell(
    recipe: Recipe, store: Store, results: Mapping[str, StepResult], findings: Mapping[str, Any]
) -> RunReport:
    """Assemble the record of a run from its steps' artifacts and what the model was asked."""
    folders = {kind: store.view(result.artifact) for kind, result in results.items()}
    return RunReport(
        recipe=recipe.name,
        when=time.strftime("%Y-%m-%d %H:%M"),
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        versions={"marrow": __version__} | package_versions(("torch", "pyarrow", "tokenizers")),
        steps=tuple(_step(kind, result) for kind, result in results.items()),
        metrics=_metrics(folders["train"]) if "train" in folders else (),
        scores=_scores(results["evaluate"].artifact.facts) if "evaluate" in results else (),
        samples=tuple(Sample(**sample) for sample in findings.get("samples", ())),
        parse_rates=findings.get("parse_rates", {}),
        nearest=tuple(_nearest(row) for row in findings.get("nearest", ())),
        serving=_serving(results["serve"].artifact.facts) if "serve" in results else None,
        dropped=_dropped(results["clean"], folders["clean"]) if "clean" in results else (),
        nodes=(
            *_given(store, results),
            *(LineageNode(result.artifact.id, kind, _note(kind, result)) for kind, result in results.items()),
        ),
        edges=tuple(
            LineageEdge(parent.artifact_id, result.artifact.id, parent.role)
            for result in results.values()
            for parent in result.artifact.parents
        ),
        recipe_values=_values(recipe),
    )


def _given(store: Store, results: Mapping[str, StepResult]) -> list[LineageNode]:
    """Return what the run took from the store without making it: a dataset's version, others' shards."""
    made = {result.artifact.id for result in results.values()}
    parents = (parent.artifact_id for result in results.values() for parent in result.artifact.parents)
    outside = store.catalog.get_many([one for one in dict.fromkeys(parents) if one not in made])
    return [
        LineageNode(one.id, one.kind, ", ".join(map(str, store.catalog.names(artifact_id=one.id))))
        for one in outside.values()
    ]


def _step(kind: str, result: StepResult) -> StepReport:
    facts = {name: value for name, value in result.artifact.facts.items() if name != COST}
    cost = result.artifact.facts[COST]
    return StepReport(
        name=kind,
        status=result.status,
        artifact_id=result.artifact.id,
        wall_s=cost["wall_s"],
        cpu_s=result.cpu_s,
        peak_rss_bytes=result.peak_rss_bytes,
        facts=facts,
        ledger=result.ledger,
    )


def _metrics(checkpoint: Path) -> tuple[MetricPoint, ...]:
    lines = (checkpoint / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [json.loads(line) for line in lines]
    return tuple(
        MetricPoint(p["step"], p["loss"], p["tokens_per_s"], p["mfu"], p["data_wait_share"]) for p in points
    )


def _scores(facts: Mapping[str, Any]) -> tuple[Score, ...]:
    """Return the model first, then the n-gram, then the rest: the report compares with the second."""
    scores = facts["bits_per_byte"]
    order = sorted(scores, key=lambda name: (name != "model", not name.startswith("ngram"), name))
    return tuple(
        Score(
            name=NAMES.get(name, f"{name.removeprefix('ngram')}-gram (Kneser-Ney)"),
            bits_per_byte=scores[name],
            ours=name == "model",
            note=NOTES.get(name, ""),
        )
        for name in order
    )


def _nearest(row: Mapping[str, Any]) -> NearestRow:
    return NearestRow(row["prompt"], row["completion"], row["file"], row["line"], row["span_text"])


def _serving(facts: Mapping[str, Any]) -> ServingFigures:
    ttft, itl = facts["ttft_ms"] or {}, facts["itl_ms"] or {}
    return ServingFigures(
        requests=facts["requests"],
        concurrency=facts["concurrency"],
        errors=facts["failed"],
        wall_s=facts["wall_s"],
        tokens_per_s=facts["completion_tokens_per_s"],
        ttft_p50_ms=ttft.get("p50", 0.0),
        ttft_p99_ms=ttft.get("p99", 0.0),
        itl_p50_ms=itl.get("p50", 0.0),
        itl_p99_ms=itl.get("p99", 0.0),
    )


def _dropped(result: StepResult, folder: Path) -> tuple[DroppedRule, ...]:
    examples: dict[str, str] = {}
    for line in (folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        examples.setdefault(sample["rule"], f"{sample['file']}:{sample['line']}")
    counts = result.artifact.facts["dropped"]
    return tuple(
        DroppedRule(rule, count["documents"], count["bytes"], examples.get(rule, ""))
        for rule, count in sorted(counts.items())
    )


def _note(kind: str, result: StepResult) -> str:
    """Say in a few words what an artifact is."""
    facts = result.artifact.facts
    notes = {
        "ingest": lambda: f"{facts['rows']:,} rows",
        "clean": lambda: f"{facts['documents']:,} documents",
        "tokenizer": lambda: f"{facts['vocab_size']:,} tokens",
        "shards": lambda: f"{facts['num_predicted_tokens']:,} tokens",
        "train": lambda: f"{facts['steps']:,} steps",
        "evaluate": lambda: f"{facts['bits_per_byte']['model']:.3f} bits per byte",
        "export": lambda: f"{facts['parameters']:,} parameters",
        "serve": lambda: f"{facts['requests']} requests",
    }
    return notes[kind]() if kind in notes else ""


def _values(recipe: Recipe) -> tuple[RecipeValue, ...]:
    sections = json.loads(canonical_json(dict(recipe.sections)))
    found: list[RecipeValue] = []

    def walk(prefix: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            key = f"{prefix}{join_key(name)}"
            if value and isinstance(value, dict):
                walk(f"{key}.", value)
            else:
                origin = str(recipe.origins.get(key, "default"))
                found.append(RecipeValue(key, config_verb.toml(value), origin))

    walk("", sections)
    return tuple(found)


def read_findings(folder: Path) -> dict[str, Any]:
    """Read what the report step found when it asked the model."""
    found: dict[str, Any] = json.loads((folder / FINDINGS).read_text(encoding="utf-8"))
    return found
