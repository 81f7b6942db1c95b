"""Declared expectations: what must hold of rows, told before anything is made of them.

    report = check_expectations(paths, {"price": Expectation(min=0, unique=True)})
    report.failed            # an expectation of level "fail" does not hold
    report.results[0]        # price.min: 3 of 1,000 rows failed, the first of them with file and line

All checks of all columns run in one pass over the files, on Arrow's kernels, in bounded memory;
what is unique and what refers to another table is decided exactly, out of core (`keys.py`). A
check that the column cannot answer (no such column, a pattern on numbers, a range on lists) has
failed, whatever its level: an expectation never holds because it was not looked at.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa

from marrow.core.errors import SourceError
from marrow.core.progress import Progress, silent
from marrow.core.span import span
from marrow.data.engine import INLINE, Engine, split_evenly
from marrow.data.keys import MEMORY_BYTES, KeyStore, keys_of, missing, repeated
from marrow.data.quality.checks import CannotCheckError, Test, checks_of, limit_of, type_matches
from marrow.data.quality.report import CheckResult, ExpectationReport, Sample, Status
from marrow.data.quality_config import Expectation
from marrow.data.scan import Tables, nearest, open_tables
from marrow.data.tables import parts

MAX_SAMPLES = 5
_SHOWN_CHARS = 120


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
    engine: Engine = INLINE,
) -> ExpectationReport:
    """Check the rows of one table, in one pass.

    Args: tables: files of one table, of any kind that `open_tables` takes. spill, memory_bytes: where keys go
        when all columns' are more (24 bytes a row); the system's temporary folder by default.
        engine: checks several columns of Parquet and Arrow files at once; the report is the same.
    Raises: SourceError for a table or a reference that is missing or unreadable.
    Cost: one pass over the columns named; about 10 ns a row and check, 0.5 us for a text that must
        be unique; memory for a batch and the keys in hand.
    """
    declared = sorted(expectations.items())
    opened = open_tables(tables)
    if engine is INLINE or not opened.is_columnar or not declared:
        num_rows, results = _check_all(opened, declared, progress, spill, memory_bytes)
        return ExpectationReport(num_rows, tuple(results))
    num_rows, results = 0, []
    work = partial(_check_part, tuple(tables), spill, memory_bytes // engine.workers)
    for rows, found in engine.map(work, split_evenly(declared, 4 * engine.workers)):
        num_rows, results = rows, results + found
        progress(len(results), None, "checks")
    return ExpectationReport(num_rows, tuple(results))


_Expected = Sequence[tuple[str, Expectation]]


def _check_part(
    tables: tuple[Path, ...], spill: Path | None, memory_bytes: int, declared: _Expected
) -> tuple[int, list[CheckResult]]:
    return _check_all(open_tables(tables), declared, silent, spill, memory_bytes)


def _check_all(
    opened: Tables, declared: _Expected, progress: Progress, spill: Path | None, memory_bytes: int
) -> tuple[int, list[CheckResult]]:
    """Check some expectations; return the number of rows too."""
    with ExitStack() as stack:
        checks = [one for name, expected in declared for one in _declared(name, expected, opened)]
        exact = [one for one in checks if one.needs_keys and not one.note]
        for one in exact:
            share = memory_bytes // (2 * len(exact))
            one.keys = stack.enter_context(KeyStore(spill, share))
            _refer(one, stack, spill, share)
        num_rows = _scan(opened, checks, progress)
        for one in checks:
            _settle(one, opened)
        return num_rows, [one.result(num_rows) for one in checks]


@dataclass(slots=True)
class _Check:
    """One check while the rows pass by."""

    name: str
    expected: Expectation
    column: str
    test: Test | None = None
    note: str = ""
    left_out: str = ""
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
            self.name,
            self.column,
            self.kind,
            limit,
            level,
            status,
            num_rows,
            failed,
            note,
            samples,
            self.left_out,
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
    one.left_out = tables.told
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
