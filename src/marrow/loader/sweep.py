"""What each setting of the loader does to a step: the measuring behind `marrow bench loader`.

    measured = sweep(open_batches, settings, step_s=0.010)
    recommend(measured)             # the smallest setting that keeps the accelerator busy

The step is simulated: it takes a fixed time and uses no CPU, as a step on an accelerator does whose
kernels are queued. "Busy" is the share of the time in which such a step runs: the rest is waiting
for batches, split by the stage that the awaited batch was in. `resized` writes some rows of a
dataset again with other row groups or shards, so that their size is measured on the user's own rows.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from marrow.core.charts import Bar, Series, bar_chart, line_chart
from marrow.core.hashes import check_file
from marrow.core.page import Page, Tile, prose, table, tiles
from marrow.core.progress import Progress, silent
from marrow.data.manifest import Manifest, ShardEntry
from marrow.loader.formats.parquet import ParquetReader
from marrow.loader.reader import ShardReader
from marrow.loader.source import Reader

ENOUGH = 0.98  # of the time busy: the rest is noise of the clock
_TIMER_SLACK_S = 200e-6  # of a sleep on an idle machine: some 100 us
MOST_BYTES = 64 << 20  # of rows written again for sizes


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """What is varied: workers, batches made ahead, shards or row groups shuffled together, rows in each."""

    workers: int = 0
    prefetch: int = 2
    window: int | None = None
    rows_of_shard: int | None = None

    @property
    def name(self) -> str:
        """Return what a table calls it."""
        text = f"workers={self.workers} prefetch={self.prefetch}"
        return text if self.window is None else f"{text} window={self.window}"


@dataclass(frozen=True, slots=True)
class Measured:
    """One setting measured.

    Seconds of wall time: wall_s of it all, stepped_s of the steps, waited_s by stage, and worked_s
    by stage on whatever thread or process; cpu_s is of this process alone.
    """

    setting: Setting
    batches: int
    rows: int
    wall_s: float
    stepped_s: float
    first_batch_s: float
    cpu_s: float
    waited_s: Mapping[str, float] = field(default_factory=dict)
    worked_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def busy(self) -> float:
        """Share of the time in which a step ran, 0 to 1."""
        return self.stepped_s / self.wall_s

    @property
    def rows_per_s(self) -> float:
        """Rows a second, the steps included."""
        return self.rows / self.wall_s

    @property
    def limit(self) -> str:
        """The stage that was waited for most, "" if there was no wait worth a name."""
        if not self.waited_s or self.busy >= ENOUGH:
            return ""
        return max(self.waited_s, key=lambda stage: (self.waited_s[stage], stage))

    def as_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold."""
        found = asdict(self) | {"busy": self.busy, "rows_per_s": self.rows_per_s, "limit": self.limit}
        return found | {"waited_s": dict(self.waited_s), "worked_s": dict(self.worked_s)}


class Batches(Protocol):
    """What is measured: an iterator with counters, such as a `Loader`."""

    def __next__(self) -> Any: ...

    def counters(self) -> dict[str, Any]:
        """Return seconds waited and worked by stage."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


def sweep(
    open_batches: Callable[[Setting], Batches],
    settings: Sequence[Setting],
    batch_rows: int,
    *,
    step_s: float = 0.0,
    seconds: float = 1.0,
    progress: Progress = silent,
) -> list[Measured]:
    """Measure each setting for about `seconds`, after a first batch and a second that warms up."""
    measured = []
    for number, setting in enumerate(settings):
        progress(number, len(settings), "setting", {"now": setting.name})
        start_s = time.perf_counter()
        batches = open_batches(setting)
        try:
            next(batches)
            first_batch_s = time.perf_counter() - start_s
            measured.append(_measure(batches, setting, batch_rows, step_s, seconds, first_batch_s))
        finally:
            batches.close()
    progress(len(settings), len(settings), "setting")
    return measured


def _measure(
    batches: Batches, setting: Setting, batch_rows: int, step_s: float, seconds: float, first_s: float
) -> Measured:
    for _ in range(setting.prefetch + 2 * setting.workers + 1):  # what was made ahead before the clock starts
        _step(step_s)
        next(batches)
    before = batches.counters()
    start_s, cpu_s = time.perf_counter(), time.process_time()
    count, stepped_s = 0, 0.0
    while time.perf_counter() - start_s < seconds:
        stepped_s += _step(step_s)
        next(batches)
        count += 1
    wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
    after = batches.counters()
    waited, worked = (
        {stage: s - before[what].get(stage, 0.0) for stage, s in after[what].items()}
        for what in ("waited_s", "worked_s")
    )
    return Measured(setting, count, count * batch_rows, wall_s, stepped_s, first_s, cpu_s, waited, worked)


def _step(step_s: float) -> float:
    """Take the time of a step; return how long the accelerator was at it.

    A sleep ends a little late. If it ends much later, a thread of the loader held Python's lock: then
    the next step was not queued in time, and the accelerator stood still.
    """
    if not step_s:
        return 0.0
    start_s = time.perf_counter()
    time.sleep(step_s)
    return min(time.perf_counter() - start_s, step_s + _TIMER_SLACK_S)


def settings_of(most_workers: int, prefetches: Sequence[int] = (0, 1, 2, 4)) -> list[Setting]:
    """List what is worth trying: depths without workers, then workers with a depth of 2."""
    counts = [count for count in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if count <= most_workers]
    return [Setting(0, depth) for depth in prefetches] + [Setting(count, 2) for count in counts]


def recommend(measured: Sequence[Measured]) -> Measured | None:
    """Return the smallest setting that keeps the accelerator busy, or as busy as the best within 1 %.

    Without a step there is nothing to keep busy: then the smallest within 5 % of the best rate.
    """
    if not measured:
        return None
    if measured[0].stepped_s:
        wanted = min(ENOUGH, max(one.busy for one in measured) - 0.01)
        good = [one for one in measured if one.busy >= wanted]
    else:
        wanted = 0.95 * max(one.rows_per_s for one in measured)
        good = [one for one in measured if one.rows_per_s >= wanted]
    return min(good, key=lambda one: (one.setting.workers, one.setting.prefetch, -one.busy))


def resized(reader: Reader[Any], folder: Path, rows_of_shard: int) -> Reader[Any]:
    """Write some rows of a dataset again with `rows_of_shard` rows in each shard or row group.

    At most MOST_BYTES of them. Returns: a reader of the copy. Raises: TypeError for a source whose
    shards are not of Marrow's making or Parquet.
    """
    if isinstance(reader, ParquetReader):
        path = folder / "rows.parquet"
        whole = pa.concat_tables(_some(pq.read_table(path, columns=reader.columns) for path in reader.paths))
        pq.write_table(whole, path, row_group_size=rows_of_shard, compression="zstd", compression_level=1)
        return ParquetReader(path, reader.columns, cache_bytes=reader.cache_bytes)
    if isinstance(reader, ShardReader):
        return _resized_shards(reader, folder, rows_of_shard)
    raise TypeError(f"{type(reader).__name__} cannot be written again")


def _resized_shards(reader: ShardReader, folder: Path, rows_of_shard: int) -> ShardReader:
    paths = [reader.folder / entry.name for entry in reader.manifest.shards]
    with_rows = _some(pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths)
    whole = pa.concat_tables(with_rows).combine_chunks()
    entries = []
    for number in range(math.ceil(whole.num_rows / rows_of_shard)):
        part = whole.slice(number * rows_of_shard, rows_of_shard).combine_chunks()
        path = folder / f"train-{number:05d}.arrow"
        with pa.ipc.new_file(str(path), part.schema) as writer:
            writer.write_table(part)
        entries.append(ShardEntry(path.name, part.num_rows, path.stat().st_size, check_file(path)))
    manifest = replace(Manifest.read(reader.folder), shards=tuple(entries), num_rows=whole.num_rows)
    manifest.write(folder)
    return ShardReader(folder)


def _some(tables: Iterator[pa.Table]) -> list[pa.Table]:
    """Take tables up to MOST_BYTES, the first at any rate."""
    taken: list[pa.Table] = []
    for found in tables:
        taken.append(found)
        if sum(one.nbytes for one in taken) >= MOST_BYTES:
            break
    return taken


def made_up(folder: Path, rows: int = 20_000) -> Path:
    """Write Parquet of made-up rows: an id, 64 tokens and a text each; return its folder."""
    draw = np.random.default_rng(0)
    tokens = pa.FixedSizeListArray.from_arrays(draw.integers(0, 50_000, 64 * rows, dtype=np.int32), 64)
    texts = [f"row {row} of made-up text " * 8 for row in range(rows)]
    out = folder / "made-up"
    out.mkdir()
    table = pa.table({"id": np.arange(rows), "tokens": tokens, "text": texts})
    pq.write_table(table, out / "rows.parquet", row_group_size=1024)
    return out


def describe(one: Measured) -> list[str]:
    """Write a measured setting as the cells of a row, for `HEADER`."""
    waits = sorted(one.waited_s.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{stage} {s / one.wall_s:.0%}" for stage, s in waits if s >= 0.005 * one.wall_s)
    size = "" if one.setting.rows_of_shard is None else f"{one.setting.rows_of_shard:,}"
    return [
        str(one.setting.workers),
        str(one.setting.prefetch),
        size,
        f"{one.busy:.1%}" if one.stepped_s else "",
        f"{one.rows_per_s:,.0f}",
        f"{one.first_batch_s * 1e3:.0f} ms",
        f"{one.cpu_s / max(1, one.batches) * 1e3:.2f} ms",
        shown,
    ]


HEADER = ("workers", "prefetch", "rows a shard", "busy", "rows/s", "first batch", "CPU here a batch", "waits")


def page(title: str, measured: Sequence[Measured], sizes: Sequence[Measured], advice: str) -> str:
    """Write what was measured as one HTML page that needs nothing else."""
    best = recommend(measured)
    report = Page(title, "what each setting of the loader does to a step")
    if best is not None:
        share = f"{best.busy:.1%} busy" if best.stepped_s else ""
        report.lead(tiles(Tile("smallest that is enough", best.setting.name, share)), prose(advice))
    has_step = bool(measured and measured[0].stepped_s)
    unit = "busy, %" if has_step else "rows a second"

    def height(one: Measured) -> float:
        return 100 * one.busy if has_step else one.rows_per_s

    by_workers = [one for one in measured if one.setting.prefetch == 2]
    by_prefetch = [one for one in measured if not one.setting.workers]
    report.section(
        "Workers",
        line_chart(
            "What workers bring",
            [Series("prefetch 2", [(one.setting.workers, height(one)) for one in by_workers])],
            x_label="workers",
            y_label=unit,
            from_zero=True,
        ),
    )
    report.section(
        "Prefetch",
        bar_chart(
            f"Batches made ahead on a thread: {unit}",
            [Bar(f"prefetch {one.setting.prefetch}", height(one), ours=one is best) for one in by_prefetch],
        ),
    )
    report.section("All settings", table(HEADER, [describe(one) for one in measured]))
    report.section(
        "Rows of a shard or row group",
        bar_chart(
            unit.capitalize(),
            [Bar(f"{one.setting.rows_of_shard:,} rows", height(one), note=one.setting.name) for one in sizes],
        ),
        table(HEADER, [describe(one) for one in sizes]),
    )
    return report.html()
