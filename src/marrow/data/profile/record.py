"""What a profile is: plain data, written to profile.json and read from it.

What is not exact says so: `rank_error` bounds how far a quantile's rank is off, `distinct_error` is
the standard deviation of the distinct count, `top_error` bounds what the counts of frequent values lack.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from marrow.core.errors import DataError, explain_os_errors
from marrow.core.files import atomic_file

PROFILE = "profile.json"
VERSION = 1
SHARES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True, slots=True)
class Distribution:
    """How numbers are spread.

    quantiles: by SHARES. rank_error: their ranks are off by at most this share of the count. curve:
    (value, share below it, share up to it), rising; between its points the curve is known to
    `gap`. bins: (low, high, count), the first and last with what lies beyond.
    """

    count: int
    minimum: float | None
    maximum: float | None
    mean: float | None
    deviation: float | None
    quantiles: tuple[float, ...]
    rank_error: float
    curve: tuple[tuple[float, float, float], ...]
    gap: float
    bins: tuple[tuple[float, float, int], ...]


@dataclass(frozen=True, slots=True)
class ColumnProfile:
    """What one column holds. of: what `numbers` are of: values, seconds, characters, bytes, items."""

    name: str
    type: str
    kind: str
    rows: int
    nulls: int
    nan: int
    infinite: int
    distinct: int | None
    distinct_error: float
    top: tuple[tuple[str, int], ...]
    top_error: int
    minimum: str | None
    maximum: str | None
    of: str
    numbers: Distribution | None

    @property
    def null_share(self) -> float:
        """Share of rows that are null."""
        return self.nulls / self.rows if self.rows else 0.0


@dataclass(frozen=True, slots=True)
class Profile:
    """What a table holds."""

    rows: int
    files: tuple[str, ...]
    columns: tuple[ColumnProfile, ...]

    def column(self, name: str) -> ColumnProfile | None:
        """Return a column, or None."""
        return next((column for column in self.columns if column.name == name), None)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"version": VERSION, **asdict(self)}

    def write(self, path: Path) -> None:
        """Write profile.json."""
        with explain_os_errors("write the profile", path), atomic_file(path, "w") as file:
            file.write(json.dumps(self.as_dict(), ensure_ascii=False, allow_nan=False) + "\n")


def read_profile(path: Path) -> Profile:
    """Read a profile.json. Raises: DataError if it is none; SourceError."""
    with explain_os_errors("read the profile", path):
        told = path.read_bytes()
    try:
        values = json.loads(told)
        if values.pop("version") != VERSION:
            raise DataError(f"{path} is a profile of another version", hint="make it anew")
        columns = []
        for column in values["columns"]:
            numbers = column["numbers"]
            if numbers is not None:
                numbers = {
                    n: tuple(map(_tupled, v)) if isinstance(v, list) else v for n, v in numbers.items()
                }
                column["numbers"] = Distribution(**numbers)
            column["top"] = _tupled(column["top"])
            columns.append(ColumnProfile(**column))
        return Profile(values["rows"], tuple(values["files"]), tuple(columns))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{path} is no profile: {error!r}", hint="`marrow data profile` writes one"
        ) from error


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value
