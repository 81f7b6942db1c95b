"""Ingest and tokenise: Marrow's road beside the libraries it is built on, used directly.

Both sides read the same CSV (quoted newlines, a number column, one text column of source code), write
Parquet with zstd, read it back, encode the text with the same byte-level BPE and write the ids as
Arrow IPC. The peer uses pyarrow's streaming CSV reader and `tokenizers.encode_batch_fast`, Marrow its
ingest step and `Tokenizer.encode_stream`, whose C encoder gives the same ids. Marrow's side also infers
types over the whole file, checks UTF-8, finds every row's line and keeps broken rows.

    python bench/ingest.py [--repeat 5] [--megabytes 10]

10 MB is what the standard library has; more would repeat it, which helps every cache. One process,
one thread, both sides interleaved, CPU seconds. Goal: at most 1.05x in all.
"""

import argparse
import csv
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read when the libraries load
os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import tokenizers

from marrow.data.config import DataRecipe
from marrow.data.ingest import ingest
from marrow.data.sources.stdlib import stdlib_files
from marrow.data.tables import stream
from marrow.text.tokenizer import Tokenizer

RESULT = Path(__file__).parent / "results" / "ingest.json"
IDS = pa.schema([("ids", pa.list_(pa.int32()))])


def write_csv(path: Path, num_bytes: int) -> None:
    """Write rows of (number, path, up to 60 lines of code) until the size is reached."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["n", "path", "text"])
        number = 0
        while file.tell() < num_bytes:
            for source in stdlib_files():
                lines = source.read_text(encoding="utf-8", errors="ignore").splitlines(keepends=True)
                for start in range(0, len(lines), 60):
                    number += 1
                    writer.writerow([number, source.name, "".join(lines[start : start + 60])])
                if file.tell() >= num_bytes:
                    break


def texts_of(folder: Path) -> Iterator[list[str]]:
    """Yield the texts of rows files in batches, the same for both sides."""
    for _, batch in stream(sorted(folder.glob("rows-*.parquet")), ["text"]):
        yield batch.column(0).to_pylist()


def write_ids(path: Path, batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
    """Write batches of flat ids and where each text's begin and end as Arrow IPC, the same for both sides."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, IDS) as writer:
        for ids, offsets in batches:
            values = pa.array(ids.view(np.int32))
            lists = pa.ListArray.from_arrays(offsets.astype(np.int32), values)
            writer.write_batch(pa.RecordBatch.from_arrays([lists], schema=IDS))


def ids_of(path: Path) -> pa.Array:
    """Read all ids back; the batches of the two sides are cut at different rows."""
    with pa.OSFile(str(path)) as file, pa.ipc.open_file(file) as reader:
        return reader.read_all()["ids"].combine_chunks()


def peer_ingest(source: Path, out: Path) -> None:
    """CSV to Parquet with pyarrow as its documentation shows it."""
    reader = pacsv.open_csv(
        source,
        read_options=pacsv.ReadOptions(use_threads=False),
        parse_options=pacsv.ParseOptions(newlines_in_values=True),
    )
    with pq.ParquetWriter(out / "rows-00000.parquet", reader.schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(batch)


def library_ids(library: tokenizers.Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encode with the library, in its fastest way; the ids of all texts in one array."""
    ids = [encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)]
    offsets = np.cumsum([0, *map(len, ids)])
    return np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(offsets[-1])), offsets


def marrow_ingest(source: Path, out: Path) -> None:
    """CSV to rows by Marrow's ingest step."""
    ingest(DataRecipe(source=str(source)), out)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=10)
    options = parser.parse_args()
    pa.set_cpu_count(1)
    seconds: dict[str, list[float]] = {
        f"{s} {p}": [] for p in ("ingest", "tokenise") for s in ("peer", "marrow")
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "a.csv"
        write_csv(source, options.megabytes * 1_000_000)
        sample = (path.read_text(encoding="utf-8", errors="ignore") for path in stdlib_files()[:150])
        Tokenizer.train(sample, 4096).save(folder / "tokenizer.json")
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))

        def peer_tokenise(out: Path) -> None:
            write_ids(out / "ids.arrow", (library_ids(library, texts) for texts in texts_of(out)))

        def marrow_tokenise(out: Path) -> None:
            tokenizer = Tokenizer.load(folder / "tokenizer.json")
            write_ids(out / "ids.arrow", tokenizer.encode_stream(texts_of(out)))

        for repeat in range(options.repeat):
            sides = [("peer", peer_ingest, peer_tokenise), ("marrow", marrow_ingest, marrow_tokenise)]
            for side, read, tokenise in sides if repeat % 2 else sides[::-1]:
                out = folder / f"{side}-{repeat}"
                out.mkdir()
                seconds[f"{side} ingest"].append(timed(lambda: read(source, out)))  # noqa: B023
                seconds[f"{side} tokenise"].append(timed(lambda: tokenise(out)))  # noqa: B023
            peer, ours = (ids_of(folder / f"{side}-{repeat}" / "ids.arrow") for side in ("peer", "marrow"))
            assert peer.equals(ours), "the two sides wrote different ids"
    report(seconds, options.megabytes)


def timed(work: Callable[[], None]) -> float:
    """Return the CPU seconds of some work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def report(seconds: dict[str, list[float]], megabytes: int) -> None:
    """Print medians and ratios; keep all figures."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{'':10}{'peer s':>10}{'marrow s':>10}{'ratio':>8}   ({megabytes} MB, CPU seconds, median)")
    ratios = {}
    for part in ("ingest", "tokenise"):
        ratios[part] = median[f"marrow {part}"] / median[f"peer {part}"]
        print(f"{part:10}{median[f'peer {part}']:10.3f}{median[f'marrow {part}']:10.3f}{ratios[part]:7.2f}x")
    peer, ours = (sum(median[f"{side} {part}"] for part in ratios) for side in ("peer", "marrow"))
    ratios["both"] = ours / peer
    print(f"{'both':10}{peer:10.3f}{ours:10.3f}{ratios['both']:7.2f}x   (goal: at most 1.05x)")
    RESULT.parent.mkdir(exist_ok=True)
    result = {
        "megabytes": megabytes,
        "seconds": seconds,
        "ratios": ratios,
        "versions": {"pyarrow": pa.__version__, "tokenizers": tokenizers.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
