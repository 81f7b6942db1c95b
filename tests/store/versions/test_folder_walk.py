import os
import socket
import time
from pathlib import Path

import pytest

from marrow.core.errors import SourceError
from marrow.store.versions.folder_walk import COARSE_GRAIN_NS, FINE_GRAIN_NS, is_settled, scan, stamp_of, walk


def names(folder: Path, **how: object) -> list[str]:
    return [seen.name for seen in walk(folder, **how)]  # type: ignore[arg-type]


def test_a_scan_gives_every_file_once_a_folder_at_a_time(tmp_path: Path) -> None:
    for name in ("a", "b/c", "b/d/e", "f/g"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty").mkdir()
    found = scan(tmp_path)
    assert sorted(listing.prefix for listing in found) == ["", "b/", "b/d/", "f/"]
    seen = {file.name: file.stamp for listing in found for file in listing.seen()}
    assert seen == {name: stamp_of((tmp_path / name).stat()) for name in ("a", "b/c", "b/d/e", "f/g")}


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
