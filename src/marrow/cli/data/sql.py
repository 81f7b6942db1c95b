"""`marrow data sql`: ask a dataset with SQL."""

import base64
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from marrow.cli import console
from marrow.cli.data.tables import open_tables_of
from marrow.core.errors import UsageError, explain_os_errors
from marrow.core.files import atomic_file
from marrow.core.page import visible
from marrow.data.sql import query

SHOWN_ROWS = 40
SHOWN_CHARS = 60
SUFFIXES = (".parquet", ".csv", ".jsonl", ".arrow")


@click.command("sql")
@click.argument("target")
@click.argument("question", metavar="SELECT")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write to a .parquet, .csv, .jsonl or .arrow file."
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each row.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
def sql(target: str, question: str, out: Path | None, as_csv: bool, as_json: bool, threads: int) -> None:
    """Ask the tables of TARGET one SELECT.

    Each table is named after its file (rows-00000.parquet is a part of `rows`); `data` is TARGET
    itself: its only table, else documents, rows or train. Nothing else can be read, and nothing is
    changed.

    marrow data sql reviews "select stars, count(*) n from data group by stars"
    """
    if as_csv and as_json:
        raise UsageError("--csv and --json exclude each other", hint="ask for one of them")
    if out is not None and out.suffix not in SUFFIXES:
        raise UsageError(f"{out}: no kind of file", hint=f"end it in one of {', '.join(SUFFIXES)}")
    with open_tables_of(target) as tables:
        reader = query(question, tables, threads=threads, say=lambda told: console.say(f"warning: {told}"))
        if out is not None:
            rows = _write(reader, out)
            console.say(f"wrote {rows:,} rows to {out}")
        elif as_csv:
            _print_csv(reader)
        elif as_json:
            for batch in reader:
                for row in batch.to_pylist():
                    click.echo(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False))
        else:
            _print_table(reader)


def _write(reader: pa.RecordBatchReader, out: Path) -> int:
    """Write the answer as a file of its suffix's kind; return the rows."""
    rows = 0
    with explain_os_errors("write the answer", out), atomic_file(out) as file:
        writer: Any = _writer(out.suffix, file, reader.schema)
        for batch in reader:
            rows += batch.num_rows
            if writer is None:
                for row in batch.to_pylist():
                    line = json.dumps(_plain(row), ensure_ascii=False, allow_nan=False)
                    file.write(line.encode("utf-8", "replace") + b"\n")
            else:
                writer.write_batch(batch)
        if writer is not None:
            writer.close()
    return rows


def _writer(suffix: str, file: Any, schema: pa.Schema) -> Any:
    if suffix == ".parquet":
        return pq.ParquetWriter(file, schema, compression="zstd")
    if suffix == ".csv":
        return pyarrow.csv.CSVWriter(file, schema)
    if suffix == ".arrow":
        return pa.ipc.new_file(file, schema)
    return None


def _print_csv(reader: pa.RecordBatchReader) -> None:
    stream = sys.stdout.buffer
    writer = _writer(".csv", stream, reader.schema)
    for batch in reader:
        writer.write_batch(batch)
    writer.close()
    stream.flush()


def _print_table(reader: pa.RecordBatchReader) -> None:
    """Print the first rows, set in columns."""
    shown = [list(reader.schema.names)]
    total = 0
    for batch in reader:
        room = SHOWN_ROWS - total
        if room > 0:
            shown += [[_cell(value) for value in row] for row in _rows(batch.slice(0, room))]
        total += batch.num_rows
    cut = [[visible(cell).replace("\n", " ") for cell in row] for row in shown]
    widths = [max(map(len, column)) for column in zip(*cut, strict=True)]
    numbers = [pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in reader.schema.types]
    for row in cut:
        cells = (
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(row, widths, numbers, strict=True)
        )
        click.echo("  ".join(cells).rstrip())
    if total > SHOWN_ROWS:
        console.say(f"{total:,} rows, the first {SHOWN_ROWS} are shown; --json, --csv and --out give all")


def _rows(batch: pa.RecordBatch) -> Iterator[tuple[Any, ...]]:
    return zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = str(value)
    if isinstance(value, list | dict | tuple | bytes):
        text = json.dumps(_plain(value), ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARS else f"{text[: SHOWN_CHARS - 1]}…"


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it: NaN and infinities are null, bytes base64, times ISO text."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
