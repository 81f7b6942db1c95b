import os
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core.hashes import hash_bytes
from marrow.core.records import FileEntry
from marrow.store.versions import folder_index
from marrow.store.versions.folder_index import FolderIndex, Known, known_entries, unsettled
from marrow.store.versions.folder_walk import Listing, Stamp

names = st.text("abc", min_size=1, max_size=2)
odd_names = st.binary(min_size=1, max_size=6).filter(lambda n: not set(b"\0/") & set(n)).map(os.fsdecode)
folders = st.sampled_from(["", "p/", "q/", "p/r/"])
stamps = st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(0, 1), st.integers(0, 1))
digests = st.sampled_from([hash_bytes(bytes([n])) for n in range(6)])
files = st.tuples(stamps, digests)
trees = st.dictionaries(folders, st.dictionaries(names, files, min_size=1, max_size=4))
odd_trees = st.dictionaries(
    odd_names.map(lambda n: f"{n}/") | st.just(""),
    st.dictionaries(odd_names, files, min_size=1, max_size=4),
    max_size=3,
)
Tree = dict[str, dict[str, tuple[Stamp, str]]]


def flat(tree: Tree) -> Known:
    return {prefix + name: file for prefix, inside in tree.items() for name, file in inside.items()}


def listings(tree: Tree) -> list[Listing]:
    return [
        Listing(p, list(inside), array("q", [n for stamp, _ in inside.values() for n in stamp]))
        for p, inside in tree.items()
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("index")


def saved(place: Path, tree: Tree, packed: set[str], packs: frozenset[str]) -> FolderIndex:
    """Write an index and read it back."""
    index = FolderIndex(place / "index")
    index.save(flat(tree), listings=listings(tree), packs=packs, is_packed=packed.__contains__)
    again = FolderIndex(place / "index")
    again.manifest, again.packs, again.blocks = folder_index._unpack((place / "index").read_bytes())
    return again


@given(odd_trees)
def test_what_is_saved_comes_back(place: Path, tree: Tree) -> None:
    index = saved(place, tree, set(), frozenset(["0" * 64]))
    assert index.known == flat(tree)
    assert index.packs == {"0" * 64}
    assert index.num_files == len(index.known)
    sizes = [stamp[0] for stamp, _ in flat(tree).values()]
    assert (index.num_bytes, index.sizes()) == (sum(sizes), set(sizes))


@given(trees, trees, st.sets(digests), st.sets(digests), st.booleans())
def test_a_difference_is_what_comparing_each_file_gives(
    place: Path, old: Tree, new: Tree, packed: set[str], gone: set[str], is_pack_gone: bool
) -> None:
    """Against the plain way. Bytes in packs can be lost only with a pack."""
    index = saved(place, old, packed, frozenset(["0" * 64]))
    if not is_pack_gone:
        gone -= packed
    here = frozenset() if is_pack_gone else frozenset(["0" * 64])
    found = index.compare(listings(new), lambda digest: digest not in gone, here)
    before, now = flat(old), flat(new)
    same = {n: f for n, f in before.items() if n in now and now[n][0] == f[0] and f[1] not in gone}
    assert {seen.name: seen.stamp for seen in found.read} == {n: now[n][0] for n in now.keys() - same.keys()}
    assert [seen.name for seen in found.read] == sorted(seen.name for seen in found.read)
    assert found.gone == before.keys() - now.keys()
    assert found.before == {n: f for n, f in before.items() if n not in same}
    assert found.same.items() <= same.items()
    if not found.read and not found.before and list(old) == list(new):
        assert not found.same or old != new or [*flat(old)] != [*flat(new)]


@given(trees, trees)
def test_saving_the_difference_is_saving_everything(place: Path, old: Tree, new: Tree) -> None:
    """What a commit writes: folders that did not change keep what is known of them."""
    index = saved(place, old, set(), frozenset())
    found = index.compare(listings(new), lambda digest: True, frozenset())
    now = flat(new)
    read = {seen.name: now[seen.name] for seen in found.read}
    all_now = {name: index.known[name] for name in now.keys() - read.keys()} | read
    index.save(found.same | read, listings=listings(new))
    assert index.known == all_now


def test_an_unsettled_file_is_known_but_never_unchanged(place: Path) -> None:
    stamp = (5, 6, 7, 8)
    index = saved(place, {"": {"a": (unsettled(stamp), "0" * 64)}}, set(), frozenset())
    found = index.compare(listings({"": {"a": (stamp, "")}}), lambda digest: True, frozenset())
    assert [seen.name for seen in found.read] == ["a"]
    assert index.num_bytes == 5
    assert [entry.num_bytes for entry in known_entries(index.known)] == [5]


def test_an_index_says_whose_files_it_holds(tmp_path: Path) -> None:
    one, other = (FileEntry("000000", digit * 64, "", 1) for digit in "12")
    index = FolderIndex.open(tmp_path, tmp_path)
    index.save({"a": ((1, 2, 3, 4), "0" * 64)}, [one])
    again = FolderIndex.open(tmp_path, tmp_path)
    assert again.manifest == folder_index.manifest_check([one]) != folder_index.manifest_check([other])


@pytest.mark.parametrize("damage", [b"", b"x", b"marrow-index 2\n", b"marrow-index 2\n" + bytes(100)])
def test_a_damaged_index_is_an_empty_one(tmp_path: Path, damage: bytes) -> None:
    index = FolderIndex.open(tmp_path, tmp_path)
    index.save({"a": ((1, 2, 3, 4), "0" * 64)})
    index.stand_on("name", "id")
    assert FolderIndex.open(tmp_path, tmp_path).known == {"a": ((1, 2, 3, 4), "0" * 64)}
    index.path.write_bytes(damage)
    index.path.with_suffix(".json").write_bytes(damage)
    again = FolderIndex.open(tmp_path, tmp_path)
    assert (again.known, again.bases) == ({}, {})


def test_two_ways_to_a_folder_share_its_index(tmp_path: Path, fill: Callable[..., Path]) -> None:
    folder = fill(a="x")
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert FolderIndex.open(tmp_path, folder).path == FolderIndex.open(tmp_path, link / "../link").path
