"""Durable is durable: one by one or all at once, each path counts, and a device that refuses says so."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from marrow.store import durable
from marrow.store.durable import ONE_BY_ONE, make_durable


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    cached = durable._syncfs
    cached.cache_clear()
    yield
    cached.cache_clear()


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Collect what is flushed one by one."""
    seen: list[Path] = []
    real = durable.fsync
    monkeypatch.setattr(durable, "fsync", lambda path: (seen.append(path), real(path))[1])
    return seen


@pytest.fixture
def files(tmp_path: Path) -> Callable[[int], list[Path]]:
    def make(count: int) -> list[Path]:
        made = [tmp_path / str(number) for number in range(count)]
        for path in made:
            path.write_text("x")
        return made

    return make


def test_few_paths_are_flushed_one_by_one_each_once(
    files: Callable[[int], list[Path]], flushed: list[Path], tmp_path: Path
) -> None:
    paths = files(3)
    make_durable([*paths, tmp_path, *paths])
    assert flushed == [*paths, tmp_path]


def test_nothing_to_do_is_fine(flushed: list[Path]) -> None:
    make_durable([])
    assert flushed == []


def test_many_paths_wait_for_the_file_system_once(
    files: Callable[[int], list[Path]], flushed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def sync(descriptor: int) -> int:
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return 0

    monkeypatch.setattr(durable, "_syncfs", lambda: sync)
    paths = files(ONE_BY_ONE + 1)
    make_durable(paths)
    assert (calls, flushed) == ([str(paths[0])], [])
    make_durable(paths[:ONE_BY_ONE])
    assert len(calls) == 1
    assert flushed == paths[:ONE_BY_ONE]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="syncfs is of Linux")
def test_the_real_call_takes_many_files(files: Callable[[int], list[Path]], flushed: list[Path]) -> None:
    make_durable(files(ONE_BY_ONE + 5))
    assert flushed == []
    assert durable._syncfs()(-1) == -1, "the call of this machine reports what it cannot do"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="syncfs is of Linux")
def test_a_device_that_refuses_is_an_error_with_its_reason(
    files: Callable[[int], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = durable._syncfs()
    monkeypatch.setattr(durable, "_syncfs", lambda: lambda descriptor: real(-1))  # fails: no such file
    before = os.listdir("/proc/self/fd")
    paths = files(ONE_BY_ONE + 1)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)) as caught:
        make_durable(paths)
    assert (caught.value.errno, caught.value.filename) == (errno.EBADF, str(paths[0]))
    assert len(os.listdir("/proc/self/fd")) == len(before), "and no descriptor is left open"


def test_elsewhere_many_files_are_flushed_one_by_one(
    files: Callable[[int], list[Path]], flushed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    paths = files(ONE_BY_ONE + 1)
    make_durable(paths)
    assert flushed == paths


def test_a_path_that_is_gone_is_an_error(files: Callable[[int], list[Path]]) -> None:
    paths = files(2)
    paths[1].unlink()
    with pytest.raises(FileNotFoundError):
        make_durable(paths)
