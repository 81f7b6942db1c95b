"""C files compiled at first use."""

import ctypes
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from marrow.core import native

ADD = "#include <stdint.h>\nint64_t add(int64_t a, int64_t b) { return a + b; }\n"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Give a C file and an empty cache; forget both after."""
    monkeypatch.setenv(native.CACHE_ENVIRONMENT, str(tmp_path / "cache"))
    native.load.cache_clear()
    native.cache_folder.cache_clear()
    native._warn_of_missing_compiler.cache_clear()
    path = tmp_path / "add.c"
    path.write_text(ADD)
    yield path
    native.load.cache_clear()
    native.cache_folder.cache_clear()


def added(library: ctypes.CDLL | None, a: int, b: int) -> int:
    assert library is not None
    library.add.restype = ctypes.c_int64
    library.add.argtypes = [ctypes.c_int64, ctypes.c_int64]
    return library.add(a, b)


def kept() -> list[Path]:
    return sorted(native.cache_folder().glob("*.so"))


def test_a_file_is_compiled_and_called(source: Path) -> None:
    assert added(native.load(source), 1 << 40, 2) == (1 << 40) + 2


def test_a_second_process_compiles_nothing(source: Path) -> None:
    native.load(source)
    before = [path.stat().st_mtime_ns for path in kept()]
    code = f"from pathlib import Path\nfrom marrow.core import native\nnative.load(Path({str(source)!r}))"
    environment = os.environ | {"CC": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert [path.stat().st_mtime_ns for path in kept()] == before


def test_a_changed_source_is_compiled_anew(source: Path) -> None:
    native.load(source)
    source.write_text(ADD.replace("a + b", "a - b"))
    native.load.cache_clear()
    assert added(native.load(source), 5, 2) == 3
    assert len(kept()) == 2


def test_a_changed_header_beside_it_compiles_anew(source: Path) -> None:
    header = source.with_name("one.h")
    header.write_text("#define ONE 1\n")
    source.write_text(f'#include "one.h"\n{ADD.replace("a + b", "a + b + ONE")}')
    assert added(native.load(source), 5, 2) == 8
    header.write_text("#define ONE 2\n")
    native.load.cache_clear()
    assert added(native.load(source), 5, 2) == 9


@pytest.mark.slow
def test_threads_are_shared_with_torch_and_cost_nothing_where_unused(source: Path) -> None:
    assert b"libgomp" not in Path(native.load(source)._name).read_bytes()
    loop = "int64_t add(int64_t a, int64_t b) {\n#pragma omp parallel for num_threads(2) reduction(+ : a)\n"
    source.write_text(f"#include <stdint.h>\n{loop}for (int64_t i = 0; i < b; i++) a += 1;\nreturn a;\n}}\n")
    code = (
        "import sys, torch; from pathlib import Path; from marrow.core import native;"
        f"assert native.load(Path({str(source)!r})).add(3, 4) == 7;"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "1"


def test_a_damaged_library_is_made_anew(source: Path) -> None:
    native.load(source)
    (path,) = kept()
    good = path.read_bytes()
    path.unlink()  # the loaded one stays mapped; a new file takes its name
    path.write_bytes(good[: len(good) // 2])
    native.load.cache_clear()
    assert added(native.load(source), 2, 2) == 4
    assert path.read_bytes() == good


def test_a_library_that_cannot_be_loaded_is_a_warning_and_none(
    source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a file system that is mounted without execution: whole, but no program."""
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho no program > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    with pytest.warns(RuntimeWarning, match=r"add\.c is compiled, but not loaded.*MARROW_CACHE"):
        assert native.load(source) is None


def test_a_home_that_cannot_be_written_gives_a_private_folder(
    source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv(native.CACHE_ENVIRONMENT, str(tmp_path / "file"))
    folder = native.cache_folder()
    assert tmp_path not in folder.parents
    assert added(native.load(source), 1, 2) == 3
    assert list(folder.iterdir()) == kept() != []
    shutil.rmtree(folder)


def test_a_compiler_that_hangs_is_given_up(
    source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hanging = tmp_path / "cc"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setenv("CC", str(hanging))
    monkeypatch.setattr(native, "_TIMEOUT_S", 0.05)
    with pytest.warns(RuntimeWarning, match="timed out"):
        assert native.load(source) is None


def test_without_a_compiler_there_is_a_warning_and_none(
    source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(RuntimeWarning, match="no C compiler"):
        assert native.load(source) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.load(source) is None
        assert native.load(source.with_name("other.c")) is None  # said once, not once a file


def test_an_error_of_the_compiler_is_shown(source: Path) -> None:
    source.write_text("this is no C\n")
    with pytest.warns(RuntimeWarning, match=r"add\.c is not compiled.*failed"):
        assert native.load(source) is None
    assert kept() == []


def test_a_folder_that_others_may_write_to_is_not_used(source: Path, tmp_path: Path) -> None:
    shared = tmp_path / "cache" / "native"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    folder = native.cache_folder()
    assert folder != shared
    assert folder.stat().st_mode & 0o077 == 0
    folder.rmdir()


def test_processes_that_compile_at_once_agree(source: Path) -> None:
    code = (
        "from pathlib import Path; from marrow.core import native; "
        f"print(native.load(Path({str(source)!r})).add(20, 22))"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [child.communicate(timeout=60)[0].strip() for child in children] == ["42"] * 3
    assert len(list(native.cache_folder().iterdir())) == 1
