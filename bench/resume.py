"""Milliseconds from a saved state to the next batch, beside the loaders of bench/loader.py.

    python bench/resume.py [--rows 160000] [--at 150000] [--repeat 5]

Every way opens its loader anew from the state it would keep at that sample, and gives one batch;
imports and the files' first reading are over. WebDataset has no seek: it reads what comes before
(measured once). Marrow's line is repeated at sample 10^9 and 10^15 of the same data, gone through
again and again, and for the order alone of 10^12 rows. Goal: at most 10 ms, anywhere.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
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


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=160_000)
    parser.add_argument("--at", type=int, default=150_000)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    at = arguments.at
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_rows(folder, arguments.rows, arguments.context, shard_rows=16_384)
        peers.write_for_peers(folder)
        ways: dict[str, Callable[[], None]] = {
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
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(arguments.repeat + 1):
            for way, resume in ways.items():
                start_s = time.perf_counter()
                resume()
                if turn:  # the first one imports and maps
                    times[way].append((time.perf_counter() - start_s) * 1e3)
        start_s = time.perf_counter()
        webdataset(folder, at)
        times["WebDataset"] = [(time.perf_counter() - start_s) * 1e3]
    print(f"{arguments.rows} rows of {arguments.context} tokens, batches of {BATCH}; medians")
    print(f"{'way':28} {'resume ms':>10} {'times marrow':>13}")
    medians = {way: statistics.median(values) for way, values in times.items()}
    for way, median in medians.items():
        print(f"{way:28} {median:10.2f} {median / medians[f'marrow at {at}']:12.1f}x")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({"command": "python bench/resume.py", "resume_ms": medians}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
