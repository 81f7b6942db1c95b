"""The shards that a mixture names, and where lineage then leads."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from marrow.cli.mixture import find_sources
from marrow.core.errors import ArtifactNotFound, SourceError, UsageError
from marrow.core.frozen_map import FrozenMap
from marrow.core.hashes import hash_file
from marrow.loader.config import LoaderRecipe, SourceRecipe
from marrow.loader.loader import Loader
from marrow.store.store import Store


@pytest.fixture
def store(tmp_path: Path):
    with Store.open(tmp_path / "home") as opened:
        yield opened


def recipe(**shards: str) -> LoaderRecipe:
    return LoaderRecipe(mixture=FrozenMap({name: SourceRecipe(where) for name, where in shards.items()}))


def shards_folder(folder: Path, text: str = "{}") -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text)
    return folder


def publish(store: Store, tmp_path: Path, kind: str, name: str, file: str) -> str:
    folder = tmp_path / f"{kind}-staging"
    folder.mkdir()
    (folder / file).write_text(kind)
    artifact = store.publish(kind, f"key of {kind}", folder)
    store.name(artifact, name)
    return artifact.id


def test_without_a_mixture_the_runs_own_shards_are_used(store: Store) -> None:
    found = find_sources(LoaderRecipe(), store)
    assert found.used() == {"shards"} and not found.parents and found.checks() == {}
    assert found.place(LoaderRecipe(), {"shards": Path("view")}) == LoaderRecipe()


def test_own_shards_artifacts_and_folders_each_get_their_place(store: Store, tmp_path: Path) -> None:
    made = publish(store, tmp_path, "shards", "books", "manifest.json")
    folder = shards_folder(tmp_path / "code")
    mixed = recipe(own="", books="books", code=str(folder))
    found = find_sources(mixed, store)
    assert {role: artifact.id for role, artifact in found.parents.items()} == {"shards: books": made}
    assert found.used() == {"shards", "shards: books"}
    assert found.checks() == {
        "books": "shards: books",
        "own": "shards",
        "code": hash_file(folder / "manifest.json"),
    }
    placed = found.place(mixed, {"shards": tmp_path / "a", "shards: books": tmp_path / "b"})
    assert placed.folders() == [tmp_path / "b", folder, tmp_path / "a"]  # by the sources' names


def test_a_mixture_of_others_does_not_use_the_runs_own_shards(store: Store, tmp_path: Path) -> None:
    found = find_sources(recipe(code=str(shards_folder(tmp_path / "code"))), store)
    assert found.used() == set()


def test_another_folder_of_the_same_name_is_another_input(store: Store, tmp_path: Path) -> None:
    folder = shards_folder(tmp_path / "code")
    before = find_sources(recipe(code=str(folder)), store).checks()
    (folder / "manifest.json").write_text("{ }")
    assert find_sources(recipe(code=str(folder)), store).checks() != before


def test_shards_at_a_url_are_a_folder_that_fetches_them(store: Store, tmp_path: Path, finished: Path) -> None:
    with Store.open(finished) as other:
        shards = other.view(other.catalog.latest(kind="shards", limit=1)[0])
        far = tmp_path / "far"
        shutil.copytree(shards, far)
    mixed = recipe(far=far.as_uri(), near=str(far))
    found = find_sources(mixed, store)
    assert found.checks()["far"] == found.checks()["near"] == hash_file(far / "manifest.json")
    placed = found.place(mixed, {})
    with (
        Loader(placed.folders(), 4, 0, order=placed.order, stop=40) as streamed,
        Loader([far, far], 4, 0, order=placed.order, stop=40) as local,
    ):
        for one, other_one in zip(streamed, local, strict=True):
            assert np.array_equal(one.tokens_N, other_one.tokens_N) and one.samples == other_one.samples
    assert list((store.home / "cache").rglob("*.arrow"))


@pytest.mark.parametrize("nowhere", ["{}/nothing", "ftp://host/shards"])
def test_a_url_without_shards_is_an_error(store: Store, tmp_path: Path, nowhere: str) -> None:
    with pytest.raises((SourceError, UsageError), match=r"manifest\.json"):
        find_sources(recipe(code=nowhere.format(tmp_path.as_uri())), store)


def test_what_is_no_folder_of_shards_is_refused_with_a_hint(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"loader\.mixture\.code.*manifest\.json") as caught:
        find_sources(recipe(code="."), store)
    assert "marrow export" in str(caught.value.hint)


def test_an_artifact_of_another_kind_is_refused(store: Store, tmp_path: Path) -> None:
    publish(store, tmp_path, "split", "halves", "train.parquet")
    with pytest.raises(UsageError, match=r"loader\.mixture\.code\.shards = 'halves' is of kind split"):
        find_sources(recipe(code="halves"), store)


def test_an_unknown_name_is_an_error_of_the_store(store: Store) -> None:
    with pytest.raises(ArtifactNotFound, match="nowhere"):
        find_sources(recipe(code="nowhere"), store)
