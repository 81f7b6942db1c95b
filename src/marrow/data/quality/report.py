"""What expectations found: counts, rows that failed with their places, and one verdict."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from marrow.core.errors import DataError, explain_os_errors
from marrow.core.files import atomic_file
from marrow.data.quality_config import Level

EXPECTATIONS = "expectations.json"
Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A row that failed: its source file and line, and the value as text."""

    file: str
    line: int
    value: str | None


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What one check found: `failed` of `rows` rows; `note` says why where rows do not.

    left_out: what is to be said of broken rows in the table that values must be in.
    """

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
    left_out: str = ""

    @property
    def share(self) -> float:
        """Share of the rows that failed."""
        return self.failed / self.rows if self.rows else 0.0

    def told(self) -> str:
        """Say it in one line."""
        what = f"{self.name} ({self.limit})"
        also = f"; of what it refers to, {self.left_out}" if self.left_out else ""
        if self.note:
            return f"{what}: {self.note}{also}"
        first = self.samples[0] if self.samples else None
        where = f", first {first.value} at {first.file}:{first.line}" if first else ""
        return f"{what}: {self.failed:,} of {self.rows:,} rows{where}{also}"


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

    def left_out(self) -> list[str]:
        """Return what is to be said of broken rows in tables that values must be in."""
        return [f"{one.name}: of what it refers to, {one.left_out}" for one in self.results if one.left_out]

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

    def refuse(self, told_in: Path | None = None) -> None:
        """Raise DataError if it has failed, naming what does not hold, and the file that tells all."""
        failures = self.of("fail")
        if failures:
            shown = "\n  ".join(result.told() for result in failures[:8])
            more = f"\n  and {len(failures) - 8} more" if len(failures) > 8 else ""
            raise DataError(
                f"{len(failures)} of {len(self.results)} expectations do not hold:\n  {shown}{more}",
                hint='mend the rows, or the limits in [data.expect]; level = "warn" only tells'
                + (f"; all counts, and rows that failed: {told_in}" if told_in else ""),
            )
