import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from object_server import Fault, FaultProxy, Seen

from marrow.core.errors import (
    ArtifactNotFound,
    DamagedBlob,
    DiskFull,
    NotPermitted,
    SourceError,
    StaleVersion,
)
from marrow.core.hashes import hash_file
from marrow.store.remote.client import Remote
from marrow.store.store import Store
from marrow.store.versions.transfer import Transferred, pull, push
from marrow.store.versions.versions import Versions


def listing(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hash_file(p) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def remote(tmp_path: Path) -> str:
    return f"file://{tmp_path}/remote"


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Versions]:
    with Store.open(tmp_path / "other-home") as store:
        yield Versions(store)


@pytest.fixture
def history(versions: Versions, folder: Path) -> Versions:
    """Give d@1, d@2 and a branch merged into d@3."""
    versions.commit(folder, "d", "first")
    versions.branch("d", "work")
    (folder / "part/00.txt").write_text("second")
    (folder / "second.bin").write_bytes(os.urandom(200_000))
    versions.commit(folder, "d", "second")
    (folder / "second.bin").unlink()
    (folder / "work").write_text("work")
    versions.commit(folder, "work", "work", replace=True)
    versions.merge("work", "d", take="ours")
    return versions


def holdings(versions: Versions, name: str = "d") -> dict[str, object]:
    """Give what a store has of a dataset: versions, facts, names, files byte for byte, what is missing."""
    log = list(versions.log(name))
    return {
        "versions": [version.artifact.id for version in log],
        "facts": [version.facts for version in log],
        "names": [(n.version, n.artifact_id) for n in versions.store.catalog.names(name=name)],
        "files": [listing(versions.store.view(version.artifact)) for version in log],
        "missing": versions.verify().missing,
    }


def test_what_is_pushed_is_pulled_with_its_history(history: Versions, other: Versions, remote: str) -> None:
    sent = push(history.store, "d", remote)
    assert sent.versions == ("d@1", "d@2", "d@3")
    assert pull(other.store, "d", remote).versions == sent.versions
    assert holdings(history) == holdings(other)


def test_only_what_is_missing_moves(history: Versions, other: Versions, remote: str, folder: Path) -> None:
    push(history.store, "d", remote)
    pull(other.store, "d", remote)
    assert push(history.store, "d", remote).num_files == 0
    assert pull(other.store, "d", remote).num_files == 0
    (folder / "tiny").write_text("tiny")
    history.commit(folder, "d", replace=True)
    assert push(history.store, "d", remote).num_files == 2  # a pack and a manifest
    pulled = pull(other.store, "d", remote)
    assert pulled.num_files == 2
    assert pulled.num_bytes < 3_000
    assert holdings(history) == holdings(other)


def test_a_push_sends_nothing_of_other_datasets(
    versions: Versions, fill: Callable[..., Path], remote: str
) -> None:
    """Files of both lie in one pack after a collection made one of many."""
    for number in range(10):
        versions.commit(fill(secret=f"secret {number}"), "private", replace=True)
        versions.commit(fill(open=f"open {number}"), "public", replace=True)
    versions.store.collect()
    assert len(list(versions.contents.packs.names())) == 1
    push(versions.store, "public", remote)
    with Remote.open(remote) as opened:
        everything = b"".join(opened.read(file.name) for file in opened.list())
    assert b"open 9" in everything
    assert b"secret" not in everything


def test_damage_and_loss_are_healed_by_pull(history: Versions, remote: str) -> None:
    push(history.store, "d", remote)
    store = history.store
    for path in [*store.blobs._folder.glob("??/??/*"), *(store.home / "packs").iterdir()]:
        path.chmod(0o644)
        data = bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
    assert set(history.verify().missing) == {"d@1", "d@2", "d@3", "work@2"}
    pull(store, "d", remote)
    assert history.verify().missing == {}
    for version in history.log("d"):
        assert store.view(version.artifact).is_dir()


@pytest.mark.parametrize("what", ["blobs", "packs", "versions"])
def test_a_damaged_remote_is_said_and_brings_nothing_wrong(
    history: Versions, other: Versions, remote: str, tmp_path: Path, what: str
) -> None:
    push(history.store, "d", remote)
    for path in (tmp_path / "remote" / what).rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            data = bytearray(path.read_bytes())
            data[len(data) // 2 if what == "versions" else 0] ^= 1
            path.write_bytes(data)
    with pytest.raises(DamagedBlob) as caught:
        pull(other.store, "d", remote)
    assert "remote" in str(caught.value)
    assert other.refs.all() == []
    assert other.verify().missing == {}


@pytest.mark.parametrize("what", ["blobs", "packs"])
def test_a_remote_that_lacks_files_is_said(
    history: Versions, other: Versions, remote: str, tmp_path: Path, what: str
) -> None:
    push(history.store, "d", remote)
    for path in list((tmp_path / "remote" / what).rglob("*")):
        if path.is_file():
            path.unlink()
    with pytest.raises(SourceError):
        pull(other.store, "d", remote)
    assert other.refs.all() == []
    push(history.store, "d", remote)
    pull(other.store, "d", remote)
    assert holdings(history) == holdings(other)


def test_a_version_that_leaves_its_folder_is_refused(
    history: Versions, other: Versions, remote: str, tmp_path: Path
) -> None:
    push(history.store, "d", remote)
    for path in (tmp_path / "remote/versions").iterdir():
        data = json.loads(path.read_text())
        data["facts"]["message"] = "facts are not part of the id"
        path.write_text(json.dumps(data))
        data["key"] = "0" * 64
        path.write_text(json.dumps(data))
    with pytest.raises(DamagedBlob, match="is not the version of its name"):
        pull(other.store, "d", remote)


def test_both_went_on_is_said_and_merged(
    history: Versions, other: Versions, remote: str, folder: Path, tmp_path: Path
) -> None:
    push(history.store, "d", remote)
    pull(other.store, "d", remote)
    theirs = other.store.checkout(other.resolve("d"), tmp_path / "theirs")
    (theirs / "their file").write_text("theirs")
    other.commit(theirs, "d", "theirs")
    push(other.store, "d", remote)
    (folder / "my file").write_text("mine")
    history.commit(folder, "d", "mine", replace=True)
    with pytest.raises(StaleVersion, match="has versions of 'd' that this store has not"):
        push(history.store, "d", remote)
    with pytest.raises(StaleVersion, match="has other versions here"):
        pull(history.store, "d", remote)
    pull(history.store, "d", remote, into="colleague")
    history.merge("colleague", "d", take="ours")
    assert {"my file", "their file"} <= {e.name for e in history.entries(history.resolve("d"))}


def test_two_pushes_at_once_cannot_both_win(
    history: Versions, other: Versions, bucket: str, folder: Path, fault_proxy: FaultProxy
) -> None:
    push(history.store, "d", bucket)
    pull(other.store, "d", bucket)
    for versions, text in ((history, "one"), (other, "other")):
        (folder / "mine").write_text(text)
        versions.commit(folder, "d", text, replace=True)
    pushed: list[Transferred] = []

    def someone_is_faster(request: Seen, n: int) -> None:
        """At the last moment, when the name is about to be written."""
        if request.method == "PUT" and "/names/" in request.path and not pushed:
            fault_proxy.fault = lambda request, n: None
            pushed.append(push(other.store, "d", bucket))

    fault_proxy.fault = someone_is_faster
    with pytest.raises(StaleVersion, match="someone else pushed d@4 meanwhile"):
        push(history.store, "d", bucket)
    assert pushed[0].versions == ("d@4",)
    with Remote.open(bucket) as opened:
        kept = json.loads(opened.read("names/d/00000004.json"))
    assert kept["artifact_id"] == other.resolve("d").id


def test_the_newest_alone_brings_only_its_files(
    history: Versions, other: Versions, remote: str, folder: Path
) -> None:
    push(history.store, "d", remote)
    pull(other.store, "d", remote, newest=True)
    assert listing(other.store.view(other.resolve("d"))) == listing(history.store.view(history.resolve("d")))
    assert other.refs.absent() == {other.resolve("d@1").id}, "the newest has all files of the second"
    assert len(list(other.log("d"))) == 4
    assert other.verify().missing == {}
    with pytest.raises(DamagedBlob, match="not kept here"):
        other.branch("d@1", "old")
    other.store.collect()
    pull(other.store, "d", remote)
    assert other.refs.absent() == set()
    assert holdings(history) == holdings(other)


def test_a_tag_travels_too(history: Versions, other: Versions, remote: str) -> None:
    history.tag("d@2", "paper")
    push(history.store, "paper", remote)
    assert pull(other.store, "paper", remote).versions == ("paper@1",)
    found = other.refs.get("paper")
    assert found is not None
    assert (found.kind, found.artifact_id) == ("tag", history.resolve("d@2").id)


def test_what_is_not_there_is_said(history: Versions, other: Versions, remote: str) -> None:
    with pytest.raises(ArtifactNotFound, match="no dataset or branch 'x'"):
        push(history.store, "x", remote)
    with pytest.raises(ArtifactNotFound, match="has no dataset 'd'"):
        pull(other.store, "d", remote)
    push(history.store, "d", remote)
    with pytest.raises(ArtifactNotFound, match="it has: d"):
        pull(other.store, "e", remote)


def test_a_full_disk_is_said_and_the_pull_goes_on_elsewhere(
    history: Versions, remote: str, small_disk: Callable[[str], Path]
) -> None:
    push(history.store, "d", remote)
    with Store.open(small_disk("300k") / "home") as store, pytest.raises(DiskFull):
        pull(store, "d", remote)


def storm(request: Seen, n: int) -> Fault | None:
    """Half the requests go wrong: errors, answers cut or lost; never one three times in a row."""
    return [Fault(status=500), None, Fault(cut_after=40), None, Fault(swallow=True), None][n % 6]


@pytest.mark.slow
def test_errors_cuts_and_lost_answers_change_nothing(
    history: Versions, other: Versions, bucket: str, fault_proxy: FaultProxy
) -> None:
    fault_proxy.fault = storm
    assert push(history.store, "d", bucket).versions == ("d@1", "d@2", "d@3")
    assert pull(other.store, "d", bucket).versions == ("d@1", "d@2", "d@3")
    assert len(fault_proxy.seen) > 50
    assert holdings(history) == holdings(other)


def moved(fault_proxy: FaultProxy, method: str) -> list[str]:
    """Paths of the bytes that a method moved, as often as it did."""
    paths = [seen.path.partition("?")[0] for seen in fault_proxy.seen if seen.method == method]
    return [path for path in paths if "/blobs/" in path or "/packs/" in path]


@pytest.mark.parametrize("step", [pytest.param(5, marks=pytest.mark.slow), 9])
def test_refused_half_way_it_goes_on_where_it_was(
    history: Versions, other: Versions, bucket: str, fault_proxy: FaultProxy, step: int
) -> None:
    """The right to go on ends after some requests, each time a little later."""
    passed: list[Seen] = []

    def attempt(work: Callable[[], Transferred], most: int) -> bool:
        fault_proxy.seen.clear()

        def refuse(request: Seen, n: int) -> Fault | None:
            if n >= most:
                return Fault(status=403)
            passed.append(request)
            return None

        fault_proxy.fault = refuse
        try:
            work()
        except NotPermitted:
            assert other.verify().missing == {}
            return False
        return True

    for work in (lambda: push(history.store, "d", bucket), lambda: pull(other.store, "d", bucket)):
        refused = 0
        while not attempt(work, step * (refused + 1)):
            refused += 1
            assert refused < 50
        assert refused
    fault_proxy.fault = lambda request, n: None
    fault_proxy.seen[:] = passed
    sent = moved(fault_proxy, "PUT")
    assert len(sent) == len(set(sent)) > 5, "nothing is sent twice"
    assert holdings(history) == holdings(other)


def test_bytes_changed_on_the_way_are_said_and_not_kept(
    history: Versions, other: Versions, bucket: str, fault_proxy: FaultProxy
) -> None:
    push(history.store, "d", bucket)
    fault_proxy.fault = lambda request, n: Fault(flip=7) if moved_by(request) else None
    with pytest.raises(DamagedBlob):
        pull(other.store, "d", bucket)
    assert other.refs.all() == []
    fault_proxy.fault = lambda request, n: None
    pull(other.store, "d", bucket)
    assert holdings(history) == holdings(other)


def moved_by(request: Seen) -> bool:
    return request.method == "GET" and "/blobs/" in request.path


def test_only_missing_bytes_are_sent_to_s3(
    history: Versions, other: Versions, bucket: str, fault_proxy: FaultProxy, folder: Path
) -> None:
    push(history.store, "d", bucket)
    pull(other.store, "d", bucket)
    (folder / "tiny").write_text("tiny")
    history.commit(folder, "d", replace=True)
    fault_proxy.seen.clear()
    push(history.store, "d", bucket)
    assert len(moved(fault_proxy, "PUT")) == 2, "a pack and a manifest"
    fault_proxy.seen.clear()
    assert pull(other.store, "d", bucket).num_files == 2
    assert holdings(history) == holdings(other)


def test_an_empty_file_beside_a_full_one_comes_whole(
    versions: Versions, other: Versions, fill: Callable[..., Path], remote: str
) -> None:
    """Both begin at one offset of the pack."""
    versions.commit(fill(a="", b="full", c="more"), "d")
    push(versions.store, "d", remote)
    pull(other.store, "d", remote)
    assert holdings(versions) == holdings(other)
