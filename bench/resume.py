"""Milliseconds from a saved state to the next batch, beside the loaders of bench/loader.py.

    python bench/resume.py [--rows 160000] [--at 150000] [--repeat 5]

Every way opens its loader anew from the state it would keep at that sample, and gives one batch; each
has a process of its own, so that no peer's threads are in it, and they take turns; imports and the
files' first reading are over. WebDataset has no seek: it reads what comes before
(measured once). Marrow's line is repeated at sample 10^9 and 10^15 of the same data, gone through
again and again, and for the order alone of 10^12 rows. Goal: at most 10 ms, anywhere.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read when the libraries load

import torch
from torch.utils.data import DataLoader

from loader import make_rows
from marrow.loader.batch import StackRows
from marrow.loader.loader import Loader, LoaderState
from marrow.loader.order import Walk
from marrow.loader.plan import FullShuffle, WindowShuffle
from peers import loader as peers

BATCH = 64
RESULTS = Path(__file__).parent / "results" / "resume.json"


def marrow(folder: Path, at: int, window: int | None = None) -> None:
    """Open Marrow's loader at a sample."""
    order = "full" if window is None else f"window of {window} shards"
    state = LoaderState.from_json(LoaderState(0, at, ((at + 10, at + 500),), order=order).to_json())
    with Loader.resume(folder / "marrow", BATCH, state, collate=StackRows(), window=window) as loader:
        next(loader)


def plan_alone(at: int, window: int | None) -> None:
    """Find the rows of a batch among 10^12."""
    order = WindowShuffle.of_equal(10**12, 32_768, 0, window) if window else FullShuffle(10**12, 0)
    next(Walk(order, at, BATCH))


def huggingface_map(folder: Path, at: int) -> None:
    """Shuffle the dataset's indices as before, and leave out the first."""
    import datasets

    rows = datasets.load_from_disk(str(folder / "huggingface")).with_format("numpy")
    rows = rows.shuffle(seed=0, keep_in_memory=True)
    torch.from_numpy(rows[at : at + BATCH]["tokens"].astype("int64"))


def huggingface_stream(folder: Path, at: int) -> None:
    """Skip examples of the iterable dataset, as its state does within a shard."""
    import datasets

    rows = datasets.load_from_disk(str(folder / "huggingface")).to_iterable_dataset(num_shards=1)
    next(iter(rows.with_format("numpy").skip(at).batch(BATCH)))


def litdata(folder: Path, at: int) -> None:
    """Load the state of litdata's loader."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    stored = int((folder / "stored").read_text())

    def make() -> Any:
        dataset = StreamingDataset(
            str(folder / "litdata"), item_loader=TokensLoader(block_size=stored), shuffle=True, drop_last=True
        )
        return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0, drop_last=True)

    state = _litdata_states.get(at)
    if state is None:
        loader = make()
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        state = loader.state_dict()
        state["num_samples_yielded"] = state["dataset"]["num_samples_yielded"] = at
        if "sample_in_epoch" in state["dataset"]:
            state["dataset"]["sample_in_epoch"] = at
        _litdata_states[at] = state
    loader = make()
    loader.load_state_dict(state)
    next(iter(loader))


_litdata_states: dict[int, Any] = {}


def mosaicml(folder: Path, at: int) -> None:
    """Load the state of MosaicML's dataset."""
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(folder / "mds"), shuffle=True, batch_size=BATCH)
    dataset.load_state_dict(
        {
            "epoch": 0,
            "sample_in_epoch": at,
            "num_canonical_nodes": 1,
            "shuffle_seed": 9176,
            "initial_physical_nodes": 1,
        }
    )
    next(iter(DataLoader(dataset, BATCH, collate_fn=peers._stack_mds)))


def webdataset(folder: Path, at: int) -> None:
    """Read past all that comes before."""
    next(islice(peers.webdataset(folder, BATCH), at // BATCH, None))


def ways(folder: Path, at: int) -> dict[str, Callable[[], None]]:
    """Return what is measured, by name."""
    return {
        f"marrow at {at}": lambda: marrow(folder, at),
        "marrow at 10^9": lambda: marrow(folder, 10**9),
        "marrow at 10^15": lambda: marrow(folder, 10**15),
        "marrow at 10^9, window of 4": lambda: marrow(folder, 10**9, 4),
        "order of 10^12 rows": lambda: plan_alone(10**11 + 7, None),
        "order of 10^12, window 64": lambda: plan_alone(10**11 + 7, 64),
        "HF datasets, indexed": lambda: huggingface_map(folder, at),
        "HF datasets, streamed": lambda: huggingface_stream(folder, at),
        "litdata": lambda: litdata(folder, at),
        "MosaicML Streaming": lambda: mosaicml(folder, at),
        "WebDataset": lambda: webdataset(folder, at),
    }


def serve_way(name: str, folder: Path, at: int) -> None:
    """Resume once for each line on stdin, and print the milliseconds."""
    torch.set_num_threads(1)
    peers.find_peers()
    resume = ways(folder, at)[name]
    if name != "WebDataset":  # which takes long, and has nothing to keep
        resume()
    print("ready", flush=True)
    for _ in sys.stdin:
        start_s = time.perf_counter()
        resume()
        print((time.perf_counter() - start_s) * 1e3, flush=True)
    os._exit(0)  # what threads a peer still has is not measured


def measure(folder: Path, at: int, repeat: int) -> dict[str, float]:
    """Return the median milliseconds of each way; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways(folder, at)}
    with ExitStack() as stack:
        served = {}
        for name in times:
            command = [sys.executable, "-W", "ignore", __file__, "--way", name, "--folder", str(folder)]
            process = subprocess.Popen(
                [*command, "--at", str(at)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            served[name] = process
            assert process.stdout is not None
            while (line := process.stdout.readline()) != "ready\n":
                if not line:
                    sys.exit(f"{name} ended before it was ready")
        for turn in range(repeat):
            for name, process in served.items():
                if turn and name == "WebDataset":  # once: it takes long
                    continue
                assert process.stdin is not None and process.stdout is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                times[name].append(float(process.stdout.readline()))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=160_000)
    parser.add_argument("--at", type=int, default=150_000)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    at = arguments.at
    if arguments.way:
        serve_way(arguments.way, arguments.folder, at)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_rows(folder, arguments.rows, arguments.context, shard_rows=16_384)
        peers.write_for_peers(folder)
        medians = measure(folder, at, arguments.repeat)
    print(f"{arguments.rows} rows of {arguments.context} tokens, batches of {BATCH}; medians")
    print(f"{'way':28} {'resume ms':>10} {'times marrow':>13}")
    for way, median in medians.items():
        print(f"{way:28} {median:10.2f} {median / medians[f'marrow at {at}']:12.1f}x")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({"command": "python bench/resume.py", "resume_ms": medians}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
