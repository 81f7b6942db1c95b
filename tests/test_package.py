"""What others install: the wheel is whole, its metadata true, and its light layers load without torch."""

import email.message
import email.parser
import random
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import marrow

pytestmark = pytest.mark.slow
PACKAGE = Path(marrow.__file__).parent
ROOT = PACKAGE.parents[1]


def module_of(path: Path) -> str:
    parts = ("marrow", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = sorted(module_of(path) for path in PACKAGE.rglob("*.py") if path.name != "__main__.py")
TORCH_FREE = [
    module
    for module in MODULES
    if module.startswith(("marrow.core", "marrow.store", "marrow.text"))
    or module in ("marrow", "marrow.data.config", "marrow.models.config", "marrow.serve.config")
    or module in ("marrow.cli.main", "marrow.cli.recipe", "marrow.cli.pipeline", "marrow.train.config")
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what it is built from: a build writes into its sources."""
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "tests/cli"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    done = subprocess.run(
        [*pip, str(source), "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_all_of_the_package_and_nothing_else(wheel: Path) -> None:
    kept = {".py", ".html", ".c", ".h", ".toml", ".typed"}
    ours = {
        f"marrow/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and (path.suffix in kept or path.name == "py.typed")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {"marrow/serve/page.html", "marrow/py.typed", "marrow/cli/main.py"} <= names
    assert names == ours


def test_the_metadata_is_that_of_the_project(wheel: Path, metadata: email.message.Message) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert metadata["Name"] == "marrow"
    assert metadata["Version"] == project["version"] == marrow.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra") or ()) == set(project["optional-dependencies"])
    assert {"test", "lint", "postgres"} <= set(metadata.get_all("Provides-Extra") or ())
    plain = [line for line in metadata.get_all("Requires-Dist") or () if "extra ==" not in line]
    assert len(plain) == len(project["dependencies"])
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        infos = {name.rpartition(".dist-info/")[2]: name for name in archive.namelist()}
        assert "marrow = marrow.cli.main:main" in archive.read(infos["entry_points.txt"]).decode()
        assert "licenses/LICENSE" in infos


def test_the_installed_package_runs_from_anywhere(installed: Path, tmp_path: Path) -> None:
    """Python takes the unpacked wheel, not this checkout: `-P` and PYTHONPATH see to it."""
    code = (
        "import pathlib, sys, marrow\nfrom marrow.cli.main import run\n"
        "from marrow.cli.sources import source_files\n"
        "print(pathlib.Path(marrow.__file__).parent)\n"
        "assert any(p.name == 'engine.py' for p in source_files('marrow.serve.engine'))\n"
        "sys.exit(run(['--help']))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(installed / "marrow")
    assert "Run a recipe" in done.stdout


@pytest.mark.parametrize("module", TORCH_FREE)
def test_a_light_module_loads_alone_and_without_torch(module: str) -> None:
    code = f"import sys, {module}\nsys.exit('torch was loaded' if 'torch' in sys.modules else 0)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", range(4))
def test_light_modules_load_in_any_order(seed: int) -> None:
    order = random.Random(seed).sample(TORCH_FREE, len(TORCH_FREE))
    code = (
        f"import sys\nfor m in {order!r}: __import__(m)\nsys.exit('torch' in sys.modules and 'torch loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


ALONE = """
import importlib, sys
import torch, fastapi, pyarrow, sqlalchemy  # once: they are what takes long
for module in sys.argv[1:]:
    if "marrow.kernels.dispatch" in sys.modules:  # torch keeps operators, and takes each name once
        sys.modules["marrow.kernels.dispatch"]._library._destroy()
    for loaded in [name for name in sys.modules if name.partition(".")[0] == "marrow"]:
        del sys.modules[loaded]
    importlib.import_module(module)
"""


def test_every_module_loads_first(tmp_path: Path) -> None:
    """No import cycle hides behind an order: each module is the first of Marrow once."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *MODULES], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(MODULES) > 80
