import mmap
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marrow.core.errors import ArtifactNotFound, DamagedBlob, DiskFull, NotPermitted, StoreError
from marrow.core.hashes import canonical_json, hash_bytes
from marrow.core.records import FileEntry, Parent
from marrow.store.store import Store, artifact_id

Fill = Callable[..., Path]


def damage(store: Store, digest: str) -> None:
    path = store.blobs.place(digest)
    path.chmod(0o644)
    path.write_bytes(b"\0" * path.stat().st_size)


# Opening


def test_the_home_comes_from_the_argument_then_the_environment_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Store.open() as store:
        assert store.home == tmp_path / ".marrow"
    monkeypatch.setenv("MARROW_HOME", str(tmp_path / "env"))
    with Store.open() as store:
        assert store.home == tmp_path / "env"
    with Store.open(Path("given")) as store:
        assert store.home == tmp_path / "given"
        assert (store.home / ".gitignore").read_text() == "*\n"
        store.close()


def test_another_process_may_make_the_store_at_the_same_moment(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_dir = Path.is_dir

    def too_late(path: Path) -> bool:
        was_there = is_dir(path)
        if path == home and not was_there:
            home.mkdir()  # the other process, right behind this one's look
        return was_there

    monkeypatch.setattr(Path, "is_dir", too_late)
    with Store.open(home) as store:
        assert store.home == home


def test_looking_does_not_make_a_store(home: Path) -> None:
    with pytest.raises(StoreError, match="there is no store at") as caught:
        Store.open(home, create=False)
    assert caught.value.hint is not None and "MARROW_HOME" in caught.value.hint
    assert not home.exists()


def test_a_home_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("x")
    with pytest.raises(StoreError, match="is not a folder"):
        Store.open(tmp_path / "home")


def test_a_home_that_cannot_be_made_is_said(
    small_disk: Callable[[str], Path], read_only: Callable[[Path], None]
) -> None:
    disk = small_disk("1m")
    read_only(disk)
    with pytest.raises(NotPermitted, match="cannot open the store"):
        Store.open(disk / "home")


def test_the_catalog_can_live_in_postgresql(home: Path, postgres: str, fill: Fill) -> None:
    with Store.open(home, catalog=postgres) as store:
        artifact = store.publish("rows", "k", fill(a="x"))
        assert store.get(artifact.id) == artifact
    assert not (home / "catalog.sqlite").exists()


# Publishing


def test_what_is_published_comes_back_file_by_file(store: Store, fill: Fill) -> None:
    rows = store.publish("rows", "k0", fill(a="x"))
    artifact = store.publish(
        "shards",
        "k1",
        fill(**{"b": "text b", "deep/er/c": "text c"}),
        parents=[Parent("rows", rows.id, {"part": [0, 1]})],
        facts={"rows": 3},
        recipe_hash="rh",
        environment={"torch": "2.13"},
    )
    assert store.get(artifact.id) == artifact
    assert [(file.name, file.sha256) for file in artifact.files] == [
        ("b", hash_bytes(b"text b")),
        ("deep/er/c", hash_bytes(b"text c")),
    ]
    assert artifact.parents == (Parent("rows", rows.id, {"part": [0, 1]}),)
    assert artifact.facts == {"rows": 3} and artifact.environment == {"torch": "2.13"}
    assert artifact.code_version.startswith("0.1.0+src.")
    view = store.view(artifact)
    assert {p.relative_to(view).as_posix(): p.read_text() for p in view.rglob("*") if p.is_file()} == {
        "b": "text b",
        "deep/er/c": "text c",
    }


def test_the_id_is_of_the_content_and_not_of_time_or_facts(store: Store, fill: Fill) -> None:
    first = store.publish("rows", "k", fill(a="x"), facts={"wall_s": 1.0}, recipe_hash="one")
    again = store.publish("rows", "k", fill(a="x"), facts={"wall_s": 2.0}, recipe_hash="two")
    assert again == first
    others = [
        store.publish("rowz", "k", fill(a="x")),
        store.publish("rows", "K", fill(a="x")),
        store.publish("rows", "k", fill(a="y")),
        store.publish("rows", "k", fill(b="x")),
        store.publish("rows", "k", fill(a="x", b="")),
        store.publish("rows", "k", fill(a="x"), parents=[Parent("r", first.id)]),
        store.publish("rows", "k", fill(a="x"), parents=[Parent("s", first.id)]),
        store.publish("rows", "k", fill(a="x"), parents=[Parent("s", first.id, {"epoch": 1})]),
    ]
    assert len({first.id, *(other.id for other in others)}) == 9


def test_the_id_is_the_same_in_every_version_of_marrow() -> None:
    # Golden: if this changes, every store out there rebuilds everything.
    entry = FileEntry("a", "0" * 64, "1" * 32, 7)
    found = artifact_id("rows", "key", [Parent("r", "p", {"x": 1})], [entry])
    assert found == "b4eb00931ef21bfce054ceef27c87a2277ce6f58266ec2e97e915358d7c5bab0"


def test_an_artifact_may_have_no_files(store: Store, fill: Fill) -> None:
    artifact = store.publish("report", "k", fill(), facts={"bits_per_byte": 1.5})
    assert artifact.files == () and store.view(artifact).is_dir()


def test_an_unknown_parent_is_refused(store: Store, fill: Fill) -> None:
    with pytest.raises(ArtifactNotFound):
        store.publish("rows", "k", fill(a="x"), parents=[Parent("r", "f" * 64)])
    assert store.catalog.latest() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"bytes"])
def test_facts_that_json_cannot_hold_are_refused_before_anything_moves(
    store: Store, fill: Fill, value: object
) -> None:
    folder = fill(a="x")
    with pytest.raises(StoreError, match="facts of rows cannot be written as JSON"):
        store.publish("rows", "k", folder, facts={"value": value})
    assert (folder / "a").read_text() == "x"


def test_what_is_no_file_cannot_be_published(store: Store, fill: Fill) -> None:
    folder = fill(a="x")
    os.mkfifo(folder / "pipe")
    with pytest.raises(StoreError, match="is not a file"):
        store.publish("rows", "k", folder)


def test_a_linked_users_file_is_copied_and_stays_the_users(store: Store, fill: Fill, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.csv"
    theirs.write_text("a,b\n")
    folder = fill()
    os.link(theirs, folder / "hard.csv")
    (folder / "soft.csv").symlink_to(theirs)
    artifact = store.publish("rows", "k", folder)
    theirs.write_text("changed by its owner")
    assert {path.read_text() for path in store.view(artifact).iterdir()} == {"a,b\n"}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.dictionaries(
        st.from_regex(r"[a-z]{1,3}(/[a-zü ]{1,3}){0,2}", fullmatch=True).map(lambda s: s.replace("/", ".d/")),
        st.binary(max_size=50),
        max_size=5,
    )
)
def test_any_folder_survives_publish_and_checkout(
    store: Store, tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    artifact = store.publish("any", canonical_json(sorted(files)), folder)
    out = store.checkout(artifact, tmp_path_factory.mktemp("out") / "x")
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert found == files


# Views and checkouts


def test_a_view_is_links_to_read_only_blobs_that_mmap_reads(store: Store, fill: Fill) -> None:
    artifact = store.publish("rows", "k", fill(**{"sub/a": "mapped"}))
    path = store.view(artifact) / "sub" / "a"
    assert path.is_symlink() and not os.path.isabs(os.readlink(path))
    assert path.resolve() == store.blobs.place(artifact.files[0].sha256)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert bytes(mapped) == b"mapped"


def test_a_view_is_made_once_and_mended(store: Store, fill: Fill) -> None:
    artifact = store.publish("rows", "k", fill(a="x", b="y"))
    folder = store.view(artifact)
    inode = folder.stat().st_ino
    assert store.view(artifact).stat().st_ino == inode
    (folder / "a").unlink()
    assert (store.view(artifact) / "a").read_text() == "x"


def test_a_store_can_be_moved_with_its_views(store: Store, fill: Fill, tmp_path: Path) -> None:
    artifact = store.publish("rows", "k", fill(a="x"))
    view = store.view(artifact)
    store.close()
    moved = store.home.rename(tmp_path / "moved")
    assert (moved / view.relative_to(store.home) / "a").read_text() == "x"
    with Store.open(moved) as again:
        assert again.resolve(artifact.id[:8]) == artifact


def test_a_view_of_damaged_bytes_is_refused(store: Store, fill: Fill) -> None:
    artifact = store.publish("rows", "k", fill(a="x" * 100))
    store.view(artifact)
    damage(store, artifact.files[0].sha256)
    with pytest.raises(DamagedBlob):
        store.view(artifact)


def test_verify_names_exactly_the_damaged_files(store: Store, fill: Fill) -> None:
    artifact = store.publish("rows", "k", fill(a="x", b="y", c="z"))
    assert store.verify(artifact) == ()
    damage(store, artifact.files[0].sha256)
    store.blobs.place(artifact.files[2].sha256).unlink()
    assert store.verify(artifact) == (artifact.files[0], artifact.files[2])


def test_a_checkout_is_the_users_own_copy(store: Store, fill: Fill, tmp_path: Path) -> None:
    artifact = store.publish("rows", "k", fill(**{"a": "x", "sub/b": "y"}))
    out = store.checkout(artifact, tmp_path / "out")
    (out / "a").write_text("mine now")
    assert (out / "sub" / "b").read_text() == "y"
    assert store.verify(artifact) == ()
    with pytest.raises(StoreError, match="is not empty"):
        store.checkout(artifact, out)
    assert (out / "a").read_text() == "mine now"


# Disk


def test_a_full_disk_keeps_what_was_there(small_disk: Callable[[str], Path], fill: Fill) -> None:
    disk = small_disk("2m")
    with Store.open(disk / "home") as store:
        small = store.publish("rows", "small", fill(a="x" * 1000))
        big = fill(a="small one first")
        (big / "b").write_bytes(os.urandom(4 << 20))
        with pytest.raises(DiskFull) as caught:
            store.publish("rows", "big", big)
        assert "MARROW_HOME" in str(caught.value)
        assert store.catalog.latest() == [small] and store.verify(small) == ()
        store.collect()
        assert list(store.blobs.digests()) == [small.files[0].sha256]


def test_collect_keeps_what_is_referenced_and_old_work_goes(store: Store, fill: Fill) -> None:
    artifact = store.publish("rows", "k", fill(a="kept"))
    orphan = fill(b="gone") / "b"
    store.blobs.put_file(orphan, move=True)
    fresh, old, busy = (store.work_folder(name) for name in ("fresh", "old", "busy"))
    for folder in (old, busy):
        (folder / "checkpoint").write_text("x")
        for path in (folder, folder / "checkpoint"):
            os.utime(path, (1e9, 1e9))
    with store.step_lock("busy"):
        freed = store.collect()
    assert (freed.num_blobs, freed.num_bytes) == (1, 4)
    assert store.verify(artifact) == ()
    assert fresh.exists() and busy.exists() and not old.exists()


def test_collect_waits_for_a_publisher_that_has_no_row_yet(
    store: Store, home: Path, spawn: Callable[..., Any], fill: Fill
) -> None:
    publish = """
import sys
from pathlib import Path
from marrow.store.store import Store
with Store.open(Path(sys.argv[1])) as store:
    store.publish("rows", "k", Path(sys.argv[2]))
"""
    collect = """
import sys
from pathlib import Path
from marrow.store.store import Store
with Store.open(Path(sys.argv[1])) as store:
    print("collecting", flush=True)
    print(store.collect().num_blobs)
"""
    # Whoever holds the write lock of SQLite holds the publisher between its blobs and its row.
    writer = sqlite3.connect(home / "catalog.sqlite", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    publisher = spawn(publish, home, fill(a="x"))
    until = time.monotonic() + 30
    while not list(store.blobs.digests()):
        assert time.monotonic() < until, publisher.process.poll()
        time.sleep(0.01)
    collector = spawn(collect, home)
    assert collector.line() == "collecting"
    time.sleep(0.2)
    assert collector.process.poll() is None, "it must wait"
    writer.execute("ROLLBACK")
    writer.close()
    publisher.result()
    assert collector.result() == ["0"]
    assert store.verify(store.catalog.latest()[0]) == ()
