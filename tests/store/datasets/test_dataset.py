"""A version read back: its changes against another, what must be kept for it, its files as a folder."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from marrow.core.errors import DamagedBlob
from marrow.core.hashes import hash_file
from marrow.core.records import Artifact, Parent
from marrow.store.datasets import dataset as module
from marrow.store.datasets.dataset import (
    changes_between,
    entries_of,
    fill_folder,
    is_dataset,
    label,
    live_digests,
    make_view,
)
from marrow.store.store import Store
from marrow.store.versions.versions import Versions


def listing(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hash_file(p) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def made(versions: Versions, folder: Path) -> Artifact:
    return versions.commit(folder, "d", "first").version.artifact


@pytest.fixture
def view(store: Store, made: Artifact, tmp_path: Path) -> Path:
    target = store.home / "views-of-mine" / "d"
    make_view(store.contents, made, target, store.home / "blobs")
    return target


def damage(path: Path) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# Views


def test_a_view_has_the_files_of_the_folder(view: Path, folder: Path) -> None:
    assert listing(view) == listing(folder)


def test_large_files_are_links_and_small_ones_read_only_copies(view: Path, store: Store) -> None:
    large = view / "large.bin"
    assert large.is_symlink()
    assert not os.path.isabs(os.readlink(large)), "so that the store can be moved as a whole"
    assert store.home in large.resolve().parents
    small = view / "part/03.txt"
    assert not small.is_symlink()
    assert small.stat().st_mode & 0o222 == 0


def test_a_view_that_is_whole_is_left_alone(view: Path, store: Store, made: Artifact) -> None:
    before = {path: path.lstat().st_ino for path in view.rglob("*")}
    make_view(store.contents, made, view, store.home / "blobs")
    assert {path: path.lstat().st_ino for path in view.rglob("*")} == before


SPOIL: dict[str, Callable[[Path], object]] = {
    "a small file changed": lambda view: damage(view / "part/05.txt"),
    "a small file gone": lambda view: (view / "part/05.txt").unlink(),
    "a large file gone": lambda view: (view / "large.bin").unlink(),
    "a folder gone": lambda view: shutil.rmtree(view / "part"),
    "a file too many": lambda view: (view / "new").write_text("new"),
    "a file by another name": lambda view: (view / "empty").rename(view / "empty.txt"),
    "a large file replaced": lambda view: (
        (view / "large.bin").unlink(),
        (view / "large.bin").write_bytes(b"other"),
    ),
    "a link elsewhere": lambda view: (
        (view / "large.bin").unlink(),
        (view / "large.bin").symlink_to("/etc/hostname"),
    ),
    "a link to nowhere": lambda view: (
        (view / "large.bin").unlink(),
        (view / "large.bin").symlink_to("nowhere"),
    ),
}


@pytest.mark.parametrize("what", SPOIL)
def test_a_view_that_someone_changed_is_made_anew(
    what: str, view: Path, store: Store, made: Artifact, folder: Path
) -> None:
    SPOIL[what](view)
    assert listing(view) != listing(folder)
    make_view(store.contents, made, view, store.home / "blobs")
    assert listing(view) == listing(folder)


def test_a_view_of_damaged_bytes_is_not_made(
    store: Store, made: Artifact, tmp_path: Path, versions: Versions
) -> None:
    [pack] = store.contents.packs.names()
    damage(store.contents.packs.place(pack))
    target = store.home / "views-of-mine" / "d"
    with pytest.raises(DamagedBlob, match="is damaged"):
        make_view(store.contents, made, target, store.home / "blobs")
    assert not target.exists()
    assert [p for p in (store.home / "staging").rglob("*") if p.is_file() and p.suffix != ".lock"] == []


def test_a_large_file_whose_blob_is_damaged_is_noticed_in_its_view(
    view: Path, store: Store, made: Artifact
) -> None:
    damage(view.joinpath("large.bin").resolve())
    with pytest.raises(DamagedBlob):
        make_view(store.contents, made, view, store.home / "blobs")


def test_a_folder_without_links_holds_the_bytes_themselves(
    store: Store, made: Artifact, tmp_path: Path, folder: Path
) -> None:
    target = tmp_path / "out"
    fill_folder(store.contents, entries_of(store.contents, made), target)
    assert listing(target) == listing(folder)
    assert not any(path.is_symlink() for path in target.rglob("*"))


# Changes


def test_changes_are_those_of_two_listings(versions: Versions, made: Artifact, folder: Path) -> None:
    before = listing(folder)
    (folder / "part/00.txt").write_text("changed")
    (folder / "part/01.txt").unlink()
    (folder / "new.txt").write_text("new")
    (folder / "large.bin").rename(folder / "moved.bin")
    second = versions.commit(folder, "d").version.artifact
    changes = changes_between(versions.contents, made, second)
    letters = {change.name: change.letter for change in changes}
    assert letters == {"part/00.txt": "M", "part/01.txt": "D", "new.txt": "A", "moved.bin": "R"}
    back = changes_between(versions.contents, second, made)
    assert {c.name: c.letter for c in back} == {
        "part/00.txt": "M", "part/01.txt": "A", "new.txt": "D", "large.bin": "R",
    }  # fmt: skip
    whole = changes_between(versions.contents, None, made)
    assert {c.name: c.new.sha256 for c in whole if c.new} == before
    assert {c.letter for c in whole} == {"A"}


def test_equal_versions_are_compared_without_reading_anything(
    versions: Versions, made: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr(module, "decode", refuse)
    assert changes_between(versions.contents, made, made) == []


# What must be kept


def test_what_a_branch_or_tag_reaches_is_needed(versions: Versions, store: Store, folder: Path) -> None:
    first = versions.commit(folder, "d").version.artifact
    (folder / "more").write_text("more")
    second = versions.commit(folder, "d").version.artifact
    live, unneeded = live_digests(store.catalog, store.refs, store.contents)
    assert unneeded == []
    assert live == {e.sha256 for v in (first, second) for e in entries_of(store.contents, v)}


def test_a_version_that_nothing_stands_on_is_not_needed(
    versions: Versions, store: Store, folder: Path
) -> None:
    versions.commit(folder, "d")
    versions.branch("d", "work")
    (folder / "more").write_text("only on work")
    lost = versions.commit(folder, "work", replace=True).version.artifact
    store.refs.remove("work")
    live, unneeded = live_digests(store.catalog, store.refs, store.contents)
    assert unneeded == [lost.id]
    only = {e.sha256 for e in entries_of(store.contents, lost) if e.name == "more"}
    assert not only & live


def test_a_version_that_a_model_was_made_from_is_needed(
    versions: Versions, store: Store, made: Artifact, make_artifact: Callable[..., Artifact]
) -> None:
    model = make_artifact("model", kind="train", parents=(Parent("data", made.id),))
    store.catalog.add(model)
    store.refs.remove("d")
    live, unneeded = live_digests(store.catalog, store.refs, store.contents)
    assert unneeded == []
    assert live == {entry.sha256 for entry in entries_of(store.contents, made)}


def test_a_damaged_manifest_stops_the_question_what_is_needed(store: Store, made: Artifact) -> None:
    damage(store.blobs.place(made.files[0].sha256))
    with pytest.raises(DamagedBlob):
        live_digests(store.catalog, store.refs, store.contents)


# Names


def test_a_label_prefers_the_name_that_was_asked_for(versions: Versions, store: Store, folder: Path) -> None:
    made = versions.commit(folder, "d").version.artifact
    versions.branch("d", "other")
    assert label(store.catalog, made) == "d@1"
    assert label(store.catalog, made, "other") == "other@1"
    assert label(store.catalog, made, "nobody") == "d@1"


def test_a_version_without_a_name_goes_by_its_id(
    store: Store, make_artifact: Callable[..., Artifact], made: Artifact
) -> None:
    nameless = store.catalog.add(make_artifact("nameless"))
    assert label(store.catalog, nameless) == nameless.id[:12]
    assert is_dataset(made)
    assert not is_dataset(nameless)
