from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from marrow.core.config import load_recipe
from marrow.core.errors import DataError, RecipeError, UsageError
from marrow.loader.batch import StackRows
from marrow.loader.config import LoaderRecipe, settings_of
from marrow.loader.loader import Loader, LoaderState
from marrow.loader.plan import FullShuffle, WindowShuffle
from marrow.loader.reader import ShardReader


def read(tmp_path: Path, text: str) -> LoaderRecipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    section = load_recipe(path, {"loader": LoaderRecipe}).sections["loader"]
    assert isinstance(section, LoaderRecipe)
    return section


@pytest.fixture
def recipe(tmp_path: Path, shards: Path) -> LoaderRecipe:
    """Two sources that are the same shards: rows tell nothing apart, numbers do."""
    return read(
        tmp_path,
        f"""
        [loader]
        phases = [0, 100]
        [loader.mixture.b]
        shards = "{shards}"
        weights = [1, 3]
        [loader.mixture.a]
        shards = "{shards}"
        weights = [1, 1]
        """,
    )


def test_a_recipe_without_a_mixture_is_one_order(shards: Path, tmp_path: Path) -> None:
    with ShardReader(shards) as reader:
        assert isinstance(LoaderRecipe().order(reader, 3), FullShuffle)
        windowed = read(tmp_path, "[loader]\nwindow = 2").order(reader, 3)
        assert isinstance(windowed, WindowShuffle) and windowed.window == 2


def test_a_mixture_is_resumed_exactly_on_other_ranks_and_batches(recipe: LoaderRecipe) -> None:
    folders = recipe.folders()
    assert len(folders) == 2
    with Loader(folders, 1, 7, order=recipe.order, collate=StackRows()) as loader:
        every = [next(loader).tolist()[0] for _ in range(240)]
        rows = loader.order.rows(np.arange(240))
        counts = Counter((rows[100:] >= loader.order.num_rows // 2).tolist())
    assert 90 < counts[True] < 120  # source b, 3 of 4 from position 100 on
    with Loader(folders, 6, 7, 1, 2, order=recipe.order, collate=StackRows()) as loader:
        for _ in range(20):
            next(loader)
        state = LoaderState.from_json(loader.state().to_json())
    assert state.position == 120 and state.order.startswith("mixture from 0: 1.0, 1.0; from 100: 1.0, 3.0")
    for world in (1, 3):
        ranks = [
            Loader.resume(
                folders, 12, state, rank=rank, world=world, order=recipe.order, collate=StackRows(), stop=240
            )
            for rank in range(world)
        ]
        got = [row for step in zip(*ranks, strict=True) for batch in step for row in batch.tolist()]
        assert got == every[120:]
        for loader in ranks:
            loader.close()
    with pytest.raises(DataError, match="the state is a position in the order"):
        Loader.resume(folders, 12, state)


def test_only_what_is_trained_on_is_a_part_of_the_key(recipe: LoaderRecipe, tmp_path: Path) -> None:
    quick = read(tmp_path, "[loader]\nprefetch = 9\nworkers = 3")
    assert settings_of(quick) == settings_of(LoaderRecipe())
    for text in ("window = 1", 'stop_after = "1M tokens"'):
        assert settings_of(read(tmp_path, f"[loader]\n{text}")) != settings_of(LoaderRecipe())
    assert settings_of(recipe)["mixture"]["b"] == (1.0, 3.0)


def test_a_budget_of_tokens_ends_the_run(shards: Path, tmp_path: Path) -> None:
    recipe = read(tmp_path, '[loader]\nstop_after = "1000 tokens"')
    assert LoaderRecipe().stop(24) is None
    assert recipe.stop(24) == 42  # 41.7 rows of 24
    with Loader(shards, 8, 0, stop=recipe.stop(24)) as loader:
        assert [batch.rows for batch in loader] == [8, 8, 8, 8, 8, 2]
        assert loader.state().position == 42
        assert list(loader) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("window = -1", "window"),
        ("phases = [0, 5]", "no mixture|of a mixture"),
        ('[loader.mixture.a]\nshards = "x"\nweights = [1, 2]', "2 weights for 1 phases"),
        ('[loader.mixture.a]\nshards = "x"\nweights = [-1]', "cannot be shares"),
        ('[loader.mixture.a]\nshards = "x"\nweights = [0]', "cannot be shares"),
        ('[loader.mixture.a]\nshards = "x"\nweight = 1', "weight"),
        ('phases = [3]\n[loader.mixture.a]\nshards = "x"', "begin at"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises((RecipeError, UsageError), match=said):
        read(tmp_path, f"[loader]\n{text}")


def test_sources_that_do_not_go_together_are_refused(shards: Path, make_shards: object) -> None:
    other = make_shards(context=16)  # type: ignore[operator]
    with pytest.raises(UsageError, match="has context 16"):
        ShardReader([shards, other])
    with pytest.raises(UsageError, match="no folder"):
        ShardReader([])
