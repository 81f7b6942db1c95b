"""Start `marrow` in processes of its own, with a store of its own. For tests of the command line."""

import csv
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

TINY = Path(__file__).parents[1] / "cli" / "tiny.toml"
Marrow = Callable[..., "subprocess.CompletedProcess[str]"]

SUBJECTS = ["the loader", "a shard", "the engine", "one rank", "the tokenizer", "a checkpoint", "the store"]
VERBS = ["reads", "keeps", "waits for", "counts", "verifies", "publishes", "names", "drops"]
OBJECTS = [
    "every row",
    "the last step",
    "its blocks",
    "a damaged blob",
    "the order",
    "two epochs",
    "no token",
]


def write_csv(path: Path, num_rows: int) -> None:
    """Write rows of (title, body), each different, the same on every call."""
    draw = random.Random(7)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["title", "body"])
        for number in range(num_rows):
            said = [" ".join(map(draw.choice, (SUBJECTS, VERBS, OBJECTS))) for _ in range(6)]
            rows.writerow([f"note {number}", f"{'. '.join(said)}; {draw.getrandbits(64):x}."])


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "marrow", *map(str, arguments)]


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"MARROW_HOME": str(home), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
