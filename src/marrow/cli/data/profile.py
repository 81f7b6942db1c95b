"""`marrow data profile` and `marrow data drift`: what a dataset holds, and what changed in it."""

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import click

from marrow.cli import console
from marrow.cli.data.tables import choose, open_tables_of
from marrow.cli.engine import engine_of, engine_options
from marrow.core.errors import explain_os_errors
from marrow.core.page import visible
from marrow.data.engine import INLINE, Engine
from marrow.data.profile.columns import profile as look
from marrow.data.profile.drift import Drift, DriftLimits
from marrow.data.profile.drift import drift as compare
from marrow.data.profile.page import write_drift_page, write_profile_page
from marrow.data.profile.record import PROFILE, SHARES, Profile, read_profile
from marrow.data.scan import open_tables

MEDIAN = SHARES.index(0.5)
SHOWN = 200  # lines on stdout; the page and the JSON have all


@click.command("profile")
@click.argument("target")
@click.option("--table", help="Which table, where there are several: the name of its file.")
@click.option("--out", type=click.Path(path_type=Path), help="A folder for profile.json and profile.html.")
@click.option("--json", "as_json", is_flag=True, help="Print the profile as JSON.")
@engine_options("looks at the columns of Parquet and Arrow files; the profile is the same")
def profile(
    target: str, table: str | None, out: Path | None, as_json: bool, engine_name: str, workers: int
) -> None:
    """Describe the columns of TARGET: a file, folder, glob, or a name in the store."""
    with closing(engine_of(engine_name, workers)) as engine:
        made = profile_of(target, table, engine)
    if out is not None:
        _make(out)
        made.write(out / PROFILE)
        write_profile_page(made, out / "profile.html", target)
        console.say(f"wrote {out / PROFILE} and {out / 'profile.html'}")
    click.echo(json.dumps(made.as_dict(), ensure_ascii=False) if as_json else _profile_text(made))


@click.command("drift")
@click.argument("old")
@click.argument("new")
@click.option("--table", help="Which table, where there are several: the name of its file.")
@click.option("--psi", "psi_fail", type=click.FloatRange(min=0), default=0.25, show_default=True)
@click.option("--ks", "ks_fail", type=click.FloatRange(0, 1), default=0.2, show_default=True)
@click.option("--check", is_flag=True, help="End with status 1 if a column has drifted.")
@click.option("--out", type=click.Path(path_type=Path), help="A folder for drift.json and drift.html.")
@click.option("--json", "as_json", is_flag=True, help="Print the drift as JSON.")
@click.pass_context
def drift(
    context: click.Context,
    old: str,
    new: str,
    table: str | None,
    psi_fail: float,
    ks_fail: float,
    check: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Show which columns of NEW are distributed otherwise than those of OLD.

    Both are files, folders, globs, names in the store, or a profile.json. A column has drifted from
    --psi and --ks on; from two fifths and a half of them it has changed.
    """
    limits = DriftLimits(0.4 * psi_fail, psi_fail, 0.5 * ks_fail, ks_fail)
    found = compare(profile_of(old, table), profile_of(new, table), limits)
    if out is not None:
        _make(out)
        found.write(out / "drift.json")
        write_drift_page(found, out / "drift.html", f"{old} -> {new}")
        console.say(f"wrote {out / 'drift.json'} and {out / 'drift.html'}")
    click.echo(json.dumps(found.as_dict(), ensure_ascii=False) if as_json else _drift_text(found))
    context.exit(1 if check and found.verdict == "drift" else 0)


def profile_of(target: str, table: str | None, engine: Engine = INLINE) -> Profile:
    """Make the profile of a target, or read it where the target is a profile.json."""
    path = Path(target)
    if path.suffix == ".json" and path.is_file():
        return read_profile(path)
    with open_tables_of(target) as tables, console.progress_of("profile") as progress:
        opened = open_tables(choose(tables, table, target))
        if opened.told:
            console.say(f"warning: {opened.told}")
        return look(opened, progress, engine=engine)


def _profile_text(made: Profile) -> str:
    rows = [("column", "type", "nulls", "distinct", "least", "median", "greatest", "most frequent")]
    for column in made.columns[:SHOWN]:
        numbers, of = column.numbers, "" if column.of in ("values", "seconds") else f" {column.of}"
        is_time = column.of == "seconds"
        median = f"{numbers.quantiles[MEDIAN]:g}{of}" if numbers and numbers.count and not is_time else ""
        top = f"{column.top[0][0]} ({column.top[0][1]:,})" if column.top and column.top[0][1] > 1 else ""
        distinct = "" if column.distinct is None else f"{column.distinct:,}"
        rows.append(
            (
                column.name,
                column.type,
                f"{column.null_share:.1%}",
                f"~{distinct}" if column.distinct_error else distinct,
                column.minimum or "",
                median,
                column.maximum or "",
                top,
            )
        )
    return "\n".join(
        [f"{made.rows:,} rows, {len(made.columns):,} columns", *_aligned(rows, len(made.columns))]
    )


def _drift_text(found: Drift) -> str:
    rows = [("column", "verdict", "psi", "ks", "why")]
    for column in [*found.of("drift"), *found.of("changed"), *found.of("same")][:SHOWN]:
        psi = "" if column.psi is None else f"{column.psi:.3f}"
        ks = "" if column.ks is None else f"{column.ks:.3f}"
        rows.append((column.name, column.verdict, psi, ks, column.note))
    head = f"{found.verdict}: {found.old_rows:,} rows before, {found.new_rows:,} now"
    return "\n".join([head, *_aligned(rows, len(found.columns))])


def _aligned(rows: Sequence[tuple[str, ...]], total: int) -> list[str]:
    """Set rows in columns; long values are cut, and controls cannot reach the terminal."""
    cut = [[_cut(visible(cell).replace("\n", " ")) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cut, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cut]
    left = total - (len(rows) - 1)
    return lines + ([f"and {left:,} more; --json and --out have all"] if left > 0 else [])


def _cut(text: str) -> str:
    return text if len(text) <= 32 else f"{text[:31]}…"


def _make(folder: Path) -> None:
    with explain_os_errors("make the folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
