import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import DamagedBlob, DiskFull, NotPermitted, SourceError, StoreError
from marrow.core.hashes import check_file, hash_file
from marrow.store.blobs import Blobs, measure
from marrow.store.staging import Staging


def open_blobs(home: Path) -> Blobs:
    return Blobs(home / "blobs", home / "damaged", Staging(home / "staging"))


@pytest.fixture
def blobs(home: Path) -> Blobs:
    return open_blobs(home)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def damage(path: Path) -> None:
    """Flip one bit and keep the size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)


@settings(max_examples=25, deadline=None)  # a disk may take its time
@given(data=st.binary(max_size=3000))
def test_any_bytes_come_back_under_the_name_that_hashlib_gives(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        blobs = open_blobs(Path(folder))
        blob = blobs.put_file(write(Path(folder) / "x", data))
        assert blob.sha256 == hashlib.sha256(data).hexdigest()
        assert blobs.path(blob.sha256).read_bytes() == data
        assert blob.num_bytes == len(data)


def test_one_pass_gives_both_hashes_of_a_file_longer_than_a_chunk(tmp_path: Path) -> None:
    path = write(tmp_path / "x", os.urandom((1 << 20) * 2 + 17))
    blob = measure(path)
    assert (blob.sha256, blob.xxh3, blob.num_bytes) == (hash_file(path), check_file(path), (1 << 21) + 17)


def test_a_blob_lies_two_folders_deep_and_is_read_only(blobs: Blobs, home: Path, tmp_path: Path) -> None:
    digest = blobs.put_file(write(tmp_path / "x", b"abc")).sha256
    path = blobs.path(digest)
    assert path == home / "blobs" / "ba" / "78" / digest
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_copying_leaves_the_users_file_as_it_was(blobs: Blobs, tmp_path: Path) -> None:
    path = write(tmp_path / "x", b"abc")
    path.chmod(0o600)
    digest = blobs.put_file(path).sha256
    assert path.read_bytes() == b"abc" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_nlink == 1
    path.write_bytes(b"changed")
    assert blobs.path(digest).read_bytes() == b"abc"


def test_moving_makes_the_file_itself_the_blob(blobs: Blobs, tmp_path: Path) -> None:
    path = write(tmp_path / "x", b"abc")
    inode = path.stat().st_ino
    digest = blobs.put_file(path, move=True).sha256
    assert not path.exists()
    assert blobs.path(digest).stat().st_ino == inode


@pytest.mark.parametrize("make", [os.link, os.symlink], ids=["hard link", "symlink"])
def test_a_file_that_others_can_reach_is_copied_even_when_moved(
    blobs: Blobs, tmp_path: Path, make: Callable[[Path, Path], None]
) -> None:
    theirs, path = write(tmp_path / "theirs", b"abc"), tmp_path / "x"
    make(theirs, path)
    digest = blobs.put_file(path, move=True).sha256
    assert not os.path.lexists(path)
    theirs.write_bytes(b"changed by its owner")
    assert blobs.path(digest).read_bytes() == b"abc"


def test_moving_from_another_file_system_copies(
    blobs: Blobs, small_disk: Callable[[str], Path], home: Path
) -> None:
    path = write(small_disk("1m") / "x", b"abc")
    digest = blobs.put_file(path, move=True).sha256
    assert blobs.path(digest).read_bytes() == b"abc"
    assert not path.exists()


def test_equal_files_are_stored_once(blobs: Blobs, tmp_path: Path) -> None:
    first = blobs.put_file(write(tmp_path / "x", b"abc"), move=True)
    inode = blobs.path(first.sha256).stat().st_ino
    second = blobs.put_file(write(tmp_path / "y", b"abc"), move=True)
    assert first == second and not (tmp_path / "y").exists()
    assert list(blobs.digests()) == [first.sha256]
    assert blobs.path(first.sha256).stat().st_ino == inode


def test_a_flipped_bit_is_found(blobs: Blobs, tmp_path: Path) -> None:
    digest = blobs.put_file(write(tmp_path / "x", b"a" * 1000)).sha256
    damage(blobs.path(digest))
    with pytest.raises(DamagedBlob, match=f"blob {digest[:12]} is damaged") as caught:
        blobs.path(digest)
    assert caught.value.hint


def test_a_torn_blob_is_found(blobs: Blobs, tmp_path: Path) -> None:
    digest = blobs.put_file(write(tmp_path / "x", b"a" * 1000)).sha256
    path = blobs.path(digest)
    path.chmod(0o644)
    os.truncate(path, 500)
    with pytest.raises(DamagedBlob):
        blobs.path(digest)


def test_a_missing_blob_is_found(blobs: Blobs, tmp_path: Path) -> None:
    digest = blobs.put_file(write(tmp_path / "x", b"a")).sha256
    blobs.path(digest).unlink()
    with pytest.raises(DamagedBlob, match="missing"):
        blobs.path(digest)


def test_a_blob_is_hashed_once_a_process_unless_its_file_changed(
    blobs: Blobs, home: Path, tmp_path: Path
) -> None:
    digest = blobs.put_file(write(tmp_path / "x", b"a" * 1000)).sha256
    path = blobs.path(digest)
    before = path.stat()
    path.chmod(0o644)
    path.write_bytes(b"b" * 1000)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    # Same size, time and inode: nothing says that it changed, so this process does not look again,
    assert blobs.path(digest) == path
    # a new one does, and so does a full check.
    with pytest.raises(DamagedBlob):
        open_blobs(home).path(digest)
    assert blobs.check() == [digest]


def test_check_names_exactly_the_damaged_blobs(blobs: Blobs, tmp_path: Path) -> None:
    digests = [blobs.put_file(write(tmp_path / "x", b"%d" % i * 100)).sha256 for i in range(8)]
    assert blobs.check() == []
    for digest in digests[2:4]:
        damage(blobs.path(digest))
    assert blobs.check() == sorted(digests[2:4])


def test_quarantine_keeps_the_bytes_aside_and_frees_the_name(
    blobs: Blobs, home: Path, tmp_path: Path
) -> None:
    digest = blobs.put_file(write(tmp_path / "x", b"a" * 1000)).sha256
    damage(blobs.path(digest))
    aside = blobs.quarantine(digest)
    assert aside is not None and aside.parent == home / "damaged" and aside.stat().st_size == 1000
    assert blobs.quarantine(digest) is None
    with pytest.raises(DamagedBlob, match="missing"):
        blobs.path(digest)


def test_storing_again_heals_a_damaged_blob(blobs: Blobs, home: Path, tmp_path: Path) -> None:
    data = b"a" * 1000
    digest = blobs.put_file(write(tmp_path / "x", data)).sha256
    damage(blobs.path(digest))
    assert blobs.put_file(write(tmp_path / "x", data), move=True).sha256 == digest
    assert blobs.path(digest).read_bytes() == data
    assert len(list((home / "damaged").iterdir())) == 1


def test_collect_removes_what_is_not_referenced(blobs: Blobs, tmp_path: Path) -> None:
    kept, gone = (blobs.put_file(write(tmp_path / "x", data)).sha256 for data in (b"kept", b"gone!"))
    freed = blobs.collect({kept})
    assert (freed.num_blobs, freed.num_bytes) == (1, 5)
    assert list(blobs.digests()) == [kept]
    with pytest.raises(DamagedBlob):
        blobs.path(gone)


@pytest.mark.parametrize("name", ["", "abc", "../../../etc/passwd", "A" * 64, "g" * 64])
def test_what_is_no_digest_names_no_path(blobs: Blobs, name: str) -> None:
    with pytest.raises(StoreError, match="does not name a blob"):
        blobs.path(name)


def test_a_file_that_is_not_there_is_the_callers_error(blobs: Blobs, tmp_path: Path) -> None:
    for move in (False, True):
        with pytest.raises(SourceError, match="cannot store a file"):
            blobs.put_file(tmp_path / "absent", move=move)


def test_a_full_disk_is_said_and_leaves_nothing_half(
    small_disk: Callable[[str], Path], tmp_path: Path
) -> None:
    disk = small_disk("1m")
    blobs = open_blobs(disk)
    good = blobs.put_file(write(tmp_path / "small", b"a" * 1000)).sha256
    big = write(tmp_path / "big", os.urandom(4 << 20))
    for move in (False, True):
        with pytest.raises(DiskFull) as caught:
            blobs.put_file(big, move=move)
        assert "MARROW_HOME" in str(caught.value)
        assert big.stat().st_size == 4 << 20
    assert blobs.check() == [] and list(blobs.digests()) == [good]
    assert sum(path.stat().st_size for path in (disk / "staging").rglob("*") if path.is_file()) < 100


def test_a_folder_that_cannot_be_written_is_said(
    small_disk: Callable[[str], Path], read_only: Callable[[Path], None], tmp_path: Path
) -> None:
    disk = small_disk("1m")
    staging = Staging(disk / "staging")
    blobs = Blobs(disk / "blobs", disk / "damaged", staging)
    digest = blobs.put_file(write(tmp_path / "x", b"abc")).sha256
    staging.close()
    read_only(disk)
    with pytest.raises(NotPermitted):
        open_blobs(disk).put_file(write(tmp_path / "y", b"other"))
    assert open_blobs(disk).path(digest).read_bytes() == b"abc"
