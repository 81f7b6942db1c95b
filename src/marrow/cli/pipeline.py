"""The run: ten steps from raw rows to a report, read top to bottom.

Each step is a plain function of a lower layer that turns input folders into an output folder.
Here it gets its parents, the part of the recipe that it reads, the code that it runs and the
environment that it depends on; the store decides from these whether its artifact is there
already (see `store/steps.py`). Steps import their layer inside, so that a run whose artifacts
are all there never loads torch.
"""

import platform
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

from marrow.cli import console
from marrow.cli.recipe import LoadRecipe, ReportRecipe
from marrow.cli.sources import source_files
from marrow.core.config import Recipe
from marrow.core.progress import Progress
from marrow.core.records import Artifact, Parent
from marrow.data.config import DataRecipe
from marrow.data.shards_config import ShardsRecipe
from marrow.models.config import ModelConfig
from marrow.serve.config import ServeRecipe
from marrow.store.steps import Step, StepResult, Workspace, run_step
from marrow.store.store import Store
from marrow.text.config import TokenizerRecipe
from marrow.train.config import TrainRecipe
from marrow.train.evaluate_config import EvaluateRecipe

Build = Callable[[Workspace, Progress], Mapping[str, Any]]


@dataclass(frozen=True)
class Pipeline:
    """Runs steps one after the other for one recipe, and tells the catalog."""

    recipe: Recipe
    store: Store
    run_id: str

    def step(
        self,
        kind: str,
        parents: Mapping[str, Artifact],
        config: Any,
        module: str,
        build: Build,
        environment: Mapping[str, str] | None = None,
    ) -> StepResult:
        """Run one step, or take its artifact from the store."""
        with ExitStack() as stack:
            progress = stack.enter_context(console.progress_of(kind))
            step = Step(
                kind=kind,
                parents=tuple(Parent(role, artifact.id) for role, artifact in parents.items()),
                config=config,
                sources=source_files(module),
                environment=dict(environment or {}),
                build=lambda workspace: build(workspace, progress),
            )
            result = run_step(self.store, step, say=console.say, recipe_hash=self.recipe.hash)
        return result
