"""A check reads every stored byte anew and says, version by version, which files are lost."""

from collections.abc import Callable
from pathlib import Path

import pytest

from marrow.store.store import Store
from marrow.store.versions.verification import verify
from marrow.store.versions.versions import Versions


def damage(path: Path, at: int = 0) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def two(versions: Versions, folder: Path) -> Versions:
    """d@1 and d@2, which has one large file more."""
    versions.commit(folder, "d", "first")
    (folder / "second.bin").write_bytes(b"second" * 50_000)
    versions.commit(folder, "d", "second")
    return versions


def digest_of(versions: Versions, target: str, name: str) -> str:
    return next(e.sha256 for e in versions.entries(versions.resolve(target)) if e.name == name)


def test_a_whole_store_lacks_nothing_and_every_byte_was_read(two: Versions, folder: Path) -> None:
    told: list[float] = []
    found = verify(two.store, progress=lambda done, total, unit, figures=None: told.append(done))
    assert (found.missing, found.artifacts, found.damage.aside) == ({}, [], ())
    kept = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    manifests = sum(f.num_bytes for v in two.log("d") for f in v.artifact.files)
    assert found.damage.num_bytes == kept + manifests == told[-1]


def test_a_damaged_large_file_is_missing_in_the_versions_that_have_it(two: Versions) -> None:
    lost = digest_of(two, "d@2", "second.bin")
    damage(two.store.blobs.place(lost), at=5)
    found = verify(two.store)
    assert found.missing == {"d@2": ["second.bin"]}
    assert (found.damage.digests, found.damage.aside) == ({lost}, (lost,))
    assert verify(two.store).missing == {"d@2": ["second.bin"]}, (
        "found lost again, with nothing left to check"
    )


def test_a_damaged_small_file_is_missing_in_both(two: Versions) -> None:
    lost = digest_of(two, "d@1", "part/00.txt")
    pack = two.contents.packs.pack_of(lost)
    assert pack is not None
    member = next(m for m in two.contents.packs.members(pack) if m.digest == lost)
    damage(two.contents.packs.place(pack), at=member.offset)
    found = verify(two.store)
    assert found.missing == {"d@1": ["part/00.txt"], "d@2": ["part/00.txt"]}
    assert found.damage.digests == {lost}


def test_a_damaged_manifest_is_said_and_the_other_versions_are_looked_at(two: Versions) -> None:
    newest = two.resolve("d@2").files[0]
    damage(two.store.blobs.place(newest.sha256))
    damage(two.store.blobs.place(digest_of(two, "d@1", "large.bin")))
    assert verify(two.store).missing == {"d@1": ["large.bin"], "d@2": [f"manifest {newest.name}"]}


def test_only_the_wanted_versions_are_told_of(two: Versions) -> None:
    lost = digest_of(two, "d@1", "large.bin")
    damage(two.store.blobs.place(lost))
    found = verify(two.store, [two.resolve("d@1")])
    assert found.missing == {"d@1": ["large.bin"]}
    assert found.damage.digests == {lost}, "bytes are checked all the same"


def test_files_that_a_version_let_go_are_not_missed(two: Versions) -> None:
    two.store.refs.remove("d")
    two.store.collect()
    found = verify(two.store)
    assert found.missing == {}


def test_a_commit_of_the_same_folder_brings_lost_files_back(two: Versions, folder: Path) -> None:
    damage(two.store.blobs.place(digest_of(two, "d@2", "second.bin")))
    assert verify(two.store).missing
    two.commit(folder, "d")
    assert verify(two.store).missing == {}


def test_damaged_files_of_other_artifacts_are_told_too(store: Store, tmp_path: Path) -> None:
    from marrow.store.steps import Step, run_step

    def build(workspace) -> dict[str, int]:
        (workspace.out / "rows.bin").write_bytes(b"rows" * 1000)
        return {"rows": 1}

    made = run_step(store, Step("ingest", build)).artifact
    assert verify(store).artifacts == []
    damage(store.blobs.place(made.files[0].sha256))
    found = verify(store)
    assert found.artifacts == [f"ingest {made.id[:12]}"]
    assert found.missing == {}


def test_names_that_do_not_print_are_told_as_escapes(versions: Versions, fill: Callable[..., Path]) -> None:
    folder = fill(**{"odd\nname": "text"})
    versions.commit(folder, "d")
    [pack] = versions.contents.packs.names()
    damage(versions.contents.packs.place(pack))
    assert verify(versions.store).missing == {"d@1": ["odd\\nname"]}
