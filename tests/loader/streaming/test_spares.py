import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from marrow.loader.streaming.cache import Cache, Pin
from marrow.loader.streaming.spares import Spares


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 300)


def put(cache: Cache, key: str, num_bytes: int = 100) -> Pin:
    claim = cache.claim(key, num_bytes)
    assert os.fstat(claim.descriptor).st_size == num_bytes
    os.pwrite(claim.descriptor, key[:1].encode() * num_bytes, 0)
    pin = cache.publish(claim)
    assert pin is not None
    return pin


def fill(cache: Cache, keys: str) -> dict[str, int]:
    inodes = {}
    for key in keys:
        pin = put(cache, key)
        inodes[key] = pin.inode
        pin.close()
    return inodes


def test_an_evicted_file_is_written_over_by_the_next(cache: Cache) -> None:
    inodes = fill(cache, "abcdef")
    assert len(set(inodes.values())) == 3, "three files have room, and no more were ever made"
    pin = cache.pin("f")
    assert pin is not None and pin.path.read_bytes() == b"f" * 100
    pin.close()


@pytest.mark.parametrize("num_bytes", [1, 99, 100, 101, 250, 300])
def test_a_file_of_another_size_is_exactly_as_long_as_claimed(cache: Cache, num_bytes: int) -> None:
    fill(cache, "abc")
    pin = put(cache, "z", num_bytes)
    assert pin.path.read_bytes() == b"z" * num_bytes
    pin.close()
    usage = cache.usage()
    assert usage.num_bytes + usage.part_bytes + usage.spare_bytes <= 300


def test_a_mapping_that_outlives_its_pin_keeps_its_bytes(cache: Cache) -> None:
    fill(cache, "a")
    with (cache.folder / "shards" / "a").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    fill(cache, "bcdefghi")
    assert cache.pin("a") is None, "it was evicted"
    assert mapped[:] == b"a" * 100
    mapped.close()


def test_an_open_file_of_another_process_keeps_its_bytes(cache: Cache) -> None:
    fill(cache, "a")
    reader = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; f = open(sys.argv[1], 'rb'); print(flush=True); input(); print(f.read().decode())",
            str(cache.folder / "shards" / "a"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout is not None and reader.stdout.readline() == "\n"
    fill(cache, "bcdefghi")
    out, _ = reader.communicate("\n", timeout=20)
    assert out.strip() == "a" * 100


def test_a_file_with_another_name_elsewhere_keeps_its_bytes(cache: Cache, tmp_path: Path) -> None:
    fill(cache, "a")
    os.link(cache.folder / "shards" / "a", tmp_path / "mine")
    fill(cache, "bcdefghi")
    assert (tmp_path / "mine").read_bytes() == b"a" * 100


def test_where_no_lease_is_granted_files_are_made_anew(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    granted = fcntl.fcntl

    def refuse(descriptor: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETLEASE:
            raise OSError(errno.EINVAL, "no leases here")
        return granted(descriptor, command, value)

    monkeypatch.setattr(fcntl, "fcntl", refuse)  # what a network file system says
    fill(cache, "abcdef")
    pin = cache.pin("f")
    assert pin is not None and pin.path.read_bytes() == b"f" * 100
    pin.close()
    usage = cache.usage()
    assert usage.num_bytes + usage.spare_bytes <= 300


def test_what_a_killed_process_left_as_spare_is_used_again_and_counts(cache: Cache) -> None:
    fill(cache, "abc")
    (cache.folder / "shards" / "a").rename(cache.folder / "spare" / "left")
    usage = cache.usage()
    assert (usage.num_files, usage.spare_bytes) == (2, 100)
    inode = (cache.folder / "spare" / "left").stat().st_ino
    assert fill(cache, "d")["d"] == inode
    assert cache.usage().spare_bytes == 0
    for key in "bc":
        pin = cache.pin(key)
        assert pin is not None, "the spare made room, nothing had to go"
        pin.close()


def test_room_on_demand_takes_the_spares_first(cache: Cache) -> None:
    fill(cache, "abc")
    (cache.folder / "shards" / "a").rename(cache.folder / "spare" / "left")
    assert cache.evict(50) == 100
    assert cache.usage().num_files == 2 and cache.usage().spare_bytes == 0


@pytest.mark.slow
def test_who_opens_a_file_while_it_is_looked_at_ends_no_process(tmp_path: Path) -> None:
    # The kernel signals the holder of a lease when somebody opens the file; by default that kills it.
    spares = Spares(tmp_path / "spare")
    spares.folder.mkdir()
    path = tmp_path / "part"
    assert signal.getsignal(signal.SIGIO) == signal.SIG_DFL
    opener = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\nend = time.monotonic() + 1.0\nwhile time.monotonic() < end:\n"
            "    try: open(sys.argv[1], 'rb').close()\n    except OSError: pass",
            str(path),
        ]
    )
    taken = 0
    while opener.poll() is None:
        (spares.folder / "a").write_bytes(b"x")
        descriptor = spares.take(path)
        if descriptor >= 0:
            taken += 1
            os.close(descriptor)
            path.unlink()
    assert opener.wait(20) == 0
    assert taken > 0
