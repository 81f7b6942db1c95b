from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marrow.store.staging import Staging

LEAVE = """
import sys
from pathlib import Path
from marrow.store.staging import Staging
path = Staging(Path(sys.argv[1])).new()
path.mkdir()
(path / "half").write_text("written")
print(path)
sys.stdin.readline()
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "staging"


def test_paths_are_fresh_and_go_with_their_owner(root: Path) -> None:
    staging = Staging(root)
    first, second = staging.new(), staging.new()
    assert first != second and not first.exists() and first.parent.is_dir()
    first.write_text("x")
    staging.close()
    staging.close()
    assert list(root.iterdir()) == []


def test_nothing_is_made_until_it_is_needed(root: Path) -> None:
    staging = Staging(root)
    assert staging.sweep() == 0
    staging.close()
    assert not root.exists()


def test_sweep_removes_what_a_killed_process_left_and_nothing_else(
    root: Path, spawn: Callable[..., Any]
) -> None:
    dead, alive = spawn(LEAVE, root), spawn(LEAVE, root)
    left, kept = Path(dead.line()), Path(alive.line())
    mine = Staging(root)
    mine.new().write_text("x")
    assert mine.sweep() == 0
    dead.kill()
    assert mine.sweep() == 1
    assert not left.parent.exists()
    assert (kept / "half").read_text() == "written"
    alive.kill()
    assert mine.sweep() == 1
    mine.close()
    assert list(root.iterdir()) == []
