"""Which code made an artifact: package version, hash of the sources, commit if there is one.

    0.1.0+src.1f3a9c04d2be.git.8ab817c6e0f1

The hash of the sources is what tells two states apart; the commit is for people.
"""

import importlib.metadata
import platform
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import marrow
from marrow.core.hashes import hash_sources


@cache
def code_version() -> str:
    """Return the version of the Marrow that runs. Cost: reads its sources once a process (~10 ms)."""
    package = Path(marrow.__file__).parent
    version = f"{marrow.__version__}+src.{hash_sources([package])[:12]}"
    commit = _commit(package.parent.parent)
    return f"{version}.git.{commit[:12]}" if commit else version


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the installed versions of packages, "absent" where one is not installed; no import."""
    versions: dict[str, str] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions


@cache
def base_environment() -> dict[str, str]:
    """Return what is recorded of every step's surroundings: Python, Marrow, the platform."""
    return {
        "python": platform.python_version(),
        "marrow": marrow.__version__,
        "platform": f"{platform.system().lower()}-{platform.machine()}",
    }


def _commit(root: Path) -> str | None:
    """Read the commit that a checkout stands on, without starting git."""
    folder = root / ".git"
    try:
        head = (folder / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        reference = head.removeprefix("ref: ")
        loose = folder / reference
        if loose.is_file():
            return loose.read_text(encoding="utf-8").strip()
        for line in (folder / "packed-refs").read_text(encoding="utf-8").splitlines():
            if line.endswith(f" {reference}"):
                return line.split()[0]
    except (FileNotFoundError, NotADirectoryError):
        return None
    return None
