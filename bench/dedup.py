"""Near-duplicates in raw text: documents per CPU-second, recall and false merges, beside datatrove.

    python bench/all.py dedup       (installs datatrove into .bench/dedup first)
    python .../dedup.py [--documents 4000] [--repeat 3]

The corpus is made of the interpreter's own documentation: runs of its words, 60 to 600 each, and
copies of them with words replaced so that their Jaccard similarity is spread over 0.5 to 1; lower-case
words with single blanks, so that every tool sees the same words. Brute force compares all pairs.
Every measurement is a process of its own that imports, then reads the same JSON lines and finds
what to drop at similarity 0.8; the CPU time (user + system, children too) of that is taken. Ways take turns.

    datatrove          signatures, buckets and clusters as its example has them: spaCy words
    datatrove split    the same with words cut at blanks, its fastest tokenizer
    marrow numpy       marrow without a compiler
    marrow             marrow: signatures in C, all candidates compared exactly

Of the texts that brute force calls near-duplicates (pairs): recall is the share that a tool put into
one cluster; merged is how many dropped texts have no kept near-duplicate; left is pairs of kept texts.
"""

import argparse
import json
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).parent / "results" / "dedup.json"
PEER = ROOT / ".bench" / "dedup" / "bin" / "python"
SIMILARITY, WIDTH = 0.8, 5
GOALS = {"documents_per_second": 5000.0, "ratio": 5.0, "recall": 0.95}
Answer = tuple[dict[int, int], set[int]]  # cluster of each text that is in one; texts that go


def datatrove(source: Path, folder: Path, *, split: bool = False) -> Callable[[], Answer]:
    """Prepare datatrove's pipeline up to the list of what goes."""
    import struct

    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.typeshelper import Languages
    from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer

    class Blanks(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        sent_tokenize = span_tokenize = word_tokenize

    config = MinhashConfig(hash_config=HashConfig(precision=64, hash_fc="xxhash"))
    words: Any = Blanks() if split else Languages.english
    load_word_tokenizer(words).word_tokenize("warm up")
    names = [str(folder / name) for name in ("signatures", "buckets", "clusters")]
    steps: list[tuple[list[Any], int]] = [
        (
            [
                JsonlReader(str(source.parent), glob_pattern=source.name),
                MinhashDedupSignature(names[0], config, language=words),
            ],
            1,
        ),
        ([MinhashDedupBuckets(names[0], names[1], config=config)], config.num_buckets),
        ([MinhashDedupCluster(names[1], names[2], config=config, save_cluster_id=True)], 1),
    ]

    def run() -> Answer:
        for number, (pipeline, tasks) in enumerate(steps):
            logs = str(folder / f"logs-{number}")
            LocalPipelineExecutor(
                pipeline, tasks=tasks, workers=1, logging_dir=logs, skip_completed=False
            ).run()
        removed = (Path(names[2]) / "000000.remove").read_bytes()
        clusters = (Path(names[2]) / "000000.clusters").read_bytes()
        return dict(struct.iter_unpack("<II", clusters)), {
            one for (one,) in struct.iter_unpack("<I", removed)
        }

    return run


def marrow(source: Path, folder: Path) -> Callable[[], Answer]:
    """Prepare Marrow's search; MARROW_KERNELS chooses C or numpy."""
    import pyarrow as pa
    import pyarrow.json

    from marrow.data.config import DedupRecipe
    from marrow.data.dedup.duplicates import find_duplicates
    from marrow.kernels.search.minhash import shingle_sets

    pa.set_cpu_count(1)
    shingle_sets(pa.array(["compile and load"]), WIDTH)

    def run() -> Answer:
        with pyarrow.json.open_json(source) as reader:
            texts = (batch.column("text") for batch in reader)
            found = find_duplicates(texts, DedupRecipe(exact=False, similarity=SIMILARITY), folder)
        clusters = dict(enumerate(found.clusters.tolist()))
        return clusters, set((found.near_of >= 0).nonzero()[0].tolist())

    return run


WAYS: dict[str, Callable[[Path, Path], Callable[[], Answer]]] = {
    "datatrove": datatrove,
    "datatrove split": lambda source, folder: datatrove(source, folder, split=True),
    "marrow numpy": marrow,
    "marrow": marrow,
}


def measure(way: str, source: Path) -> None:
    """Work as the measured process: print the CPU seconds and the answer."""
    with tempfile.TemporaryDirectory() as name:
        run = WAYS[way](source, Path(name))
        start = cpu_seconds()
        clusters, dropped = run()
        seconds = cpu_seconds() - start
    print(json.dumps({"seconds": seconds, "clusters": list(clusters.items()), "dropped": sorted(dropped)}))


def cpu_seconds() -> float:
    """Return user + system time of this process and those it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def make_corpus(count: int) -> list[str]:
    """Make texts, 4 in 10 of them copies of an earlier one, in random order."""
    from marrow.data.sources.stdlib import stdlib_files

    rng = random.Random(0)
    words: list[str] = []
    for path in stdlib_files():
        words += re.findall("[a-z]+", path.read_text(encoding="utf-8", errors="ignore").lower())
        if len(words) > 400 * count:
            break
    texts: list[list[str]] = []
    place = 0
    while len(texts) < count:
        size = rng.randrange(60, 600)
        text = words[place % len(words) :][:size]
        place += size
        texts.append(text)
        copies = rng.choice([0, 0, 0, 0, 1, 1, 3])
        texts += [edited(text, rng.uniform(0.5, 1.0), rng) for _ in range(copies)]
    rng.shuffle(texts)
    return [" ".join(text) for text in texts[:count]]


def edited(words: list[str], similarity: float, rng: random.Random) -> list[str]:
    """Replace as many words as bring two texts to about this similarity: a word costs 5 shingles."""
    shingles = len(words) - WIDTH + 1
    lost = shingles * (1 - similarity) / (1 + similarity)  # of both sides
    result = list(words)
    for place in rng.sample(
        range(2, len(words) - 2, WIDTH), min(round(lost / WIDTH), len(words) // WIDTH - 1)
    ):
        result[place] = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=9))
    return result


def near_by_force(texts: list[str]) -> set[tuple[int, int]]:
    """Return all pairs of at least the similarity, by comparing sets of words without hashing them away."""
    sets = []
    for text in texts:
        words = text.split()
        sets.append({" ".join(words[i : i + WIDTH]) for i in range(max(1, len(words) - WIDTH + 1))})
    holders: dict[str, list[int]] = defaultdict(list)
    near = set()
    for number, one in enumerate(sets):
        shared: dict[int, int] = defaultdict(int)
        for shingle in one:
            for other in holders[shingle]:
                shared[other] += 1
            holders[shingle].append(number)
        for other, count in shared.items():
            if count / (len(one) + len(sets[other]) - count) >= SIMILARITY:
                near.add((other, number))
    return near


def quality(near: set[tuple[int, int]], clusters: dict[int, int], dropped: set[int]) -> dict[str, float]:
    """Judge an answer by brute force."""
    alike: dict[int, set[int]] = defaultdict(set)
    for one, other in near:
        alike[one].add(other)
        alike[other].add(one)
    together = sum(clusters.get(one, -1) == clusters.get(other, -2) for one, other in near)
    return {
        "recall": together / len(near),
        "merged": sum(alike[one] <= dropped for one in dropped),
        "left": sum(one not in dropped and other not in dropped for one, other in near),
        "dropped": len(dropped),
    }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    if not PEER.exists():
        parser.error("datatrove is not there: `python bench/all.py dedup` installs it")
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "corpus.jsonl"
        texts = make_corpus(options.documents)
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        near = near_by_force(texts)
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for repeat in range(options.repeat):
            for way in list(WAYS)[:: 1 if repeat % 2 else -1]:
                runs[way].append(run_process(way, source))
    report(texts, near, runs)


def run_process(way: str, source: Path) -> dict[str, Any]:
    """Measure a way once in a fresh process."""
    python = str(PEER) if way.startswith("datatrove") else sys.executable
    mode = "reference" if way == "marrow numpy" else "auto"
    environment = {**os.environ, "MARROW_KERNELS": mode, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [python, __file__, "--measure", way, str(source)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        sys.exit(f"{way} failed:\n{process.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def report(texts: list[str], near: set[tuple[int, int]], runs: dict[str, list[dict[str, Any]]]) -> None:
    """Print medians and ratios; keep all figures."""
    num_bytes = sum(map(len, texts))
    print(
        f"{len(texts)} texts, {num_bytes / 1e6:.1f} MB, {len(near)} near-duplicate pairs; CPU time, one core"
    )
    print(
        f"{'':17}{'docs/s':>9}{'ratio':>8}{'recall':>9}{'merged':>8}{'left':>6}{'dropped':>9}{'repeats':>9}"
    )
    base = statistics.median(run["seconds"] for run in runs["datatrove"])
    rows = {}
    for way, measured in runs.items():
        seconds = statistics.median(run["seconds"] for run in measured)
        same = all(run["dropped"] == measured[0]["dropped"] for run in measured)
        judged = quality(near, dict(measured[0]["clusters"]), set(measured[0]["dropped"]))
        rows[way] = {
            "seconds": [run["seconds"] for run in measured],
            "documents_per_second": len(texts) / seconds,
            "ratio": base / seconds,
            **judged,
            "same_every_time": same,
        }
        print(
            f"{way:17}{len(texts) / seconds:9.0f}{base / seconds:7.1f}x{judged['recall']:9.4f}"
            f"{judged['merged']:8}{judged['left']:6}{judged['dropped']:9}{'same' if same else 'differ':>9}"
        )
    fastest = max(rows[way]["ratio"] for way in rows if way.startswith("datatrove"))
    ours = {**rows["marrow"], "ratio": rows["marrow"]["ratio"] / fastest}
    met = ", ".join(f"{name} {ours[name]:.3g} (goal {goal:g})" for name, goal in GOALS.items())
    print(f"marrow: {met}; ratio to the faster datatrove")
    version = subprocess.run(
        [PEER, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )
    RESULT.parent.mkdir(exist_ok=True)
    result = {
        "documents": len(texts),
        "bytes": num_bytes,
        "near_pairs": len(near),
        "similarity": SIMILARITY,
        "goals": GOALS,
        "ways": rows,
        "versions": [line for line in version.stdout.splitlines() if line.startswith(("datatrove", "spacy"))],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
