"""Numbers that cannot work are refused before anything starts, with those that would."""

import pytest

from marrow.core.config import load_recipe
from marrow.core.errors import RecipeError, TrainError
from marrow.models.config import ModelConfig
from marrow.train.parallel.config import ParallelRecipe, check_fits

MODEL = ModelConfig(vocab_size=64, num_layers=4, num_heads=4, num_kv_heads=2, num_experts=0)


def fits(parallel=ParallelRecipe(), model=MODEL, context=512, batch_rows=16, micro_batches=2):  # noqa: B008
    check_fits(parallel, model, context=context, batch_rows=batch_rows, micro_batches=micro_batches)
    return True


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelRecipe(),
        ParallelRecipe(dp=2, fsdp=2, tp=2, pp=2),
        ParallelRecipe(dp=4, fsdp=2, zero=1),
        ParallelRecipe(pp=2, schedule="interleaved", stages_per_rank=2),
    ],
)
def test_what_divides_is_taken(parallel):
    assert fits(parallel)


@pytest.mark.parametrize(
    ("parallel", "message", "hint"),
    [
        ({"tp": 4}, "tp = 4 does not divide model.num_kv_heads = 2", "1, 2"),
        ({"dp": 3}, r"dp x fsdp = 3 does not divide train.batch_rows / train.micro_batches = 8", "1, 2"),
        ({"pp": 8}, "8 pipeline stages, but the model has 4 layers", "at most 4"),
        (
            {"pp": 3, "schedule": "interleaved", "stages_per_rank": 2, "zero": 1},
            "6 pipeline stages, but the model has 4 layers",
            "at most 4",
        ),
        ({"pp": 4}, "train.micro_batches = 2 leave stages of pp = 4 without work", "micro_batches = 4"),
    ],
)
def test_what_does_not_is_refused_with_what_would(parallel, message, hint):
    with pytest.raises(TrainError, match=message) as told:
        fits(ParallelRecipe(**parallel))
    assert hint in str(told.value.hint)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("pp = 2\nstages_per_rank = 2", 'needs schedule = "interleaved"'),
        ('schedule = "interleaved"', "needs pp and stages_per_rank"),
        ("tp = 0", "out of range"),
        ('schedule = "gpipe"', "none of '1f1b', 'interleaved'"),
    ],
)
def test_a_recipe_says_where(lines, message, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(f"[parallel]\n{lines}\n")
    with pytest.raises(RecipeError, match=message) as told:
        load_recipe(path, {"parallel": ParallelRecipe})
    assert "r.toml:" in str(told.value)
