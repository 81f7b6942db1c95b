"""What a run notes on its edges to shards says exactly which rows it consumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marrow.cli.consumption import note, seen
from marrow.cli.mixture import Sources
from marrow.cli.source_lineage import as_text, trace_file
from marrow.core.frozen_map import FrozenMap
from marrow.core.records import Parent
from marrow.data.manifest import Manifest
from marrow.loader.config import LoaderRecipe, SourceRecipe
from marrow.loader.loader import Loader
from marrow.store.store import Store

FACTS = {"seed": 3, "samples": [0, 1500], "order": "mixture ..."}
ROLES = {"books": "shards: books", "code": "shards", "own": "shards"}


def mixture(window: int) -> LoaderRecipe:
    sources = {"books": (1.0, 2.0), "code": (3.0, 0.5), "own": (0.5, 0.5)}
    return LoaderRecipe(
        window=window,
        phases=(0, 700),
        mixture=FrozenMap({name: SourceRecipe("", weights) for name, weights in sources.items()}),
    )


@pytest.fixture(scope="module")
def shards(finished: Path) -> Path:
    with Store.open(finished) as store:
        return store.view(store.catalog.latest(kind="shards", limit=1)[0])


def kept(detail: dict[str, Any]) -> dict[str, Any]:
    """As the catalog gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(detail))
    return found


@pytest.mark.parametrize("window", [0, 1])
@pytest.mark.parametrize("role", ["shards", "shards: books"])
def test_rows_of_a_mixture_are_counted_as_the_loader_gives_them(shards: Path, window: int, role: str) -> None:
    recipe = mixture(window)
    manifest = Manifest.read(shards)
    rows_of_S = [shard.num_rows for shard in manifest.shards]
    with Loader([shards, shards, shards], 5, 3, order=recipe.order, prefetch=0, stop=1500) as loader:
        given = loader.order.rows(np.concatenate([np.array(batch.samples) for batch in loader]))
    source_N, row_N = np.divmod(given, manifest.num_rows)
    of_role = np.isin(source_N, [i for i, name in enumerate(sorted(ROLES)) if ROLES[name] == role])
    detail = kept(note(recipe, Sources({}, ROLES, {}), role, FACTS))
    assert set(detail["sources"]) == {name for name in ROLES if ROLES[name] == role}
    for rows in ([0], [5, 6, 7], list(range(manifest.num_rows))):
        hits = np.flatnonzero(of_role & np.isin(row_N, rows))
        found = seen(detail, rows_of_S, np.array(rows))
        assert found is not None
        assert (found.times, found.first) == (len(hits), int(hits[0]) if len(hits) else None)


def test_without_a_mixture_the_note_is_the_order_alone(shards: Path) -> None:
    facts = FACTS | {"order": "full", "loss": 1.0}
    detail = note(LoaderRecipe(), Sources({}, {}, {}), "shards", facts)
    assert detail == {"seed": 3, "samples": [0, 1500], "order": "full"}
    found = seen(detail, [100, 50], np.array([1]))
    assert found is not None and found.times == 10


def test_a_note_that_does_not_tell_gives_no_figure() -> None:
    assert seen({}, [10], np.array([1])) is None
    assert seen(FACTS, [10], np.array([1])) is None, "a mixture of a run that did not note its sources"


def test_lineage_says_exactly_what_a_run_on_a_mixture_consumed(finished: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(finished, home, symlinks=True)
    with Store.open(home) as store:
        made = store.catalog.latest(kind="shards", limit=1)[0]
        rows = np.arange(Manifest.read(store.view(made)).num_rows)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model").write_text("weights")
        detail = note(mixture(0), Sources({}, ROLES, {}), "shards: books", FACTS)
        parents = [Parent("shards: books", made.id, detail)]
        run = store.publish("train", "a run on a mixture", tmp_path / "out", parents=parents)
        told = trace_file(store, "notes.csv")
        (mine,) = [one for one in told["artifacts"] if one["id"] == run.id]
        expected = seen(detail, [len(rows)], rows)
    assert expected is not None and expected.times > 400
    assert mine["times_seen"] == expected.times and mine["effect"] == "learned"
    assert mine["consumed"][0]["exact"] and "may have" not in as_text(told)
    assert f"consumed it {expected.times:,} times in samples 0 to 1,500" in as_text(told)
