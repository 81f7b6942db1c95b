"""What a table holds, column by column: nulls, distinct and frequent values, ranges, distributions.

    made = profile([Path("rows-00000.parquet")])
    made.write(folder / "profile.json")
    write_profile_page(made, folder / "profile.html")       # `page.py`

One pass, bounded memory, no chance: equal rows in equal files give equal bytes. Numbers that are NaN or
infinite are counted and left out of the distribution; of texts, bytes and lists the distribution is
that of their lengths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from marrow.core.progress import Progress, silent
from marrow.core.span import span
from marrow.data.engine import INLINE, Engine, split_evenly
from marrow.data.profile.record import SHARES, ColumnProfile, Distribution, Profile
from marrow.data.profile.summaries import (
    F64,
    I64,
    Distinct,
    Frequent,
    Quantiles,
    distinct_of,
    finite,
    seconds,
)
from marrow.data.quality.checks import KINDS
from marrow.data.scan import Tables, open_tables
from marrow.data.template import PROVENANCE

MAX_TOP = 64
NUM_BINS = 20
MANY_COLUMNS = 200  # more get smaller summaries, so that memory and the file stay small
_SHOWN_CHARS = 120


def profile(
    tables: Sequence[Path] | Tables, progress: Progress = silent, *, engine: Engine = INLINE
) -> Profile:
    """Look at every column of a table, in one pass.

    Args: tables: files of one table, of any kind that `open_tables` takes, or what it gave. The
        columns that ingest adds to tell where a row came from are left out. engine: looks at several
        columns of Parquet and Arrow files at once; the profile is the same.
    Raises: SourceError, DataError for files that are missing, unreadable or of several tables.
    Cost: 0.1 us a number, 0.5 us a distinct text; memory for a batch and 0.4 MiB a column.
    """
    opened = tables if isinstance(tables, Tables) else open_tables(tables)
    names = [name for name in opened.schema.names if name not in PROVENANCE]
    many = len(names) > MANY_COLUMNS
    with span("profile"):
        if engine is INLINE or not opened.is_columnar or not names:
            num_rows, columns = _look(opened, names, many, progress)
        else:
            num_rows, columns = 0, []
            work = partial(_look_at_part, opened.paths, many)
            for rows, found in engine.map(work, split_evenly(names, 4 * engine.workers)):
                num_rows, columns = rows, columns + found
                progress(len(columns), len(names), "columns")
    return Profile(num_rows, tuple(path.name for path in opened.paths), tuple(columns))


def _look_at_part(
    tables: tuple[Path, ...], many: bool, names: Sequence[str]
) -> tuple[int, list[ColumnProfile]]:
    return _look(open_tables(tables), names, many, silent)


def _look(
    opened: Tables, names: Sequence[str], many: bool, progress: Progress
) -> tuple[int, list[ColumnProfile]]:
    """Look at some columns; return the number of rows too."""
    watched = [_Watch.of(opened, name, many=many) for name in names]
    num_rows = 0
    for scan in opened.scan(names):
        for one in watched:
            one.add(scan.batch.column(one.name))
        num_rows += scan.batch.num_rows
        progress(num_rows, opened.num_rows, "rows")
    return num_rows, [one.result(num_rows) for one in watched]


@dataclass(slots=True)
class _Watch:
    """One column while the rows pass by."""

    name: str
    type: pa.DataType
    kind: str
    num_points: int
    quantiles: Quantiles
    distinct: Distinct
    frequent: Frequent = field(default_factory=Frequent)
    nulls: int = 0
    nan: int = 0
    infinite: int = 0
    minimum: Any = None
    maximum: Any = None
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean (Chan et al. 1983)

    @classmethod
    def of(cls, tables: Tables, name: str, *, many: bool) -> "_Watch":
        kind = tables.schema.field(name).type
        size = 1024 if many else 4096
        names = [kind_name for kind_name, is_kind in KINDS.items() if is_kind(kind)]
        return cls(name, kind, (names or ["other"])[0], size // 16, Quantiles(size), Distinct(size))

    @property
    def is_plain(self) -> bool:
        return self.kind not in ("list", "struct", "other")

    def add(self, column: pa.Array) -> None:
        self.nulls += column.null_count
        column = column.drop_null()
        if not len(column):
            return
        if pa.types.is_float16(column.type):  # Arrow has few kernels for it
            column = column.cast(pa.float32())
        if self.is_plain:
            values, counts, hashes = distinct_of(column)
            self.distinct.add(hashes)
            self.frequent.add(values, counts, hashes, _shown)
            self._range(values)
        numbers = self._numbers(column)
        if numbers is not None:
            found, num_nan, num_infinite = finite(numbers)
            self.nan += num_nan
            self.infinite += num_infinite
            self._moments(found)
            self.quantiles.add(found)

    def _numbers(self, column: pa.Array) -> pa.Array | None:
        if self.kind in ("timestamp", "date", "time"):
            return seconds(column)
        if self.kind in ("integer", "number"):
            return column
        if self.kind == "text":
            return pc.utf8_length(column)
        if self.kind == "binary":
            return pc.binary_length(column)
        return pc.list_value_length(column) if self.kind == "list" else None

    def _range(self, values: pa.Array) -> None:
        if pa.types.is_floating(values.type):
            values = values.filter(pc.is_finite(values))
            if not len(values):
                return
        found = pc.min_max(values) if not pa.types.is_fixed_size_binary(values.type) else None
        if found is None:
            return
        low, high = (found[side] for side in ("min", "max"))
        values = [low, high] if self.minimum is None else [self.minimum, low, self.maximum, high]
        ends = pc.min_max(pa.concat_arrays([pa.repeat(value, 1) for value in values]))
        self.minimum, self.maximum = ends["min"], ends["max"]

    def _moments(self, values: F64) -> None:
        if not len(values):
            return
        before, count = self.quantiles.count, len(values)
        with np.errstate(over="ignore", invalid="ignore"):  # values near the largest float
            mean = float(values.mean())
            squares = float(np.square(values - mean).sum())
            delta = mean - self.mean
            self.mean += delta * count / (before + count)
            self.squares += squares + delta * delta * before * count / (before + count)

    def result(self, num_rows: int) -> ColumnProfile:
        numbers = None
        if self.kind not in ("boolean", "struct", "other"):
            numbers = self._distribution()
        of = {"text": "characters", "binary": "bytes", "list": "items"}.get(self.kind, "values")
        return ColumnProfile(
            self.name,
            str(self.type),
            self.kind,
            num_rows,
            self.nulls,
            self.nan,
            self.infinite,
            self.distinct.count if self.is_plain else None,
            self.distinct.error if self.is_plain else 0.0,
            tuple(self.frequent.top(MAX_TOP)),
            self.frequent.error,
            None if self.minimum is None else _shown(self.minimum),
            None if self.maximum is None else _shown(self.maximum),
            "seconds" if self.kind in ("timestamp", "date", "time") else of,
            numbers,
        )

    def _distribution(self) -> Distribution:
        values, weights = self.quantiles.points()
        count = self.quantiles.count
        if not count:
            return Distribution(0, None, None, None, None, (), 0.0, (), 0.0, ())
        upto = np.cumsum(weights)
        ranks = np.maximum(1, np.ceil(np.array(SHARES) * count)).astype(np.int64)
        quantiles = values[np.searchsorted(upto, ranks)]
        quantiles[[0, -1]] = self.quantiles.minimum, self.quantiles.maximum
        chosen = _chosen(upto, self.num_points)
        below_N = (upto - weights)[chosen] / count
        upto_N = upto[chosen] / count
        gap = float(np.max(below_N[1:] - upto_N[:-1], initial=0.0))
        return Distribution(
            count,
            self.quantiles.minimum,
            self.quantiles.maximum,
            _finite_or_none(self.mean),
            _finite_or_none(math.sqrt(self.squares / count) if self.squares >= 0 else math.nan),
            tuple(quantiles.tolist()),
            self.quantiles.error / count,
            tuple(zip(values[chosen].tolist(), below_N.tolist(), upto_N.tolist(), strict=True)),
            gap,
            _bins(values, weights, quantiles),
        )


def _chosen(upto: I64, most: int) -> I64:
    """Choose points of a curve: all if they are few, else evenly spread over the ranks, ends included."""
    if len(upto) <= most:
        return np.arange(len(upto))
    ranks = np.linspace(1, int(upto[-1]), most)
    return np.unique(np.concatenate([[0], np.searchsorted(upto, ranks), [len(upto) - 1]]))


def _bins(values: F64, weights: I64, quantiles: F64) -> tuple[tuple[float, float, int], ...]:
    """Count values in bins of one width, from the first to the last percent."""
    low, high = float(quantiles[SHARES.index(0.01)]), float(quantiles[SHARES.index(0.99)])
    if not math.isfinite(high - low) or high <= low:
        low, high = float(values[0]), float(values[-1])
    if not math.isfinite(high - low) or high <= low:
        return ((low, high, int(weights.sum())),)
    edges = np.linspace(low, high, NUM_BINS + 1)
    edges[-1] = high  # linspace may end a hair beside it
    at = np.clip(np.searchsorted(edges, values, "right") - 1, 0, NUM_BINS - 1)
    counts = np.bincount(at, weights=weights, minlength=NUM_BINS).astype(np.int64)
    return tuple(zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True))


def _shown(value: pa.Scalar) -> str:
    if pa.types.is_timestamp(value.type):  # as_py would want pandas for nanoseconds
        return str(value.cast(pa.string()).as_py())
    text = str(value.as_py())
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
