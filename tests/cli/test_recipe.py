"""Every table of a recipe is known, its defaults hold together, and what cannot fit is refused early."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from marrow.cli.recipe import PYTHON_PROMPTS, SCHEMA, LoadRecipe, ReportRecipe, read_recipe
from marrow.core.errors import RecipeError
from marrow.data.config import PYTHON
from marrow.data.shards_config import ShardsRecipe
from marrow.models.config import ModelConfig
from marrow.train.config import TrainRecipe


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str = "") -> Path:
        path = tmp_path / "r.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("table", SCHEMA)
def test_every_table_has_defaults_that_are_allowed(table: str, recipe) -> None:
    """An empty table is a whole recipe of its step."""
    read = read_recipe(recipe(f"[{table}]\n"), [])
    assert read.section(SCHEMA[table]) == SCHEMA[table]()


@pytest.mark.parametrize("kind", SCHEMA.values(), ids=lambda kind: kind.__name__)
def test_settings_are_values_that_do_not_change(kind: type) -> None:
    one = kind()
    assert one == kind() and hash(one) == hash(kind())
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, dataclasses.fields(one)[0].name, None)


def test_flags_win_over_the_file_and_the_file_over_defaults(recipe) -> None:
    path = recipe("[train]\nsteps = 300\nbatch_rows = 4\n[load]\nrequests = 5\n")
    read = read_recipe(path, ["train.steps=70"])
    train = read.section(TrainRecipe)
    assert (train.steps, train.batch_rows, train.micro_batches) == (70, 4, 1)
    assert read.section(LoadRecipe) == LoadRecipe(requests=5)


def test_a_context_longer_than_the_model_names_both_places(recipe) -> None:
    path = recipe("[shards]\ncontext = 4096\n\n[model]\nmax_positions = 64\n")
    with pytest.raises(
        RecipeError, match=r"shards\.context = 4096 is more than model\.max_positions = 64"
    ) as e:
        read_recipe(path, [])
    assert f"{path}:2" in str(e.value) and f"{path}:5" in str(e.value)
    assert "set model.max_positions = 4096" in e.value.hint
    fits = read_recipe(path, ["model.max_positions=4096"])
    assert fits.section(ShardsRecipe).context == fits.section(ModelConfig).max_positions == 4096


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[trian]\nsteps = 3\n", "did you mean 'train'"),
        ("[train]\nstepz = 3\n", "did you mean 'steps'"),
        ("[load]\nrequests = 0\n", "load.requests"),
        ("[report]\ntemperature = 2.5\n", "report.temperature"),
        ('[report]\nprompts = "one"\n', "report.prompts"),
        ("[train]\nbatch_rows = 5\nmicro_batches = 2\n", "does not divide"),
        ("[train]\nsteps = 10\nwarmup_steps = 11\n", "warmup_steps = 11 is more than steps = 10"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_line(recipe, text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=r"r\.toml:\d") as caught:
        read_recipe(recipe(text), [])
    assert said in f"{caught.value}"


def test_the_interpreters_documentation_is_asked_for_python() -> None:
    filled = ReportRecipe().for_source(PYTHON)
    assert (filled.prompts, filled.python) == (PYTHON_PROMPTS, True)


def test_other_data_is_not_asked_for_python() -> None:
    filled = ReportRecipe().for_source("reviews.csv")
    assert (filled.prompts, filled.python) == ((), False)


@pytest.mark.parametrize("source", [PYTHON, "reviews.csv"])
@pytest.mark.parametrize("python", [False, True])
def test_what_the_recipe_says_itself_stays(source: str, python: bool) -> None:
    own = ReportRecipe(prompts=("Once",), python=python)
    assert own.for_source(source) == own


def test_reading_a_recipe_loads_no_torch(recipe) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom marrow.cli.recipe import read_recipe\n"
        "read_recipe(Path(sys.argv[1]), [])\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, recipe()], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
