"""What one check of an expectation asks of a batch of values, on Arrow's kernels.

Nulls pass every check but that of nulls. Limits are turned into the column's own type once, so
that "2024-01-31" compares with dates and 3 with decimals; one that does not fit cannot be checked.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from marrow.data.quality_config import Expectation

KINDS: dict[str, Callable[[pa.DataType], bool]] = {
    "text": pa.types.is_string,
    "integer": pa.types.is_integer,
    "number": lambda kind: (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    ),
    "boolean": pa.types.is_boolean,
    "timestamp": pa.types.is_timestamp,
    "date": pa.types.is_date,
    "time": pa.types.is_time,
    "binary": lambda kind: pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind),
    "list": lambda kind: pa.types.is_list(kind) or pa.types.is_large_list(kind) or _is_fixed(kind),
    "struct": pa.types.is_struct,
}
_ALIASES = {"string": "text", "str": "text", "int": "integer", "float": "number", "bool": "boolean"}


class CannotCheckError(ValueError):
    """The column's type has no answer to the check."""


def checks_of(expected: Expectation) -> list[str]:
    """Name the checks of values that are declared, those of one pass first."""
    declared = {
        "nulls": expected.max_null_share is not None,
        "range": expected.min is not None or expected.max is not None,
        "length": expected.min_length is not None or expected.max_length is not None,
        "regex": expected.regex is not None,
        "values": bool(expected.values),
        "unique": expected.unique,
        "refers_to": expected.refers_to is not None,
    }
    return [kind for kind, asked in declared.items() if asked]


def limit_of(kind: str, expected: Expectation) -> str:
    """Say what a check allows."""
    if kind == "nulls":
        return f"at most {expected.max_null_share:.2%} null"
    if kind in ("range", "length", "rows"):
        suffix = {"range": "", "length": "_length", "rows": "_rows"}[kind]
        low, high = getattr(expected, f"min{suffix}"), getattr(expected, f"max{suffix}")
        sides = [f"at least {low}"] if low is not None else []
        sides += [f"at most {high}"] if high is not None else []
        return " and ".join(sides) + {"range": "", "length": " long", "rows": " rows"}[kind]
    if kind == "values":
        shown = ", ".join(map(str, expected.values[:6]))
        return f"one of {shown}" + (", ..." if len(expected.values) > 6 else "")
    return {
        "type": f"type {expected.type}",
        "regex": f"matches {expected.regex}",
        "unique": "no value twice",
        "refers_to": f"in {expected.refers_to}",
    }.get(kind, "the column is there")


def type_matches(name: str, kind: pa.DataType) -> bool | None:
    """Tell whether a column is of a declared kind or Arrow type; None if there is no such type."""
    if is_kind := KINDS.get(_ALIASES.get(name, name)):
        return is_kind(kind)
    if str(kind) == name:
        return True
    try:
        return bool(pa.type_for_alias(name) == kind)
    except ValueError:  # composite types, such as decimal128(10, 2), are known by their text alone
        return False if re.fullmatch(r"[a-z]+\d*\s*[\[(<].*[\])>]", name) else None


class Test:
    """One check of one column, ready to be asked about batches."""

    __test__ = False  # pytest, this is no test class

    def __init__(self, kind: str, expected: Expectation, column: pa.DataType) -> None:
        """Turn the limits into the column's type. Raises: CannotCheckError."""
        self.type = column
        self._fails: Callable[[pa.Array], pa.Array | None] = getattr(self, f"_{kind}")(expected)

    def failures(self, column: pa.Array) -> NDArray[np.int64]:
        """Return the indices of the values that fail."""
        mask = self._fails(column)
        if mask is None:
            return np.empty(0, np.int64)
        return np.flatnonzero(np.asarray(mask.fill_null(False)))

    def compares_with(self, other: pa.DataType) -> bool:
        """Tell whether keys of two columns can be equal: both whole numbers, both floats, or one type."""
        for kind in (pa.types.is_integer, pa.types.is_floating, _has_text_keys):
            if kind(self.type) and kind(other):
                return True
        return bool(self.type == other)

    def _nulls(self, _: Expectation) -> Any:
        return lambda column: pc.is_null(column) if column.null_count else None

    def _range(self, expected: Expectation) -> Any:
        if pa.types.is_nested(self.type) or pa.types.is_boolean(self.type):
            raise CannotCheckError(f"a range needs numbers, times or text; the column is {self.type}")
        # Whole numbers are compared with a fraction as numbers; else 2.5 would not fit int64.
        low, high = (self._scalar(value) for value in (expected.min, expected.max))

        def fails(column: pa.Array) -> Any:
            inside = pc.true_unless_null(column)
            if low is not None:
                inside = pc.and_(inside, pc.greater_equal(column, low))
            if high is not None:
                inside = pc.and_(inside, pc.less_equal(column, high))
            return pc.invert(inside)  # NaN is on neither side of a limit, so it fails

        return fails

    def _length(self, expected: Expectation) -> Any:
        lengths: Callable[[pa.Array], Any]
        if pa.types.is_string(self.type):
            lengths = pc.utf8_length
        elif KINDS["binary"](self.type):
            lengths = pc.binary_length
        elif KINDS["list"](self.type):
            lengths = pc.list_value_length
        else:
            raise CannotCheckError(f"only text, bytes and lists have a length; the column is {self.type}")
        low = expected.min_length or 0
        high = expected.max_length if expected.max_length is not None else 1 << 31

        def fails(column: pa.Array) -> Any:
            length = lengths(column)
            return pc.or_(pc.less(length, low), pc.greater(length, high))

        return fails

    def _regex(self, expected: Expectation) -> Any:
        if not pa.types.is_string(self.type):
            raise CannotCheckError(f"a pattern needs text; the column is {self.type}")
        pattern = rf"\A(?:{expected.regex})\z"
        try:
            pc.match_substring_regex(pa.array(["a"]), pattern)
        except pa.ArrowInvalid as error:
            reason = str(error).partition(": ")[2] or str(error)
            raise CannotCheckError(
                f"not a pattern of RE2 ({reason}), which has no look-around and no back references"
            ) from error
        return lambda column: pc.invert(pc.match_substring_regex(column, pattern))

    def _values(self, expected: Expectation) -> Any:
        if pa.types.is_nested(self.type):
            raise CannotCheckError(f"values need a plain column; this one is {self.type}")
        allowed = pa.concat_arrays([pa.repeat(self._exact(value), 1) for value in expected.values])

        def fails(column: pa.Array) -> Any:
            return pc.and_(pc.is_valid(column), pc.invert(pc.is_in(column, value_set=allowed)))

        return fails

    def _unique(self, _: Expectation) -> Any:
        self._check_keys("unique values")
        return lambda _: None

    def _refers_to(self, _: Expectation) -> Any:
        self._check_keys("references")
        return lambda _: None

    def _check_keys(self, what: str) -> None:
        if pa.types.is_nested(self.type) or pa.types.is_null(self.type):
            raise CannotCheckError(f"{what} need a plain column; this one is {self.type}")

    def _scalar(self, value: int | float | str | None) -> pa.Scalar | None:
        """Turn a limit of a range into a scalar that compares with the column."""
        if value is None or pa.types.is_null(self.type):
            return None
        numbers = KINDS["number"](self.type)
        if numbers == isinstance(value, str):
            kind = "numbers" if numbers else "text"
            raise CannotCheckError(f"the limit {value!r} does not compare with {self.type}; write {kind}")
        if pa.types.is_integer(self.type):
            if isinstance(value, int) and value.bit_length() < 64:
                return pa.scalar(value, pa.int64())
            return pa.scalar(float(value), pa.float64())
        if pa.types.is_floating(self.type):
            return pa.scalar(float(value), pa.float64())
        return self._exact(value)

    def _exact(self, value: Any) -> pa.Scalar:
        """Return a value as the column's type holds it."""
        is_text, is_number = pa.types.is_string(self.type), KINDS["number"](self.type)
        fits = not is_text and not (is_number and isinstance(value, str))
        fits = fits and isinstance(value, bool) == pa.types.is_boolean(self.type)
        try:
            if pa.types.is_null(self.type) or (is_text and isinstance(value, str)):
                return pa.scalar(value if is_text else None, self.type)
            if fits:
                return pa.scalar(str(value) if pa.types.is_decimal(self.type) else value).cast(self.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            pass
        raise CannotCheckError(f"{value!r} does not fit the column's type {self.type}")


def _has_text_keys(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_binary(kind))


def _is_fixed(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind))
