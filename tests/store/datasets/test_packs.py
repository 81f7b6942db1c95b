import hashlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marrow.core.errors import DamagedBlob
from marrow.core.hashes import hash_bytes
from marrow.store.datasets.packs import Packs, PackWriter, read_index
from marrow.store.staging import Staging
from marrow.store.store import Store


def write(packs: Packs, *contents: bytes) -> str:
    packs.folder.mkdir(exist_ok=True, parents=True)
    writer = PackWriter(packs.folder / "new")
    for data in contents:
        writer.add(hash_bytes(data), data)
    name = writer.finish()
    writer.path.rename(packs.place(name))
    packs.refresh()
    return name


@pytest.fixture
def packs(tmp_path: Path) -> Packs:
    return Packs(tmp_path / "packs", tmp_path / "damaged", Staging(tmp_path / "staging"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.binary(max_size=200), max_size=20))
def test_any_files_come_back_verified(packs: Packs, contents: list[bytes]) -> None:
    name = write(packs, *contents)
    assert [packs.read(hash_bytes(data)) for data in contents] == contents
    assert {member.digest for member in packs.members(name)} == set(map(hash_bytes, contents))
    assert packs.check(name)[1] == []


def test_equal_files_are_stored_once(packs: Packs) -> None:
    name = write(packs, b"same" * 1000, b"same" * 1000)
    assert packs.place(name).stat().st_size == 4000 + 48 + 16


def test_the_name_does_not_depend_on_the_order(packs: Packs, tmp_path: Path) -> None:
    other = Packs(tmp_path / "other", tmp_path / "damaged", Staging(tmp_path / "staging"))
    data = [b"a" * 10, b"b" * 10]
    assert hashlib.sha256(b"").hexdigest() != write(packs, *data)
    assert packs.names() is not other.names()
    # Offsets are part of the index, so another order is another pack, with the same members.
    assert {m.digest for m in packs.members(write(packs, *data))} == {
        m.digest for m in other.members(write(other, *reversed(data)))
    }


@pytest.mark.parametrize("place", [0, -1, -17, -30])
def test_any_damaged_byte_is_noticed(packs: Packs, place: int) -> None:
    name = write(packs, b"one", b"two")
    path = packs.place(name)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    damaged = place == 0
    if damaged:
        with pytest.raises(DamagedBlob, match="is damaged in pack"):
            packs.read(hash_bytes(b"one"))
        assert [member.digest for member in packs.check(name)[1]] == [hash_bytes(b"one")]
        assert packs.read(hash_bytes(b"two")) == b"two"
    else:
        with pytest.raises(DamagedBlob, match="index is not that of its name"):
            packs.members(name)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 40])
def test_a_pack_cut_short_is_set_aside(packs: Packs, tmp_path: Path, size: int) -> None:
    name = write(packs, b"one", b"two")
    path = packs.place(name)
    path.write_bytes(path.read_bytes()[:size])
    fresh = Packs(packs.folder, tmp_path / "damaged", Staging(tmp_path / "staging"))
    assert fresh.refresh() == [name]
    assert not path.exists()
    assert len(list((tmp_path / "damaged").iterdir())) == 1
    with pytest.raises(DamagedBlob, match="no pack holds it"):
        fresh.read(hash_bytes(b"one"))


def test_a_huge_count_in_the_footer_is_no_huge_allocation() -> None:
    footer = (1 << 60).to_bytes(8, "little") + b"MARROWP1"
    with pytest.raises(DamagedBlob):
        read_index("0" * 64, 16, lambda start, length: footer[start : start + length])


def test_a_reader_follows_a_member_to_another_pack(packs: Packs) -> None:
    old = write(packs, b"one", b"two")
    reader = Packs(packs.folder, packs._damaged, packs._staging)
    reader.refresh()
    write(packs, b"one")
    packs.place(old).unlink()
    assert reader.read(hash_bytes(b"one")) == b"one"
    assert not reader.has(hash_bytes(b"two"))


def test_a_member_in_two_packs_survives_the_loss_of_either(packs: Packs) -> None:
    first, second = write(packs, b"one", b"two"), write(packs, b"one", b"three")
    for gone, rest in ((first, b"three"), (second, b"")):
        packs.place(gone).unlink()
        packs.refresh()
        assert packs.has(hash_bytes(b"one")) == bool(rest)


def test_a_store_opens_without_reading_packs(store: Store) -> None:
    assert not (store.home / "packs").exists()
    assert store.contents.packs.refresh() == []
