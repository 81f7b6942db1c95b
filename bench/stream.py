"""Streaming packed rows from S3: Marrow beside raw clients and other loaders, on one server.

    python bench/all.py stream       (installs MosaicML Streaming and litdata into .bench/stream)

A server of files (tests/support/range_server.py) waits 20 ms before each answer and then sends as
fast as it can. The same rows of 1024 + 1 tokens lie there as Marrow's shards, as MDS and as litdata
chunks, all of one size. Every measurement is a fresh process with an empty cache folder; its clock
starts after the imports, before anything is opened. Ways take turns; medians are shown.

    obstore, boto3, pyarrow.fs   whole shards into memory, 16 in flight: nothing is kept or checked
    obstore to disk              the same, and each shard's bytes written to a file; not checked
    marrow shards                `CachedShards` alone: fetched, checked, in the cache
    marrow                       the loader: shuffled batches of 64 rows as int64 tensors, checked
    mosaicml, litdata            their datasets and loaders, shuffled batches of 64 rows; not checked

The cache is a sixth of the dataset (the oldest files make room, also of "obstore to disk"): that
is what streaming is for, and memory that was used before is then used again. Where this was tried,
in a virtual machine, pages that had lain free were filled at a ninth of the speed of those just
freed: what keeps the bytes pays that until its cache is full, what only fetches them does not.

The other loaders are stopped after some seconds: their rate is rows so far by time so far.
MosaicML with two workers is left out: a worker ends with an IndexError (a row not in its shard file),
for a reason that is not known and may lie in the set-up here.
"""

import argparse
import importlib.machinery
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / ".bench" / "stream"
RESULTS = Path(__file__).parent / "results" / "stream.json"
STORED, ROWS, LATENCY_S, IN_FLIGHT, PATIENCE_S = 1025, 64, 0.02, 16, 3.0
CACHE_SHARDS = 2 * IN_FLIGHT  # half of a cache is for what is fetched ahead
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_REGION": "us-east-1"}
PEER_ROWS = 100_000  # more than they read in that time
RAW = ("obstore", "boto3", "pyarrow.fs", "obstore to disk")
SLOW = ("boto3", "pyarrow.fs")
MARROW = ("marrow shards", "marrow")
LOADERS = ("mosaicml", "litdata", "litdata 2 workers")


def make_data(folder: Path, num_shards: int, shard_bytes: int) -> None:
    """Write the same rows in three formats, a folder each."""
    import pyarrow as pa

    from marrow.core.hashes import check_file
    from marrow.data.manifest import Manifest, ShardEntry
    from marrow.data.shards import packed_rows
    from marrow.kernels.rows.gather_rows import Columns

    each = shard_bytes // (STORED * 2)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 50_000, (num_shards * each, STORED), dtype=np.uint16)
    out = folder / "marrow"
    out.mkdir()
    entries = []
    for index in range(num_shards):
        part = rows[index * each : (index + 1) * each]
        columns = Columns(
            tokens=part,
            starts=np.zeros(each, np.int32),
            starts_of=np.arange(each + 1, dtype=np.int32),
            num_tokens=np.full(each, STORED, np.int32),
        )
        ids = np.arange(each, dtype=np.int64) + index * each
        batch = packed_rows(columns, ids, np.zeros(each, np.int64))
        path = out / f"train-{index:05d}.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as arrow:
            arrow.write_batch(batch)
        entries.append(ShardEntry(path.name, each, path.stat().st_size, check_file(path)))
    count = len(rows)
    tokens = (STORED - 1, "uint16", 50_000, "0" * 64, 0, 1, 2)
    Manifest(*tokens, count, count, rows.size, rows.size, 1, 0.0, tuple(entries)).write(out)


def write_peers(folder: Path) -> None:
    """Write MDS and litdata chunks of the rows in `folder/marrow`; in a process of its own."""
    from marrow.data.manifest import Manifest
    from marrow.loader.reader import ShardReader

    add_peers()
    import torch
    from litdata.streaming import Cache, TokensLoader
    from streaming import MDSWriter

    largest = max(shard.num_bytes for shard in Manifest.read(folder / "marrow").shards)
    with ShardReader(folder / "marrow") as reader:
        columns = {"tokens": f"ndarray:uint16:{STORED}"}
        litdata = Cache(str(folder / "litdata"), chunk_bytes=largest, item_loader=TokensLoader(STORED))
        with MDSWriter(out=str(folder / "mds"), columns=columns, size_limit=largest) as mds:
            num_rows = min(reader.num_rows, PEER_ROWS)
            for start in range(0, num_rows, 4096):
                rows = np.arange(start, min(start + 4096, num_rows))
                for row, tokens in zip(rows, reader.take(rows).tokens, strict=True):
                    mds.write({"tokens": tokens})
                    litdata[int(row)] = torch.from_numpy(tokens.copy())
        litdata.done()
        litdata.merge()


def add_peers() -> None:
    """Make the peers importable. MosaicML imports torchvision for datasets of its own: a stand-in does."""
    sys.path.append(str(PEERS))
    import transformers  # noqa: F401 - before the stand-in, for which it would look

    for name in ("", ".datasets", ".transforms", ".transforms.functional", ".io"):
        module = types.ModuleType(f"torchvision{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        module.__path__ = []

        def anything(wanted: str) -> Any:
            if wanted.startswith("__"):
                raise AttributeError(wanted)
            return type(wanted, (), {})

        module.__getattr__ = anything  # type: ignore[method-assign]
        sys.modules[module.__name__] = module


def raw(way: str, names: list[str], cache: Path) -> Callable[[], int]:
    """Return what fetches all shards, and how many bytes they have."""
    url = os.environ["AWS_ENDPOINT_URL"]
    fetch: Callable[[str], int]
    kept: deque[Path] = deque()
    if way.startswith("obstore"):
        import obstore
        from obstore.store import S3Store

        store = S3Store("data", prefix="marrow", client_options={"allow_http": True})

        def fetch(name: str) -> int:
            data = obstore.get(store, name).bytes()
            if way == "obstore":
                return len(data)
            with open(cache / name, "wb", buffering=0) as file:
                written = file.write(data)
            kept.append(cache / name)
            if len(kept) > CACHE_SHARDS - IN_FLIGHT:
                kept.popleft().unlink()
            return written

    elif way == "boto3":
        import boto3
        from botocore.config import Config

        client = boto3.client("s3", endpoint_url=url, config=Config(max_pool_connections=IN_FLIGHT))

        def fetch(name: str) -> int:
            return len(client.get_object(Bucket="data", Key=f"marrow/{name}")["Body"].read())

    else:
        from pyarrow.fs import S3FileSystem

        system = S3FileSystem(endpoint_override=url.removeprefix("http://"), scheme="http")

        def fetch(name: str) -> int:
            with system.open_input_stream(f"data/marrow/{name}") as file:
                return len(file.read())

    def run() -> int:
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            return sum(pool.map(fetch, names))

    return run


def marrow(way: str, cache_folder: Path, cache_bytes: int) -> Callable[[], int]:
    """Return what reads the epoch, and how many bytes of shards that is."""
    import torch

    from marrow.loader.batch import StackRows
    from marrow.loader.loader import Loader
    from marrow.loader.reader import ShardReader
    from marrow.loader.streaming.cache import Cache
    from marrow.loader.streaming.shards import CachedShards
    from marrow.store.remote import objects  # noqa: F401 - the client, which is imported at first use

    torch.set_num_threads(1)
    cache = Cache(cache_folder, cache_bytes)

    def run() -> int:
        shards = CachedShards.open("s3://data/marrow", cache, in_flight=IN_FLIGHT)
        total = sum(file.num_bytes for file in shards.files)
        if way == "marrow shards":
            with shards:
                shards.ahead(range(len(shards.files)))
                for index in range(len(shards.files)):
                    shards.path(index)
                    shards.release(index)
                return total
        assert shards.folder is not None
        reader, collate = ShardReader(shards.folder, shards), StackRows()
        with Loader(reader, ROWS, 0, window=IN_FLIGHT // 2, stop=reader.num_rows, collate=collate) as loader:
            rows = sum(len(tokens) for tokens in loader)
        assert rows == reader.num_rows, rows
        return total

    return run


def loader_rows(way: str, cache: Path) -> Callable[[], Iterator[int]]:
    """Return what reads batches and says how many rows each has."""
    add_peers()
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    workers = 2 if way.endswith("workers") else 0
    if way.startswith("mosaicml"):
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()  # of runs before: they say that shards are here

        def run() -> Iterator[int]:
            dataset = StreamingDataset(
                remote="s3://data/mds", local=str(cache), shuffle=True, batch_size=ROWS, predownload=1 << 16
            )
            for batch in DataLoader(dataset, ROWS, num_workers=workers):
                yield len(batch["tokens"].long()[:, 1:])

    else:
        from litdata import StreamingDataLoader, StreamingDataset
        from litdata.streaming import TokensLoader, downloader

        # It allows https only; the server here has none.
        options = dict(downloader._OBSTORE_CLIENT_OPTIONS or {}, allow_http=True)
        downloader._OBSTORE_CLIENT_OPTIONS = options

        def run() -> Iterator[int]:
            dataset = StreamingDataset(
                "s3://data/litdata",
                cache_dir=str(cache),
                item_loader=TokensLoader(STORED),
                shuffle=True,
                max_pre_download=IN_FLIGHT,
            )
            for batch in StreamingDataLoader(dataset, batch_size=ROWS, num_workers=workers):
                yield len(batch.long()[:, 1:])

    return run


def measure(way: str, folder: Path) -> dict[str, float]:
    """Measure one way in this process."""
    names = sorted(path.name for path in (folder / "data" / "marrow").glob("*.arrow"))
    bytes_of_row = sum((folder / "data" / "marrow" / name).stat().st_size for name in names)
    from marrow.data.manifest import Manifest

    bytes_of_row /= Manifest.read(folder / "data" / "marrow").num_rows
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        if way in LOADERS:
            run_rows = loader_rows(way, Path(cache))
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            rows, until_s = 0, 0.0
            for count in run_rows():
                rows += count
                until_s = until_s or time.perf_counter() + PATIENCE_S  # from the first batch on
                if time.perf_counter() > until_s:
                    break
            num_bytes = rows * bytes_of_row
        else:
            largest = max((folder / "data" / "marrow" / name).stat().st_size for name in names)
            run = (
                raw(way, names, Path(cache))
                if way in RAW
                else marrow(way, Path(cache), CACHE_SHARDS * largest)
            )
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            num_bytes = run()
        wall_s = time.perf_counter() - start_s
        result = {"mb_per_s": num_bytes / wall_s / 1e6, "cpu_s": time.process_time() - start_cpu_s}
        print(json.dumps(result), flush=True)
        if way.startswith("mosaicml"):
            from streaming.base.util import clean_stale_shared_memory

            clean_stale_shared_memory()
        # Peers leave worker processes and threads behind that would be waited for.
        shutil.rmtree(cache, ignore_errors=True)
        os._exit(0)


def main() -> None:
    """Measure all ways in turns, print the table, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=192)
    parser.add_argument("--shard-mib", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="*", default=[*RAW, *MARROW, *LOADERS])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        return write_peers(options.write)
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]))
    sys.path.append(str(ROOT / "tests" / "support"))
    from range_server import RangeServer

    results: dict[str, list[float]] = {way: [] for way in options.ways}
    failed: dict[str, str] = {}  # a peer that fails is told, and the others go on
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        make_data(data, options.shards, options.shard_mib << 20)
        os.sync()  # else it is written out while others are measured
        if set(options.ways) & set(LOADERS):
            subprocess.run([sys.executable, "-W", "ignore", __file__, "--write", str(data)], check=True)
        with RangeServer(Path(folder), LATENCY_S) as server:
            addresses = {
                "AWS_ENDPOINT_URL": server.url,
                "S3_ENDPOINT_URL": server.url,
                "AWS_ALLOW_HTTP": "true",
            }
            environment = {**os.environ, **CREDENTIALS, **addresses, "OMP_NUM_THREADS": "1"}
            for repeat in range(options.repeats):
                for way in options.ways:
                    if way in (*SLOW, *LOADERS) and repeat >= 2:
                        continue  # seconds each, and no base of a ratio, or far from its goal
                    command = [sys.executable, "-W", "ignore", __file__, "--measure", way, folder]
                    done = subprocess.run(
                        command, env=environment, capture_output=True, text=True, check=False, timeout=300
                    )
                    if done.returncode and way in LOADERS:
                        lines = done.stderr.strip().splitlines()
                        failed[way] = next(line for line in reversed(lines) if "Error" in line)
                        continue
                    if done.returncode:
                        sys.exit(f"{way} failed:\n{done.stderr[-2000:]}")
                    results[way].append(json.loads(done.stdout.splitlines()[-1])["mb_per_s"])
    report(options, {way: rates for way, rates in results.items() if rates}, failed)
    return None


def report(options: argparse.Namespace, results: dict[str, list[float]], failed: dict[str, str]) -> None:
    """Print the table and write the results."""
    medians = {way: statistics.median(rates) for way, rates in results.items()}
    base = medians.get("obstore", float("nan"))
    print(f"{options.shards} shards of {options.shard_mib} MiB, {LATENCY_S * 1000:g} ms latency, medians")
    print(f"{'way':20} {'MB/s':>8} {'lowest':>8} {'highest':>8} {'of obstore':>11}")
    for way, median in medians.items():
        low, high = min(results[way]), max(results[way])
        print(f"{way:20} {median:8.0f} {low:8.0f} {high:8.0f} {median / base:10.2f}x")
    for way, problem in failed.items():
        print(f"{way:20} failed: {problem}")
    best = max((medians[way] for way in LOADERS if way in medians), default=float("nan"))
    rate = medians.get("marrow", float("nan"))
    disk = medians.get("obstore to disk", float("nan"))
    print(f"marrow: {rate / base:.2f}x obstore (goal 0.8), {rate / best:.1f}x the best loader (goal 2)")
    print(f"        {rate / disk:.2f}x obstore to disk, which does not check; marrow shards ", end="")
    print(f"{medians.get('marrow shards', float('nan')) / disk:.2f}x")
    RESULTS.parent.mkdir(exist_ok=True)
    facts = {
        "command": "python bench/all.py stream",
        "shards": options.shards,
        "shard_mib": options.shard_mib,
        "mb_per_s": results,
        "medians": medians,
        "failed": failed,
        "of_obstore": rate / base,
        "of_obstore_to_disk": rate / disk,
        "of_best_loader": rate / best,
    }
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
