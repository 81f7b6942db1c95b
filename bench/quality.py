"""Quality of data: text filters, personal data, profiles and expectations, beside their peers.

    python bench/all.py quality         (installs datatrove into .bench/quality first)
    python bench/quality.py [--megabytes 8] [--rows 500000] [--repeat 3]

    gopher    Gopher's quality and repetition filters over the interpreter's own sources, cut into
              texts of 2 to 20 kB; datatrove's with words cut at blanks, as Marrow cuts them
    pii       all kinds of personal data and secrets; datatrove looks for emails and IPv4 alone
    profile   every column of a Parquet table of eight: quantiles, distinct and frequent values, lengths;
              DuckDB's SUMMARIZE, which has no frequent values, no curve and no lengths
    expect    range, regex, values, nulls, uniqueness and reference; DuckDB counts the same by SQL

Each measurement is a process of its own with one thread; the sides take turns; CPU seconds (user
and system) of the work, without imports and reading the texts. The verdicts and counts of both sides must
agree; the number of texts on which the filters differ is printed.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).parent / "results" / "quality.json"
PEER = ROOT / ".bench" / "quality" / "bin" / "python"
WORK = ("gopher", "pii", "profile", "expect")
PEER_OF = {"gopher": "datatrove", "pii": "datatrove", "profile": "duckdb", "expect": "duckdb"}
Answer = Callable[[], Any]


def write_texts(path: Path, megabytes: float) -> None:
    """Cut the standard library into texts of 2 to 20 kB, a few of them with personal data."""
    generator = random.Random(0)
    folder = Path(sysconfig.get_paths()["stdlib"])
    left = megabytes * 1e6
    with path.open("w") as file:
        for source in sorted(folder.rglob("*.py")):
            text = source.read_text(errors="replace").strip()
            while text and left > 0:
                size = generator.randrange(2_000, 20_000)
                piece, text = text[:size].strip(), text[size:].strip()
                if generator.random() < 0.1:
                    piece += f"\nmail user{size}@example.org from 8.8.4.{size % 250 + 1}"
                file.write(json.dumps(piece) + "\n")
                left -= len(piece)


def write_table(path: Path, reference: Path, rows: int) -> None:
    """Write a table of eight columns and the one that it refers to."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = np.random.default_rng(0)
    words = np.array(["".join(generator.choice(list("etaoinshrd"), 6)) for _ in range(5000)])
    table = pa.table(
        {
            "id": pa.array(generator.permutation(rows)),
            "key": pa.array([f"item-{i:09}" for i in generator.permutation(rows)]),
            "price": pa.array(generator.gamma(2, 30, rows), mask=generator.random(rows) < 0.02),
            "count": pa.array(generator.poisson(4, rows), pa.int32()),
            "day": pa.array(generator.integers(15_000, 20_000, rows), pa.int32()).cast(pa.date32()),
            "country": pa.array(
                generator.choice(["de", "fr", "it", "es", "xx"], rows, p=[0.4, 0.3, 0.2, 0.09, 0.01])
            ),
            "word": pa.array(words[generator.zipf(1.3, rows) % 5000]),
            "ok": pa.array(generator.random(rows) < 0.9),
        }
    )
    pq.write_table(table, path, compression="zstd")
    pq.write_table(pa.table({"code": ["de", "fr", "it", "es"]}), reference)


def marrow(work: str, folder: Path) -> Answer:
    """Prepare Marrow's side."""
    if work == "gopher":
        from marrow.data.quality.filters import filled, filters_of
        from marrow.data.quality.rules import Rule, judge
        from marrow.data.quality_config import QualityRecipe

        rules = [Rule(*one) for one in filters_of(filled(QualityRecipe(preset="gopher")))]
        texts = read(folder)
        return lambda: [judge(text, rules) is None for text in texts]
    if work == "pii":
        from marrow.data.quality.pii import find

        texts = read(folder)
        return lambda: [sum(one.kind == "email" for one in find(text)) for text in texts]
    if work == "profile":
        from marrow.data.profile.columns import profile

        return lambda: {c.name: [c.nulls, c.minimum] for c in profile([folder / "t.parquet"]).columns}
    from marrow.data.quality.expectations import check_expectations
    from marrow.data.quality_config import Expectation

    expected = {
        "key": Expectation(unique=True, regex="item-[0-9]{9}"),
        "id": Expectation(unique=True),
        "price": Expectation(min=1, max=200, max_null_share=0.5),
        "word": Expectation(min_length=3, max_length=6),
        "country": Expectation(refers_to=f"{folder / 'codes.parquet'}:code"),
        "count": Expectation(values=(0, 1, 2, 3, 4, 5, 6)),
    }
    order = ["country.refers_to", "count.values", "id.unique", "key.regex", "key.unique", "price.nulls"]
    order += ["price.range", "word.length"]

    def check() -> list[int]:
        results = check_expectations([folder / "t.parquet"], expected).results
        failed = {result.name: result.failed for result in results}
        return [failed[name] for name in order]

    return check


def datatrove(work: str, folder: Path) -> Answer:
    """Prepare datatrove's side."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Blanks(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        sent_tokenize = span_tokenize = word_tokenize

    texts = read(folder)
    if work == "pii":
        formatter = PIIFormatter(email_replacement="\0")
        return lambda: [formatter.format(text).count("\0") for text in texts]
    blanks: Any = Blanks()
    filters = [GopherQualityFilter(language=blanks), GopherRepetitionFilter(language=blanks)]
    documents = [Document(text, str(i)) for i, text in enumerate(texts)]
    return lambda: [all(one.filter(document) is True for one in filters) for document in documents]


def duckdb(work: str, folder: Path) -> Answer:
    """Prepare DuckDB's side."""
    import duckdb as peer

    connection = peer.connect(config={"threads": "1"})
    table = f"read_parquet('{folder / 't.parquet'}')"
    if work == "profile":

        def summarize() -> dict[str, Any]:
            rows = connection.execute(f"summarize select * from {table}").fetchall()
            return {row[0]: None for row in rows}

        return summarize
    sql = f"""
        with t as (select * from {table})
        select (select count(*) from t where country not in
                  (select code from read_parquet('{folder / "codes.parquet"}'))),
               (select count(*) from t where "count" not in (0, 1, 2, 3, 4, 5, 6)),
               (select count(id) - count(distinct id) from t),
               (select count(*) from t where not regexp_full_match(key, 'item-[0-9]{{9}}')),
               (select count(key) - count(distinct key) from t),
               (select count(*) from t where price is null),
               (select count(*) from t where price < 1 or price > 200),
               (select count(*) from t where length(word) < 3 or length(word) > 6)"""
    return lambda: list(connection.execute(sql).fetchall()[0])


def read(folder: Path) -> list[str]:
    """Read the texts."""
    return [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]


def measure(side: str, work: str, folder: Path) -> None:
    """Do one piece of work in this process; print its CPU seconds and answer."""
    run = {"marrow": marrow, "datatrove": datatrove, "duckdb": duckdb}[side](work, folder)
    start = time.process_time()
    answer = run()
    print(json.dumps({"cpu_s": time.process_time() - start, "answer": answer}))


def start(side: str, work: str, folder: Path) -> dict[str, Any]:
    """Measure in a process of its own, with the peer's interpreter where it has one."""
    python = PEER if side == "datatrove" else sys.executable
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ARROW_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, __file__, "--side", side, "--work", work, "--folder", folder],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(work: str, folder: Path, repeat: int, amount: float, unit: str) -> dict[str, Any]:
    """Let both sides take turns; print and return the figures."""
    sides = ("marrow", PEER_OF[work])
    runs = [{side: start(side, work, folder) for side in sides} for _ in range(repeat)]
    cpu_s = {side: statistics.median(run[side]["cpu_s"] for run in runs) for side in sides}
    answers = [runs[0][side]["answer"] for side in sides]
    differ = sum(a != b for a, b in zip(*answers, strict=True)) if work != "profile" else None
    ratio = cpu_s[sides[1]] / cpu_s[sides[0]]
    rates = ", ".join(f"{side} {amount / cpu_s[side]:.2f} {unit}" for side in sides)
    print(
        f"{work:<8} {rates}: {ratio:.2f}x {sides[1]}" + (f"; {differ} answers differ" if differ else ""),
        flush=True,
    )
    return {"cpu_s": cpu_s, "ratio": ratio, "peer": sides[1], "answers_that_differ": differ}


def main() -> None:
    """Run the benchmark, or one measurement of it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=WORK, default=WORK)
    for name in ("--side", "--work", "--folder"):
        parser.add_argument(name)
    given = parser.parse_args()
    if given.side:
        measure(given.side, given.work, Path(given.folder))
        return
    if {"gopher", "pii"} & set(given.only) and not PEER.exists():
        parser.error(
            "datatrove is not there: `python bench/all.py quality` installs it, or --only profile expect"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder / "texts.jsonl", given.megabytes)
        write_table(folder / "t.parquet", folder / "codes.parquet", given.rows)
        found = {}
        for work in given.only:
            is_text = work in ("gopher", "pii")
            amount = (folder / "texts.jsonl").stat().st_size / 1e6 if is_text else given.rows / 1e6
            unit = "MB/s" if is_text else "M rows/s"
            found[work] = compare(work, folder, given.repeat, amount, unit)
    arguments = {"megabytes": given.megabytes, "rows": given.rows, "repeat": given.repeat}
    RESULT.parent.mkdir(exist_ok=True)
    machine = {"machine": platform.machine(), "python": platform.python_version()}
    RESULT.write_text(json.dumps({"arguments": arguments, **machine, "work": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
