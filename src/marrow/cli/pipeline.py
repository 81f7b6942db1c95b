"""The run: ten steps from raw rows to a report, read top to bottom.

Each step is a plain function of a lower layer that turns input folders into an output folder.
Here it gets its parents, the part of the recipe that it reads, the code that it runs and the
environment that it depends on; the store decides from these whether its artifact is there
already (`store/steps.py`). A step imports its layer when it is built, so that a run whose
artifacts are all there never loads torch.
"""

import importlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from marrow.cli import console
from marrow.cli.consumption import note
from marrow.cli.mixture import find_sources
from marrow.cli.recipe import LoadRecipe, ReportRecipe
from marrow.cli.report import write_report
from marrow.cli.sources import source_files
from marrow.cli.story import tell
from marrow.cli.target import find_version
from marrow.core.config import Recipe
from marrow.core.hashes import hash_file
from marrow.core.progress import Progress
from marrow.core.records import Artifact, Parent
from marrow.core.span import span
from marrow.data.config import PYTHON, DataRecipe, settings_of
from marrow.data.engine import INLINE, Engine
from marrow.data.shards_config import ShardsRecipe
from marrow.data.sources.listing import fingerprint
from marrow.loader.config import LoaderRecipe
from marrow.loader.config import settings_of as order_settings
from marrow.models.config import ModelConfig
from marrow.serve.config import ServeRecipe
from marrow.store.datasets.dataset import label
from marrow.store.points import PointLog
from marrow.store.runs import RunStep
from marrow.store.steps import Step, StepResult, Watcher, Workspace, run_step
from marrow.store.store import Store
from marrow.text.config import TokenizerRecipe
from marrow.train.config import TrainRecipe
from marrow.train.evaluate_config import EvaluateRecipe

Build = Callable[[Any, Workspace, Progress], Mapping[str, Any]]
"""(the step's module, where to work, how to tell progress) -> facts"""

REPORT = "report.html"
Finished = Callable[[str, StepResult], None]


@dataclass
class Pipeline:
    """Runs one recipe's steps, one after the other, and tells the catalog of each.

    engine: who does the pieces of the data steps; the artifacts are the same. watcher: told too.
    """

    recipe: Recipe
    store: Store
    run_id: str
    log: PointLog
    finished: Finished
    engine: Engine = INLINE
    watcher: Watcher | None = None
    results: dict[str, StepResult] = field(default_factory=dict)

    def run(self) -> dict[str, StepResult]:
        """Run all steps; return their results by kind, in order."""
        self.store.catalog.check_free(self.recipe.name)  # what the model will be called
        data = self.recipe.section(DataRecipe)
        rows = self.ingest(data)
        documents = self.step(
            "clean",
            module="marrow.data.clean",
            parents={"rows": rows},
            config=settings_of(data, "clean"),
            build=lambda clean, work, progress: clean.clean(
                data, work.inputs["rows"], work.out, progress, work=work.work, engine=self.engine
            ),
        )
        split = self.step(
            "split",
            module="marrow.data.split",
            parents={"documents": documents},
            config=settings_of(data, "split"),
            build=lambda split, work, progress: split.split(
                data, work.inputs["documents"], work.out, progress
            ),
        )
        tokenizer = self.tokenizer(split)
        shards = self.shards(split, tokenizer)
        checkpoint = self.train(shards, tokenizer)
        evaluation = self.evaluate(checkpoint, tokenizer, split)
        model = self.export(checkpoint, tokenizer)
        served = self.serve(model, split)
        self.report(
            {
                "rows": rows,
                "split": split,
                "tokenizer": tokenizer,
                "checkpoint": checkpoint,
                "evaluation": evaluation,
                "model": model,
                "served": served,
            }
        )
        return self.results

    def ingest(self, data: DataRecipe) -> Artifact:
        """Read the source: files, the interpreter's own documentation, or a version of a dataset."""
        version = find_version(self.store, data.source)
        python = {"python": platform.python_version()} if data.source == PYTHON else {}
        settings = settings_of(data, "ingest")
        if version:  # the parent says what is read, whichever of its names the recipe uses
            del settings["source"]

        def build(ingest: Any, work: Workspace, progress: Progress) -> Mapping[str, Any]:
            source = str(work.inputs["source"]) if version else data.source
            found = ingest.ingest(replace(data, source=source), work.out, progress, engine=self.engine)
            return {**found, "source": label(self.store.catalog, version) if version else data.source}

        return self.step(
            "ingest",
            module="marrow.data.ingest",
            parents={"source": version} if version else {},
            config=[settings, None if version else fingerprint(data)],
            environment=python,
            build=build,
        )

    def tokenizer(self, split: Artifact) -> Artifact:
        """Train the tokenizer on the training documents, or take one that is there."""
        recipe = self.recipe.section(TokenizerRecipe)
        if recipe.file:
            return self.taken_tokenizer(Path(recipe.file).expanduser())
        return self.step(
            "tokenizer",
            module="marrow.data.shards",
            parents={"split": split},
            config=recipe,
            environment={"tokenizers": version("tokenizers")},
            build=lambda shards, work, progress: shards.train_tokenizer(
                recipe, work.inputs["split"], work.out, progress
            ),
        )

    def taken_tokenizer(self, path: Path) -> Artifact:
        """Take a tokenizer that somebody else made: it is known by its bytes, wherever it lies."""
        from marrow.data.shards import tokenizer_files

        files = {name: hash_file(file) for name, file in tokenizer_files(path).items()}
        return self.step(
            "tokenizer",
            module="marrow.data.shards",
            config=files,
            environment={"tokenizers": version("tokenizers")},
            build=lambda shards, work, _: shards.take_tokenizer(path, work.out),
        )

    def shards(self, split: Artifact, tokenizer: Artifact) -> Artifact:
        """Encode and pack the training documents."""
        recipe = self.recipe.section(ShardsRecipe)
        return self.step(
            "shards",
            module="marrow.data.shards",
            parents={"split": split, "tokenizer": tokenizer},
            config=recipe,
            build=lambda shards, work, progress: shards.write_shards(
                recipe,
                work.inputs["split"],
                work.inputs["tokenizer"],
                work.out,
                progress,
                engine=self.engine,
            ),
        )

    def train(self, shards: Artifact, tokenizer: Artifact) -> Artifact:
        """Train the model; its metrics go to the catalog as they come."""
        recipe, model = self.recipe.section(TrainRecipe), self.recipe.section(ModelConfig)
        loader = self.recipe.section(LoaderRecipe)
        sources = find_sources(loader, self.store)

        def log(step: int, metrics: Mapping[str, float]) -> None:
            for name, value in metrics.items():
                self.log.add(f"train/{name}", step, value)

        def build(loop: Any, work: Workspace, progress: Progress) -> Mapping[str, Any]:
            folders = (work.inputs["shards"], work.inputs["tokenizer"], work.out, work.work)
            placed = sources.place(loader, work.inputs)
            facts: Mapping[str, Any] = loop.train(recipe, model, *folders, progress, log, loader=placed)
            for role in sorted(sources.used()):
                work.used(role, **note(loader, sources, role, facts))
            return facts

        return self.step(
            "train",
            module="marrow.train.loop",
            parents={"shards": shards, "tokenizer": tokenizer, **sources.parents},
            config=[recipe, model, order_settings(loader), sources.checks()],
            environment={"torch": version("torch")},
            build=build,
        )

    def evaluate(self, checkpoint: Artifact, tokenizer: Artifact, split: Artifact) -> Artifact:
        """Measure bits per byte on the held-out documents, beside the baselines."""
        recipe = self.recipe.section(EvaluateRecipe)
        return self.step(
            "evaluate",
            module="marrow.train.evaluate",
            parents={"checkpoint": checkpoint, "tokenizer": tokenizer, "split": split},
            config=recipe,
            environment={"torch": version("torch")},
            build=lambda evaluate, work, progress: evaluate.evaluate(
                recipe,
                work.inputs["checkpoint"],
                work.inputs["tokenizer"],
                work.inputs["split"],
                work.out,
                progress,
            ),
        )

    def export(self, checkpoint: Artifact, tokenizer: Artifact) -> Artifact:
        """Write the model as a Hugging Face folder and give it the recipe's name."""

        def build(huggingface: Any, work: Workspace, progress: Progress) -> Mapping[str, Any]:
            decoder = huggingface.load(work.inputs["checkpoint"])
            huggingface.save(work.out, decoder, work.inputs["tokenizer"])
            return {"parameters": decoder.config.num_parameters(), "format": "Hugging Face"}

        model = self.step(
            "export",
            module="marrow.models.huggingface",
            parents={"checkpoint": checkpoint, "tokenizer": tokenizer},
            config=None,
            build=build,
        )
        self.store.name(model, self.recipe.name)
        return model

    def serve(self, model: Artifact, split: Artifact) -> Artifact:
        """Start a real server on the model, load it over HTTP, drain it, stop it."""
        serve, load = self.recipe.section(ServeRecipe), self.recipe.section(LoadRecipe)
        report = self.recipe.section(ReportRecipe).for_source(self.recipe.section(DataRecipe).source)

        def build(trial: Any, work: Workspace, progress: Progress) -> Mapping[str, Any]:
            from marrow.cli.findings import prompts_of  # loads torch

            prompts = prompts_of(report, work.inputs["split"])
            folder = work.inputs["model"]
            facts: Mapping[str, Any] = trial.try_server(
                self.recipe.name, folder, prompts, serve, load, work.out, progress
            )
            return facts

        return self.step(
            "serve",
            module="marrow.cli.trial",
            also="marrow.cli.serve",  # what the child process runs
            environment={"torch": version("torch")},
            parents={"model": model, "split": split},
            config=[serve, load, report.prompts],
            build=build,
        )

    def report(self, parents: Mapping[str, Artifact]) -> Artifact:
        """Ask the model before, midway and after training; write the page."""
        recipe = self.recipe.section(ReportRecipe).for_source(self.recipe.section(DataRecipe).source)
        serve, evaluate = self.recipe.section(ServeRecipe), self.recipe.section(EvaluateRecipe)

        def build(findings: Any, work: Workspace, progress: Progress) -> Mapping[str, Any]:
            found = findings.find(recipe, serve, evaluate, work.inputs, work.out, progress)
            write_report(tell(self.recipe, self.store, self.results, found), work.out / REPORT)
            return {"samples": len(found["samples"]), "parse_rates": found["parse_rates"]}

        return self.step(
            "report",
            module="marrow.cli.findings",
            parents=parents,
            config=[recipe, self.recipe.hash],
            build=build,
        )

    def step(
        self,
        kind: str,
        *,
        module: str,
        config: Any,
        build: Build,
        parents: Mapping[str, Artifact] | None = None,
        environment: Mapping[str, str] | None = None,
        also: str | None = None,
    ) -> Artifact:
        """Run one step, or take its artifact from the store; tell the catalog and the caller.

        Args: module: where its function is. also: another module whose code it runs.
        """
        position = len(self.results)
        self.store.runs.record(self.run_id, position, RunStep(kind, "running"))
        with console.progress_of(kind) as progress:
            step = Step(
                kind=kind,
                parents=[Parent(role, artifact.id) for role, artifact in (parents or {}).items()],
                config=config,
                sources=source_files(*filter(None, (module, also))),
                environment=environment or {},
                build=lambda work: build(load(module), work, progress),
            )
            result = run_step(
                self.store, step, say=console.say, recipe_hash=self.recipe.hash, watcher=self.watcher
            )
        self.log.flush()
        done = RunStep(kind, result.status, result.artifact.id, result.wall_s)
        self.store.runs.record(self.run_id, position, done)
        self.results[kind] = result
        self.finished(kind, result)
        return result.artifact


def load(module: str) -> Any:
    """Import a step's layer, torch with it where it is needed; time that the ledger names."""
    with span("load code"):
        return importlib.import_module(module)
