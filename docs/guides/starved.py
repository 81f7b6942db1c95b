"""A training loop that starves, and the settings that feed it: the runs of the guide beside this file.

    python docs/guides/starved.py first        # or: window, prefetch, workers, deeper; far, near
    marrow why ledger.json

The accelerator is simulated: a step keeps it busy for 20 ms (--step-ms) and uses no CPU, as a step does
whose kernels are queued on a device. All else is real: files, decoding, the transform, processes, HTTP.
"""

import argparse
import http.server
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from marrow.core.span import Ledger, LedgerSummary, span
from marrow.data.shards import train_tokenizer, write_shards
from marrow.data.shards_config import ShardsRecipe
from marrow.loader.formats.parquet import ParquetReader
from marrow.loader.loader import Loader
from marrow.loader.samples import Collate
from marrow.loader.streaming.cache import Cache
from marrow.text.config import TokenizerRecipe

ROWS, ROWS_OF_GROUP, BATCH_ROWS = 8192, 512, 16
LATENCY_S = 0.120  # of each request to the far shards

RUNS: dict[str, dict[str, Any]] = {  # name: settings of the loader
    "first": {"prefetch": 0},
    "window": {"prefetch": 0, "window": 4},
    "prefetch": {"prefetch": 2, "window": 4},
    "workers": {"prefetch": 2, "window": 4, "workers": 2},
    "deeper": {"prefetch": 6, "window": 4, "workers": 2},
    "far": {"prefetch": 2},
    "near": {"prefetch": 2, "window": 4},
}


def prepare(sample: dict[str, Any], position: int) -> dict[str, Any]:
    """Turn a text into the numbers of its word pairs, in plain Python: a millisecond or two a sample."""
    words = sample["text"].split()
    pairs = [hash_of(first + " " + second) for first, second in pairwise(words)]
    return {"id": sample["id"], "features": sorted(pairs)[:256]}


def hash_of(text: str) -> int:
    """Hash a text, one letter after the other."""
    value = 5381
    for letter in text:
        value = (value * 33 + ord(letter)) & 0xFFFFFFFF
    return value


def write_rows(folder: Path) -> Path:
    """Write Parquet of random words, 16 row groups of 512 rows, unless it is there."""
    path = folder / "rows.parquet"
    if path.exists():
        return path
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefghij", k=draw.randint(3, 9))) for _ in range(5000)]
    texts = [" ".join(draw.choices(vocabulary, k=800)) for _ in range(ROWS)]
    table = pa.table({"id": list(range(ROWS)), "text": texts, "num_bytes": [len(text) for text in texts]})
    pq.write_table(table, path, row_group_size=ROWS_OF_GROUP, compression="zstd")
    return path


def write_far_shards(folder: Path) -> Path:
    """Write 88 packed token shards of some 36 kilobytes each, unless they are there."""
    out = folder / "shards"
    if out.exists():
        return out
    draw = random.Random(1)
    texts = [" ".join(f"word{draw.randint(0, 300)}" for _ in range(400)) for _ in range(1500)]
    table = pa.table(
        {
            "document_id": pa.array(range(len(texts)), pa.int64()),
            "text": texts,
            "num_bytes": pa.array([len(text) for text in texts], pa.int64()),
        }
    )
    pq.write_table(table, folder / "train.parquet")
    out.mkdir()
    train_tokenizer(TokenizerRecipe(vocab_size=512), folder, folder)
    write_shards(ShardsRecipe(context=256, shard_bytes=32 << 10), folder, folder, out)
    return out


class _Far(http.server.SimpleHTTPRequestHandler):
    """Serves a folder with ranges, and takes its time."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        time.sleep(LATENCY_S)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, total = path.read_bytes(), path.stat().st_size
        wanted = self.headers.get("Range")
        self.send_response(206 if wanted else 200)
        if wanted:
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            end = min(int(high), total - 1) if high else total - 1
            data = data[int(low) : end + 1]
            self.send_header("Content-Range", f"bytes {low}-{end}/{total}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{total}"')
        self.send_header("Last-Modified", self.date_time_string(path.stat().st_mtime))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def far_away(folder: Path) -> Iterator[str]:
    """Serve a folder on this host, LATENCY_S away."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *given: _Far(*given, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def open_loader(run: str, folder: Path) -> Iterator[Loader[Any]]:
    """Open the loader of a run on data in `folder`."""
    if run in ("far", "near"):
        with far_away(write_far_shards(folder)) as url:
            # Too small for a full shuffle, which wants all shards at once; enough for a window of 4.
            cache = Cache(folder / "cache", 1 << 20)
            with Loader(url, BATCH_ROWS, 0, cache=cache, **RUNS[run]) as loader:
                yield loader
    else:
        # Room for a window of row groups, as where the rows are far more than the memory.
        reader = ParquetReader(write_rows(folder), cache_bytes=24 << 20)
        with Loader(reader, BATCH_ROWS, 0, collate=Collate(prepare), **RUNS[run]) as loader:
            yield loader


def train(loader: Loader[Any], steps: int, step_s: float) -> LedgerSummary:
    """Train, in a manner of speaking; return where the time went."""
    for _ in range(5):
        next(loader)  # files are open and processes started before the clock is
    with Ledger("train") as ledger:
        for _ in range(steps):
            next(loader)
            with span("step on the accelerator"):
                time.sleep(step_s)
    return ledger.summary()


def busy(summary: LedgerSummary, steps: int, step_s: float) -> float:
    """Return the share of the time in which the accelerator worked.

    By its own clock: a span ends later if another thread holds Python's lock when the step is done.
    """
    return steps * step_s / summary.wall_s


def main() -> None:
    """Run what the command line asks for and write its ledger."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--ledger", type=Path, default=Path("ledger.json"))
    given = parser.parse_args()
    step_s = given.step_ms / 1e3
    with tempfile.TemporaryDirectory() as folder, open_loader(given.run, Path(folder)) as loader:
        summary = train(loader, given.steps, step_s)
    given.ledger.write_text(json.dumps(summary.as_dict(), indent=1) + "\n", encoding="utf-8")
    shown = " ".join(f"{name}={value}" for name, value in RUNS[given.run].items())
    share = busy(summary, given.steps, step_s)
    sys.stdout.write(f"{given.run} ({shown}): the accelerator is busy {share:.0%} of the time\n")


if __name__ == "__main__":
    main()
