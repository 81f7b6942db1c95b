"""CSV to Parquet: Marrow's ingest beside polars, duckdb, pandas and pyarrow, each streaming as it can.

All read the same file (numbers, a date, a time, a category, a truth value, text of which a tenth is in
quotes, with delimiters, doubled quotes and line ends in them) and write Parquet with zstd level 1.
Marrow's side also finds every row's line, writes it and the file's name beside the row, checks UTF-8,
and keeps broken rows. Each run is a process of its own, so that its memory and its threads are its
own; the sides take turns; wall and CPU seconds are of the work, without the start and the imports.

    python bench/csv_to_parquet.py [--megabytes 200] [--repeat 3] [--threads 2] [--sides marrow polars ...]

Goals, at 1000 MB: at least 0.9x the fastest peer's speed, at most 0.5 GB of memory, and with one row
in a hundred broken at most 1.3x the time of the clean file.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "csv_to_parquet.json"
PEERS = HERE.parent / ".bench" / "csv_to_parquet"
SIDES = ("marrow", "marrow broken", "polars", "duckdb", "pandas", "pyarrow")
SPEED_GOAL, BROKEN_GOAL, MEMORY_GOAL = 0.9, 1.3, 500e6


def write_csv(path: Path, num_bytes: int, *, broken: bool) -> None:
    """Write rows until the size is reached; with broken, one row in a hundred is none."""
    import numpy as np

    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    words = ["".join(rng.choice(letters, n)) for n in rng.integers(2, 11, 5000)]
    regions = ["north", "south", "east", "west", "online", "wholesale", "café"]
    days = np.datetime64("2016-01-01") + rng.integers(0, 3000, 5000)
    number = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write("id,day,at,region,price,quantity,paid,comment\n")
        while file.tell() < num_bytes:
            count = 20_000
            day = days[rng.integers(0, len(days), count)].astype(str)
            at = np.datetime_as_string(np.datetime64("2016-01-01T00:00:00") + rng.integers(0, 10**8, count))
            price, quantity = rng.gamma(2, 50, count), rng.integers(1, 500, count)
            region, paid = rng.integers(0, len(regions), count), rng.random(count) < 0.7
            lengths = rng.integers(4, 24, count)
            picks, start = rng.integers(0, len(words), int(lengths.sum())), 0
            lines = []
            for i in range(count):
                text = " ".join([words[pick] for pick in picks[start : start + lengths[i]]])
                start += lengths[i]
                if i % 10 == 0:
                    text = (
                        '"' + text.replace(" ", ", ", 2) + ('\nsecond ""line""' if i % 100 == 0 else "") + '"'
                    )
                if broken and i % 100 == 50:
                    text += ",too,wide" if i % 200 else ',"open'
                lines.append(
                    f"{number + i},{day[i]},{at[i].replace('T', ' ')},{regions[region[i]]},{price[i]:.2f},"
                    f"{quantity[i]},{'true' if paid[i] else 'false'},{text}\n"
                )
            file.write("".join(lines))
            number += count


def run_marrow(source: Path, out: Path, threads: int) -> Callable[[], None]:
    """Run Marrow's ingest step."""
    from marrow.data.config import DataRecipe
    from marrow.data.engine import Threads
    from marrow.data.ingest import ingest

    def work() -> None:
        with Threads(threads) as engine:
            ingest(DataRecipe(source=str(source)), out, engine=engine)

    return work


def run_polars(source: Path, out: Path, threads: int) -> Callable[[], None]:
    """Stream with polars, from scan to sink."""
    os.environ["POLARS_MAX_THREADS"] = str(threads)
    import polars

    return lambda: polars.scan_csv(source, try_parse_dates=True).sink_parquet(
        out / "a.parquet", compression="zstd", compression_level=1
    )


def run_duckdb(source: Path, out: Path, threads: int) -> Callable[[], None]:
    """Run one COPY statement of duckdb."""
    import duckdb

    def work() -> None:
        connection = duckdb.connect()
        connection.execute(f"SET threads = {threads}")
        connection.execute(
            f"COPY (FROM read_csv('{source}')) TO '{out}/a.parquet' "
            "(FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1)"
        )

    return work


def run_pandas(source: Path, out: Path, threads: int) -> Callable[[], None]:
    """Read chunks with pandas, for the whole would not fit, and write them with pyarrow."""
    import pandas
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_cpu_count(threads)

    def work() -> None:
        writer = None
        for frame in pandas.read_csv(source, chunksize=200_000, parse_dates=["day", "at"]):
            table = pa.Table.from_pandas(frame, preserve_index=False)
            writer = writer or pq.ParquetWriter(
                out / "a.parquet", table.schema, compression="zstd", compression_level=1
            )
            writer.write_table(table.cast(writer.schema))
        assert writer is not None
        writer.close()

    return work


def run_pyarrow(source: Path, out: Path, threads: int) -> Callable[[], None]:
    """Stream with pyarrow, as its documentation shows it."""
    import pyarrow as pa
    import pyarrow.csv as pacsv
    import pyarrow.parquet as pq

    pa.set_cpu_count(threads)

    def work() -> None:
        reader = pacsv.open_csv(source, parse_options=pacsv.ParseOptions(newlines_in_values=True))
        path = out / "a.parquet"
        with pq.ParquetWriter(path, reader.schema, compression="zstd", compression_level=1) as writer:
            for batch in reader:
                writer.write_batch(batch)

    return work


RUNS = {
    "marrow": run_marrow,
    "marrow broken": run_marrow,
    "polars": run_polars,
    "duckdb": run_duckdb,
    "pandas": run_pandas,
    "pyarrow": run_pyarrow,
}


def child(side: str, source: Path, out: Path, threads: int) -> None:
    """Do one run in this process and print its figures."""
    sys.path.append(str(PEERS))
    work = RUNS[side](source, out, threads)
    start, cpu = time.perf_counter(), time.process_time()
    work()
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    # On Linux ru_maxrss begins with the peak of the process that started this one; VmHWM does not.
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    print(json.dumps({"wall_s": wall_s, "cpu_s": cpu_s, "peak_bytes": int(peak[1]) * 1024 if peak else 0}))


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, source, out = options.child
        child(side, Path(source), Path(out), options.threads)
        return
    figures: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("clean.csv", "broken.csv"):
            write_csv(folder / file, options.megabytes * 1_000_000, broken=file == "broken.csv")
        for repeat in range(options.repeat):
            for side in options.sides if repeat % 2 else options.sides[::-1]:
                figures[side].append(measure(side, folder, options.threads))
    report(figures, options.megabytes, options.threads)


def measure(side: str, folder: Path, threads: int) -> dict[str, float]:
    """Run one side in a process of its own and check what it wrote."""
    import pyarrow.parquet as pq

    source, out = folder / ("broken.csv" if side.endswith("broken") else "clean.csv"), folder / "out"
    out.mkdir()
    command = [sys.executable, __file__, "--threads", str(threads), "--child", side, str(source), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = quantity = size = 0
    for path in sorted(out.glob("*.parquet")):
        column = pq.read_table(path, columns=["quantity"])["quantity"]
        rows, quantity = rows + len(column), quantity + sum(column.to_numpy().tolist())
        size += path.stat().st_size
    shutil.rmtree(out)
    return {**json.loads(done.stdout), "rows": rows, "quantity": quantity, "bytes": size}


def report(figures: dict[str, list[dict[str, float]]], megabytes: int, threads: int) -> None:
    """Print medians and ratios; keep all figures."""
    found = {
        (run["rows"], run["quantity"])
        for side, runs in figures.items()
        if side != "marrow broken"
        for run in runs
    }
    assert len(found) <= 1, f"the sides wrote different rows: {found}"
    median = {
        side: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for side, runs in figures.items()
    }
    ours = median.get("marrow")
    print(f"{megabytes} MB, {threads} threads, zstd 1, medians of {len(next(iter(figures.values())))}")
    print(f"{'':16}{'wall s':>8}{'CPU s':>8}{'peak MB':>9}{'out MB':>8}{'ours is':>9}")
    for side, one in median.items():
        faster = f"{one['wall_s'] / ours['wall_s']:8.2f}x" if ours and side != "marrow" else ""
        print(
            f"{side:16}{one['wall_s']:8.2f}{one['cpu_s']:8.2f}{one['peak_bytes'] / 1e6:9.0f}"
            f"{one['bytes'] / 1e6:8.1f}{faster:>9}"
        )
    ratios: dict[str, float] = {}
    peers = [one["wall_s"] for side, one in median.items() if not side.startswith("marrow")]
    if ours and peers:
        ratios["speed beside the fastest"] = min(peers) / ours["wall_s"]
        print(f"{ratios['speed beside the fastest']:.2f}x the fastest peer   (goal: at least {SPEED_GOAL}x)")
    if ours and "marrow broken" in median:
        ratios["time with broken rows"] = median["marrow broken"]["wall_s"] / ours["wall_s"]
        print(f"{ratios['time with broken rows']:.2f}x the time with broken rows   (goal: <= {BROKEN_GOAL}x)")
    if ours:
        ratios["peak bytes"] = max(run["peak_bytes"] for run in figures["marrow"])
        print(f"{ratios['peak bytes'] / 1e6:.0f} MB at the peak   (goal: at most {MEMORY_GOAL / 1e6:.0f} MB)")
    RESULT.parent.mkdir(exist_ok=True)
    result = {
        "megabytes": megabytes,
        "threads": threads,
        "figures": figures,
        "ratios": ratios,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
