"""scripts/setup.py: installs when something changed, does nothing else, and says why it cannot.

The script runs on a copy of itself in a folder with a small pyproject.toml. Its Python is a shell
script that writes down what it is asked, so that no package is downloaded.
"""

import ast
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "setup.py"
PYTHON = """#!/bin/sh
root={root}
echo "$*" >> "$root/asked"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"pip config list"*) cat "$root/pip.conf" 2> /dev/null ;;
  *"pip install"*) if [ -e "$root/no-network" ]; then exit 1; fi ;;
esac
exit 0
"""
Setup = Callable[..., list[str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder as a fresh clone has it, as far as set-up looks at it."""
    root = tmp_path / "clone"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(SCRIPT, root / "scripts" / "setup.py")
    (root / "pyproject.toml").write_text('[project]\nname = "marrow"\n', encoding="utf-8")
    (root / "constraints.txt").write_text("numpy==2.0\n", encoding="utf-8")
    python = root / "python"
    python.write_text(PYTHON.format(root=root), encoding="utf-8")
    python.chmod(0o755)
    return root


@pytest.fixture
def setup(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Run the script in `checkout`; return what it asked its Pythons to do."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100e9))

    def run(*extras: str, root: Path = checkout) -> list[str]:
        monkeypatch.setattr(sys, "executable", str(root / "python"))
        monkeypatch.setattr(sys, "argv", ["setup.py", *(w for extra in extras for w in ("--extra", extra))])
        (root / "asked").unlink(missing_ok=True)
        spec = importlib.util.spec_from_file_location("setup_copy", root / "scripts" / "setup.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main()
        asked = root / "asked"
        return asked.read_text(encoding="utf-8").splitlines() if asked.exists() else []

    return run


def installs(asked: list[str]) -> list[str]:
    """What the editable installs named, as in "marrow[lint,test]"."""
    return [line.rpartition("/")[2] for line in asked if "--editable" in line]


def test_a_fresh_clone_gets_an_environment_with_the_constraints(setup: Setup, checkout: Path) -> None:
    asked = setup("test", "lint")
    assert [line for line in asked if line.startswith("-m venv")] == [f"-m venv {checkout}/.venv"]
    assert installs(asked) == ["clone[lint,test]"]
    packages = [line for line in asked if "pip install" in line]
    assert len(packages) == 2  # the build backend first, since the build is not isolated
    assert all(f"--constraint {checkout}/constraints.txt" in line for line in packages)
    assert (checkout / ".venv" / "ready").exists()


def test_nothing_is_done_when_all_is_there(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    setup("test")
    capsys.readouterr()
    assert setup("test") == []
    assert setup() == []  # fewer extras are there as well
    assert capsys.readouterr() == ("", "")


def test_an_extra_is_added_to_those_that_are_there(setup: Setup) -> None:
    setup("test")
    asked = setup("lint")
    assert installs(asked) == ["clone[lint,test]"]
    assert not any(line.startswith("-m venv") for line in asked)
    assert setup("lint", "test") == []


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml"])
def test_a_changed_file_installs_again_into_the_same_environment(
    name: str, setup: Setup, checkout: Path
) -> None:
    setup("test")
    with (checkout / name).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    asked = setup()
    assert installs(asked) == ["clone"]
    assert not any(line.startswith("-m venv") for line in asked)
    assert setup() == []
    assert installs(setup("test")) == ["clone[test]"]  # the extra was of the old state


def test_a_touched_file_of_equal_bytes_changes_nothing(setup: Setup, checkout: Path) -> None:
    setup()
    os.utime(checkout / "pyproject.toml", (0, 0))
    assert setup() == []


def test_another_python_gets_another_environment(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup()
    monkeypatch.setattr(sys, "version", "3.99.0 (another build)")
    asked = setup()
    assert any(line.startswith("-m venv") for line in asked)
    assert setup() == []


def test_a_moved_checkout_gets_another_environment(setup: Setup, checkout: Path) -> None:
    """The scripts in an environment begin with the path of its Python."""
    setup()
    moved = checkout.rename(checkout.with_name("moved"))
    python = moved / "python"
    python.write_text(PYTHON.format(root=moved), encoding="utf-8")
    asked = setup(root=moved)
    assert any(line == f"-m venv {moved}/.venv" for line in asked)
    assert installs(asked) == ["moved"]


def test_an_environment_without_python_is_made_anew(setup: Setup, checkout: Path) -> None:
    setup()
    (checkout / ".venv" / "bin" / "python").unlink()
    assert any(line.startswith("-m venv") for line in setup())


def test_a_failed_install_is_an_error_and_the_next_set_up_tries_again(
    setup: Setup, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup()
    (checkout / "constraints.txt").write_text("numpy==2.1\n", encoding="utf-8")
    (checkout / "no-network").touch()
    assert "PIP_INDEX_URL" in refusal(setup, capsys)
    assert not (checkout / ".venv" / "ready").exists()
    (checkout / "constraints.txt").write_text("numpy==2.0\n", encoding="utf-8")  # as it was: no way back
    (checkout / "no-network").unlink()
    assert installs(setup()) == ["clone"]


def refusal(setup: Setup, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        setup()
    told = capsys.readouterr()
    assert ended.value.code == 1
    assert told.out == ""
    assert "error: " in told.err
    assert "\nhint: " in told.err
    return told.err


def test_an_old_python_is_refused_with_the_command_for_a_newer_one(
    setup: Setup, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 14, "final", 0))
    assert "make run PYTHON=python3.12" in refusal(setup, capsys)
    assert not (checkout / ".venv").exists()


def test_an_old_python_can_read_the_script() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    ast.parse(text, feature_version=(3, 6))
    with pytest.raises(SyntaxError):
        ast.parse("if x := 1: pass", feature_version=(3, 6))  # the check above can fail


@pytest.mark.parametrize(
    ("free_gb", "pip_conf", "said"),
    [
        (11.9, "", "11.9 GB free on this disk, set-up needs 12.0 GB"),
        (2.9, "global.find-links='https://wheels.example'", "2.9 GB free on this disk, set-up needs 3.0 GB"),
        (2.9, "global.index-url='https://wheels.example'", "set-up needs 3.0 GB"),
    ],
)
def test_too_small_a_disk_is_refused_before_anything_is_made(
    free_gb: float,
    pip_conf: str,
    said: str,
    setup: Setup,
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (checkout / "pip.conf").write_text(pip_conf, encoding="utf-8")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_gb * 1e9))
    told = refusal(setup, capsys)
    assert said in told
    assert "free some space" in told
    assert ("CPU build" in told) == (not pip_conf)
    assert not (checkout / ".venv").exists()


def test_a_source_of_cpu_wheels_in_the_environment_needs_little_disk(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3.1e9))
    monkeypatch.setenv("PIP_FIND_LINKS", "https://wheels.example")
    assert installs(setup()) == ["clone"]


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_venv_is_refused(
    module: str, setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    told = refusal(setup, capsys)
    assert f"this Python has no {module}" in told
    assert "apt install python3-venv" in told


@pytest.mark.parametrize(
    ("system", "machine"), [("Windows", "AMD64"), ("Linux", "i686"), ("Darwin", "x86_64")]
)
def test_a_platform_without_torch_is_refused(
    system: str,
    machine: str,
    setup: Setup,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert f"no torch build is known for {system} {machine}" in refusal(setup, capsys)


def test_a_folder_that_cannot_be_written_is_refused(
    setup: Setup, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"no permission to write in {checkout}" in refusal(setup, capsys)


def test_a_ready_environment_is_not_refused_for_a_full_disk(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0.0))
    assert setup() == []
