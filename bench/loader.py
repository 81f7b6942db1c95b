"""Samples per second of the loader, beside the loaders that a user would otherwise take.

    python bench/loader.py [--rows 32768] [--context 1024] [--batch 64] [--repeat 7]

A sample is one packed row as int64 tokens [T+1], of which inputs and targets are views; batches are
[B, T+1]. All ways read the same rows, shuffled, each in a process of its own, in turns of equal
time and changing order; the table shows medians, and what positions, document numbers and masked
targets cost beside it. Marrow's checks are on: each row is hashed once a process, before the clock
starts like every side's first epoch. Peers (`peers/loader.py`) come from bench/requirements-loader.txt.

Then the first batch, in fresh processes: from the start of the process, and after the imports.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when the libraries load

RESULTS = Path(__file__).parent / "results"
GOALS = {  # at least so many times the peer
    "flat memmap take": 0.8,
    "DataLoader": 4.0,
    "litdata": 15.0,
    "MosaicML Streaming": 150.0,
}
FIRST = ("marrow", "litdata", "MosaicML Streaming", "import torch alone")


def make_rows(folder: Path, rows: int, context: int, shard_rows: int) -> None:
    """Write random packed rows as shards of Marrow's and as one flat file."""
    import numpy as np
    import pyarrow as pa

    from marrow.core.hashes import check_file
    from marrow.data.manifest import Manifest, ShardEntry
    from marrow.data.shards import packed_rows
    from marrow.kernels.rows.gather_rows import Columns

    rng = np.random.default_rng(0)
    out, stored = folder / "marrow", context + 1
    out.mkdir(parents=True)
    (folder / "stored").write_text(str(stored))
    entries = []
    with (folder / "flat.bin").open("wb") as flat:
        for low in range(0, rows, shard_rows):
            count = min(shard_rows, rows - low)
            tokens = rng.integers(0, 50_000, (count, stored), dtype=np.uint16)
            tokens.tofile(flat)
            # Three documents a row: at 0, and somewhere in each half.
            middle = stored // 2
            cuts = [rng.integers(2, middle - 1, count), rng.integers(middle, stored - 2, count)]
            starts = np.stack([np.zeros(count, dtype=np.int64), *cuts], axis=1).reshape(-1)
            columns = Columns(
                tokens=tokens,
                starts=starts.astype(np.int32),
                starts_of=np.arange(0, 3 * count + 1, 3, dtype=np.int32),
                num_tokens=np.full(count, stored, dtype=np.int32),
            )
            path = out / f"train-{low // shard_rows:05d}.arrow"
            batch = packed_rows(columns, np.arange(3 * count) + 3 * low, np.zeros(3 * count, np.int64))
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as arrow:
                arrow.write_batch(batch)
            entries.append(ShardEntry(path.name, count, path.stat().st_size, check_file(path)))
    Manifest(
        context=context,
        dtype="uint16",
        vocab_size=50_000,
        tokenizer_sha256="0" * 64,
        bos_id=0,
        eos_id=1,
        pad_id=2,
        num_rows=rows,
        num_documents=3 * rows,
        num_tokens=rows * stored,
        num_predicted_tokens=rows * (stored - 3),
        num_bytes_text=rows * stored,
        padding_share=0.0,
        shards=tuple(entries),
    ).write(out)


def marrow(folder: Path, batch: int, **options: Any) -> Iterator[Any]:
    """Open Marrow's loader for tokens alone."""
    from marrow.loader.batch import StackRows
    from marrow.loader.loader import Loader

    return Loader(folder / "marrow", batch, 0, collate=StackRows(), **options)


def ways() -> dict[str, Callable[[Path, int], Iterator[Any]]]:
    """List what is compared: name -> how to open it."""
    from marrow.loader.loader import Loader
    from peers.loader import WAYS

    return {
        "marrow": lambda folder, batch: marrow(folder, batch),
        "marrow, no thread": lambda folder, batch: marrow(folder, batch, prefetch=0),
        "marrow, with documents": lambda folder, batch: Loader(folder / "marrow", batch, 0),
        **WAYS,
    }


def samples_per_s(batches: Iterator[Any], batch: int, seconds: float) -> float:
    """Take batches for so long; return samples per second."""
    count = 0
    start_s = time.perf_counter()
    while (elapsed_s := time.perf_counter() - start_s) < seconds:
        for _ in range(4):
            next(batches)
        count += 4 * batch
    return count / elapsed_s


def check_rows(batches: Iterator[Any], known: set[bytes], name: str) -> None:
    """Refuse a way that gives other rows than all."""
    tokens = next(batches)
    rows = getattr(tokens, "tokens_N", tokens)
    if rows is tokens:
        found = {row.numpy().astype("uint16").tobytes() for row in rows}
        if not found <= known:
            sys.exit(f"{name} gives rows that are not in the data")


def serve_way(name: str, folder: Path, batch: int, seconds: float) -> None:
    """Measure one way for each line on stdin; a process of its own, so that no peer's threads are in it."""
    import torch

    from peers.loader import find_peers, read_flat

    torch.set_num_threads(1)
    find_peers()
    batches = ways()[name](folder, batch)
    check_rows(batches, {row.tobytes() for row in read_flat(folder)}, name)
    samples_per_s(batches, batch, 2 * seconds)  # pages mapped, checks made, buffers there
    print("ready", flush=True)
    for _ in sys.stdin:
        print(samples_per_s(batches, batch, seconds), flush=True)
    os._exit(0)  # what threads a peer still has is not measured


def measure(folder: Path, batch: int, repeat: int, seconds: float) -> dict[str, float]:
    """Return the median samples per second of each way; they take turns."""
    rates: dict[str, list[float]] = {name: [] for name in ways()}
    with ExitStack() as stack:
        served = {}
        for name in rates:
            command = [sys.executable, "-W", "ignore", __file__, "--way", name, "--folder", str(folder)]
            options = ["--batch", str(batch), "--seconds", str(seconds)]
            process = subprocess.Popen(
                [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            served[name] = process
            assert process.stdout is not None
            while process.stdout.readline() not in ("ready\n", ""):
                pass
        for turn in range(repeat):
            # Another order each turn: some peers' threads go on for a while after theirs.
            for name, process in random.Random(turn).sample(sorted(served.items()), len(served)):
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write("go\n")
                rates[name].append(float(process.stdout.readline()))
    return {name: statistics.median(values) for name, values in rates.items()}


def first_batch(name: str, folder: Path, batch: int) -> None:
    """Print the seconds to a first batch after the imports; this process does nothing else."""
    way: Callable[[Path, int], Iterator[Any]]
    if name == "import torch alone":
        import torch  # noqa: F401

        def way(folder: Path, batch: int) -> Iterator[Any]:
            return iter([0])

    elif name == "marrow":
        from marrow.loader.batch import StackRows  # noqa: F401
        from marrow.loader.loader import Loader  # noqa: F401

        way = marrow
    else:
        from peers.loader import WAYS, find_peers

        find_peers()
        __import__({"litdata": "litdata", "MosaicML Streaming": "streaming"}[name])
        way = WAYS[name]
    start_s = time.perf_counter()
    next(way(folder, batch))
    print(time.perf_counter() - start_s)
    sys.stdout.flush()
    os._exit(0)  # what threads a peer still has is not measured


def measure_first(folder: Path, batch: int, repeat: int) -> dict[str, tuple[float, float]]:
    """Return for each of FIRST the median seconds from process start, and after the imports."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in FIRST}
    for _ in range(repeat):
        for name in FIRST:
            command = [sys.executable, "-W", "ignore", __file__, "--first", name, "--folder", str(folder)]
            start_s = time.perf_counter()
            done = subprocess.run(
                [*command, "--batch", str(batch)], capture_output=True, text=True, check=True
            )
            times[name].append((time.perf_counter() - start_s, float(done.stdout.split()[-1])))
    return {
        name: (statistics.median(a for a, _ in values), statistics.median(b for _, b in values))
        for name, values in times.items()
    }


def main() -> None:
    """Measure, print the tables, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=32_768)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each way in each turn")
    parser.add_argument("--first", choices=FIRST, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        serve_way(arguments.way, arguments.folder, arguments.batch, arguments.seconds)
    if arguments.first:
        first_batch(arguments.first, arguments.folder, arguments.batch)
    import torch

    from peers.loader import write_for_peers

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_rows(folder, arguments.rows, arguments.context, shard_rows=16_384)
        write_for_peers(folder)
        rates = measure(folder, arguments.batch, arguments.repeat, arguments.seconds)
        first = measure_first(folder, arguments.batch, min(3, arguments.repeat))
    ours = rates["marrow"]
    print(
        f"batches of {arguments.batch} rows of {arguments.context} tokens, {arguments.rows} rows; "
        f"medians of {arguments.repeat}"
    )
    print(f"{'way':24} {'samples/s':>10} {'marrow is':>10} {'goal':>7}")
    for way, rate in rates.items():
        goal = f"{GOALS[way]:.1f}x" if way in GOALS else ""
        print(f"{way:24} {rate:10.0f} {ours / rate:9.2f}x {goal:>7}")
    print(f"\n{'first batch':24} {'process ms':>10} {'marrow is':>10} {'loader ms':>10} {'marrow is':>10}")
    for way, (whole_s, own_s) in first.items():
        times = first["marrow"]
        ratios = f"{whole_s / times[0]:9.2f}x {own_s * 1e3:10.1f} {own_s / times[1]:9.2f}x"
        print(f"{way:24} {whole_s * 1e3:10.0f} {ratios}")
    RESULTS.mkdir(exist_ok=True)
    settings = {name: getattr(arguments, name) for name in ("rows", "context", "batch", "repeat")}
    found = {
        "command": "python bench/loader.py",
        **settings,
        "samples_per_s": rates,
        "first_batch_s": {way: {"process": a, "after imports": b} for way, (a, b) in first.items()},
    }
    (RESULTS / "loader.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
