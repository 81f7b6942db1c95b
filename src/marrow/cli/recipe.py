"""The tables of a recipe, and who consumes each. Importing this loads no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from marrow.core.config import Range, Recipe, load_recipe
from marrow.core.errors import RecipeError
from marrow.data.config import PYTHON, DataRecipe
from marrow.data.shards_config import ShardsRecipe
from marrow.loader.config import LoaderRecipe
from marrow.models.config import ModelConfig
from marrow.serve.config import ServeRecipe
from marrow.text.config import TokenizerRecipe
from marrow.train.config import TrainRecipe
from marrow.train.evaluate_config import EvaluateRecipe


@dataclass(frozen=True, slots=True)
class LoadRecipe:
    """[load]: the requests that the serve step sends to the server over HTTP."""

    requests: Annotated[int, Range(1)] = 24
    concurrency: Annotated[int, Range(1)] = 8
    max_tokens: Annotated[int, Range(1)] = 48


PYTHON_PROMPTS = (
    "def read(self",
    'class Queue:\n    """',
    "import os\nimport sys\n\n",
    "    for name in sorted(",
    "def test_",
)


@dataclass(frozen=True, slots=True)
class ReportRecipe:
    """[report]: what the report asks the model.

    `prompts` empty: for the interpreter's own documentation five beginnings of Python, for other
    data the beginnings of held-out documents. `samples`: completions of each
    prompt that are judged. `python`: count the completions that parse as Python, beside the
    5-gram's; None: if the data is the interpreter's own.
    """

    prompts: tuple[str, ...] = ()
    max_tokens: Annotated[int, Range(1)] = 64
    temperature: Annotated[float, Range(0, 2)] = 0.6
    samples: Annotated[int, Range(1)] = 8
    python: bool | None = None

    def for_source(self, source: str) -> "ReportRecipe":
        """Return the recipe with what depends on `data.source` filled in; `python` is then a bool."""
        is_python = source == PYTHON
        return replace(
            self,
            prompts=self.prompts or (PYTHON_PROMPTS if is_python else ()),
            python=is_python if self.python is None else self.python,
        )


SCHEMA: dict[str, type] = {
    "data": DataRecipe,
    "tokenizer": TokenizerRecipe,
    "shards": ShardsRecipe,
    "loader": LoaderRecipe,
    "model": ModelConfig,
    "train": TrainRecipe,
    "evaluate": EvaluateRecipe,
    "serve": ServeRecipe,
    "load": LoadRecipe,
    "report": ReportRecipe,
}


def read_recipe(path: Path, overrides: Sequence[str]) -> Recipe:
    """Read a recipe with every table known to Marrow. Raises: RecipeError."""
    recipe = load_recipe(path, SCHEMA, overrides)
    context, room = recipe.section(ShardsRecipe).context, recipe.section(ModelConfig).max_positions
    if context > room:
        places = {str(recipe.origins[key]) for key in ("shards.context", "model.max_positions")}
        raise RecipeError(
            f"{', '.join(sorted(places))}: shards.context = {context} is more than "
            f"model.max_positions = {room}",
            hint=f"set model.max_positions = {context}",
        )
    return recipe
