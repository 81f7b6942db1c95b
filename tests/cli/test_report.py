"""The report: a reader's questions answered in a page that needs nothing but a browser."""

import json
import math
import re
from dataclasses import asdict, fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.cli.report import (
    DroppedRule,
    LineageEdge,
    LineageNode,
    MetricPoint,
    NearestRow,
    RecipeValue,
    RunReport,
    Sample,
    Score,
    ServingFigures,
    StepReport,
    headline,
    page_of,
    write_report,
)
from marrow.core.errors import SourceError


def ledger(
    name: str, wall_s: float, overlapped: dict[str, float] | None = None, **parts: float
) -> dict[str, Any]:
    """Make a ledger as `LedgerSummary.as_dict()` does; "other" fills up to the wall time."""
    named = {key.replace("_", " "): value for key, value in parts.items()}
    named["other"] = wall_s - sum(named.values())
    return {
        "name": name,
        "wall_s": wall_s,
        "cpu_s": wall_s * 1.7,
        "parts": {key: {"seconds": value, "count": 1} for key, value in named.items()},
        "overlapped": {key: {"seconds": value, "count": 1} for key, value in (overlapped or {}).items()},
    }


def sha(number: int) -> str:
    return f"{number * 2654435761 % 2**32:08x}" * 8


STEPS = (
    StepReport(
        "ingest", "built", sha(1), 5.31, 5.1, 310 << 20,
        {"rows": 48_213, "files": 1_021, "bytes": 13_914_022, "quarantined": 0},
        ledger("ingest", 5.31, read=0.4, parse=3.9, write=0.81),
    ),
    StepReport(
        "clean", "built", sha(2), 6.9, 7.4, 402 << 20,
        {"documents": 1_204, "dropped": {"tables": 141, "exact duplicate": 12, "near duplicate": 27}},
        ledger("clean", 6.9, rules=1.2, minhash=4.1, write=0.7),
    ),
    StepReport("split", "built", sha(3), 0.71, 0.8, 402 << 20, {"train": 1_031, "held out": 173}),
    StepReport("tokenizer", "cached", sha(4), 0.02, 0.02, 0, {"vocabulary": 2048, "bytes per token": 2.93}),
    StepReport(
        "shards", "built", sha(5), 4.4, 7.9, 505 << 20,
        {"rows": 7_913, "tokens": 4_050_112, "padding share": 0.0007},
        ledger("shards", 4.4, {"tokenize (2 threads)": 6.1}, tokenize=3.2, pack=0.31, write=0.6),
    ),
    StepReport(
        "train", "built", sha(6), 151.2, 296.0, 1_402 << 20,
        {"steps": 1_200, "loss": 1.874, "parameters": 2_163_072, "bf16": True},
        ledger(
            "train", 151.2, {"prefetch": 3.2}, forward=44.0, backward=71.2, optimiser=22.9,
            data_wait=0.8, checkpoint=2.2, logging=0.4, loss=6.9, snapshot=0.8,
        ),
    ),
    StepReport("evaluate", "built", sha(7), 21.7, 39.0, 1_210 << 20, {}, ledger("evaluate", 21.7, model=6.0, five_gram=13.2, xz=1.9)),
    StepReport("export", "built", sha(8), 0.32, 0.3, 700 << 20),
    StepReport("serve", "built", sha(9), 14.8, 22.0, 812 << 20),
    StepReport("report", "built", sha(10), 2.9, 3.1, 640 << 20),
)  # fmt: skip

SAMPLES = tuple(
    Sample(prompt, "\x07ñ}qtr eT(ss ,\n\n]#lnnif0aVv{", midway, after)
    for prompt, midway, after in (
        ("def read(self", ", size):\n        self.file = self.read()\n    def", ", size=-1):\n        if self.closed:\n            raise ValueError(\"read of closed file\")\n        return self._buffer.read(size)\n"),
        ("class Queue:\n    def __init__(self", "):\n        self.self = None\n        self.", ", maxsize=0):\n        self.maxsize = maxsize\n        self._init(maxsize)\n        self.mutex = threading.Lock()\n"),
        ("import os\nimport ", "re\nimport os\nimport\n", "sys\nimport time\nimport errno\n\n__all__ = [\"open\", \"close\"]\n"),
        ("    for key, value in ", "self:\n            if self.value(", "self.items():\n            if not isinstance(value, str):\n                raise TypeError(f\"{key!r} is no string\")\n"),
        ("    \"\"\"Return the ", "string of the file of the\n    the file", "number of bytes in the buffer.\n\n    If the buffer is empty, return None.\n    \"\"\"\n"),
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def run() -> RunReport:
    """A run as the quickstart makes it."""
    kinds = (
        "rows",
        "documents",
        "split",
        "tokenizer",
        "shards",
        "model",
        "evaluation",
        "export",
        "serving",
        "report",
    )
    edges = (
        "0 1 rows", "1 2 documents", "2 3 split", "2 4 split", "3 4 tokenizer", "4 5 shards", "3 5 tokenizer",
        "5 6 model", "2 6 split", "3 6 tokenizer", "5 7 model", "3 7 tokenizer", "7 8 export",
        "6 9 evaluation", "8 9 serving", "5 9 model",
    )  # fmt: skip
    return RunReport(
        recipe="quickstart",
        when="21 November 2026, 12:04 UTC",
        machine="2 x86-64 cores (AVX-512, BF16), 24 GiB, Linux 6.1",
        versions={"Marrow": "0.1.0", "Python": "3.11.2", "torch": "2.13.0", "pyarrow": "26.0.1"},
        steps=STEPS,
        metrics=tuple(
            MetricPoint(
                step,
                1.85 + 5.8 * math.exp(-step / 90) + 0.05 * math.sin(step * 1.7) + 0.4 * math.exp(-step / 500),
                13_900 + 400 * math.sin(step / 31) - (2_100 if step % 400 == 0 else 0),
                0.47 + 0.01 * math.sin(step / 31),
                0.004 + 0.002 * math.cos(step / 17),
            )
            for step in range(0, 1_201, 4)
        ),
        scores=(
            Score("5-gram (Kneser-Ney)", 1.698, note="same tokens"),
            Score("Marrow", 1.512, ours=True, note="2.16 M parameters"),
            Score("unigram", 3.391, note="same tokens"),
            Score("xz, given the training text", 1.583, note="copies at any range"),
            Score("zlib", 1.911),
        ),
        samples=SAMPLES,
        parse_rates={"Marrow": 0.412, "5-gram": 0.118, "untrained": 0.0},
        nearest=(
            NearestRow("def read(self", SAMPLES[0].after or "", "lib/gzip.py", 311, "if self.closed:\n            raise ValueError(\"read of closed file\")"),
            NearestRow("class Queue:\n    def __init__(self", SAMPLES[1].after or "", "lib/queue.py", 34, ", maxsize=0):\n        self.maxsize = maxsize\n        self._init(maxsize)"),
            NearestRow("import os\nimport ", SAMPLES[2].after or "", "lib/tempfile.py", 38, "import os\nimport sys\nimport "),
        ),
        serving=ServingFigures(96, 8, 0, 9.4, 1_431.0, 21.4, 88.2, 5.1, 9.7, ledger("engine", 9.4, queue=0.9, prefill=1.6, decode=6.1)),
        dropped=(
            DroppedRule("tables (more than half of the lines are data)", 141, 2_204_311, "lib/encodings/cp1252.py"),
            DroppedRule("exact duplicate", 12, 31_002, "lib/ctypes/macholib/__init__.py"),
            DroppedRule("near duplicate", 27, 190_441, "lib/idlelib/idle_test/htest.py"),
            DroppedRule("too short", 64, 1_201, "lib/json/scanner.py"),
        ),
        nodes=(
            LineageNode("source", "Python 3.11.2", "its own documentation"),
            *(LineageNode(sha(i + 1), kind) for i, kind in enumerate(kinds)),
        ),
        edges=(
            LineageEdge("source", sha(1), "source"),
            *(
                LineageEdge(sha(int(a) + 1), sha(int(b) + 1), role)
                for a, b, role in (edge.split() for edge in edges)
            ),
        ),
        recipe_values=(
            RecipeValue("data.source", "python", "recipes/quickstart.toml:4"),
            RecipeValue("tokenizer.vocab_size", "2048", "recipes/quickstart.toml:12"),
            RecipeValue("model.hidden_size", "192", "recipes/quickstart.toml:16"),
            RecipeValue("train.steps", "1200", "recipes/quickstart.toml:24"),
            RecipeValue("train.lr", "0.02", "--set train.lr=2e-2"),
            RecipeValue("train.checkpoint_every", "30.0"),
        ),
    )  # fmt: skip


def test_shots(run, browser) -> None:
    write_report(run, Path("shots/report.html"))
    browser.open(Path("shots/report.html"))
    for name, w, h, dark in (
        ("desk", 1100, 1500, False),
        ("dark", 1100, 1500, True),
        ("phone", 390, 1500, False),
    ):
        browser.resize(w, h, dark=dark)
        total = browser.evaluate("document.documentElement.scrollHeight")
        for i in range(-(-total // h)):
            browser.evaluate(f"document.documentElement.style.scrollBehavior='auto';scrollTo(0,{i * h})")
            browser.screenshot(f"shots/{name}{i}.png", w, h, dark=dark)
    print(total)
