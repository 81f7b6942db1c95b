import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marrow.core.errors import (
    ArtifactNotFound,
    DamagedBlob,
    DiskFull,
    MergeConflict,
    NotPermitted,
    SourceError,
    StaleVersion,
    StoreError,
)
from marrow.core.hashes import hash_file
from marrow.core.records import Parent
from marrow.store import lineage
from marrow.store.store import Store
from marrow.store.versions.versions import Versions, dataset_folder

Tick = Callable[[], None]
Fill = Callable[..., Path]


def listing(folder: Path) -> dict[str, str]:
    """Read a folder file by file: the oracle that knows nothing of manifests."""
    return {p.relative_to(folder).as_posix(): hash_file(p) for p in folder.rglob("*") if p.is_file()}


def stored(versions: Versions, target: str) -> dict[str, str]:
    return {e.name: e.sha256 for e in versions.entries(versions.resolve(target))}


# Commit


def test_a_version_holds_exactly_the_files_of_the_folder(versions: Versions, folder: Path) -> None:
    done = versions.commit(folder, "reviews", "first")
    assert (done.version.label, done.is_new, done.num_read) == ("reviews@1", True, 14)
    assert stored(versions, "reviews") == listing(folder)
    facts = done.version.facts
    assert (facts["files"], facts["added"], facts["message"]) == (14, 14, "first")
    assert facts["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert versions.store.view(done.version.artifact).joinpath("part/03.txt").read_text() == "text of 3\n" * 4


def test_a_version_is_an_artifact_with_its_predecessor_as_parent(versions: Versions, folder: Path) -> None:
    first = versions.commit(folder, "reviews").version.artifact
    (folder / "new").write_text("new")
    second = versions.commit(folder, "reviews").version.artifact
    assert second.parents == (Parent("previous", first.id),)
    graph = lineage.trace(versions.store.catalog, second)
    assert set(graph.artifacts) == {first.id, second.id}
    assert graph.names[second.id] == ("reviews@2",)


def test_the_same_files_again_are_no_new_version(versions: Versions, folder: Path) -> None:
    first = versions.commit(folder, "reviews", "first")
    again = versions.commit(folder, "reviews", "again")
    assert not again.is_new
    assert again.version.artifact.id == first.version.artifact.id
    assert len(list(versions.log("reviews"))) == 1


def test_unchanged_files_are_not_read_again(versions: Versions, folder: Path, wait_a_tick: Tick) -> None:
    wait_a_tick()
    versions.commit(folder, "reviews")
    (folder / "part/03.txt").write_text("changed")
    done = versions.commit(folder, "reviews")
    assert (done.num_read, done.bytes_read) == (1, len("changed"))
    assert done.version.facts["modified"] == 1


def test_an_unreadable_unchanged_file_proves_that_it_is_not_read(
    versions: Versions, folder: Path, wait_a_tick: Tick, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_a_tick()
    versions.commit(folder, "reviews")
    (folder / "new").write_text("new")
    opened: list[str] = []
    real = os.open

    def watch(path: Any, *rest: Any, **more: Any) -> int:
        opened.append(str(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", watch)
    versions.commit(folder, "reviews")
    assert [path for path in opened if path.startswith(f"{folder}/")] == [f"{folder}/new"]


def test_a_file_changed_within_a_tick_with_equal_size_is_noticed(versions: Versions, fill: Fill) -> None:
    folder = fill(a="0000")
    for number in range(12):
        (folder / "a").write_text(f"{number:04d}")
        versions.commit(folder, "racy")
        assert stored(versions, "racy") == listing(folder), number


def test_a_change_that_restores_size_and_mtime_is_noticed(
    versions: Versions, fill: Fill, wait_a_tick: Tick
) -> None:
    folder = fill(a="before")
    os.utime(folder / "a", ns=(10**18, 10**18))
    wait_a_tick()
    versions.commit(folder, "d")
    with (folder / "a").open("r+") as file:
        file.write("after!")
    os.utime(folder / "a", ns=(10**18, 10**18))
    versions.commit(folder, "d")
    assert stored(versions, "d") == listing(folder)


@pytest.mark.parametrize("mtime_s", [0, -1_000_000, 4_000_000_000])
def test_skewed_clocks_do_not_hide_changes(
    versions: Versions, fill: Fill, wait_a_tick: Tick, mtime_s: int
) -> None:
    folder = fill(a="before", b="same")
    os.utime(folder / "a", (mtime_s, mtime_s))
    wait_a_tick()
    versions.commit(folder, "d")
    (folder / "a").write_text("after!")
    os.utime(folder / "a", (mtime_s, mtime_s))
    assert versions.commit(folder, "d").num_read == 1
    assert stored(versions, "d") == listing(folder)


def test_a_clock_set_back_only_costs_reading(
    versions: Versions, folder: Path, wait_a_tick: Tick, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_a_tick()
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 3_600 * 10**9)
    versions.commit(folder, "d")
    assert versions.commit(folder, "d").num_read == 14
    monkeypatch.undo()
    versions.commit(folder, "d")
    assert versions.commit(folder, "d").num_read == 0


def test_a_lost_index_costs_one_full_read_and_stores_nothing(
    versions: Versions, folder: Path, wait_a_tick: Tick
) -> None:
    wait_a_tick()
    versions.commit(folder, "reviews")
    shutil.rmtree(versions.store.home / "indexes")
    done = versions.commit(folder, "reviews")
    assert (done.is_new, done.num_read, done.stored_bytes) == (False, 14, 0)
    assert versions.commit(folder, "reviews").num_read == 0


def test_renamed_and_equal_files_are_free(versions: Versions, folder: Path) -> None:
    versions.commit(folder, "reviews")
    (folder / "large.bin").rename(folder / "renamed.bin")
    shutil.copy(folder / "renamed.bin", folder / "copy.bin")
    shutil.copy(folder / "part/05.txt", folder / "copy.txt")
    done = versions.commit(folder, "reviews")
    assert done.stored_bytes == 0
    assert [(c.letter, c.name) for c in versions.diff("reviews~1", "reviews")] == [
        ("R", "copy.bin"),
        ("A", "copy.txt"),
        ("A", "renamed.bin"),
    ]


def test_a_users_file_is_never_linked_or_touched(versions: Versions, folder: Path) -> None:
    before = {p: p.stat() for p in folder.rglob("*") if p.is_file()}
    versions.commit(folder, "reviews")
    for path, was in before.items():
        now = path.stat()
        assert (now.st_ino, now.st_nlink, now.st_mode, now.st_mtime_ns, now.st_ctime_ns) == (
            was.st_ino,
            1,
            was.st_mode,
            was.st_mtime_ns,
            was.st_ctime_ns,
        )
    (folder / "large.bin").write_bytes(b"overwritten in place")
    assert versions.verify().missing == {}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_packs_do_not_depend_on_the_number_of_threads(
    tmp_path: Path, folder: Path, threads: int, fill: Fill
) -> None:
    packs = set()
    for number in (1, threads):
        with Store.open(tmp_path / f"home-{threads}-{number}") as store:
            Versions(store).commit(folder, "d", threads=number)
            packs.add(tuple(store.contents.packs.names()))
    assert len(packs) == 1


names_of_files = st.text("abc/é \n", min_size=1, max_size=6).filter(
    lambda n: all(part not in ("", ".", "..") for part in n.split("/"))
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(names_of_files, st.binary(max_size=20), max_size=6), min_size=1, max_size=4))
def test_any_history_of_a_folder_comes_back(
    tmp_path_factory: pytest.TempPathFactory, history: list[dict[str, bytes]]
) -> None:
    base = tmp_path_factory.mktemp("history")
    folder = base / "folder"
    with Store.open(base / "home") as store:
        versions = Versions(store)
        kept = []
        for files in history:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name, data in files.items():
                path = folder / name
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(data)
                except OSError:
                    continue  # a file where another name has a folder
            done = versions.commit(folder, "d", allow_empty=True)
            kept.append((done.version.label, listing(folder)))
        for number, (label, wanted) in enumerate(kept):
            assert stored(versions, label) == wanted
            assert listing(store.checkout(versions.resolve(label), base / f"out-{number}")) == wanted
    shutil.rmtree(base)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda p: None, SourceError, "does not exist"),
        (lambda p: p.write_text("file"), SourceError, "is no folder"),
        (lambda p: p.mkdir(), SourceError, "has no files"),
    ],
)
def test_what_cannot_be_committed_is_said(
    versions: Versions, tmp_path: Path, make: Callable[[Path], object], error: type[Exception], said: str
) -> None:
    make(tmp_path / "source")
    with pytest.raises(error, match=said):
        versions.commit(tmp_path / "source", "d")
    with pytest.raises(ArtifactNotFound):
        versions.resolve("d")


def test_an_empty_folder_is_a_version_if_asked_for(versions: Versions, tmp_path: Path) -> None:
    (tmp_path / "source/below").mkdir(parents=True)
    assert versions.commit(tmp_path / "source", "d", allow_empty=True).version.facts["files"] == 0
    assert stored(versions, "d") == {}


def test_a_file_that_changes_while_it_is_read_is_read_again(
    versions: Versions, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, changed = os.read, []

    def read(descriptor: int, count: int) -> bytes:
        data = real(descriptor, count)
        if not changed and os.readlink(f"/proc/self/fd/{descriptor}").endswith("07.txt"):
            changed.append(True)
            (folder / "part/07.txt").write_text("written meanwhile")
        return data

    monkeypatch.setattr(os, "read", read)
    versions.commit(folder, "d")
    monkeypatch.undo()
    assert changed
    assert stored(versions, "d") == listing(folder)


@pytest.mark.parametrize("name", ["part/07.txt", "large.bin"])
def test_a_file_that_never_stops_changing_is_an_error(
    versions: Versions, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real = os.read

    def read(descriptor: int, count: int) -> bytes:
        data = real(descriptor, count)
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(name):
            with (folder / name).open("ab") as file:
                file.write(b"more")
        return data

    monkeypatch.setattr(os, "read", read)
    with pytest.raises(SourceError, match="changed each of the 3 times") as caught:
        versions.commit(folder, "d")
    assert name in str(caught.value)
    monkeypatch.undo()
    assert versions.refs.all() == []
    versions.store.collect()
    assert list(versions.store.blobs.digests()) == list(versions.contents.packs.names()) == []


def test_a_folder_being_written_gives_a_version_of_bytes_that_were_there(
    versions: Versions, fill: Fill
) -> None:
    folder = fill(**{f"{n}": "0" * 5000 for n in range(10)})
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            temporary = folder.parent / "being-written"
            temporary.write_text(f"{number % 10}" * 5000)
            temporary.rename(folder / f"{number % 10}")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(10):
            versions.commit(folder, "d")
    finally:
        stop.set()
        writer.join()
    for version in versions.log("d"):
        for entry in versions.entries(version.artifact):
            assert len(set(versions.contents.read(entry.sha256))) == 1, "never half a file"
    assert versions.verify().missing == {}


def test_a_file_without_permission_is_said(
    versions: Versions, folder: Path, spawn: Callable[..., Any]
) -> None:
    (folder / "part/03.txt").chmod(0)
    code = """
import os, sys
from pathlib import Path
from marrow.core.errors import NotPermitted
from marrow.store.store import Store
from marrow.store.versions.versions import Versions, dataset_folder
import marrow.store.version
marrow.store.version.code_version()
home, folder = Path(sys.argv[1]), Path(sys.argv[2])
if os.getuid() == 0:
    for path in (home.parent, *home.parent.parents):
        os.chmod(path, 0o755) if path.stat().st_uid == 0 and len(path.parts) > 2 else None
    home.mkdir()
    os.chown(home, 65534, 65534)
    os.setegid(65534); os.seteuid(65534)
with Store.open(home) as store:
    try:
        Versions(store).commit(folder, "d")
    except NotPermitted as error:
        print(str(error).replace(chr(10), " "))
"""
    (said,) = spawn(code, folder.parent / "other-home", folder).result()
    assert "no permission to read" in said
    assert "03.txt" in said
    assert "move it out of the folder" in said


def test_a_read_only_store_is_said(
    small_disk: Callable[[str], Path], read_only: Callable[[Path], None], folder: Path
) -> None:
    disk = small_disk("8m")
    with Store.open(disk / "home") as store:
        Versions(store).commit(folder, "d")
    read_only(disk)
    with pytest.raises(NotPermitted), Store.open(disk / "home") as store:
        Versions(store).commit(folder, "d")


def test_a_full_disk_keeps_the_versions_that_were_there(
    small_disk: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    disk = small_disk("4m")
    with Store.open(disk / "home") as store:
        versions = Versions(store)
        versions.commit(folder, "d", "first")
        was = stored(versions, "d")
        (folder / "huge.bin").write_bytes(os.urandom(6 << 20))
        with pytest.raises(DiskFull) as caught:
            versions.commit(folder, "d", "second")
        assert "MARROW_HOME" in str(caught.value)
        assert stored(versions, "d") == was
        (folder / "huge.bin").unlink()
        for number in range(80):
            (folder / f"{number}.bin").write_bytes(os.urandom(100 << 10))
        with pytest.raises(DiskFull):
            versions.commit(folder, "d", "third")
        assert stored(versions, "d") == was
    with Store.open(disk / "home") as store:
        store.collect()
        versions = Versions(store)
        assert versions.verify().missing == {}
        for number in range(75):
            (folder / f"{number}.bin").unlink()
        versions.commit(folder, "d", "fourth")
        assert stored(versions, "d") == listing(folder)


# Branches, tags, names


def test_a_branch_goes_its_own_way_and_a_tag_stays(versions: Versions, folder: Path) -> None:
    versions.commit(folder, "reviews", "first")
    versions.branch("reviews", "work")
    versions.tag("reviews@1", "paper")
    (folder / "new").write_text("new")
    assert versions.commit(folder, "work", "second", replace=True).version.label == "work@2"
    assert versions.resolve("reviews").id == versions.resolve("paper").id == versions.resolve("work@1").id
    assert versions.resolve("work~1").id == versions.resolve("reviews").id
    with pytest.raises(StoreError, match="'paper' is a tag"):
        versions.commit(folder, "paper")
    with pytest.raises(StoreError, match="already"):
        versions.tag("reviews", "paper")


@pytest.mark.parametrize("target", ["reviews~2", "reviews@3", "reviews~x", "nothing", "reviews@0"])
def test_an_unknown_version_is_said(versions: Versions, folder: Path, target: str) -> None:
    versions.commit(folder, "reviews")
    with pytest.raises(ArtifactNotFound):
        versions.resolve(target)


def test_a_dataset_and_a_model_cannot_share_a_name(versions: Versions, folder: Path, fill: Fill) -> None:
    model = versions.store.publish("export", "k" * 64, fill(a="x"))
    versions.store.name(model, "taken")
    with pytest.raises(StoreError, match="already names an artifact of kind export"):
        versions.commit(folder, "taken")
    versions.commit(folder, "reviews")
    with pytest.raises(StoreError, match="is the name of a dataset"):
        versions.store.name(model, "reviews")
    with pytest.raises(StoreError, match="of kind export, not a dataset"):
        versions.resolve("taken")


def test_two_datasets_from_one_folder_share_their_bytes(versions: Versions, folder: Path) -> None:
    one = versions.commit(folder, "one")
    other = versions.commit(folder, "other")
    assert other.is_new
    assert other.stored_bytes == 0
    assert one.version.artifact.id == other.version.artifact.id


def test_the_log_goes_through_both_parents_of_a_merge(versions: Versions, folder: Path, fill: Fill) -> None:
    versions.commit(folder, "main", "base")
    versions.branch("main", "work")
    other = versions.store.checkout(versions.resolve("main"), folder.parent / "other")
    (folder / "a").write_text("a")
    (other / "b").write_text("b")
    versions.commit(folder, "main", "adds a")
    versions.commit(other, "work", "adds b")
    versions.merge("work", "main")
    assert [v.facts["message"] for v in versions.log("main")] == [
        "merge work into main",
        "adds b",
        "adds a",
        "base",
    ]
    assert len(list(versions.log("main", limit=2))) == 2


# Two writers


@pytest.fixture
def behind(versions: Versions, folder: Path) -> Path:
    """A folder that was changed while a colleague committed a change of another file."""
    versions.commit(folder, "d", "first")
    colleague = versions.store.checkout(versions.resolve("d"), folder.parent / "colleague")
    (colleague / "theirs").write_text("theirs")
    versions.commit(colleague, "d", "theirs")
    (folder / "mine").write_text("mine")
    return folder


def test_a_folder_left_behind_is_told_and_loses_nothing(versions: Versions, behind: Path) -> None:
    with pytest.raises(StaleVersion, match="'d' has moved to d@2") as caught:
        versions.commit(behind, "d", "mine")
    assert "marrow data merge" in str(caught.value)
    versions.branch("d@1", "mine")
    versions.commit(behind, "mine", "mine")
    versions.merge("mine", "d")
    assert {"mine", "theirs"} < stored(versions, "d").keys()


def test_replace_commits_all_the_same(versions: Versions, behind: Path) -> None:
    assert versions.commit(behind, "d", "mine", replace=True).version.label == "d@3"
    assert stored(versions, "d") == listing(behind)


COMMIT = """
import sys
from pathlib import Path
from marrow.store.store import Store
from marrow.store.versions.versions import Versions, dataset_folder
home, folder, number, times = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
with Store.open(home) as store:
    versions = Versions(store)
    print("ready", flush=True)
    sys.stdin.readline()
    for turn in range(times):
        (folder / "mine").write_text(f"{number} {turn}")
        versions.commit(folder, "d", f"{number} {turn}", replace=True)
"""


@pytest.mark.slow
def test_two_processes_commit_to_one_branch_and_lose_nothing(
    home: Path, tmp_path: Path, spawn: Callable[..., Any]
) -> None:
    children = []
    for number in range(2):
        folder = tmp_path / f"writer-{number}"
        folder.mkdir()
        children.append(spawn(COMMIT, home, folder, number, 5))
    for child in children:
        assert child.line() == "ready"
    for child in children:
        child.go()
    for child in children:
        child.result()
    with Store.open(home) as store:
        versions = Versions(store)
        log = list(versions.log("d"))
        told = sorted(version.facts["message"] for version in log)
        assert told == sorted(f"{number} {turn}" for number in range(2) for turn in range(5))
        for older, newer in zip(log[1:], log, strict=False):
            assert newer.artifact.parents == (Parent("previous", older.artifact.id),)
        assert versions.verify().missing == {}


# Merge


def test_a_merge_brings_both_sides_and_reads_no_data(
    versions: Versions, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions.commit(folder, "main", "base")
    versions.branch("main", "work")
    other = versions.store.checkout(versions.resolve("main"), folder.parent / "other")
    (folder / "part/00.txt").write_text("ours")
    (other / "part/01.txt").write_text("theirs")
    (other / "part/02.txt").unlink()
    versions.commit(folder, "main")
    versions.commit(other, "work")
    monkeypatch.setattr(type(versions.contents.packs), "read", None)
    done = versions.merge("work", "main")
    monkeypatch.undo()
    assert done.how == "merged"
    assert done.version.label == "main@3"
    assert [parent.role for parent in done.version.artifact.parents] == ["previous", "merged"]
    wanted = listing(folder) | {"part/01.txt": listing(other)["part/01.txt"]}
    del wanted["part/02.txt"]
    assert stored(versions, "main") == wanted
    assert versions.merge("work", "main").how == "nothing"
    assert versions.merge("main", "work").how == "forward"
    assert versions.resolve("work").id == versions.resolve("main").id


def test_a_conflict_leaves_the_branch_where_it_was(versions: Versions, folder: Path) -> None:
    versions.commit(folder, "main", "base")
    versions.branch("main", "work")
    (folder / "part/00.txt").write_text("ours")
    versions.commit(folder, "main")
    (folder / "part/00.txt").write_text("theirs")
    versions.commit(folder, "work", replace=True)
    with pytest.raises(MergeConflict, match=r"part/00\.txt: changed in main, changed in work"):
        versions.merge("work", "main")
    assert versions.resolve("main").id == versions.resolve("main@2").id
    assert versions.merge("work", "main", take="theirs").taken == ("part/00.txt",)
    assert stored(versions, "main")["part/00.txt"] == hash_file(folder / "part/00.txt")


@pytest.mark.parametrize("forward", [True, False])
def test_a_gate_sees_what_the_merge_would_give_and_can_refuse(
    versions: Versions, folder: Path, forward: bool
) -> None:
    versions.commit(folder, "main", "base")
    versions.branch("main", "work")
    if not forward:
        (folder / "ours").write_text("ours")
        versions.commit(folder, "main")
        (folder / "ours").unlink()
    (folder / "theirs").write_text("theirs")
    versions.commit(folder, "work", replace=True)
    seen: list[set[str]] = []

    def gate(entries: Any) -> None:
        with versions.as_folder(entries) as view:
            seen.append(set(listing(view)))
        raise ZeroDivisionError

    before = versions.refs.all()
    with pytest.raises(ZeroDivisionError):
        versions.merge("work", "main", gate=gate)
    assert versions.refs.all() == before
    assert seen == [listing(folder).keys() | (set() if forward else {"ours"})]
    assert list(versions.store.staging.new().parent.iterdir()) == []


# Garbage


def test_a_removed_branch_frees_what_only_it_needed(versions: Versions, folder: Path) -> None:
    versions.commit(folder, "main")
    versions.branch("main", "work")
    (folder / "large.bin").write_bytes(os.urandom(300_000))
    (folder / "small").write_text("only in work")
    versions.commit(folder, "work", replace=True)
    assert versions.store.collect().num_bytes == 0
    gone = versions.resolve("work")
    versions.refs.remove("work")
    freed = versions.store.collect()
    assert freed.num_bytes >= 300_000
    assert versions.refs.absent() == {gone.id}
    assert versions.verify().missing == {}
    assert stored(versions, "work@2").keys() == listing(folder).keys(), "what it was stays known"
    for forbidden in (versions.branch, versions.tag):
        with pytest.raises(DamagedBlob, match="are not kept here"):
            forbidden("work@2", "again")
    assert versions.commit(folder, "main", replace=True).is_new
    assert versions.verify().missing == {}


def test_a_version_that_a_step_was_made_from_is_kept(versions: Versions, folder: Path, fill: Fill) -> None:
    used = versions.commit(folder, "main").version.artifact
    versions.store.publish("ingest", "k" * 64, fill(rows="rows"), parents=[Parent("source", used.id)])
    versions.refs.remove("main")
    assert versions.store.collect().num_blobs == 0
    assert listing(versions.store.view(used)) == listing(folder)


def test_a_pack_mostly_dead_is_written_anew(versions: Versions, fill: Fill) -> None:
    folder = fill(**{f"{n:02d}": f"{n}" * 1000 for n in range(30)})
    versions.commit(folder, "work")
    for number in range(3, 30):
        (folder / f"{number:02d}").unlink()
    versions.commit(folder, "main")
    (before,) = versions.contents.packs.names()
    versions.refs.remove("work")
    freed = versions.store.collect()
    (after,) = versions.contents.packs.names()
    assert before != after
    assert freed.num_blobs == 27
    assert stored(versions, "main") == listing(folder)
    assert versions.verify().missing == {}


def test_many_small_packs_become_one(versions: Versions, fill: Fill) -> None:
    folder = fill(a="0")
    for number in range(20):
        (folder / "a").write_text(f"{number}")
        versions.commit(folder, "d")
    assert len(list(versions.contents.packs.names())) == 20
    versions.store.collect()
    assert len(list(versions.contents.packs.names())) == 1
    assert versions.verify().missing == {}


def test_a_damaged_manifest_stops_the_collection(versions: Versions, folder: Path) -> None:
    artifact = versions.commit(folder, "d").version.artifact
    place = versions.store.blobs.place(artifact.files[0].sha256)
    place.chmod(0o644)
    place.write_bytes(b"damaged")
    before = set(versions.store.blobs.digests())
    with pytest.raises(DamagedBlob):
        versions.store.collect()
    assert set(versions.store.blobs.digests()) == before


# Damage


def test_verify_finds_damage_and_a_commit_of_the_same_folder_heals_it(
    versions: Versions, folder: Path, wait_a_tick: Tick
) -> None:
    wait_a_tick()
    versions.commit(folder, "d")
    entries = {e.name: e for e in versions.entries(versions.resolve("d"))}
    blob = versions.store.blobs.place(entries["large.bin"].sha256)
    (pack,) = versions.contents.packs.names()
    for path, place in ((blob, 5), (versions.contents.packs.place(pack), 0)):
        path.chmod(0o644)
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
    found = versions.verify()
    ((label, lost),) = found.missing.items()
    assert label == "d@1"
    assert "large.bin" in lost
    assert len(lost) == 2
    assert len(found.damage.aside) == 2
    assert len(list((versions.store.home / "damaged").iterdir())) == 2
    assert versions.verify().damage.aside == ()
    again = versions.commit(folder, "d")
    assert (again.is_new, again.num_read) == (False, 2)
    assert versions.verify().missing == {}
    assert listing(versions.store.view(again.version.artifact)) == listing(folder)


def test_a_view_is_mended_and_never_wrong(versions: Versions, folder: Path) -> None:
    artifact = versions.commit(folder, "d").version.artifact
    view = versions.store.view(artifact)
    assert listing(view) == listing(folder)
    (view / "part/03.txt").chmod(0o644)
    (view / "part/03.txt").write_text("changed by someone")
    (view / "extra").write_text("added by someone")
    assert listing(versions.store.view(artifact)) == listing(folder)
    (pack,) = versions.contents.packs.names()
    versions.contents.packs.place(pack).unlink()
    (view / "part/03.txt").chmod(0o644)
    (view / "part/03.txt").write_text("changed again")
    with pytest.raises(DamagedBlob):
        versions.store.view(artifact)


def test_a_folder_that_stands_still_is_only_looked_at(
    versions: Versions, folder: Path, wait_a_tick: Tick
) -> None:
    wait_a_tick()
    first = versions.commit(folder, "d", "first")
    index = next((versions.store.home / "indexes").glob("*[!n]"))
    before = index.stat().st_mtime_ns
    again = versions.commit(folder, "d", "again")
    assert (again.version, again.is_new, again.num_read) == (first.version, False, 0)
    assert index.stat().st_mtime_ns == before
    (pack,) = versions.contents.packs.names()
    versions.contents.packs.place(pack).unlink()
    assert versions.commit(folder, "d", "heals").num_read == 13, "what the store has lost is read again"
    assert versions.verify().missing == {}


def test_a_recipe_can_name_a_version_as_its_folder(versions: Versions, folder: Path) -> None:
    versions.commit(folder, "d")
    was = listing(folder)
    (folder / "new").write_text("new")
    versions.commit(folder, "d")
    assert listing(dataset_folder(versions.store, "d~1")) == was
    assert listing(dataset_folder(versions.store, "d@2")) == listing(folder)
