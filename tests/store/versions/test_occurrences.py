"""Where a file occurs in dataset versions: against a search of the versions' files themselves."""

import random
from pathlib import Path

import pytest

from marrow.store.store import Store
from marrow.store.versions.occurrences import find_occurrences
from marrow.store.versions.versions import Versions

NAMES = ("a.csv", "b.csv", "deep/a.csv", "deep/c.csv")


def edited(versions: Versions, folder: Path, seed: int) -> list[dict[str, bytes]]:
    """Commit a folder a few times under random edits; return what each version then held."""
    choose = random.Random(seed)
    held = []
    for step in range(6):
        for name in choose.sample(NAMES, 2):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(choose.choice([b"", b"x\n1\n", b"x\n2\n", b"x\n%d\n" % step]))
        if choose.random() < 0.4:
            (folder / choose.choice(NAMES)).unlink(missing_ok=True)
        versions.commit(folder, "docs", allow_empty=True)
        files = [path for path in folder.rglob("*") if path.is_file()]
        held.append({path.relative_to(folder).as_posix(): path.read_bytes() for path in files})
    return held


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_what_a_search_of_all_files_finds(tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "ds"
    with Store.open(tmp_path / "home") as store:
        held = edited(Versions(store), folder, seed)
        found = find_occurrences(store, str(folder / "a.csv"))
        labels = {one.artifact.id: one.files for one in found.versions}
        entries = [Versions(store).resolve(f"docs@{n + 1}").id for n in range(len(held))]
    named = {"a.csv", "deep/a.csv"}
    contents = {data for files in held for name, data in files.items() if name in named and data}
    for artifact_id, files in zip(entries, held, strict=True):
        wanted = {
            n: "name" if n in named else "bytes" for n, d in files.items() if n in named or d in contents
        }
        assert labels.get(artifact_id, {}) == wanted
    assert found.contents == len(contents)


def test_a_link_to_the_folder_is_the_folder(tmp_path: Path) -> None:
    (tmp_path / "ds" / "deep").mkdir(parents=True)
    (tmp_path / "ds" / "deep" / "a.csv").write_text("x\n")
    (tmp_path / "link").symlink_to(tmp_path / "ds")
    with Store.open(tmp_path / "home") as store:
        Versions(store).commit(tmp_path / "ds", "docs")
        found = find_occurrences(store, str(tmp_path / "link" / "deep" / "a.csv"))
    assert found.names == ("deep/a.csv",) and len(found.versions) == 1


def test_nothing_is_found_in_a_store_without_datasets(tmp_path: Path) -> None:
    with Store.open(tmp_path / "home") as store:
        found = find_occurrences(store, "../away/a.csv")
    assert found.versions == () and found.folder is None and found.contents == 0
    assert not any(name.startswith("..") for name in found.names)
