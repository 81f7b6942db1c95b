"""Samples per second of the loader, beside what a user would otherwise write.

    python bench/loader.py

Peers: a flat numpy memmap of the same rows, shuffled and taken by hand (`memmap`); the same behind
a PyTorch DataLoader in this process (`DataLoader`) and with two worker processes (`DataLoader 2w`).
The peers give tokens and targets only; Marrow's loader also gives positions and document numbers,
masks the targets that cross documents, checks its files and can resume anywhere.

Two loads: `alone` takes batches as fast as they come; `training` puts matrix products of some
milliseconds between them, as a step does, and counts what the batches add to it. All ways run in
turns, several times; the table shows medians.
"""

import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset

from marrow.data.shards import train_tokenizer, write_shards
from marrow.data.shards_config import ShardsRecipe
from marrow.loader.loader import Loader
from marrow.loader.reader import ShardReader
from marrow.text.config import TokenizerRecipe

ROWS, REPEATS = 16, 7
BATCHES = {"alone": 400, "training": 60}
RESULTS = Path(__file__).parent / "results" / "loader.json"
Batches = Iterator[Any]


class MemmapRows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Rows of a flat file, one at a time, as PyTorch wants them."""

    def __init__(self, path: Path, stored: int) -> None:
        self.rows = np.memmap(path, dtype=np.uint16, mode="r").reshape(-1, stored)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = torch.from_numpy(self.rows[index].astype(np.int64))
        return row[:-1], row[1:]


def make_data(folder: Path) -> Path:
    """Pack the interpreter's own sources; write the same rows as one flat file too."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted([*library.glob("*.py"), *library.glob("[a-s]*/*.py")])
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths if "test" not in path.parts]
    num_bytes = pa.array([len(text.encode()) for text in texts], pa.int64())
    table = pa.table(
        {"document_id": pa.array(range(len(texts)), pa.int64()), "text": texts, "num_bytes": num_bytes}
    )
    pq.write_table(table, folder / "train.parquet")
    train_tokenizer(TokenizerRecipe(vocab_size=2048), folder, folder)
    write_shards(ShardsRecipe(context=512, shard_bytes=2 << 20), folder, folder, folder)
    with ShardReader(folder) as reader:
        reader.take(np.arange(reader.manifest.num_rows)).tokens.tofile(folder / "flat.bin")
    return folder


def memmap_batches(path: Path, stored: int) -> Batches:
    """Shuffle and take rows by hand, without end."""
    rows = np.memmap(path, dtype=np.uint16, mode="r").reshape(-1, stored)
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(rows))
        for i in range(0, len(order) - ROWS + 1, ROWS):
            picked = torch.from_numpy(rows[order[i : i + ROWS]].astype(np.int64))
            yield picked[:, :-1].contiguous(), picked[:, 1:].contiguous()


def dataloader_batches(path: Path, stored: int, workers: int) -> Batches:
    """Give what PyTorch's DataLoader gives, without end."""
    rows = MemmapRows(path, stored)
    while True:
        yield from DataLoader(rows, ROWS, shuffle=True, drop_last=True, num_workers=workers)


def ways(folder: Path) -> dict[str, Callable[[], Batches]]:
    """List what is compared: name -> how to open it."""
    flat, stored = folder / "flat.bin", 513
    return {
        "marrow, thread": lambda: Loader(folder, ROWS, 0, prefetch=2),
        "marrow, no thread": lambda: Loader(folder, ROWS, 0, prefetch=0),
        "memmap": lambda: memmap_batches(flat, stored),
        "DataLoader": lambda: dataloader_batches(flat, stored, 0),
        "DataLoader 2w": lambda: dataloader_batches(flat, stored, 2),
    }


def measure(open_batches: Callable[[], Batches], load: str, work: Callable[[], None]) -> tuple[float, float]:
    """Return wall and CPU microseconds per batch, workers' CPU not included."""
    batches = open_batches()
    for _ in range(5):
        next(batches)
    count = BATCHES[load]
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(batches)
        work()
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    close = getattr(batches, "close", None)
    if close is not None:
        close()
    return wall_s / count * 1e6, cpu_s / count * 1e6


def main() -> None:
    """Measure all ways in turns, print the table, write the results."""
    torch.set_num_threads(1)
    square = torch.randn(512, 512)

    def step() -> None:
        for _ in range(10):
            torch.mm(square, square)

    works: dict[str, Callable[[], None]] = {"alone": lambda: None, "training": step}
    with tempfile.TemporaryDirectory() as folder:
        all_ways = ways(make_data(Path(folder)))
        times: dict[tuple[str, str], list[tuple[float, float]]] = {}
        steps: list[tuple[float, float]] = []
        for _ in range(REPEATS):
            steps.append(measure(lambda: iter(lambda: 0, 1), "training", step))
            for load, work in works.items():
                for name, open_batches in all_ways.items():
                    times.setdefault((load, name), []).append(measure(open_batches, load, work))
    base = {
        "alone": (0.0, 0.0),
        "training": tuple(statistics.median(column) for column in zip(*steps, strict=True)),
    }
    results = []
    for (load, name), measured in times.items():
        wall_us, cpu_us = (statistics.median(column) for column in zip(*measured, strict=True))
        results.append(
            {
                "load": load,
                "way": name,
                "samples_per_s": ROWS / wall_us * 1e6,
                "added_wall_us": wall_us - base[load][0],
                "added_cpu_us": cpu_us - base[load][1],
            }
        )
    print(
        f"batches of {ROWS} rows of 512 tokens; a step of {base['training'][0]:.0f} us; medians of {REPEATS}"
    )
    print(f"{'load':9} {'way':18} {'samples/s':>10} {'added wall us':>14} {'added CPU us':>13}  per batch")
    for line in results:
        print(
            f"{line['load']:9} {line['way']:18} {line['samples_per_s']:10.0f} "
            f"{line['added_wall_us']:14.0f} {line['added_cpu_us']:13.0f}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"command": "python bench/loader.py", "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
