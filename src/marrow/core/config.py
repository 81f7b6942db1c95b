"""Recipes: one TOML file says *what* a run does.

    [train]
    steps = 2_000
    lr = 3e-4            # --set train.lr=1e-3 overrides it
    checkpoint_every = "30s"

Each table is a frozen dataclass in the folder that consumes it; `load_recipe` is given the map
from table name to dataclass. Unknown keys are refused with file, line and "did you mean"; units
are parsed where the field's type asks for one (`Bytes`, `Duration`, `Count`); `base = "other.toml"`
takes one parent; every value remembers where it came from. `Recipe.hash` covers the resolved
values, never the way they were written.

A field of type `Mapping[str, X]` is a table with free keys, each an X: a value, or a dataclass
(`[data.expect.price]`). Its value is a `FrozenMap`, in the order of the keys' names.
"""

import difflib
import math
import re
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from marrow.core.errors import RecipeError
from marrow.core.flat_toml import TABLE, cut_setting, flatten, join_key, read_flat, split_key
from marrow.core.frozen_map import FrozenMap
from marrow.core.hashes import hash_value

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Unit:
    """Marks a number that may be written with a suffix; `scale` maps the suffix to a factor.

    nouns: words that may follow and mean nothing, as in "2B tokens".
    """

    name: str
    scale: Mapping[str, float]
    example: str
    nouns: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Range:
    """Marks a number with bounds, both inclusive; None leaves a side open."""

    low: float | None = None
    high: float | None = None


_BYTES = {"B": 1} | {
    f"{p}{b}": (1024 if b == "iB" else 1000) ** (i + 1) for i, p in enumerate("KMGT") for b in ("B", "iB")
}
_BYTES |= {"kB": 1000, "kiB": 1024}
_SECONDS = {"ms": 1e-3, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_COUNT = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}

Bytes = Annotated[int, Unit("a size in bytes", _BYTES, '"64MiB"')]
Duration = Annotated[float, Unit("a duration in seconds", _SECONDS, '"30s"')]
_NOUNS = ("tokens", "steps", "rows", "samples", "documents", "sequences", "requests")
Count = Annotated[int, Unit("a count", _COUNT, '"2B"', _NOUNS)]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from: a recipe line, the command line, or the default."""

    place: str

    def __str__(self) -> str:
        return self.place


DEFAULT = Origin("default")


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe: one dataclass per table, and where each value came from."""

    name: str
    path: Path
    sections: Mapping[str, Any]
    origins: Mapping[str, Origin]

    @property
    def hash(self) -> str:
        """SHA-256 of the resolved values."""
        return hash_value(dict(self.sections))

    def section(self, kind: type[T]) -> T:
        """Return the section that is of this dataclass."""
        for value in self.sections.values():
            if isinstance(value, kind):
                return value
        raise KeyError(kind.__name__)


def load_recipe(path: Path | None, schema: Mapping[str, type], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, its base and the command line's `key=value` overrides.

    Args: path: None for a recipe of defaults and overrides alone. schema: table name -> frozen
        dataclass. overrides: as in "train.lr=3e-4"; a value that is not TOML is taken as a string.
    Raises: RecipeError with file and line for any key, type, unit or bound that is wrong.
    """
    written = {} if path is None else _read(path, base_allowed=True)
    for override in overrides:
        key, value = _parse_override(override)
        _write(written, flatten(key, value), Origin(f"--set {override}"))
    for key, (value, origin) in written.items():
        names = split_key(key)
        table, name = names[0], names[-1]
        if table not in schema:
            what = "table" if value is TABLE else "key"
            raise _unknown(what, table, list(schema), origin, _places(name, schema))
        if len(names) == 1 and value is not TABLE:
            raise _wrong_type(value, "a table", key, origin, hint=f"write [{key}]")
    for table in schema:
        written.setdefault(table, (TABLE, Origin(str(path or "recipe"))))
    build = _Build(schema, written, _names_within(written))
    sections = {table: build.section(kind, table) for table, kind in schema.items()}
    return Recipe(path.stem if path else "", path or Path(), sections, build.origins)


Written = dict[str, tuple[Any, Origin]]


def _read(path: Path, *, base_allowed: bool) -> Written:
    """Return {"table.key": (value, origin)} of a file, on top of its base's."""
    file = read_flat(path)
    written: Written = {}
    base = file.values.get("base")
    if base is not None:
        place = Origin(file.place("base"))
        if not isinstance(base, str):
            raise _wrong_type(base, "a string", "base", place)
        if not base_allowed:
            raise RecipeError(
                f"{place}: base = {base!r}: a base may not have a base", hint="copy its keys here"
            )
        written.update(_read(path.parent / base, base_allowed=False))
    for key, value in file.values.items():
        if key != "base":
            _write(written, [(key, value)], Origin(file.place(key)))
    return written


def _write(
    written: Written, entries: Iterator[tuple[str, Any]] | list[tuple[str, Any]], origin: Origin
) -> None:
    """Lay entries over those that are there, with the tables that their keys imply."""
    for key, value in entries:
        parts = split_key(key)
        for i in range(1, len(parts)):
            table = join_key(*parts[:i])
            if written.get(table, (None,))[0] is not TABLE:
                written[table] = (TABLE, origin)
        if value is not TABLE or written.get(key, (None,))[0] is not TABLE:
            written[key] = (value, origin)


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = cut_setting(override)
    if not equals or not key:
        raise RecipeError(f"--set {override}: no value", hint="write --set table.key=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    return join_key(*split_key(key)), value


def _names_within(written: Written) -> dict[str, list[str]]:
    """Return the names that stand in each table."""
    within: dict[str, list[str]] = {}
    for key in written:
        *table, name = split_key(key)
        within.setdefault(join_key(*table), []).append(name)
    return within


@dataclass(frozen=True, slots=True)
class _Build:
    """Makes the sections from what is written, and records where each value came from."""

    schema: Mapping[str, type]
    written: Written
    within: Mapping[str, Sequence[str]]
    origins: dict[str, Origin] = field(default_factory=dict)

    def section(self, kind: type, prefix: str) -> Any:
        """Make the dataclass for one table, filling defaults."""
        hints = get_type_hints(kind, include_extras=True)
        known = {f.name: f for f in fields(kind)}
        for name in self.within.get(prefix, ()):
            if name not in known:
                origin = self.written[f"{prefix}.{join_key(name)}"][1]
                raise _unknown(f"key in [{prefix}]", name, list(known), origin, _places(name, self.schema))
        given: dict[str, Any] = {}
        places: dict[str, Origin] = {}
        for name, field_ in known.items():
            key = f"{prefix}.{name}"
            if is_dataclass(hints[name]) or key in self.written:
                given[name] = self.value(hints[name], key)
                places |= {name: self.origins[key]} if key in self.origins else {}
            elif field_.default is MISSING and field_.default_factory is MISSING:
                place = self.written.get(prefix, self.written[split_key(prefix)[0]])[1]
                raise RecipeError(f"{place}: [{prefix}] needs {name}", hint=f"add {name} = ... to [{prefix}]")
            else:
                self.origins[key] = DEFAULT
        try:
            return kind(**given)
        except ValueError as error:  # from __post_init__: values that do not fit together
            places = {name: place for name, place in places.items() if place is not DEFAULT}
            named = [place for name, place in places.items() if name in str(error)] or list(places.values())
            where = ", ".join(dict.fromkeys(str(place) for place in named[:3])) or "defaults"
            hint = "`marrow config show` prints every value of the recipe and where it came from"
            raise RecipeError(f"{where}: [{prefix}] {error}", hint=hint) from None

    def value(self, hint: Any, key: str) -> Any:
        """Make the value of one key: a table within the table, a table with free keys, or a plain one."""
        value, origin = self.written.get(key, (TABLE, DEFAULT))
        free = get_origin(hint) is Mapping
        if not free and not is_dataclass(hint):
            self.origins[key] = origin
            return _convert(value, hint, key, origin)
        if value is not TABLE:
            raise _wrong_type(value, "a table", key, origin, hint=f"write [{key}]")
        if not free:
            return self.section(cast(type, hint), key)
        item = get_args(hint)[1]
        names = sorted(self.within.get(key, ()))
        if not names:
            self.origins[key] = origin
        return FrozenMap((name, self.value(item, f"{key}.{join_key(name)}")) for name in names)


def _places(name: str, schema: Mapping[str, type]) -> list[str]:
    """Return the keys of all tables that end in this name."""
    found = []
    for table, kind in schema.items():
        hints = get_type_hints(kind)
        nested = {f.name: hints[f.name] for f in fields(kind) if is_dataclass(hints[f.name])}
        if name in hints and name not in nested:
            found.append(f"{table}.{name}")
        found += [f"{table}.{key}" for key in _places(name, cast(Mapping[str, type], nested))]
    return found


def _unknown(
    what: str, name: str, known: Sequence[str], origin: Origin, elsewhere: Sequence[str] = ()
) -> RecipeError:
    close = [*elsewhere, *difflib.get_close_matches(name, known, n=1, cutoff=0.5)]
    if what == "table":  # a misspelt name is likelier than a key in a table that is not there
        close.reverse()
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
    return RecipeError(f"{origin}: unknown {what}: {name!r}", hint=hint)


def _convert(value: Any, hint: Any, key: str, origin: Origin) -> Any:
    """Check a written value against a field's type; parse units; enforce bounds."""
    marks: list[Any] = []
    while get_origin(hint) is Annotated:
        hint, *new = get_args(hint)
        marks = new + marks
    unit = next((mark for mark in marks if isinstance(mark, Unit)), None)
    if get_origin(hint) in (Union, types.UnionType):
        options = get_args(hint)
        if value is None or (isinstance(value, str) and value == "none" and type(None) in options):
            return None
        failures = []
        for option in options:
            if option is type(None):
                continue
            try:
                return _convert(value, Annotated[option, *marks] if marks else option, key, origin)
            except RecipeError as error:
                failures.append(error)
        raise RecipeError(
            failures[0].message, hint=", or ".join(dict.fromkeys(str(failure.hint) for failure in failures))
        )
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if not any(type(choice) is type(value) and choice == value for choice in choices):
            close = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
            known = ", ".join(repr(c) for c in choices)
            raise RecipeError(
                f"{origin}: {key} = {_shown(value)} is none of {known}",
                hint=f"did you mean {close[0]!r}?" if close else f"write one of {known}",
            )
        return value
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        if not isinstance(value, list):
            raise _wrong_type(value, f"a list of {_name(item)}s", key, origin)
        return tuple(_convert(v, item, key, origin) for v in value)
    number = _number(value, hint, unit, key, origin)
    if isinstance(number, float) and not math.isfinite(number):
        raise RecipeError(
            f"{origin}: {key} = {_shown(value)} is no finite number", hint="write a finite number"
        )
    for mark in marks:
        if isinstance(mark, Range):
            bounds = {"at least": mark.low, "at most": mark.high}
            if number < (-math.inf if mark.low is None else mark.low) or number > (
                math.inf if mark.high is None else mark.high
            ):
                allowed = " and ".join(f"{side} {n:g}" for side, n in bounds.items() if n is not None)
                raise RecipeError(
                    f"{origin}: {key} = {_shown(value)} is out of range", hint=f"allowed: {allowed}"
                )
    return number


# At most two digits of exponent: no count needs more, and a billion digits would fill the memory.
_WITH_UNIT = re.compile(
    r"\s*(\d[\d_]*(?:\.\d+)?(?:e[+-]?\d{1,2})?)\s*([A-Za-z]*)(?:\s+([a-z]+))?\s*", re.ASCII
)


def _number(value: Any, hint: Any, unit: Unit | None, key: str, origin: Origin) -> Any:
    if unit is not None and isinstance(value, str):
        scaled = _scaled(value, unit)
        if scaled is None or (hint is int and scaled.denominator != 1):
            raise RecipeError(
                f"{origin}: {key} = {_shown(value)} is not {unit.name}",
                hint=f"write a number, or {unit.example}; units: {', '.join(unit.scale)}",
            )
        return int(scaled) if hint is int else float(scaled)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1023 else math.inf
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    wanted = hint if isinstance(hint, type) else object
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool) or value is TABLE:
        raise _wrong_type(
            value, f"{unit.name} such as {unit.example}" if unit else f"a {_name(hint)}", key, origin
        )
    return value


def _scaled(text: str, unit: Unit) -> Fraction | None:
    """Read a number with a suffix exactly; None if it is none."""
    match = _WITH_UNIT.fullmatch(text)
    if match is None or match[1].endswith("_") or (match[3] and match[3] not in unit.nouns):
        return None
    if match[2] and match[2] not in unit.scale and (match[3] or match[2] not in unit.nouns):
        return None
    return Fraction(match[1].replace("_", "")) * Fraction(str(unit.scale.get(match[2], 1)))


def _wrong_type(value: Any, wanted: str, key: str, origin: Origin, hint: str = "") -> RecipeError:
    shown = key if value is TABLE else f"{key} = {_shown(value)}"
    return RecipeError(
        f"{origin}: {shown} is a {_name(type(value))}, not {wanted}", hint=hint or f"write {wanted}"
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_NAMES = {
    str: "string",
    int: "whole number",
    float: "number",
    bool: "true or false",
    list: "list",
    dict: "table",
    type(TABLE): "table",
}


def _name(kind: Any) -> str:
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))
