import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core.errors import SourceError
from marrow.store import folder_index
from marrow.store.folder_index import COARSE_GRAIN_NS, FINE_GRAIN_NS, FolderIndex, is_settled, walk

INT64 = st.integers(-(2**63), 2**63 - 1)
stamps = st.tuples(INT64, INT64, INT64, INT64)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
file_names = st.binary(min_size=1, max_size=20).filter(lambda n: b"\0" not in n).map(os.fsdecode)


def names(folder: Path, **how: object) -> list[str]:
    return [seen.name for seen in walk(folder, **how)]  # type: ignore[arg-type]


@given(st.dictionaries(file_names, st.tuples(stamps, digests), max_size=20))
def test_what_is_packed_comes_back(known: dict[str, tuple[tuple[int, int, int, int], str]]) -> None:
    assert folder_index._unpack(folder_index._pack(known)) == known


def test_a_walk_lists_files_sorted_with_odd_names(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    (folder / "sub/deep").mkdir(parents=True)
    (folder / "empty folder").mkdir()
    odd = [
        b"new\nline",
        b"not \xff utf-8",
        b"-rf",
        b" ",
        b"\xc3\xbc",
        b'"quoted"',
        b"back\\slash",
        b"x" * 255,
    ]
    for name in odd:
        (folder / os.fsdecode(name)).write_bytes(b"")
    (folder / "sub/deep/file").write_bytes(b"")
    assert names(folder) == sorted([*map(os.fsdecode, odd), "sub/deep/file"])


def test_git_the_store_and_leftovers_are_passed_over(tmp_path: Path) -> None:
    for name in (".git/config", "store/blobs/x", "kept/.hidden", f".tmp-1-{'0' * 12}", ".tmp-mine"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert names(tmp_path, avoid=tmp_path / "store") == [".tmp-mine", "kept/.hidden"]


def test_a_link_is_refused_followed_or_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("text")
    (folder / "link").symlink_to(tmp_path / "outside/file")
    with pytest.raises(SourceError, match="'link' is a symbolic link") as caught:
        names(folder)
    assert "--follow-links" in str(caught.value)
    assert names(folder, links="skip") == []
    (folder / "folder").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to(folder)
    assert names(folder, links="follow")[:2] == ["folder/file", "link"]


def test_a_link_that_leads_nowhere_is_said(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(SourceError, match="leads nowhere"):
        names(tmp_path, links="follow")


def test_what_is_no_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
        with pytest.raises(SourceError, match="'socket' is no file, folder or link"):
            names(tmp_path)


def test_names_that_differ_in_normal_form_only_are_refused(tmp_path: Path) -> None:
    (tmp_path / "caf\u00e9").write_bytes(b"")
    (tmp_path / "cafe\u0301").write_bytes(b"")
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system keeps one of the two")
    with pytest.raises(SourceError, match="normal form") as caught:
        names(tmp_path)
    assert "'cafe\\u0301' and 'caf\\xe9'" in str(caught.value)


def test_a_path_too_long_for_the_system_is_said(tmp_path: Path) -> None:
    here = os.open(tmp_path, os.O_RDONLY)
    part = "x" * 250
    try:
        for _ in range(20):
            os.mkdir(part, dir_fd=here)
            below = os.open(part, os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        with pytest.raises(SourceError, match="too long to read"):
            names(tmp_path)
    finally:
        os.close(here)


def test_a_file_is_settled_once_a_change_must_show() -> None:
    fine, coarse = 1_000_000_000_000_123_456, 1_000_000_000_000_000_000
    assert not is_settled((1, 0, fine, 1), fine + FINE_GRAIN_NS)
    assert is_settled((1, 0, fine, 1), fine + FINE_GRAIN_NS + 1)
    assert not is_settled((1, 0, coarse, 1), coarse + COARSE_GRAIN_NS)
    assert is_settled((1, 0, coarse, 1), coarse + COARSE_GRAIN_NS + 1)


def test_a_file_from_the_future_is_never_settled() -> None:
    now = time.time_ns()
    assert not is_settled((1, 0, now + 3_600 * 10**9, 1), now)


@pytest.mark.parametrize("damage", [b"", b"x", b"marrow-index 1\n", b"marrow-index 1\n" + bytes(100)])
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
