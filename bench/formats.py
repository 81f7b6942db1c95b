"""Formats, codecs and row-group sizes: what each costs to write, to keep and to read as Marrow reads.

The same rows (numbers, times, a category, text) as CSV, as Parquet of several codecs and row-group
sizes, and as an Arrow file. Read: one column; all rows; random rows, one at a time, by way of what is
smallest to read (a row group, a memory map). CPU seconds, medians; one thread.

    python bench/formats.py [--megabytes 60] [--repeat 3]

`docs/decisions/0004-row-groups-and-codecs.md` draws on it.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from csv_to_parquet import write_csv

RESULT = Path(__file__).parent / "results" / "formats.json"
CODECS = (("none", None), ("snappy", None), ("lz4", None), ("zstd", 1), ("zstd", 3), ("zstd", 9))
GROUP_MEGABYTES = (1, 4, 8, 16, 64)
DEFAULT_MEGABYTES, LOOKUPS = 8, 20
Work = Callable[[], object]


def timed(work: Work, repeat: int) -> float:
    """Return the median CPU seconds of some work."""
    seconds = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def read_some(path: Path, rows: list[int]) -> None:
    """Read single rows of a Parquet file, each through its row group."""
    file = pq.ParquetFile(path)
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    ends = np.cumsum(sizes)
    for row in rows:
        group = int(np.searchsorted(ends, row, side="right"))
        file.read_row_group(group, use_threads=False).slice(row - (ends[group] - sizes[group]), 1).to_pylist()


def measure(table: pa.Table, folder: Path, repeat: int) -> dict[str, dict[str, float]]:
    """Write and read each form."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, table.num_rows, LOOKUPS).tolist()
    group_rows = table.num_rows * 1_000_000 // table.nbytes
    figures: dict[str, dict[str, float]] = {}

    def take(
        name: str, path: Path, write: Callable[[], object], reads: dict[str, Callable[[], object]]
    ) -> None:
        one = {"write_s": timed(write, repeat), "bytes": path.stat().st_size}
        figures[name] = one | {f"{key}_s": timed(read, repeat) for key, read in reads.items()}

    def parquet(name: str, megabytes: int, codec: str, level: int | None) -> None:
        path = folder / "a.parquet"
        take(
            name,
            path,
            lambda: pq.write_table(
                table,
                path,
                row_group_size=max(1, megabytes * group_rows),
                compression=codec,
                compression_level=level,
                use_dictionary=["region"],
            ),
            {
                "column": lambda: pq.read_table(path, columns=["price"], use_threads=False),
                "all": lambda: pq.read_table(path, use_threads=False),
                "row": lambda: read_some(path, rows),
            },
        )

    path = folder / "a.csv"
    options = pacsv.ParseOptions(newlines_in_values=True)
    alone = pacsv.ConvertOptions(include_columns=["price"])
    one_thread = pacsv.ReadOptions(use_threads=False)
    take(
        "csv",
        path,
        lambda: pacsv.write_csv(table, path),
        {
            "column": lambda: pacsv.read_csv(path, one_thread, options, alone),
            "all": lambda: pacsv.read_csv(path, one_thread, options),
        },
    )
    for codec, level in CODECS:
        parquet(f"parquet {codec}{f' {level}' if level else ''}", DEFAULT_MEGABYTES, codec, level)
    for megabytes in GROUP_MEGABYTES:
        parquet(f"parquet zstd 1, {megabytes} MB groups", megabytes, "zstd", 1)
    arrow = folder / "a.arrow"

    def write_arrow() -> None:
        with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table.combine_chunks())

    def mapped() -> pa.Table:
        return pa.ipc.open_file(pa.memory_map(str(arrow))).read_all()

    take(
        "arrow, mapped",
        arrow,
        write_arrow,
        {
            "column": lambda: mapped()["price"].to_numpy().sum(),
            "all": mapped,
            "row": lambda: [mapped().slice(row, 1).to_pylist() for row in rows],
        },
    )
    return figures


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "source.csv"
        write_csv(source, options.megabytes * 1_000_000, broken=False)
        table = pacsv.read_csv(source, parse_options=pacsv.ParseOptions(newlines_in_values=True))
        figures = measure(table, folder, options.repeat)
    print(f"{table.nbytes / 1e6:.0f} MB of rows in Arrow; CPU ms, medians of {options.repeat}")
    print(f"{'':28}{'write':>8}{'MB':>8}{'column':>9}{'all':>8}{'one row':>9}")
    for name, one in figures.items():
        row = f"{one['row_s'] / LOOKUPS * 1e3:9.3f}" if "row_s" in one else ""
        print(
            f"{name:28}{one['write_s'] * 1e3:8.0f}{one['bytes'] / 1e6:8.1f}"
            f"{one['column_s'] * 1e3:9.1f}{one['all_s'] * 1e3:8.1f}{row}"
        )
    RESULT.parent.mkdir(exist_ok=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    RESULT.write_text(
        json.dumps({"megabytes": options.megabytes, "figures": figures, "machine": machine}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
