"""The guide to the memory wall: its script runs, each step computes SwiGLU, and the guide shows its table."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDES = Path(__file__).parents[2] / "docs" / "guides"


def steps(text: str) -> list[str]:
    """The first columns of the table: number, name and traffic of each step."""
    return re.findall(r"^(?:\d|  marrow)[^%\n]*? x", text, re.MULTILINE)


@pytest.mark.slow
def test_the_script_prints_the_steps_that_the_guide_shows():
    command = [sys.executable, str(GUIDES / "swiglu_steps.py"), "64", "96"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr  # each step is compared with fp64
    assert len(steps(done.stdout)) >= 9
    assert steps((GUIDES / "the-memory-wall.md").read_text()) == steps(done.stdout)
