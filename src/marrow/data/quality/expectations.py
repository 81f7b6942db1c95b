"""Declared expectations: what must hold of rows, told before anything is made of them.

    report = check_expectations(paths, {"price": Expectation(min=0, unique=True)})
    report.failed            # an expectation of level "fail" does not hold
    report.results[0]        # price.min: 3 of 1,000 rows failed, the first of them with file and line

All checks of all columns run in one pass over the files, on Arrow's kernels, in bounded memory;
what is unique and what refers to another table is decided exactly, out of core (`keys.py`). A
check that the column cannot answer (no such column, a pattern on numbers, a range on lists) has
failed, whatever its level: an expectation never holds because it was not looked at.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from marrow.core.errors import DataError, SourceError, explain_os_errors
from marrow.core.files import atomic_file
from marrow.core.progress import Progress, silent
from marrow.core.span import span
from marrow.data.keys import MEMORY_BYTES, KeyStore, keys_of, missing, repeated
from marrow.data.quality.checks import CannotCheckError, Test, checks_of, limit_of, type_matches
from marrow.data.quality_config import Expectation, Level
from marrow.data.scan import Tables, nearest, open_tables
from marrow.data.tables import parts

EXPECTATIONS = "expectations.json"
MAX_SAMPLES = 5
_SHOWN_CHARS = 120
Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A row that failed: its source file and line, and the value as text."""

    file: str
    line: int
    value: str | None


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What one check found: `failed` of `rows` rows; `note` says why where rows do not."""

    name: str
    column: str
    check: str
    limit: str
    level: Level
    status: Status
    rows: int
    failed: int
    note: str = ""
    samples: tuple[Sample, ...] = ()

    @property
    def share(self) -> float:
        """Share of the rows that failed."""
        return self.failed / self.rows if self.rows else 0.0

    def told(self) -> str:
        """Say it in one line."""
        what = f"{self.name} ({self.limit})"
        if self.note:
            return f"{what}: {self.note}"
        first = self.samples[0] if self.samples else None
        where = f", first {first.value} at {first.file}:{first.line}" if first else ""
        return f"{what}: {self.failed:,} of {self.rows:,} rows{where}"


@dataclass(frozen=True, slots=True)
class ExpectationReport:
    """All results, in the order of the expectations' names and of their checks."""

    rows: int
    results: tuple[CheckResult, ...]

    @property
    def failed(self) -> bool:
        """Tell whether an expectation of level "fail" does not hold."""
        return any(result.status == "fail" for result in self.results)

    def of(self, status: Status) -> tuple[CheckResult, ...]:
        """Return the results with a status."""
        return tuple(result for result in self.results if result.status == status)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "rows": self.rows,
            "failed": self.failed,
            "results": [asdict(result) | {"share": result.share} for result in self.results],
        }

    def facts(self) -> dict[str, int]:
        """Return how many checks passed, warned and failed."""
        return {status: len(self.of(status)) for status in ("pass", "warn", "fail")}

    def shown_as(self, change: Callable[[str], str]) -> "ExpectationReport":
        """Return the report with the values of its samples changed, such as without personal data."""

        def changed(sample: Sample) -> Sample:
            return sample if sample.value is None else replace(sample, value=change(sample.value))

        results = (replace(one, samples=tuple(map(changed, one.samples))) for one in self.results)
        return replace(self, results=tuple(results))

    def write(self, path: Path) -> None:
        """Write expectations.json."""
        with explain_os_errors("write the expectations' results", path), atomic_file(path, "w") as file:
            file.write(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n")

    def refuse(self) -> None:
        """Raise DataError if it has failed, naming what does not hold."""
        failures = self.of("fail")
        if failures:
            shown = "\n  ".join(result.told() for result in failures[:8])
            more = f"\n  and {len(failures) - 8} more" if len(failures) > 8 else ""
            raise DataError(
                f"{len(failures)} of {len(self.results)} expectations do not hold:\n  {shown}{more}",
                hint='mend the rows, or the limits in [data.expect]; level = "warn" only tells',
            )


def check(rows_folder: Path, expectations: Mapping[str, Expectation]) -> ExpectationReport:
    """Check the rows-*.parquet of a folder that `ingest` wrote; see `check_expectations`."""
    return check_expectations(parts(rows_folder, "rows-*.parquet"), expectations)


def check_expectations(
    tables: Sequence[Path],
    expectations: Mapping[str, Expectation],
    progress: Progress = silent,
    *,
    spill: Path | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> ExpectationReport:
    """Check the rows of one table, in one pass.

    Args: tables: Parquet, Arrow IPC or CSV files of one table. spill, memory_bytes: where keys go
        when all columns' are more (24 bytes a row); the system's temporary folder by default.
    Raises: SourceError for a table or a reference that is missing or unreadable.
    Cost: one pass over the columns named; about 10 ns a row and check, 0.5 us for a text that must
        be unique; memory for a batch and the keys in hand.
    """
    opened = open_tables(tables)
    with ExitStack() as stack:
        checks = [
            one
            for name, expected in sorted(expectations.items())
            for one in _declared(name, expected, opened)
        ]
        exact = [one for one in checks if one.needs_keys and not one.note]
        for one in exact:
            share = memory_bytes // (2 * len(exact))
            one.keys = stack.enter_context(KeyStore(spill, share))
            _refer(one, stack, spill, share)
        num_rows = _scan(opened, checks, progress)
        for one in checks:
            _settle(one, opened)
    return ExpectationReport(num_rows, tuple(one.result(num_rows) for one in checks))


@dataclass(slots=True)
class _Check:
    """One check while the rows pass by."""

    name: str
    expected: Expectation
    column: str
    test: Test | None = None
    note: str = ""
    failed: int = 0
    samples: list[Sample] = field(default_factory=list)
    keys: KeyStore | None = None
    known: KeyStore | None = None

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def needs_keys(self) -> bool:
        return self.kind in ("unique", "refers_to")

    def result(self, num_rows: int) -> CheckResult:
        level, failed, note = self.expected.level, self.failed, self.note
        if self.kind == "rows":
            low, high = self.expected.min_rows, self.expected.max_rows
            holds = (low is None or num_rows >= low) and (high is None or num_rows <= high)
            note = "" if holds else f"the table has {num_rows:,} rows"
        elif note:
            level, failed, holds = "fail", num_rows, False
        else:
            allowed = self.expected.max_null_share if self.kind == "nulls" else self.expected.max_failed_share
            holds = failed <= (allowed or 0.0) * num_rows
        status: Status = "pass" if holds else level
        limit = limit_of(self.kind, self.expected)
        samples = tuple(self.samples)
        return CheckResult(
            self.name, self.column, self.kind, limit, level, status, num_rows, failed, note, samples
        )


def _declared(name: str, expected: Expectation, tables: Tables) -> list[_Check]:
    """List the checks of one expectation; those that the column cannot answer say why."""
    checks = []
    if expected.min_rows is not None or expected.max_rows is not None:
        checks.append(_Check(f"{name}.rows", expected, ""))
    if not expected.wants_column and checks:
        return checks
    column = expected.column or name
    found = tables.column(column)
    if found is None:
        note = f"no column {column!r}; {nearest(column, tables.schema.names)}"
        return [*checks, _Check(f"{name}.column", expected, column, note=note)]
    if expected.type is not None:
        matches = type_matches(expected.type, found.type)
        note = "" if matches else f"the column is {found.type}"
        if matches is None:
            note = f"{expected.type!r} is no type; as in text, integer, number, timestamp, int64"
        checks.append(_Check(f"{name}.type", expected, column, note=note))
    for kind in checks_of(expected):
        one = _Check(f"{name}.{kind}", expected, column)
        try:
            one.test = Test(kind, expected, found.type)
        except CannotCheckError as error:
            one.note = str(error)
        checks.append(one)
    return checks or [_Check(f"{name}.column", expected, column)]


def _refer(one: _Check, stack: ExitStack, spill: Path | None, memory_bytes: int) -> None:
    """Collect the keys of the column that values must be in."""
    if one.kind != "refers_to":
        return
    paths, column = one.expected.reference()
    if not paths:
        raise SourceError(
            f"[data.expect.{one.name.rpartition('.')[0]}] refers_to = {one.expected.refers_to!r}: "
            "there is no such file",
            hint="relative paths start at the working folder",
        )
    tables = open_tables(paths)
    found = tables.column(column)
    if found is None:
        one.note = f"{paths[0].name} has no column {column!r}; {nearest(column, tables.schema.names)}"
        return
    assert one.test is not None
    if not one.test.compares_with(found.type):
        one.note = f"the column is {one.test.type}, {column!r} of {paths[0].name} is {found.type}"
        return
    one.known = stack.enter_context(KeyStore(spill, memory_bytes))
    with span("read references"):
        for scan in tables.scan([column]):
            one.known.add(keys_of(scan.batch.column(0), 0))


def _scan(tables: Tables, checks: list[_Check], progress: Progress) -> int:
    """Show every batch to every check; return how many rows there are."""
    asked = [one for one in checks if one.test is not None and not one.note]
    place = tables.place_columns()
    columns = list(dict.fromkeys([*(one.column for one in asked), *(place or ())]))
    num_rows = 0
    with span("expectations"):
        for scan in tables.scan(columns):
            for one in asked:
                column = scan.batch.column(one.column)
                if one.keys is not None:
                    one.keys.add(keys_of(column, num_rows))
                    continue
                assert one.test is not None
                failed = one.test.failures(column)
                one.failed += len(failed)
                for row in failed[: MAX_SAMPLES - len(one.samples)].tolist():
                    value = None if one.kind == "nulls" else _shown(column[row])
                    one.samples.append(_sample(scan.batch, row, place, scan.path, scan.row, value))
            num_rows += scan.batch.num_rows
            progress(num_rows, tables.num_rows, "rows")
    return num_rows


def _settle(one: _Check, tables: Tables) -> None:
    """Decide what needed all values; look up the first rows that failed."""
    if one.keys is None or one.note:
        return
    with span("expectations"):
        if one.known is not None:
            one.failed, rows = missing(one.keys, one.known, MAX_SAMPLES)
        else:
            one.failed, rows = repeated(one.keys, MAX_SAMPLES)
        wanted, seen = rows.tolist(), 0
        if not wanted:
            return
        place = tables.place_columns()
        for scan in tables.scan(list(dict.fromkeys([one.column, *(place or ())]))):
            for row in [row - seen for row in wanted if seen <= row < seen + scan.batch.num_rows]:
                value = _shown(scan.batch.column(one.column)[row])
                one.samples.append(_sample(scan.batch, row, place, scan.path, scan.row, value))
            seen += scan.batch.num_rows
            if seen > wanted[-1]:
                return


def _sample(
    batch: pa.RecordBatch,
    row: int,
    place: tuple[str, str] | None,
    path: Path,
    start: int,
    value: str | None,
) -> Sample:
    if place is None:
        return Sample(path.name, start + row + 1, value)
    file, line = (batch.column(name)[row].as_py() for name in place)
    return Sample(str(file), line if isinstance(line, int) else start + row + 1, value)


def _shown(value: pa.Scalar) -> str:
    text = repr(value.as_py()) if pa.types.is_string(value.type) else str(value.as_py())
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."
