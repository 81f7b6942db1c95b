"""The [serve] table is read with units, and what does not fit together is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

from marrow.core.config import load_recipe
from marrow.core.errors import RecipeError
from marrow.serve.config import ServeRecipe


def test_units_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[serve]\nkv_memory = "64MiB"\ndeadline = "2m"\nmax_waiting = "1k"\n')
    recipe = load_recipe(path, {"serve": ServeRecipe}, ["serve.drain=1s"]).section(ServeRecipe)
    assert (recipe.kv_memory, recipe.deadline, recipe.max_waiting, recipe.drain) == (64 << 20, 120, 1000, 1)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("max_batch_tokens = 8", "max_sequences"),
        ("port = 70_000", "port"),
        ('dtype = "fp64"', "dtype"),
        ('kv_memory = "much"', "kv_memory"),
        ("block_sise = 16", "block_size"),
        ("max_sequences = 0", "max_sequences"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_place(line: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(f"[serve]\n{line}\n")
    with pytest.raises(RecipeError, match=word) as error:
        load_recipe(path, {"serve": ServeRecipe})
    assert "r.toml:2" in str(error.value)


def test_reading_the_table_loads_no_torch_and_no_server() -> None:
    program = "import sys, marrow.serve.config; print([m for m in ('torch', 'fastapi') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"
