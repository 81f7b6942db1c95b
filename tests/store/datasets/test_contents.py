"""The bytes of datasets: what a deposit publishes is there whole, what it does not publish leaves nothing."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marrow.core.errors import DamagedBlob, DiskFull
from marrow.core.hashes import hash_bytes
from marrow.store.blobs import Blobs
from marrow.store.datasets import contents as module
from marrow.store.datasets.contents import (
    MAX_TINY_PACKS,
    Contents,
    Deposit,
    copy_and_hash,
    need_room,
)
from marrow.store.datasets.packs import MAX_MEMBER_BYTES, Packs
from marrow.store.staging import Staging

LARGE = bytes(range(256)) * (MAX_MEMBER_BYTES // 256) + b"more"
SMALL = b"small"


def build(root: Path) -> Contents:
    staging = Staging(root / "staging")
    (root / "staging").mkdir(parents=True)
    return Contents(
        Blobs(root / "blobs", root / "damaged", staging),
        Packs(root / "packs", root / "damaged", staging),
        staging,
    )


@pytest.fixture
def contents(tmp_path: Path) -> Iterator[Contents]:
    made = build(tmp_path)
    yield made
    made.staging.close()


@pytest.fixture
def lies_there(tmp_path: Path) -> Callable[[], list[str]]:
    """List all files of the store but locks, by folder."""

    def listing() -> list[str]:
        files = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"]
        return sorted(p.relative_to(tmp_path).parts[0] for p in files)

    return listing


def put(contents: Contents, *datas: bytes) -> list[str]:
    with Deposit(contents) as deposit:
        for data in datas:
            deposit.add(hash_bytes(data), data)
        deposit.publish()
    return [hash_bytes(data) for data in datas]


def damage(path: Path, at: int = 0) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# Deposits


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.lists(st.sampled_from([b"", b"a", b"b" * 1000, SMALL, LARGE, LARGE + b"!"]), max_size=8))
def test_what_is_published_is_read_back_whoever_stored_it(tmp_path_factory, datas: list[bytes]) -> None:
    contents = build(tmp_path_factory.mktemp("contents"))
    digests = put(contents, *datas)
    assert [contents.read(digest) for digest in digests] == datas
    assert all(contents.has(digest) for digest in digests)
    large = {data for data in datas if len(data) > MAX_MEMBER_BYTES}
    assert set(contents.blobs.digests()) == {hash_bytes(data) for data in large}
    assert len(list(contents.packs.names())) == bool(set(datas) - large)
    contents.staging.close()


def test_published_files_are_read_only(contents: Contents) -> None:
    put(contents, SMALL, LARGE)
    [pack] = contents.packs.names()
    for path in (contents.packs.place(pack), contents.blobs.place(hash_bytes(LARGE))):
        assert path.stat().st_mode & 0o777 == 0o444


@pytest.mark.parametrize("error", [None, ValueError("the reader failed")])
def test_without_publish_nothing_stays(
    contents: Contents, lies_there: Callable[[], list[str]], error: Exception | None
) -> None:
    try:
        with Deposit(contents) as deposit:
            deposit.add(hash_bytes(SMALL), SMALL)
            deposit.add(hash_bytes(LARGE), LARGE)
            assert deposit.has(hash_bytes(SMALL)) and deposit.has(hash_bytes(LARGE))
            assert lies_there() == ["staging", "staging"]
            if error is not None:
                raise error
    except ValueError:
        assert error is not None
    assert lies_there() == []
    assert not contents.has(hash_bytes(SMALL))


def test_known_bytes_are_not_stored_again(contents: Contents, lies_there: Callable[[], list[str]]) -> None:
    put(contents, SMALL, LARGE)
    before = lies_there()
    with Deposit(contents) as deposit:
        for data in (SMALL, LARGE):
            deposit.add(hash_bytes(data), data)
        staged = contents.staging.new()
        staged.write_bytes(LARGE)
        deposit.add_file(hash_bytes(LARGE), staged, len(LARGE))
        assert not staged.exists(), "it is removed, its bytes are known"
        deposit.publish()
        assert deposit.num_bytes == 0
    assert lies_there() == before


def test_bytes_are_counted_once_in_one_deposit(contents: Contents) -> None:
    with Deposit(contents) as deposit:
        for data in (SMALL, SMALL, LARGE, LARGE):
            deposit.add(hash_bytes(data), data)
        assert deposit.num_bytes == len(SMALL) + len(LARGE)


def test_a_staged_file_becomes_the_blob(contents: Contents) -> None:
    staged = contents.staging.new()
    staged.write_bytes(LARGE)
    with Deposit(contents) as deposit:
        deposit.add_file(hash_bytes(LARGE), staged, len(LARGE))
        assert deposit.num_bytes == len(LARGE)
        deposit.publish()
    assert not staged.exists()
    assert contents.blobs.path(hash_bytes(LARGE)).read_bytes() == LARGE


def test_a_manifest_is_a_blob_however_small(contents: Contents) -> None:
    digest = hash_bytes(SMALL)
    with Deposit(contents) as deposit:
        deposit.add_blob(digest, SMALL)
        deposit.add_blob(digest, SMALL)
        deposit.publish()
    assert contents.blobs.path(digest).read_bytes() == SMALL
    assert list(contents.packs.names()) == []


def put_twice(contents: Contents) -> str:
    """Put the same bytes into a pack and into a blob of their own."""
    [digest] = put(contents, SMALL)
    staged = contents.staging.new()
    staged.write_bytes(SMALL)
    with Deposit(contents) as deposit:
        deposit.keep_blob(digest, staged)
        deposit.publish()
    return digest


def test_a_blob_may_be_kept_beside_a_pack_that_has_its_bytes(contents: Contents) -> None:
    digest = put_twice(contents)
    assert contents.blobs.path(digest).read_bytes() == SMALL
    assert contents.packs.has(digest)


def test_a_full_pack_is_followed_by_another(contents: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PACK_BYTES", 100)
    datas = [bytes([number]) * 60 for number in range(5)]
    digests = put(contents, *datas)
    assert len(list(contents.packs.names())) == 3, "two members fill one"
    assert [contents.read(digest) for digest in digests] == datas


def test_an_empty_deposit_writes_nothing(contents: Contents, lies_there: Callable[[], list[str]]) -> None:
    with Deposit(contents) as deposit:
        deposit.writer()  # opened, and nothing came
        deposit.publish()
        deposit.publish()
        assert deposit.published == set()
    assert lies_there() == []


@pytest.mark.parametrize("fail_at", [0, 1])
def test_a_disk_that_refuses_the_sync_publishes_nothing_or_whole_files(
    contents: Contents, monkeypatch: pytest.MonkeyPatch, lies_there: Callable[[], list[str]], fail_at: int
) -> None:
    calls: list[int] = []

    def full(paths: object) -> None:
        calls.append(len(list(paths)))  # type: ignore[call-overload]
        if len(calls) == fail_at + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "make_durable", full)
    with pytest.raises(DiskFull, match="cannot write to the store") as caught:
        put(contents, SMALL, LARGE)
    assert "MARROW_HOME" in caught.value.hint
    assert lies_there() == ([] if fail_at == 0 else ["blobs", "packs"]), "no half, and nothing in staging"
    contents.packs.refresh()
    assert contents.has(hash_bytes(LARGE)) == contents.has(hash_bytes(SMALL)) == bool(fail_at)


# Reading


def test_what_is_missing_is_said_with_what_helps(contents: Contents, tmp_path: Path) -> None:
    digest = hash_bytes(b"never stored")
    for read in (contents.read, lambda digest: contents.copy(digest, tmp_path / "out")):
        with pytest.raises(DamagedBlob, match=f"{digest[:12]} is missing") as caught:
            read(digest)
        assert "pull it" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["packed", "blob"])
def test_damaged_bytes_are_never_given_out(contents: Contents, tmp_path: Path, data: bytes) -> None:
    [digest] = put(contents, data)
    if data is LARGE:
        damage(contents.blobs.place(digest), at=1000)
    else:
        damage(contents.packs.place(next(contents.packs.names())))
    for read in (contents.read, lambda digest: contents.copy(digest, tmp_path / "out")):
        with pytest.raises(DamagedBlob, match=f"{digest[:12]} is damaged") as caught:
            read(digest)
        assert "marrow data verify" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"", SMALL, LARGE], ids=["empty", "packed", "blob"])
def test_a_copy_has_the_bytes(contents: Contents, tmp_path: Path, data: bytes) -> None:
    [digest] = put(contents, data)
    contents.copy(digest, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["packed", "blob"])
def test_a_copy_never_touches_a_file_that_is_there(contents: Contents, tmp_path: Path, data: bytes) -> None:
    [digest] = put(contents, data)
    mine = tmp_path / "mine"
    mine.write_text("a user's")
    with pytest.raises(FileExistsError):
        contents.copy(digest, mine)
    assert mine.read_text() == "a user's"


# Checking


def test_a_check_of_whole_bytes_finds_nothing_and_tells_how_far_it_is(contents: Contents) -> None:
    put(contents, SMALL, b"", LARGE)
    told: list[int] = []
    found = contents.verify(told.append)
    assert (found.digests, found.aside) == (frozenset(), ())
    assert (found.num_checked, found.num_bytes) == (3, len(SMALL) + len(LARGE))
    assert told == sorted(told) and told[-1] == found.num_bytes


def test_a_damaged_blob_is_set_aside_and_can_come_back(contents: Contents, tmp_path: Path) -> None:
    other, digest = put(contents, LARGE + b"x", LARGE)
    damage(contents.blobs.place(digest), at=7)
    found = contents.verify()
    assert (found.digests, found.aside) == ({digest}, (digest,))
    assert [path.name[:64] for path in (tmp_path / "damaged").iterdir()] == [digest]
    assert contents.has(other) and not contents.has(digest)
    put(contents, LARGE)
    assert contents.read(digest) == LARGE
    assert contents.verify().digests == frozenset()


def test_of_a_pack_with_one_damaged_member_the_others_are_saved(contents: Contents, tmp_path: Path) -> None:
    digests = put(contents, b"one", b"two", b"three")
    [name] = contents.packs.names()
    damage(contents.packs.place(name), at=4)  # within "two"
    found = contents.verify()
    assert (found.digests, found.aside, found.num_checked) == ({digests[1]}, (name,), 3)
    assert [contents.has(digest) for digest in digests] == [True, False, True]
    assert (contents.read(digests[0]), contents.read(digests[2])) == (b"one", b"three")
    assert name not in set(contents.packs.names())
    assert len(list((tmp_path / "damaged").iterdir())) == 1


def test_a_pack_whose_index_is_damaged_is_set_aside(contents: Contents) -> None:
    put(contents, b"one", b"two")
    [name] = contents.packs.names()
    damage(contents.packs.place(name), at=-1)
    anew = Contents(contents.blobs, Packs(contents.packs.folder, contents.packs._damaged, contents.staging),
                    contents.staging)  # fmt: skip
    found = anew.verify()
    assert found.aside == (name,)
    assert not anew.has(hash_bytes(b"one"))


def test_bytes_lost_in_one_place_and_whole_in_another_are_not_lost(contents: Contents) -> None:
    digest = put_twice(contents)
    damage(contents.blobs.place(digest))
    found = contents.verify()
    assert (found.digests, found.aside) == (frozenset(), (digest,))
    assert contents.read(digest) == SMALL


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sets(st.integers(0, 30), min_size=1), min_size=1, max_size=4), st.sets(st.integers(0, 30)))
def test_a_collection_keeps_what_lives_and_counts_what_goes(
    tmp_path_factory, commits: list[set[int]], alive: set[int]
) -> None:
    """Packs are written anew only if half of them is dead: what stays of them is counted by nobody."""
    contents = build(tmp_path_factory.mktemp("contents"))
    data_of = {hash_bytes(b"%d" % number * 50): b"%d" % number * 50 for number in range(31)}
    known = list(data_of)
    for numbers in commits:
        put(contents, *(data_of[known[number]] for number in numbers))
    live = {known[number] for number in alive}
    present = {digest for digest in known if contents.has(digest)}
    freed = contents.collect(live)
    assert {digest for digest in known if contents.has(digest)} >= live & present
    assert all(contents.read(digest) == data_of[digest] for digest in live & present)
    gone = {digest for digest in present if not contents.has(digest)}
    assert not gone & live
    assert freed.num_blobs == len(gone)
    assert freed.num_bytes == sum(len(data_of[digest]) for digest in gone)
    assert contents.collect(live) == type(freed)(0, 0), "a second one finds nothing"
    assert contents.verify().digests == frozenset()
    contents.staging.close()


def test_many_tiny_packs_become_one(contents: Contents) -> None:
    digests = [put(contents, b"%d" % number)[0] for number in range(MAX_TINY_PACKS + 1)]
    assert len(list(contents.packs.names())) == MAX_TINY_PACKS + 1
    freed = contents.collect(set(digests))
    assert (freed.num_blobs, freed.num_bytes) == (0, 0)
    assert len(list(contents.packs.names())) == 1
    assert [contents.read(digest) for digest in digests] == [b"%d" % n for n in range(MAX_TINY_PACKS + 1)]


def test_a_few_tiny_packs_stay_as_they_are(contents: Contents) -> None:
    digests = [put(contents, b"%d" % number)[0] for number in range(MAX_TINY_PACKS)]
    before = set(contents.packs.names())
    contents.collect(set(digests))
    assert set(contents.packs.names()) == before


def test_a_collection_leaves_a_damaged_pack_to_the_check(contents: Contents) -> None:
    alive, dead, _ = put(contents, b"alive", b"dead" * 100, b"dead too" * 100)
    [name] = contents.packs.names()
    damage(contents.packs.place(name))  # within "alive"
    contents.collect({alive})
    assert name in set(contents.packs.names()), "it cannot be written anew whole, so it stays"
    assert contents.verify().digests == {alive}
    assert not contents.has(alive)
    assert contents.has(dead), "saved from the damaged pack, and collected the next time"
    assert contents.collect(set()).num_blobs == 2


# Helpers


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_copying_hashes_what_was_copied(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "source").write_bytes(data)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("wb") as target:
        assert copy_and_hash(source.fileno(), target.fileno()) == (hash_bytes(data), size)
    assert (tmp_path / "target").read_bytes() == data


def test_copying_stops_behind_its_limit(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(5 << 20))
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("wb") as target:
        _, copied = copy_and_hash(source.fileno(), target.fileno(), limit=(2 << 20) - 1)
    assert copied == (tmp_path / "target").stat().st_size == 2 << 20


def test_what_does_not_fit_is_refused_before_it_is_written(tmp_path: Path) -> None:
    assert need_room(tmp_path, 1) is None
    with pytest.raises(DiskFull, match="1,152,921,504,606,846,976 bytes do not fit on the disk") as caught:
        need_room(tmp_path, 1 << 60)
    assert "MARROW_HOME" in caught.value.hint
