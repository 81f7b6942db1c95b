import re
import subprocess
from pathlib import Path

import pytest

import marrow
from marrow.store.version import _commit, base_environment, code_version, package_versions


def test_the_code_version_names_package_sources_and_commit() -> None:
    assert re.fullmatch(
        rf"{re.escape(marrow.__version__)}\+src\.[0-9a-f]{{12}}(\.git\.[0-9a-f]{{12}})?", code_version()
    )


@pytest.mark.parametrize("packed", [False, True])
def test_the_commit_is_what_git_says(tmp_path: Path, packed: bool) -> None:
    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *words]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-b", "main")
    assert _commit(tmp_path) is None
    git("commit", "--allow-empty", "-m", "one")
    if packed:
        git("pack-refs", "--all")
    assert _commit(tmp_path) == git("rev-parse", "HEAD")
    git("checkout", "--detach")
    assert _commit(tmp_path) == git("rev-parse", "HEAD")


def test_no_checkout_has_no_commit(tmp_path: Path) -> None:
    assert _commit(tmp_path) is None
    (tmp_path / ".git").write_text("gitdir: elsewhere")
    assert _commit(tmp_path) is None


def test_packages_that_are_absent_are_said_to_be() -> None:
    versions = package_versions(["sqlalchemy", "no-such-package"])
    assert versions["no-such-package"] == "absent" and versions["sqlalchemy"][0].isdigit()
    assert set(base_environment()) == {"python", "marrow", "platform"}
