"""The guides' own scripts: each starved run is diagnosed as its guide says, and each fix makes it better."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from marrow.cli.tables import bottleneck, data_wait

GUIDES = Path(__file__).parents[2] / "docs" / "guides"


@pytest.fixture(scope="module")
def starved() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(GUIDES))  # workers import its transform by name
        yield importlib.import_module("starved")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("starved")


def diagnosed(starved: ModuleType, folder: Path, run: str, steps: int = 25) -> tuple[float, str]:
    """Run it in short form; return how busy the accelerator was, and what is said of the wait."""
    with starved.open_loader(run, folder) as loader:
        summary = starved.train(loader, steps, 0.02)
    assert bottleneck(summary.as_dict()) is not None
    wait = data_wait(summary.as_dict())
    assert wait is not None
    return starved.busy(summary, steps, 0.02), wait.advice


@pytest.mark.slow
def test_the_stages_that_the_guide_names_are_named_and_each_fix_helps(starved: Any, folder: Path) -> None:
    first, why_first = diagnosed(starved, folder, "first")
    assert why_first.startswith("decode takes")
    assert "window" in why_first
    window, why_window = diagnosed(starved, folder, "window")
    assert why_window.startswith("transform takes")
    assert "loader.workers" in why_window
    assert window > 1.3 * first
    prefetch, why_prefetch = diagnosed(starved, folder, "prefetch")
    assert why_prefetch.startswith("transform takes")
    assert prefetch > window
    far, why_far = diagnosed(starved, folder, "far", 10)
    assert why_far.startswith("fetch takes")
    assert "loader.window" in why_far
    near, _ = diagnosed(starved, folder, "near", 10)
    assert near > 1.2 * far


def test_the_guide_shows_what_its_script_can_do() -> None:
    text = (GUIDES / "from-40-to-100-percent.md").read_text(encoding="utf-8")
    shown = [
        line.split()[-1] for line in text.splitlines() if line.startswith("$ python docs/guides/starved.py")
    ]
    source = (GUIDES / "starved.py").read_text(encoding="utf-8")
    assert shown
    assert all(f'"{run}": {{' in source for run in shown)
