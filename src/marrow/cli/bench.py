"""`marrow bench`: measure what runs, with the measuring module of the layer itself."""

import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from marrow.cli import console
from marrow.core.errors import DataError, ServeError, UsageError, explain_os_errors
from marrow.core.files import atomic_file

if TYPE_CHECKING:
    from marrow.loader.sweep import Batches, Measured, Setting


CACHE_BYTES = 1 << 30  # of the shards of a URL, while they are measured


@click.group("bench")
def command() -> None:
    """Measure a layer, or any OpenAI-compatible server."""


@command.command("serve")
@click.argument("url")
@click.option("--prompt", "prompts", multiple=True, help="A prompt to send; several are taken in turn.")
@click.option("--requests", type=click.IntRange(1), default=64, show_default=True)
@click.option("--concurrency", type=click.IntRange(1), default=8, show_default=True)
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Requests a second: an open loop.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--model", help="By default the first that the server lists.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def serve(
    url: str,
    prompts: tuple[str, ...],
    requests: int,
    concurrency: int,
    rate: float | None,
    max_tokens: int,
    model: str | None,
    as_json: bool,
) -> None:
    """Load the OpenAI-compatible server at URL and print what its clients felt."""
    from marrow.serve.load import Load, drive

    load = Load(prompts or ("def read(self",), requests, concurrency, rate, max_tokens, model)
    with console.progress_of("bench") as progress:
        measured, _ = drive(url, load, progress)
    if measured["failed"] == measured["requests"]:
        raise ServeError(
            f"all {measured['requests']} requests to {url} failed: {next(iter(measured['errors']))}",
            hint="is it a server of the OpenAI API, and does it serve that model?",
        )
    if as_json:
        click.echo(json.dumps(measured, indent=2))
        return
    wall = console.duration(measured["wall_s"])
    click.echo(f"{measured['requests']} requests, {measured['failed']} failed, in {wall}")
    click.echo(f"{console.quantity(measured['completion_tokens_per_s'])} completion tokens/s")
    for name in ("ttft_ms", "itl_ms", "e2e_ms"):
        if found := measured[name]:
            figures = "  ".join(f"{rank} {found[rank]:.1f}" for rank in ("p50", "p90", "p99"))
            click.echo(f"{name:<8} {figures}")


@command.command("kernels")
@click.option("--op", "ops", multiple=True, help="An operator; all by default.")
@click.option(
    "--dtype", "dtypes", type=click.Choice(["fp32", "bf16"]), multiple=True, default=("fp32", "bf16")
)
@click.option(
    "--seconds", type=click.FloatRange(0.001), default=0.1, show_default=True, help="For each path and shape."
)
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with the roofline plot there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--budget", "budget_s", type=click.FloatRange(1), help="GPU: all cases within so many seconds.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="GPU: write kernels.jsonl and kernels.txt there."
)
@click.option("--tune", is_flag=True, help="GPU: find the fastest tile configurations and keep them.")
def kernels(
    ops: tuple[str, ...],
    dtypes: tuple[str, ...],
    seconds: float,
    html: Path | None,
    as_json: bool,
    budget_s: float | None,
    out: Path | None,
    tune: bool,
) -> None:
    """Measure each operator against this machine's roofline.

    On one thread of the CPU, every path; the one that is taken has a star, time is that of a forward. With
    --budget, --out or --tune on the GPU, beside its peers and against the goals.
    """
    import torch

    from marrow.cli.tables import measured_table
    from marrow.kernels import device, roofline

    if budget_s is not None or out is not None or tune:
        if ops or html is not None or as_json:
            raise UsageError("--op, --html and --json are of the CPU's roofline, not of the GPU's cases")
        _gpu_kernels(540.0 if budget_s is None else budget_s, out, tune)
        return
    device.raise_malloc_thresholds()
    torch.set_num_threads(1)
    operators = roofline.load_operators(ops)
    rows: list[dict[str, Any]] = []
    with console.progress_of("bench") as progress:
        for name in dict.fromkeys(dtypes):
            dtype = torch.float32 if name == "fp32" else torch.bfloat16
            rows += roofline.measure(operators, dtype=dtype, seconds=seconds, progress=progress)
    if html is not None:
        with explain_os_errors("write the page", html), atomic_file(html, "w") as file:
            file.write(roofline.page(rows))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo(measured_table(roofline.HEADER, [roofline.describe(row) for row in rows]), nl=False)


def _gpu_kernels(budget_s: float, out: Path | None, tune: bool) -> None:
    """Measure or tune the Triton kernels on the CUDA device."""
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            "--budget, --out and --tune need a CUDA device, and torch sees none here",
            hint="leave them away: the CPU's roofline needs none; `marrow doctor` shows the devices",
        )
    from marrow.kernels import gpu_bench, gpu_cases, tuning

    if tune:
        path = tuning.tune(gpu_cases.all_cases(), device="cuda", budget_s=budget_s, tell=console.say)
        click.echo(str(path))
        return
    bench = gpu_bench.Bench(device="cuda", budget_s=budget_s, out=out)
    rows = bench.run(gpu_cases.all_cases())
    click.echo(gpu_bench.table(rows, bench.roofs, gpu_bench.facts("cuda")), nl=False)


@command.command("loader")
@click.argument("source", required=False)
@click.option(
    "--step-ms", type=click.FloatRange(0), default=10.0, show_default=True, help="Of a simulated step."
)
@click.option("--batch-rows", type=click.IntRange(1), default=32, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(0.05), default=1.0, show_default=True, help="For each setting."
)
@click.option("--workers", type=click.IntRange(0), help="The most to try; by default one a core.")
@click.option("--transform", "function", help="MODULE:NAME of a transform(sample, position) of yours.")
@click.option("--columns", help="Columns to read, with commas; Parquet only.")
@click.option("--window", type=click.IntRange(1), help="Shards or row groups shuffled together.")
@click.option("--sizes/--no-sizes", default=True, help="Write some rows again to measure shard sizes.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with plots there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def loader(
    source: str | None,
    step_ms: float,
    batch_rows: int,
    seconds: float,
    workers: int | None,
    function: str | None,
    columns: str | None,
    window: int | None,
    sizes: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Measure what workers, prefetch and shard sizes do to a training step that reads SOURCE.

    SOURCE is a folder (shards, Parquet, MDS, litdata), a pattern of Parquet files, a URL of shards, or a
    name of the store; without one, rows are made up. The step is simulated: it takes --step-ms and no
    CPU, as on an accelerator.
    """
    from marrow.cli.tables import measured_table
    from marrow.loader import sweep

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="marrow-bench-")))
        where = _rows_of(source, folder, stack)
        transform = None if function is None else _function(function)
        names = None if columns is None else columns.split(",")

        def open_batches(setting: "Setting") -> "Batches":
            return _open_loader(where, setting, batch_rows, transform, names, folder)

        most = len(os.sched_getaffinity(0)) if workers is None else workers
        tried = [sweep.Setting(one.workers, one.prefetch, window) for one in sweep.settings_of(most)]
        with console.progress_of("bench") as progress:
            measured = sweep.sweep(
                open_batches, tried, batch_rows, step_s=step_ms / 1e3, seconds=seconds, progress=progress
            )
            best = sweep.recommend(measured)
            assert best is not None, "there are settings to try"
            varied = _sizes(best, where, window) if sizes else []
            by_size = sweep.sweep(
                open_batches, varied, batch_rows, step_s=step_ms / 1e3, seconds=seconds, progress=progress
            )
    advice = _advice(best)
    if html is not None:
        with explain_os_errors("write the page", html), atomic_file(html, "w") as file:
            file.write(sweep.page(f"Loader: {source or 'made-up rows'}", measured, by_size, advice))
    if as_json:
        found: dict[str, Any] = {
            "source": source,
            "step_ms": step_ms,
            "batch_rows": batch_rows,
            "settings": [one.as_dict() for one in measured],
            "sizes": [one.as_dict() for one in by_size],
            "recommended": best.as_dict(),
            "advice": advice,
        }
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(measured_table(sweep.HEADER, [sweep.describe(one) for one in measured]), nl=False)
    if by_size:
        click.echo(measured_table(sweep.HEADER, [sweep.describe(one) for one in by_size]), nl=False)
    click.echo(advice)


def _rows_of(source: str | None, folder: Path, stack: ExitStack) -> str:
    """Return the path or URL that a source on the command line means; make rows up if there is none."""
    from marrow.cli.target import find_artifact
    from marrow.store.remote.client import is_url

    if source is None:
        from marrow.loader.sweep import made_up

        return str(made_up(folder))
    if is_url(source) or Path(source).exists() or any(letter in source for letter in "*?["):
        return source
    store, artifact = stack.enter_context(find_artifact(source))
    if "manifest.json" not in {file.name for file in artifact.files}:
        raise DataError(
            f"{source} is an artifact of kind {artifact.kind}, not shards",
            hint="give the id of the shards step (`marrow lineage` shows it), or a folder",
        )
    return str(store.view(artifact))


def _function(name: str) -> Callable[..., Any]:
    """Import MODULE:NAME, the working folder first."""
    module, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"--transform {name}: {error}", hint="write MODULE:NAME of a function in the working folder"
        ) from error
    finally:
        sys.path.pop(0)
    return function


def _open_loader(
    where: str,
    setting: "Setting",
    batch_rows: int,
    transform: Callable[..., Any] | None,
    columns: list[str] | None,
    folder: Path,
) -> "Batches":
    from marrow.loader.loader import Loader
    from marrow.loader.reader import ShardReader
    from marrow.loader.samples import Collate
    from marrow.loader.streaming.cache import Cache
    from marrow.loader.sweep import resized
    from marrow.loader.torch_dataset import open_source
    from marrow.store.remote.client import is_url

    options: dict[str, Any] = {
        "prefetch": setting.prefetch,
        "workers": setting.workers,
        "window": setting.window,
    }
    if is_url(where) and not where.startswith("file:"):
        cache = folder / "cache"  # begun anew, so that each setting fetches what it reads
        shutil.rmtree(cache, ignore_errors=True)
        return Loader(where, batch_rows, 0, cache=Cache(cache, CACHE_BYTES), **options)
    reader = open_source(where, columns)
    if setting.rows_of_shard is not None:
        copy = folder / f"rows-{setting.rows_of_shard}"
        if copy.exists():
            reader = open_source(copy, columns)
        else:
            copy.mkdir()
            reader = resized(reader, copy, setting.rows_of_shard)
    if isinstance(reader, ShardReader):
        return Loader(reader, batch_rows, 0, **options)
    return Loader(reader, batch_rows, 0, collate=Collate(transform), **options)


def _sizes(best: "Measured", where: str, window: int | None) -> "list[Setting]":
    """List the sizes of shards or row groups to try, around those that the source has."""
    from dataclasses import replace

    from marrow.loader.formats.parquet import ParquetReader
    from marrow.loader.reader import ShardReader
    from marrow.loader.torch_dataset import open_source
    from marrow.store.remote.client import is_url

    if is_url(where):
        return []
    reader = open_source(where)
    if not isinstance(reader, ShardReader | ParquetReader):
        return []
    usual = int(sorted(reader.rows_of_shards.tolist())[len(reader.rows_of_shards) // 2])
    reader.close()
    counts = sorted({max(1, usual // 16), max(1, usual // 4), usual, usual * 4})
    return [replace(best.setting, rows_of_shard=count, window=window) for count in counts]


def _advice(best: "Measured") -> str:
    """Say which setting to take, and what still limits it."""
    from marrow.cli.tables import ADVICE, WAIT
    from marrow.loader.sweep import ENOUGH

    setting = f"loader.workers = {best.setting.workers}, loader.prefetch = {best.setting.prefetch}"
    if not best.stepped_s:
        return f"{setting} is the smallest within 5 % of the best rate, {best.rows_per_s:,.0f} rows/s"
    if best.busy >= ENOUGH:
        return f"{setting} is the smallest that keeps the accelerator busy ({best.busy:.1%} of the time)"
    advice = ADVICE.get(f"{WAIT}: {best.limit}", ADVICE[WAIT])
    return f"{setting} comes nearest: {best.busy:.1%} of the time busy; {best.limit}: {advice}"
