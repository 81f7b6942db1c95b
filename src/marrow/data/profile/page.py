"""Profiles and drift as pages: one file each, for any browser, without a network."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from marrow.core.charts import Bar, bar_chart
from marrow.core.errors import explain_os_errors
from marrow.core.files import atomic_file
from marrow.core.page import Cell, Html, Page, Tile, compact, details, prose, table, tiles
from marrow.data.profile.drift import ColumnDrift, Drift
from marrow.data.profile.record import SHARES, ColumnProfile, Distribution, Profile

MAX_DRAWN = 200  # columns with charts of their own; the table names all that it has room for
MAX_BARS = 12
_FAR_FUTURE_S = 253_402_300_799.0  # the last second that a date has


def write_profile_page(profile: Profile, path: Path, title: str = "profile") -> None:
    """Write a profile as a page."""
    _write(path, profile_page(profile, title))


def write_drift_page(drift: Drift, path: Path, title: str = "drift") -> None:
    """Write what changed between two profiles as a page."""
    _write(path, drift_page(drift, title))


def profile_page(profile: Profile, title: str = "profile") -> str:
    """Draw a profile."""
    files = f"{len(profile.files):,} files" if len(profile.files) != 1 else profile.files[0]
    page = Page(title, f"{profile.rows:,} rows, {len(profile.columns):,} columns of {files}")
    with_nulls = sum(column.nulls > 0 for column in profile.columns)
    empty = sum(column.nulls == column.rows for column in profile.columns if column.rows)
    page.lead(
        tiles(
            Tile("rows", f"{profile.rows:,}"),
            Tile("columns", f"{len(profile.columns):,}"),
            Tile("with nulls", f"{with_nulls:,}", f"{empty:,} hold nothing else"),
        )
    )
    rows = [_line(column) for column in profile.columns]
    header = ("column", "type", "nulls", "distinct", "least", "median", "greatest", "most frequent")
    page.section("Columns", table(header, rows, caption="Columns"))
    for column in profile.columns[:MAX_DRAWN]:
        page.section(column.name or "(no name)", *_column(column))
    if len(profile.columns) > MAX_DRAWN:
        page.section("More columns", prose(f"Charts of the first {MAX_DRAWN} columns only."))
    return page.html()


def drift_page(drift: Drift, title: str = "drift") -> str:
    """Draw what changed."""
    page = Page(title, f"{drift.old_rows:,} rows before, {drift.new_rows:,} now: {drift.verdict}")
    page.lead(
        tiles(
            *(
                Tile(verdict, f"{len(drift.of(verdict)):,}", "columns")
                for verdict in ("drift", "changed", "same")
            )
        )
    )
    worst = sorted(
        drift.columns, key=lambda c: ({"drift": 0, "changed": 1, "same": 2}[c.verdict], -(c.psi or 0))
    )
    rows: list[Sequence[Cell]] = [
        (
            column.name,
            column.verdict,
            column.note,
            column.psi,
            column.ks,
            f"{column.null_share[0]:.1%}",
            f"{column.null_share[1]:.1%}",
        )
        for column in worst
    ]
    header = ("column", "verdict", "why", "psi", "ks", "nulls before", "nulls now")
    limits = drift.limits
    note = (
        f"psi: {limits.psi_warn:g} changed, {limits.psi_fail:g} drift; "
        f"ks: {limits.ks_warn:g} changed, {limits.ks_fail:g} drift; each beyond what chance explains. "
        "Categories have psi alone, and by it a chi-square test: psi / (1/before + 1/now), in rows, is "
        "about the chi-square of their counts, and chance explains 3.5 standard deviations of that."
    )
    page.section("Columns", table(header, rows, caption="Columns, most changed first"), prose(note))
    for column in worst[:MAX_DRAWN]:
        if column.verdict != "same" and column.parts:
            page.section(column.name or "(no name)", *_changes(column))
    return page.html()


def _line(column: ColumnProfile) -> tuple[Cell, ...]:
    numbers = column.numbers
    median = ""
    if numbers is not None and numbers.count:
        median = _value(numbers.quantiles[SHARES.index(0.5)], column)
        median += f" {column.of}" if column.of in ("characters", "bytes", "items") else ""
    most = f"{column.top[0][0]} ({column.top[0][1]:,})" if column.top and column.top[0][1] > 1 else ""
    return (
        column.name,
        column.type,
        f"{column.null_share:.1%}",
        _distinct(column),
        _cut(column.minimum),
        median,
        _cut(column.maximum),
        _cut(most),
    )


def _column(column: ColumnProfile) -> list[Html]:
    blocks = []
    numbers = column.numbers
    if numbers is not None and numbers.count and len(numbers.bins) > 1:
        blocks.append(_histogram(column, numbers))
    if column.top and column.top[0][1] > 1:
        bars = [
            Bar(_cut(value) or '""', count, f"{count:,}", f"{count / column.rows:.1%}")
            for value, count in column.top[:MAX_BARS]
        ]
        note = f"Counts may lack up to {column.top_error:,}." if column.top_error else ""
        blocks.append(bar_chart("Most frequent values", bars, note=note, top=column.rows))
    facts = [
        ("type", column.type),
        ("nulls", f"{column.nulls:,} of {column.rows:,}"),
        ("distinct", _distinct(column)),
        ("least", _cut(column.minimum)),
        ("greatest", _cut(column.maximum)),
    ]
    facts += [("NaN", f"{column.nan:,}")] if column.nan else []
    facts += [("infinite", f"{column.infinite:,}")] if column.infinite else []
    if numbers is not None and numbers.count:
        facts += [
            ("mean", "" if numbers.mean is None else _value(numbers.mean, column)),
            ("standard deviation", "" if numbers.deviation is None else compact(numbers.deviation)),
        ]
        facts += [
            (f"{share:.0%}", _value(value, column))
            for share, value in zip(SHARES, numbers.quantiles, strict=True)
        ]
        if numbers.rank_error:
            facts.append(("ranks are off by at most", f"{numbers.rank_error:.2%}"))
    what = f"Numbers, of {column.of}" if column.of != "values" else "Numbers"
    return [*blocks, details(what, table(("what", "value"), facts))]


def _histogram(column: ColumnProfile, numbers: Distribution) -> Html:
    bars = []
    for i, (low, high, count) in enumerate(numbers.bins):
        name = f"{_value(low, column)} to {_value(high, column)}"
        if i == 0:
            name = f"up to {_value(high, column)}"
        elif i == len(numbers.bins) - 1:
            name = f"from {_value(low, column)}"
        bars.append(Bar(name, count, compact(count), f"{count / max(1, numbers.count):.1%}"))
    return bar_chart(f"Distribution of {column.of}", bars)


def _changes(column: ColumnDrift) -> list[Html]:
    rows = [
        (_cut(part.name), f"{part.old:.2%}", f"{part.new:.2%}", f"{100 * (part.new - part.old):+.2f} points")
        for part in column.parts
    ]
    bars = [
        bar
        for part in sorted(column.parts, key=lambda part: -abs(part.new - part.old))[:MAX_BARS]
        for bar in (
            Bar(_cut(part.name), part.old, f"{part.old:.1%}", "before"),
            Bar(_cut(part.name), part.new, f"{part.new:.1%}", "now", ours=True),
        )
    ]
    shown = (
        [f"psi {column.psi:.3g} (chance explains {column.psi_chance:.2g})"] if column.psi is not None else []
    )
    if column.ks is not None:
        shown.append(f"ks {column.ks:.3g}, off by at most {column.ks_error:.2g}")
    return [
        prose("; ".join([*filter(None, [column.note]), *shown])),
        bar_chart("Shares of the rows, most changed first", bars),
        details("Numbers", table(("part", "before", "now", "change"), rows)),
    ]


def _value(value: float, column: ColumnProfile) -> str:
    if column.of == "seconds" and column.kind != "time" and abs(value) < _FAR_FUTURE_S:
        try:
            when = datetime.fromtimestamp(value, UTC)
            return when.strftime("%Y-%m-%d" if column.kind == "date" else "%Y-%m-%d %H:%M:%S")
        except (ValueError, OverflowError, OSError):  # before the year 1
            return compact(value)
    return compact(value)


def _distinct(column: ColumnProfile) -> str:
    if column.distinct is None:
        return ""
    return f"{column.distinct:,}" if not column.distinct_error else f"about {compact(column.distinct)}"


def _cut(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= 40 else f"{text[:39]}…"


def _write(path: Path, html: str) -> None:
    with explain_os_errors("write the page", path), atomic_file(path, "w") as file:
        file.write(html)
