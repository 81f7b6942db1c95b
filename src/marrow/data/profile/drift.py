"""What changed between two profiles of a table, column by column.

    found = drift(read_profile(old), read_profile(new))
    found.verdict            # "same", "changed" or "drift"

Numbers, times and lengths are compared by the Kolmogorov-Smirnov distance (the largest difference
of the two shares up to a value) and by the population stability index over the tenths of the old
data; categories by the index over the frequent values. Nulls, NaN and infinities are a part of
their own in the index.

    psi = sum over parts of (new - old) * ln(new / old)

A column has drifted if a measure reaches its limit and is more than chance explains. Of two samples
of the same data the index, divided by 1/n + 1/m, is about a chi-square of (parts - 1) degrees of
freedom: 3.5 standard deviations above its mean are chance, and so is a distance up to
1.95 * sqrt(1/n + 1/m), once in a thousand. So two small samples are not called different.
Source: Lewis 1994 (credit scoring); Smirnov 1948; Yurdakul 2018 for the index's expectation.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from marrow.core.errors import UsageError, explain_os_errors
from marrow.core.files import atomic_file
from marrow.data.profile.record import ColumnProfile, Distribution, Profile

Verdict = Literal["same", "changed", "drift"]
FLOOR = 1e-4  # least share of an empty part, if half a row is less; the index would be infinite
NUM_PARTS = 10
MAX_CATEGORIES = 50  # more distinct values than that are no categories
VERDICTS: tuple[Verdict, ...] = ("drift", "changed", "same")  # the worst first
_RANK = {"same": 0, "changed": 1, "drift": 2}


@dataclass(frozen=True, slots=True)
class DriftLimits:
    """From `warn` a column has changed, from `fail` it has drifted; psi >= 0, ks from 0 to 1."""

    psi_warn: float = 0.1
    psi_fail: float = 0.25
    ks_warn: float = 0.1
    ks_fail: float = 0.2

    def __post_init__(self) -> None:
        for name in ("psi", "ks"):
            warn, fail = getattr(self, f"{name}_warn"), getattr(self, f"{name}_fail")
            if not 0 <= warn <= fail:
                raise UsageError(
                    f"{name}_warn = {warn:g} and {name}_fail = {fail:g} are no limits",
                    hint="0 <= warn <= fail",
                )


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the values, and which share of the rows it was and is."""

    name: str
    old: float
    new: float


@dataclass(frozen=True, slots=True)
class ColumnDrift:
    """What changed in one column.

    psi, ks: None where they do not apply. *_chance: what chance alone explains. ks_error: how far
    the distance may be off, since profiles are summaries. parts: what the index is made of.
    """

    name: str
    verdict: Verdict
    note: str
    psi: float | None = None
    psi_chance: float = 0.0
    ks: float | None = None
    ks_chance: float = 0.0
    ks_error: float = 0.0
    null_share: tuple[float, float] = (0.0, 0.0)
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class Drift:
    """What changed in a table; columns in the order of the new one, lost ones last."""

    old_rows: int
    new_rows: int
    limits: DriftLimits
    columns: tuple[ColumnDrift, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of the columns' verdicts."""
        return max((column.verdict for column in self.columns), key=_RANK.__getitem__, default="same")

    def of(self, verdict: Verdict) -> tuple[ColumnDrift, ...]:
        """Return the columns with a verdict."""
        return tuple(column for column in self.columns if column.verdict == verdict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"verdict": self.verdict, **asdict(self)}

    def write(self, path: Path) -> None:
        """Write drift.json."""
        with explain_os_errors("write the drift", path), atomic_file(path, "w") as file:
            file.write(json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def drift(old: Profile, new: Profile, limits: DriftLimits | None = None) -> Drift:
    """Compare two profiles, column by column. Cost: about 0.2 ms a column."""
    limits = limits or DriftLimits()
    before = {column.name: column for column in old.columns}
    now = {column.name for column in new.columns}
    found = [_compare(before.get(column.name), column, limits) for column in new.columns]
    lost = [ColumnDrift(name, "drift", "the column is gone") for name in before if name not in now]
    return Drift(old.rows, new.rows, limits, tuple(found + lost))


def _compare(old: ColumnProfile | None, new: ColumnProfile, limits: DriftLimits) -> ColumnDrift:
    if old is None:
        return ColumnDrift(new.name, "changed", "the column is new")
    nulls = (old.null_share, new.null_share)
    if _family(old.kind) != _family(new.kind):
        return ColumnDrift(new.name, "drift", f"was {old.type}, is {new.type}", null_share=nulls)
    if not old.rows or not new.rows:
        empty = bool(old.rows) != bool(new.rows)
        note = "one of the tables is empty" if empty else ""
        return ColumnDrift(new.name, "drift" if empty else "same", note, null_share=nulls)
    ks, ks_error, ks_chance = None, 0.0, 0.0
    if old.numbers is not None and new.numbers is not None and old.numbers.count and new.numbers.count:
        ks, ks_error = ks_distance(old.numbers, new.numbers)
        ks_chance = 1.95 * math.sqrt(1 / old.numbers.count + 1 / new.numbers.count)
    parts = _parts(old, new)
    floors = (max(FLOOR, 0.5 / old.rows), max(FLOOR, 0.5 / new.rows))
    psi = stability_index([(part.old, part.new) for part in parts], floors)
    freedom = max(0, len(parts) - 1)
    psi_chance = (freedom + 3.5 * math.sqrt(2 * freedom)) * (1 / old.rows + 1 / new.rows)
    verdict, why = _judge(psi if psi > psi_chance else -1, (ks or 0.0), ks_chance, limits)
    if old.type != new.type:
        why = f"was {old.type}, is {new.type}" + (f"; {why}" if why else "")
        verdict = max(verdict, "changed", key=_RANK.__getitem__)
    return ColumnDrift(new.name, verdict, why, psi, psi_chance, ks, ks_chance, ks_error, nulls, parts)


def _judge(psi: float, ks: float, ks_chance: float, limits: DriftLimits) -> tuple[Verdict, str]:
    if psi >= limits.psi_fail:
        return "drift", f"psi from {limits.psi_fail:g}"
    if ks >= limits.ks_fail and ks > ks_chance:
        return "drift", f"ks from {limits.ks_fail:g}"
    if psi >= limits.psi_warn:
        return "changed", f"psi from {limits.psi_warn:g}"
    if ks >= limits.ks_warn and ks > ks_chance:
        return "changed", f"ks from {limits.ks_warn:g}"
    return "same", ""


def stability_index(
    shares: Sequence[tuple[float, float]], floors: tuple[float, float] = (FLOOR, FLOOR)
) -> float:
    """Return the population stability index of (old, new) shares of the same parts; >= 0.

    Args: floors: the least shares that the parts count with, old and new.
    """
    total = 0.0
    for old, new in shares:
        if old or new:
            a, b = max(old, floors[0]), max(new, floors[1])
            total += (b - a) * math.log(b / a)
    return total


def ks_distance(old: Distribution, new: Distribution) -> tuple[float, float]:
    """Return the Kolmogorov-Smirnov distance of two distributions, and how far it may be off."""
    points = np.array(sorted({value for one in (old, new) for value, _, _ in one.curve}))
    (old_below, old_upto), (new_below, new_upto) = (_shares(one, points) for one in (old, new))
    distance = max(np.abs(old_upto - new_upto).max(), np.abs(old_below - new_below).max())
    error = max(old.gap + old.rank_error, 0.0) + max(new.gap + new.rank_error, 0.0)
    return float(distance), error


def _shares(one: Distribution, points: Any) -> tuple[Any, Any]:
    """Return the shares below and up to points, straight lines between those of the curve."""
    values, below, upto = (np.array(column) for column in zip(*one.curve, strict=True))
    at = np.searchsorted(values, points)
    here = np.minimum(at, len(values) - 1)
    is_point = values[here] == points
    left = np.maximum(at - 1, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        width = values[here] - values[left]
        along = np.where(width > 0, (points - values[left]) / np.where(width > 0, width, 1), 0.0)
    along = np.nan_to_num(along, posinf=1.0)
    between = upto[left] + along * np.maximum(below[here] - upto[left], 0)
    between = np.where(at == 0, 0.0, np.where(at == len(values), 1.0, between))
    return np.where(is_point, below[here], between), np.where(is_point, upto[here], between)


def _parts(old: ColumnProfile, new: ColumnProfile) -> tuple[Part, ...]:
    """Part the rows: nulls, what is no number, then tenths of the old numbers, or categories."""
    parts = [
        Part(name, getattr(old, field) / old.rows, getattr(new, field) / new.rows)
        for name, field in (("null", "nulls"), ("NaN", "nan"), ("infinite", "infinite"))
        if getattr(old, field) or getattr(new, field)
    ]
    if _is_category(old) and new.distinct is not None:
        return tuple(parts + _categories(old, new))
    if old.numbers is None or new.numbers is None or not old.numbers.count:
        return tuple(parts)
    # A limit lies on a point of the curve, so that a value that fills several tenths is one part.
    values = [value for value, _, _ in old.numbers.curve]
    upto = [share for _, _, share in old.numbers.curve]
    limits = sorted({values[int(np.searchsorted(upto, i / NUM_PARTS - 1e-12))] for i in range(1, NUM_PARTS)})
    limits = [limit for limit in limits if limit < values[-1]]
    shares = []
    for column in (old, new):
        numbers = column.numbers
        assert numbers is not None
        edges = _shares(numbers, np.array(limits))[1] if numbers.count and limits else np.zeros(len(limits))
        whole = numbers.count / column.rows
        shares.append(np.diff(np.concatenate([[0.0], edges, [1.0 if numbers.count else 0.0]])) * whole)
    names = [*(f"up to {limit:g}" for limit in limits), "above" if limits else "all"]
    return tuple(parts) + tuple(
        Part(name, float(a), float(b)) for name, a, b in zip(names, *shares, strict=True)
    )


def _categories(old: ColumnProfile, new: ColumnProfile) -> list[Part]:
    before, now = dict(old.top), dict(new.top)
    names = [name for name, _ in old.top] + [name for name in now if name not in before][:NUM_PARTS]
    parts = [Part(name, before.get(name, 0) / old.rows, now.get(name, 0) / new.rows) for name in names]
    rest = [
        max(0.0, (column.rows - column.nulls) / column.rows - sum(getattr(part, side) for part in parts))
        for column, side in ((old, "old"), (new, "new"))
    ]
    return [*parts, Part("other", *rest)] if max(rest) > 1e-9 else parts


def _is_category(column: ColumnProfile) -> bool:
    if column.kind == "boolean":
        return True
    few = column.distinct is not None and column.distinct <= min(MAX_CATEGORIES, column.rows // 5)
    few = few and not column.distinct_error
    return few and column.kind in ("text", "binary") and column.top_error == 0


def _family(kind: str) -> str:
    return "number" if kind in ("integer", "number") else "time" if kind in ("date", "timestamp") else kind
