"""Tokenise: Marrow's encoder beside tokenizers and tiktoken, the same texts, merges and ids.

One byte-level BPE is trained on the source code of the standard library; all three encode its files,
cut into documents of 60 lines, with it. Each gets its fastest way for many texts on N threads:

    tokenizers      encode_batch_fast, RAYON_NUM_THREADS=N; reading the ids out is not counted
    tiktoken        encode_ordinary_batch(num_threads=N), ranks made of our merges
    marrow          Threads(N).map(tokenizer.encode_flat, batches of 1 MB)
    marrow shards   the step that reads Parquet, encodes, packs and writes shards, with Threads(N)

    python bench/all.py tokenise        (installs tiktoken into .bench/tokenise first)
    python bench/tokenise.py [--threads 2] [--repeat 7] [--vocab-size 32768] [--prose]

The ids are compared first: a peer with other ids is no peer. Ways take turns in one process; every
turn has a tokenizer fresh from its file, so that no cache of words is warm. Medians of wall and CPU
seconds; on a machine with other work only the CPU figures mean anything. --prose encodes text with
one character in eight beyond ASCII instead, where words are other and longer.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / ".bench" / "tokenise"))
RESULT = ROOT / "bench" / "results" / "tokenise.json"
GOALS = {"tokenizers": 2.5, "tiktoken": 0.95}
BATCH_BYTES = 1 << 20
FOREIGN = "naïve café Привет мир 你好世界 œuvre façade größe mañana ελληνικά "


def texts_of(megabytes: float, *, prose: bool) -> list[str]:
    """Return documents of up to 60 lines, until the size is reached."""
    from marrow.data.sources.stdlib import stdlib_files

    texts: list[str] = []
    num_bytes = 0
    for path in stdlib_files():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        for start in range(0, len(lines), 60):
            text = "".join(lines[start : start + 60])
            if prose:
                words = text.split()
                text = " ".join(w if i % 8 else FOREIGN.split()[i % 9] for i, w in enumerate(words))
            texts.append(text)
            num_bytes += len(text.encode())
        if num_bytes > megabytes * 1e6:
            break
    return texts


def batches_of(texts: Sequence[str]) -> list[list[str]]:
    """Group texts into batches of about a megabyte."""
    batches: list[list[str]] = [[]]
    room = BATCH_BYTES
    for text in texts:
        if room <= 0:
            batches.append([])
            room = BATCH_BYTES
        batches[-1].append(text)
        room -= len(text)
    return batches


def ways_of(path: Path, texts: list[str], threads: int, split: Path) -> dict[str, Callable[[], Any]]:
    """Return, by name, functions that prepare a fresh encoder and return what is to be measured."""
    import tiktoken
    from tokenizers import Tokenizer as Library

    from marrow.data.engine import Threads
    from marrow.data.shards import write_shards
    from marrow.data.shards_config import ShardsRecipe
    from marrow.text.pattern import PATTERN
    from marrow.text.special import NUM_SPECIAL
    from marrow.text.tokenizer import Tokenizer

    batches = batches_of(texts)
    table = Tokenizer.load(path).token_bytes()
    ranks = {table[i]: i - NUM_SPECIAL for i in range(NUM_SPECIAL, len(table))}

    def library() -> Callable[[], Any]:
        made = Library.from_file(str(path))
        made.encode_special_tokens = True
        return lambda: made.encode_batch_fast(texts, add_special_tokens=False)

    def rust_ranks() -> Callable[[], Any]:
        made = tiktoken.Encoding("ours", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        return lambda: made.encode_ordinary_batch(texts, num_threads=threads)

    def marrow() -> Callable[[], Any]:
        made = Tokenizer.load(path)
        made.encode("x")  # builds the tables, as the peers did when they were made

        def run() -> Any:
            with Threads(threads) as engine:
                return list(engine.map(made.encode_flat, batches))

        return run

    def shards() -> Callable[[], Any]:
        out = Path(tempfile.mkdtemp(dir=split))

        def run() -> Any:
            with Threads(threads) as engine:
                return write_shards(ShardsRecipe(), split, path.parent, out, engine=engine)

        return run

    return {"tokenizers": library, "tiktoken": rust_ranks, "marrow": marrow, "marrow shards": shards}


def check_ids(path: Path, texts: list[str], ways: dict[str, Callable[[], Any]]) -> None:
    """Stop unless all three give the same ids."""
    from marrow.text.special import NUM_SPECIAL

    expected = [encoding.ids for encoding in ways["tokenizers"]()()]
    ranked = [[i + NUM_SPECIAL for i in ids] for ids in ways["tiktoken"]()()]
    flat = [
        ids[start:end].tolist() for ids, offsets in ways["marrow"]()() for start, end in pairwise(offsets)
    ]
    if not expected == ranked == flat:
        sys.exit(f"the encoders of {path} give different ids: there is nothing to compare")


def measure(ways: dict[str, Callable[[], Any]], repeat: int) -> dict[str, dict[str, float]]:
    """Run all ways in turns; return the medians of wall and CPU seconds."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeat):
        for name, prepare in ways.items():
            run = prepare()
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            made = run()
            samples[name].append((time.perf_counter() - wall_s, time.process_time() - cpu_s))
            del made
    return {
        name: {
            "wall_s": statistics.median(wall for wall, _ in taken),
            "cpu_s": statistics.median(cpu for _, cpu in taken),
        }
        for name, taken in samples.items()
    }


def main() -> None:
    """Train, check, measure, print, write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--megabytes", type=float, default=12)
    parser.add_argument("--prose", action="store_true")
    options = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(options.threads)  # read when the library first encodes
    os.environ["TOKENIZERS_PARALLELISM"] = "true"

    import pyarrow as pa
    import pyarrow.parquet as pq

    from marrow.text.tokenizer import Tokenizer

    texts = texts_of(options.megabytes, prose=options.prose)
    sizes = [len(text.encode()) for text in texts]
    megabytes = sum(sizes) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        Tokenizer.train(texts, options.vocab_size).save(path)
        table = pa.table({"document_id": range(len(texts)), "text": texts, "num_bytes": sizes})
        pq.write_table(table, Path(folder) / "train.parquet", row_group_size=500, compression="zstd")
        ways = ways_of(path, texts, options.threads, Path(folder))
        check_ids(path, texts, ways)
        rows = measure(ways, options.repeat)
    print(
        f"{megabytes:.1f} MB in {len(texts)} texts, {options.threads} threads, median of {options.repeat}\n"
    )
    print(f"{'':<16}{'MB/s':>9}{'MB a CPU-s':>12}{'marrow is':>12}{'by CPU':>9}")
    ours = rows["marrow"]
    for name, row in rows.items():
        wall, cpu = row["wall_s"] / ours["wall_s"], row["cpu_s"] / ours["cpu_s"]
        speeds = f"{megabytes / row['wall_s']:>9.1f}{megabytes / row['cpu_s']:>12.1f}"
        print(f"{name:<16}{speeds}{wall:>11.2f}x{cpu:>8.2f}x")
    for name, goal in GOALS.items():
        print(f"goal: >= {goal}x {name}: {rows[name]['wall_s'] / ours['wall_s']:.2f}x")
    data = {
        "megabytes": round(megabytes, 1),
        "threads": options.threads,
        "repeat": options.repeat,
        "vocab_size": options.vocab_size,
        "prose": options.prose,
        "machine": platform.machine(),
        "goals": GOALS,
        "ways": rows,
        "ratios": {name: rows[name]["wall_s"] / ours["wall_s"] for name in GOALS},
    }
    if not options.prose:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
