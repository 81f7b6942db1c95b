"""Tile configurations that were measured: one JSON file a device, `configs/DEVICE.json`.

    {"device": "NVIDIA H200", "capability": "90", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-01-31",
     "configs": {"swiglu": {"(4096, 11008)": {"BLOCK": 1024, "num_warps": 4}}}}

`marrow bench kernels --tune` writes them, and `compiled.py` compiles them ahead of time. An operator, shape
class or device without an entry uses the operator's own default.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

Table = dict[str, dict[str, dict[str, Any]]]


def slug(device: str) -> str:
    """Return the file name of a device: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@cache
def load(device: str, folder: Path = FOLDER) -> Table:
    """Return operator -> shape class -> configuration of a device; empty where there is no table."""
    path = folder / f"{slug(device)}.json"
    if not path.exists():
        return {}
    table: Table = json.loads(path.read_text())["configs"]
    return table


def of_capability(capability: int, folder: Path = FOLDER) -> list[Table]:
    """Return the tables of all devices of a compute capability, such as 90."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [table["configs"] for table in found if table["capability"] == str(capability)]


def write(device: str, table: Table, facts: dict[str, str], folder: Path = FOLDER) -> Path:
    """Write the table of a device; entries of other operators and shape classes that it holds stay.

    Args: facts: versions and date, kept beside it.
    """
    path, merged = folder / f"{slug(device)}.json", {}
    if path.exists():
        merged = json.loads(path.read_text())["configs"]
    for name, classes in table.items():
        merged[name] = merged.get(name, {}) | classes
    ordered = {name: dict(sorted(classes.items())) for name, classes in sorted(merged.items())}
    path.write_text(json.dumps({"device": device, **facts, "configs": ordered}, indent=1) + "\n")
    load.cache_clear()
    return path
