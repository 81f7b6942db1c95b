"""`marrow config show`: what it prints can be read again and means the same."""

import json
import tomllib
from pathlib import Path

import pytest

from marrow.cli.config import lines
from marrow.cli.main import run
from marrow.cli.recipe import SCHEMA, read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    "path", [*RECIPES.glob("*.toml"), Path(__file__).parent / "tiny.toml"], ids=lambda p: p.name
)
def test_what_is_shown_is_the_same_recipe(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path, ["train.lr=0.125", "data.split.seed=3"])
    again = tmp_path / path.name
    again.write_text("\n".join(lines(recipe)), encoding="utf-8")
    assert read_recipe(again, []).hash == recipe.hash


def test_each_value_names_its_origin(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "show", str(tiny), "--set", "train.lr=1e-3"]) == 0
    shown = capsys.readouterr().out
    assert tomllib.loads(shown)["train"]["lr"] == 1e-3
    by_key = {line.split(" = ")[0]: line for line in shown.splitlines()}
    assert "# --set train.lr=1e-3" in by_key["lr"]
    assert "tiny.toml:" in by_key["steps"]
    assert "# default" in by_key["rope_theta"]


def test_json_holds_every_table(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "show", str(tiny), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(shown["values"]) == set(SCHEMA)
    assert shown["hash"] == read_recipe(tiny, []).hash


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.lrr=1", "did you mean 'lr'"),
        ("trian.lr=1", "did you mean 'train'"),
        ("train.steps=12.5", "train.steps"),
        ("shards.shard_bytes=1parsec", "MiB"),
        ("train.schedule=linaer", "did you mean 'linear'"),
        ("model.num_kv_heads=3", "multiple"),
    ],
)
def test_a_wrong_setting_is_refused_with_a_hint(
    setting: str, said: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["config", "show", str(tiny), "--set", setting]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "hint:" in told or "multiple" in told


def test_a_wrong_key_in_a_file_is_refused_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[train]\nsteps = 3\n\nbatchrows = 4\n", encoding="utf-8")
    assert run(["config", "show", str(path)]) == 2
    told = capsys.readouterr().err
    assert f"{path}:4" in told
    assert "did you mean 'batch_rows'?" in told


def test_tables_with_free_keys_are_shown_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[data.expect.'unit price (EUR)']\nmin = 0\nvalues = [1, 'x']\n", encoding="utf-8")
    recipe = read_recipe(path, ['data.expect."a.b".regex="\\\\d+"', "data.types.id=int64"])
    shown = lines(recipe)
    again = tmp_path / "again.toml"
    again.write_text("\n".join(shown), encoding="utf-8")
    assert read_recipe(again, []).hash == recipe.hash
    assert any(
        line.startswith('expect."unit price (EUR)".min = 0 ') and "mine.toml:2" in line for line in shown
    )
    assert any(line.startswith("types.id = ") and "--set data.types.id" in line for line in shown)
