import os
from collections.abc import Callable
from pathlib import Path

import pytest

from marrow.core.errors import DamagedBlob, DiskFull, SourceError, UnsavedFiles
from marrow.core.hashes import hash_file
from marrow.store.datasets.manifests import Entry
from marrow.store.store import Store
from marrow.store.versions.checkout import CheckedOut, checkout
from marrow.store.versions.versions import Versions

Tick = Callable[[], None]


def listing(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hash_file(p) for p in folder.rglob("*") if p.is_file()}


def take(versions: Versions, target: str, folder: Path, *, force: bool = False) -> CheckedOut:
    return checkout(versions.store, versions.resolve(target), folder, name=target.split("@")[0], force=force)


@pytest.fixture
def two(versions: Versions, folder: Path) -> Versions:
    """Give d@1, and d@2 with a file changed, one deleted with its folder, one added, one renamed."""
    (folder / "sub").mkdir()
    (folder / "sub/only").write_text("only in the first")
    versions.commit(folder, "d", "first")
    (folder / "part/03.txt").write_text("changed")
    (folder / "sub/only").unlink()
    (folder / "sub").rmdir()
    (folder / "new/deep").mkdir(parents=True)
    (folder / "new/deep/file").write_text("added")
    (folder / "large.bin").rename(folder / "moved.bin")
    versions.commit(folder, "d", "second")
    return versions


def test_a_new_folder_gets_exactly_the_files(two: Versions, folder: Path, tmp_path: Path) -> None:
    done = take(two, "d", tmp_path / "out")
    assert listing(tmp_path / "out") == listing(folder)
    assert (done.num_written, done.num_deleted) == (15, 0)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp-")) == []
    (tmp_path / "out/part/00.txt").write_text("the user's own")
    assert two.verify().missing == {}


def test_only_what_differs_is_written(two: Versions, tmp_path: Path) -> None:
    out = tmp_path / "out"
    take(two, "d@1", out)
    first = listing(out)
    before = {p: p.stat().st_ino for p in out.rglob("*") if p.is_file()}
    done = take(two, "d@2", out)
    assert (done.num_written, done.num_deleted, done.num_kept) == (3, 2, 12)
    same = [p for p, inode in before.items() if p.exists() and p.stat().st_ino == inode]
    assert len(same) == 12
    assert not (out / "sub").exists(), "a folder left empty goes"
    take(two, "d@1", out)
    assert listing(out) == first
    assert take(two, "d@1", out).num_written == 0


def test_after_a_checkout_nothing_is_read_again(two: Versions, tmp_path: Path) -> None:
    out = tmp_path / "out"
    take(two, "d", out)
    done = two.commit(out, "d")
    assert (done.is_new, done.num_read) == (False, 0)


@pytest.mark.parametrize("target", ["d@1", "d@2"])
def test_a_changed_file_is_not_overwritten(two: Versions, tmp_path: Path, target: str) -> None:
    out = tmp_path / "out"
    take(two, "d@1", out)
    (out / "part/03.txt").write_text("the user's change")
    (out / "part/04.txt").write_text("another")
    before = listing(out)
    with pytest.raises(UnsavedFiles, match="2 changed files") as caught:
        take(two, target, out)
    assert "part/03.txt" in str(caught.value)
    assert "--force" in str(caught.value)
    assert listing(out) == before
    take(two, target, out, force=True)
    assert listing(out).keys() == {e.name for e in two.entries(two.resolve(target))}
    assert "the user's change" not in (out / "part/03.txt").read_text()


def test_a_changed_file_that_the_version_deletes_is_kept(two: Versions, tmp_path: Path) -> None:
    out = tmp_path / "out"
    take(two, "d@1", out)
    (out / "sub/only").write_text("changed by the user")
    with pytest.raises(UnsavedFiles, match="sub/only"):
        take(two, "d@2", out)
    assert (out / "sub/only").read_text() == "changed by the user"


def test_files_that_no_version_knows_stay(two: Versions, tmp_path: Path) -> None:
    out = tmp_path / "out"
    take(two, "d@1", out)
    (out / "notes").write_text("mine")
    (out / "sub/notes").write_text("mine")
    (out / "link").symlink_to("notes")
    take(two, "d@2", out)
    assert (out / "notes").read_text() == (out / "sub/notes").read_text() == "mine"
    assert (out / "link").is_symlink()


def test_without_an_index_what_the_store_has_may_go_and_nothing_else(two: Versions, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "part").mkdir()
    (out / "part/03.txt").write_text("text of 3\n" * 4)  # as in d@1
    take(two, "d@2", out)
    assert (out / "part/03.txt").read_text() == "changed"
    other = tmp_path / "other"
    other.mkdir()
    (other / "empty").write_text("not empty at all")
    with pytest.raises(UnsavedFiles, match="empty"):
        take(two, "d@2", other)


def test_a_link_in_the_way_is_never_followed(two: Versions, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name, target in (("part", outside), ("moved.bin", outside / "victim")):
        out = tmp_path / f"out-{name}"
        out.mkdir()
        (out / name).symlink_to(target)
        with pytest.raises(UnsavedFiles, match=name):
            take(two, "d@2", out)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize(("before", "after"), [("a", "a/b"), ("a/b", "a")])
def test_a_file_becomes_a_folder_and_back(
    versions: Versions, fill: Callable[..., Path], tmp_path: Path, before: str, after: str
) -> None:
    versions.commit(fill(**{before: "1", "z": "z"}), "d")
    versions.commit(fill(**{after: "2", "z": "z"}), "d", replace=True)
    out = tmp_path / "out"
    take(versions, "d@1", out)
    take(versions, "d@2", out)
    assert listing(out).keys() == {after, "z"}


def test_a_file_where_the_folder_should_be_is_said(two: Versions, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SourceError):
        take(two, "d", tmp_path / "out")


@pytest.mark.parametrize("existing", [False, True])
def test_damaged_bytes_are_never_written_out(two: Versions, tmp_path: Path, existing: bool) -> None:
    out = tmp_path / "out"
    if existing:
        take(two, "d@1", out)
    before = listing(out) if existing else {}
    entries = {e.name: e for e in two.entries(two.resolve("d"))}
    pack = two.contents.packs.place(two.contents.packs.pack_of(entries["part/03.txt"].sha256) or "")
    pack.chmod(0o644)
    data = bytearray(pack.read_bytes())
    data[data.index(b"changed")] ^= 1
    pack.write_bytes(data)
    with pytest.raises(DamagedBlob):
        take(two, "d@2", out)
    assert (listing(out) if out.exists() else {}) == before
    assert list(tmp_path.rglob(".tmp-*")) == []


def test_a_full_disk_is_said_before_anything_is_written(
    two: Versions, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("200k")
    with pytest.raises(DiskFull):
        take(two, "d", disk / "out")
    assert list(disk.iterdir()) == []


KILL = """
import os, signal, sys
from pathlib import Path
from marrow.store.versions.checkout import checkout
from marrow.store.store import Store
from marrow.store.versions.versions import Versions
import marrow.store.version
marrow.store.version.code_version()
home, out, n = Path(sys.argv[1]), Path(sys.argv[2]), 0
def at(n, target):
    child = os.fork()
    if child == 0:
        seen = 0
        def hook(event, arguments):
            nonlocal seen
            if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "open"):
                if arguments and str(arguments[0]).startswith(str(out)):
                    seen += 1
                    if seen == n:
                        os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        with Store.open(home) as store:
            checkout(store, Versions(store).resolve(target), out, name="d")
        os._exit(0)
    return os.waitpid(child, 0)[1]
n = 0
while True:
    n += 1
    if not os.WIFSIGNALED(at(n, "d@2")):
        break
    assert at(0, "d@2") == 0, n
    assert at(0, "d@1") == 0, n
print(n)
"""


@pytest.mark.slow
def test_killed_before_any_file_operation_the_same_checkout_completes(
    two: Versions, home: Path, tmp_path: Path, spawn: Callable[..., object]
) -> None:
    out = tmp_path / "out"
    take(two, "d@1", out)
    (count,) = spawn(KILL, home, out).result()  # type: ignore[attr-defined]
    assert int(count) > 8
    assert listing(out) == {e.name: e.sha256 for e in two.entries(two.resolve("d@2"))}
    assert list(out.rglob(".tmp-*")) == []


def test_odd_names_come_back(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in (b"new\nline", b"not \xff utf-8", b"-rf", b"x" * 255, b'"quoted"'):
        (folder / os.fsdecode(name)).write_bytes(name)
    versions = Versions(store)
    versions.commit(folder, "d")
    take(versions, "d", tmp_path / "out")
    assert listing(tmp_path / "out") == listing(folder)
    (folder / "more").write_text("more")
    versions.commit(folder, "d")
    take(versions, "d", tmp_path / "out")
    assert listing(tmp_path / "out") == listing(folder)
    assert all(isinstance(entry, Entry) for entry in versions.entries(versions.resolve("d")))
