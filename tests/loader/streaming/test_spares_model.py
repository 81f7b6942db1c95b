"""Spare files against a plain model: which one is taken, what is trimmed, and that no bytes are lost."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from marrow.loader.streaming.spares import Spares


class Model(RuleBasedStateMachine):
    """The spares are a folder; the model is a dict of names to sizes, in the order of the names."""

    folder: Path

    @initialize()
    def begin(self) -> None:
        self.number = 0
        self.spares = Spares(self.folder / "spare")
        self.spares.folder.mkdir(exist_ok=True)
        for path in [*self.spares.folder.iterdir(), *self.folder.glob("part*")]:
            path.unlink()
        self.sizes: dict[str, int] = {}
        self.opened: dict[str, int] = {}

    def teardown(self) -> None:
        for descriptor in getattr(self, "opened", {}).values():
            os.close(descriptor)

    def ordered(self) -> list[tuple[str, int]]:
        return sorted(self.sizes.items())

    def place(self) -> Path:
        self.number += 1
        return self.folder / f"part{self.number}"

    @rule(num_bytes=st.integers(0, 50), seen=st.booleans())
    def add(self, num_bytes: int, seen: bool) -> None:
        path = self.place()
        path.write_bytes(b"x" * num_bytes)
        before = set(self.sizes)
        descriptor = os.open(path, os.O_RDONLY) if seen else -1
        self.spares.add(path)
        assert not path.exists()
        (name,) = {one.name for one in self.spares.folder.iterdir()} - before
        self.sizes[name] = num_bytes
        if seen:
            self.opened[name] = descriptor

    @rule()
    def take(self) -> None:
        """The first that nobody looks into is taken; those before it that somebody does are let go."""
        path = self.place()
        descriptor = self.spares.take(path)
        taken = next((name for name, _ in self.ordered() if name not in self.opened), None)
        for name, _ in self.ordered():
            if taken is not None and name > taken:
                break
            num_bytes = self.sizes.pop(name)
            if name in self.opened:
                assert os.pread(self.opened[name], 99, 0) == b"x" * num_bytes, "whoever looks sees its bytes"
                os.close(self.opened.pop(name))
            else:
                assert os.fstat(descriptor).st_size == num_bytes and path.exists()
        if taken is None:
            assert descriptor == -1 and not path.exists()
        else:
            os.close(descriptor)

    @rule(most_bytes=st.integers(0, 120))
    def trim(self, most_bytes: int) -> None:
        left = self.spares.trim(most_bytes)
        first = self.ordered()[:1]
        while len(self.sizes) > 1 and sum(self.sizes.values()) > most_bytes + first[0][1]:
            name, _ = self.ordered()[-1]
            del self.sizes[name]
            if name in self.opened:
                os.close(self.opened.pop(name))
        assert left == sum(self.sizes.values())
        assert self.ordered()[:1] == first, "the one that is taken next stays"

    @rule()
    def clear(self) -> None:
        assert self.spares.clear() == sum(self.sizes.values())
        self.sizes.clear()
        while self.opened:
            os.close(self.opened.popitem()[1])

    @invariant()
    def the_folder_is_as_the_model_says(self) -> None:
        if not hasattr(self, "sizes"):
            return
        found = [(path.name, size) for path, size in self.spares.sizes().items()]
        assert found == self.ordered()
        assert self.spares.first_bytes() == (found[0][1] if found else 0)


def test_any_use_of_spares_is_as_the_model_says(tmp_path: Path) -> None:
    Model.folder = tmp_path
    run_state_machine_as_test(Model)  # asserts after each step
    assert any(tmp_path.iterdir()), "the model had a folder for each run, so it was run"


def test_a_folder_that_is_not_there_has_no_spares(tmp_path: Path) -> None:
    spares = Spares(tmp_path / "gone")
    assert (spares.sizes(), spares.first_bytes(), spares.trim(0), spares.clear()) == ({}, 0, 0, 0)
    assert spares.take(tmp_path / "part") == -1


def test_a_file_that_another_process_removes_meanwhile_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spare").mkdir()
    for name in "ab":
        (tmp_path / "spare" / name).write_bytes(b"x" * 10)

    class Removing:
        """A listing whose first file goes before it is looked at."""

        def __init__(self, folder: Path) -> None:
            self._entries = list(listed(folder))

        def __enter__(self) -> list[os.DirEntry[str]]:
            (tmp_path / "spare" / "a").unlink(missing_ok=True)
            return self._entries

        def __exit__(self, *_: object) -> None:
            """Nothing is open."""

    listed = os.scandir
    monkeypatch.setattr(os, "scandir", Removing)
    assert list(Spares(tmp_path / "spare").sizes().values()) == [10]


def test_a_link_is_measured_itself_not_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "spare").mkdir()
    (tmp_path / "large").write_bytes(b"x" * 1000)
    (tmp_path / "spare" / "link").symlink_to(tmp_path / "large")
    spares = Spares(tmp_path / "spare")
    assert spares.first_bytes() < 1000
    spares.clear()
    assert (tmp_path / "large").stat().st_size == 1000


def test_a_spare_that_cannot_be_renamed_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "spare").mkdir()
    (tmp_path / "spare" / "a").write_bytes(b"x")
    with pytest.raises(OSError, match="part") as caught:
        Spares(tmp_path / "spare").take(tmp_path / "no folder" / "part")
    assert caught.value.errno == errno.ENOENT
    assert (tmp_path / "spare" / "a").exists(), "and it is a spare still"
