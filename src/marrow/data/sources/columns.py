"""Types of columns: read off the values, joined over files, and fitted to.

Text of a CSV takes the narrowest type that all its values have: whole number < number, date < time,
true/false, else text. A whole number must be written as one would write it (no leading zero or plus),
or the column stays text: 007 is a name. An empty value, NA, null and the like are null in a column
that is not text; in a text column they stay what they are.

Other formats bring their types. Where files disagree, the joined type is the narrowest that holds
both; where there is none, it is text, and values that are no text are written as JSON.
"""

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from marrow.core.errors import SourceError
from marrow.data.config import TYPE_ALIASES
from marrow.data.tables import plain_type

NULLS = pa.array(["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "#N/A"])
MAX_DEPTH = 16  # of nested values; readers of Parquet refuse schemas that are much deeper
_LADDERS = (
    (pa.int64(), pa.float64()),
    (pa.date32(), pa.timestamp("us")),
    (pa.bool_(),),
)
_BOOLS = pa.array(["true", "True", "TRUE", "false", "False", "FALSE"])
_LONG_INTEGER = r"^-?\d{16,}$"
_HEX = r"^-?0[xX]"
_ODD_INTEGER = r"^(?:-?0\d|\+|\s|-0$)|\s$"


class SchemaGrewError(Exception):
    """A value does not fit the type that its column, the argument, was taken to have."""


@dataclass(frozen=True, slots=True)
class Misfit:
    """A row left out, for a value is not of the type asked for: its line, the column, how it begins."""

    line: int
    column: str
    text: str


def type_named(name: str) -> pa.DataType:
    """Return the type that a recipe calls so (`config.TYPES`)."""
    name = TYPE_ALIASES.get(name, name)
    if name == "timestamp":
        return pa.timestamp("us")
    return pa.type_for_alias("date32" if name == "date" else name)


def ask(schema: pa.Schema, types: Mapping[str, str]) -> pa.Schema:
    """Put the types that a recipe asks for in place of those found.

    Raises: SourceError if there is no such column.
    """
    for name, kind in types.items():
        index = schema.get_field_index(name)
        if index < 0:
            close = difflib.get_close_matches(name, schema.names, n=1, cutoff=0.5)
            raise SourceError(
                f"data.types: the source has no column {name!r}",
                hint=f"did you mean {close[0]!r}?" if close else f"its columns: {', '.join(schema.names)}",
            )
        schema = schema.set(index, pa.field(name, type_named(kind)))
    return schema


def infer_text(column: pa.Array) -> pa.DataType:
    """Return the narrowest type of a column of text; null if it has no value."""
    values = _filled(column)
    if not len(values):
        return pa.null()
    for ladder in _LADDERS:
        for kind in ladder:
            if _parses(values, kind):
                return kind
    return pa.string()


def join_types(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return the narrowest type that holds both, text if there is none."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_boolean(one) or pa.types.is_boolean(other):
        return pa.string()
    if {pa.types.is_decimal(kind) or 2 * pa.types.is_floating(kind) for kind in (one, other)} == {1, 2}:
        return pa.string()  # a double would lose digits of the decimal
    try:
        joined = pa.unify_schemas(
            [pa.schema([("c", one)]), pa.schema([("c", other)])], promote_options="permissive"
        )
    except pa.ArrowException:
        return pa.string()
    return plain_type(joined.field(0).type)


def join_schemas(one: pa.Schema, other: pa.Schema) -> pa.Schema:
    """Return a schema with the columns of both, in the order in which they first came."""
    types = {field.name: field.type for field in one}
    for field in other:
        types[field.name] = join_types(types.get(field.name, pa.null()), field.type)
    return pa.schema(list(types.items()))


def fit(batch: pa.RecordBatch, schema: pa.Schema, *, is_text: bool) -> pa.RecordBatch:
    """Give a batch the columns and types of a schema; missing columns are null.

    Args: is_text: the batch's columns are text still to be parsed (CSV).
    Raises: SchemaGrewError if a column or value has no place in it.
    """
    if set(batch.schema.names) - set(schema.names):
        raise SchemaGrewError
    columns = []
    for field in schema:
        if field.name not in batch.schema.names:
            columns.append(pa.nulls(batch.num_rows, field.type))
            continue
        change = parse if is_text else _convert
        try:
            columns.append(change(batch.column(field.name), field.type))
        except SchemaGrewError:
            raise SchemaGrewError(field.name) from None
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def fit_asked(
    batch: pa.RecordBatch, schema: pa.Schema, asked: Collection[str]
) -> tuple[pa.RecordBatch, NDArray[np.bool_], str]:
    """Give the columns whose type a recipe asks for that type, and leave out the rows that do not fit.

    Returns: the rows that do, which ones do not (bool [N]), and the first column to blame.
    """
    bad_N = np.zeros(batch.num_rows, bool)
    blamed = ""
    for name in sorted(set(asked) & set(batch.schema.names)):
        index = batch.schema.get_field_index(name)
        column, bad = as_asked(batch.column(index), schema.field(name).type)
        batch = batch.set_column(index, name, column)
        blamed = blamed or (name if bad.any() else "")
        bad_N |= bad
    return batch.filter(pa.array(~bad_N)) if blamed else batch, bad_N, blamed


def as_asked(column: pa.Array, kind: pa.DataType) -> tuple[pa.Array, NDArray[np.bool_]]:
    """Give a column the type that a recipe asks for.

    Returns: the column, null where a value does not fit, and where that is (bool [N]).
    """
    column = column.cast(plain_type(column.type))
    if column.type == kind:
        return column, np.zeros(len(column), bool)
    if pa.types.is_string(kind):
        return _convert(column, kind), np.zeros(len(column), bool)
    if pa.types.is_string(column.type):
        text = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.is_in(text, NULLS), pa.scalar(None, pa.string()), text)
    pieces: list[pa.Array] = []
    bad: list[NDArray[np.bool_]] = []
    _cast_what_fits(column, kind, pieces, bad)
    return pa.concat_arrays(pieces or [pa.array([], kind)]), np.concatenate([np.zeros(0, bool), *bad])


def _cast_what_fits(
    column: pa.Array, kind: pa.DataType, pieces: list[pa.Array], bad: list[NDArray[np.bool_]]
) -> None:
    """Cast a column; where that fails, its halves. Cost: O(log N) casts for each value that does not fit."""
    try:
        pieces.append(column.cast(kind))
        bad.append(np.zeros(len(column), bool))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        if len(column) <= 1:
            pieces.append(pa.nulls(len(column), kind))
            bad.append(np.ones(len(column), bool))
            return
        middle = len(column) // 2
        _cast_what_fits(column.slice(0, middle), kind, pieces, bad)
        _cast_what_fits(column.slice(middle), kind, pieces, bad)


def column_of(values: list[Any]) -> pa.Array:
    """Make a column of Python values; of mixed kinds or without a form in Parquet, one of text."""
    try:
        column = pa.array(values)
        if _has_form(column.type):
            return column
    except (RecursionError, pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        pass  # of mixed kinds
    return pa.array([_to_text(value) for value in values], pa.string())


def _has_form(kind: pa.DataType, depth: int = 0) -> bool:
    """Tell whether Parquet has a form for a type: none for a struct without fields, or too deep a nesting."""
    if depth > MAX_DEPTH or (pa.types.is_struct(kind) and not kind.num_fields):
        return False
    return all(_has_form(kind.field(i).type, depth + 1) for i in range(kind.num_fields))


def _filled(column: pa.Array) -> pa.Array:
    return column.filter(pc.invert(pc.is_in(column, NULLS)))


def _parses(values: pa.Array, kind: pa.DataType) -> bool:
    if pa.types.is_boolean(kind):
        return bool(pc.all(pc.is_in(values, _BOOLS), min_count=0).as_py())
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        if pc.any(pc.match_substring_regex(values, _HEX)).as_py():
            return False  # pyarrow reads it as a number; a key such as 0xE1 is a name
        odd = values.filter(pc.match_substring_regex(values, _ODD_INTEGER))
        if not pc.all(pc.match_substring_regex(odd, r"[.eE]"), min_count=0).as_py():
            return False  # of neither kind of number; decimals such as 00.5 lose nothing that counts
        if pa.types.is_floating(kind) and pc.any(pc.match_substring_regex(values, _LONG_INTEGER)).as_py():
            return False  # a key of 20 digits would lose its last ones
    try:
        values.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def parse(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """Read a column of text as an inferred type. Raises: SchemaGrewError if a value is none of it."""
    if pa.types.is_string(kind):
        return column
    is_null = pc.is_in(column, NULLS)
    if pa.types.is_null(kind):
        if not pc.all(is_null, min_count=0).as_py():
            raise SchemaGrewError
        return pa.nulls(len(column))
    values = pc.if_else(is_null, pa.scalar(None, pa.string()), column)
    if not _parses(values.drop_null(), kind):
        raise SchemaGrewError
    return values.cast(kind)


def _convert(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if column.type == kind:
        return column
    if not pa.types.is_string(kind) and join_types(plain_type(column.type), kind) != kind:
        raise SchemaGrewError
    try:
        return column.cast(kind) if not _loses(column.type, kind) else _texts(column)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        if pa.types.is_string(kind):
            return _texts(column)
        raise SchemaGrewError from error


def _loses(kind: pa.DataType, target: pa.DataType) -> bool:
    """Tell whether a cast to text would not give the value as JSON writes it."""
    return bool(pa.types.is_string(target) and (pa.types.is_nested(kind) or pa.types.is_floating(kind)))


def _texts(column: pa.Array) -> pa.Array:
    return pa.array([_to_text(value) for value in column.to_pylist()], pa.string())


def _to_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)
