import pytest

from marrow.core.config import load_recipe
from marrow.core.errors import RecipeError
from marrow.data.config import DataRecipe, settings_of


def test_a_recipe_reads_units_and_nested_tables(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(
        '[data]\nsource = "rows"\ntext = "{a}"\nrow_group_bytes = "1MiB"\n'
        "[data.quality]\nmin_chars = 3\n[data.split]\nheldout_share = 0.2\n"
    )
    recipe = load_recipe(path, {"data": DataRecipe}, ["data.dedup.near=keep"]).section(DataRecipe)
    assert recipe.row_group_bytes == 1 << 20
    assert (recipe.quality.min_chars, recipe.split.heldout_share, recipe.dedup.near) == (3, 0.2, "keep")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sourse = 'x'", "did you mean 'source'"),
        ("source = ' '", "source is empty"),
        ("format = 'csv'", "has its own schema"),
        ("group = '{a}'", "write it bare"),
        ("row_group_bytes = '1 parsec'", "not a size"),
        ("split.heldout_share = 0.9", "at most 0.5"),
        ("dedup.near = 'dropp'", "did you mean 'drop'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_line(tmp_path, line, words):
    path = tmp_path / "r.toml"
    path.write_text(f"[data]\n{line}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, {"data": DataRecipe})
    assert words in str(caught.value)
    assert "r.toml:2" in str(caught.value)


def test_each_step_depends_on_its_own_settings_and_together_on_all():
    steps = [settings_of(DataRecipe(), step) for step in ("ingest", "clean", "split")]
    outside = {"references", "evaluations"}  # contents of files that the recipe names
    assert set().union(*steps) - outside == set(DataRecipe.__dataclass_fields__)
    assert "split" not in steps[0] | steps[1]
    assert "quality" not in steps[0] | steps[2]
