"""Shards at URLs as folders: the same batches as from a disk, several at once, in small caches."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError, SourceError
from marrow.core.frozen_map import FrozenMap
from marrow.data.manifest import Manifest
from marrow.loader.config import LoaderRecipe, SourceRecipe
from marrow.loader.far_folder import ORIGIN, JoinedFiles, far_files, far_folder
from marrow.loader.loader import Loader
from marrow.loader.reader import ShardReader
from marrow.loader.source import LocalFiles
from marrow.loader.streaming.cache import Cache

MIXED = LoaderRecipe(
    mixture=FrozenMap(
        {"a": SourceRecipe("", (3.0,)), "b": SourceRecipe("", (1.0,)), "c": SourceRecipe("", (2.0,))}
    )
)


@pytest.fixture
def sources(shards: Path, tmp_path: Path) -> list[Path]:
    """Three folders of the same shards, which lie in three places."""
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        shutil.copytree(shards, folder)
    return folders


def batches(folders: list[Path], **options: object) -> list[np.ndarray]:
    with Loader(folders, 6, 3, order=MIXED.order, stop=120, **options) as loader:  # type: ignore[arg-type]
        return [batch.tokens_N.numpy().copy() for batch in loader]


@pytest.mark.parametrize(
    ("num_shards", "workers"), [(2, 0), (100, 0), pytest.param(100, 2, marks=pytest.mark.slow)]
)
def test_a_mixture_of_urls_and_folders_gives_the_batches_of_folders_alone(
    sources: list[Path], tmp_path: Path, num_shards: int, workers: int
) -> None:
    """Through a cache that holds all, and through one that holds few shards of each at once."""
    size = max(shard.num_bytes for shard in Manifest.read(sources[0]).shards)
    caches = [Cache(tmp_path / "cache" / name, 2 * num_shards * size) for name in "ac"]
    far_a, far_c = (far_folder(sources[i].as_uri(), cache) for i, cache in zip((0, 2), caches, strict=True))
    far = [far_a, sources[1], far_c]
    expected = batches(sources)
    found = batches(far, workers=workers)
    assert len(found) == len(expected) == 20
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    with ShardReader(far) as streamed, ShardReader(sources) as local:
        assert streamed.check == local.check, "so a run may go on with copies of the shards"


def test_a_folder_stands_for_a_url_in_every_process(sources: list[Path], tmp_path: Path) -> None:
    folder = far_folder(sources[0].as_uri(), Cache(tmp_path / "cache", 1 << 24))
    assert far_folder(sources[0].as_uri(), Cache(tmp_path / "cache", 1 << 25)) == folder
    files = far_files(folder, Manifest.read(folder))
    assert files is not None
    with files:
        assert (files.url, files.cache.max_bytes) == (sources[0].as_uri(), 1 << 25)
    assert far_files(sources[0], Manifest.read(sources[0])) is None


def test_an_origin_that_says_nothing_is_damaged(sources: list[Path], tmp_path: Path) -> None:
    folder = far_folder(sources[0].as_uri(), Cache(tmp_path / "cache", 1 << 24))
    whole = json.loads((folder / ORIGIN).read_text())
    wrong = [json.dumps(part).encode() for part in ({"url": "file:///x"}, whole | {"max_bytes": -5})]
    for text in (b"", b"[]", b"\xff\xfe", b"[" * 100_000, *wrong):
        (folder / ORIGIN).write_bytes(text)
        with pytest.raises(DataError, match=r"origin\.json is damaged"):
            ShardReader(folder)


def test_a_url_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"manifest\.json"):
        far_folder(tmp_path.as_uri(), Cache(tmp_path / "cache", 1 << 24))


class Noting(LocalFiles):
    """Files that note what they are told."""

    def __init__(self, name: str, count: int, max_open: int | None) -> None:
        super().__init__([Path(f"{name}{index}") for index in range(count)])
        self.max_open = max_open
        self.told: list[list[int]] = []
        self.is_closed = False

    def ahead(self, indices: list[int]) -> None:
        self.told.append(indices)

    def close(self) -> None:
        self.is_closed = True


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=5), data=st.data())
def test_joined_files_are_those_of_the_parts_in_their_order(counts: list[int], data: st.DataObject) -> None:
    limits = data.draw(
        st.lists(st.one_of(st.none(), st.integers(1, 9)), min_size=len(counts), max_size=len(counts))
    )
    parts = [Noting("abcde"[i], count, limits[i]) for i, count in enumerate(counts)]
    joined = JoinedFiles(list(zip(parts, counts, strict=True)))
    names = [f"{'abcde'[i]}{index}" for i, count in enumerate(counts) for index in range(count)]
    assert [joined.path(index).name for index in range(len(names))] == names
    assert joined.max_open == min((limit for limit in limits if limit is not None), default=None)
    soon = data.draw(st.permutations(range(len(names))))
    joined.ahead(list(soon))
    for i, part in enumerate(parts):
        assert part.told == [[int(names[index][1:]) for index in soon if names[index][0] == "abcde"[i]]]
    joined.close()
    assert all(part.is_closed for part in parts)
