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
"""

import difflib
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from marrow.core.errors import RecipeError
from marrow.core.hashes import hash_value

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Unit:
    """Marks a number that may be written with a suffix; `scale` maps the suffix to a factor."""

    name: str
    scale: Mapping[str, float]
    example: str


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
Count = Annotated[int, Unit("a count", _COUNT, '"2B"')]


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


def load_recipe(path: Path, schema: Mapping[str, type], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, its base and the command line's `key=value` overrides.

    Args: schema: table name -> frozen dataclass. overrides: as in "train.lr=3e-4"; a value that
        is not TOML is taken as a string.
    Raises: RecipeError with file and line for any key, type, unit or bound that is wrong.
    """
    written = _read(path, base_allowed=True)
    for override in overrides:
        key, value = _parse_override(override)
        written[key] = (value, Origin(f"--set {override}"))
    sections: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for key, (_, origin) in written.items():
        table = key.split(".", 1)[0]
        if table not in schema or "." not in key:
            raise _unknown("table" if "." in key else "key", table, list(schema), origin)
    for table, kind in schema.items():
        sections[table] = _build(kind, table, written, origins)
    return Recipe(path.stem, path, sections, origins)


def _read(path: Path, *, base_allowed: bool) -> dict[str, tuple[Any, Origin]]:
    """Flatten a TOML file to {"table.key": (value, origin)}, on top of its base's."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        nearby = sorted(str(p) for folder in {path.parent, Path("recipes")} for p in folder.glob("*.toml"))
        close = difflib.get_close_matches(str(path), nearby, n=1, cutoff=0.4)
        raise RecipeError(
            f"no recipe at {path}",
            hint=f"did you mean {close[0]}?" if close else "give the path of a .toml file",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {path}: {error}", hint="a recipe is a UTF-8 TOML file") from None
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(
            f"{path}: {error}", hint="the file is not valid TOML; strings need quotes"
        ) from None
    values: dict[str, tuple[Any, Origin]] = {}
    base = tree.pop("base", None)
    if base is not None:
        if not base_allowed:
            raise RecipeError(
                f"{path}: base = {base!r}: a base may not have a base", hint="copy its keys here"
            )
        values.update(_read(path.parent / base, base_allowed=False))
    lines = _key_lines(text)

    def flatten(prefix: str, table: Mapping[str, Any]) -> None:
        for name, value in table.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict) and value:
                flatten(f"{key}.", value)
            else:
                values[key] = (value, Origin(f"{path}:{lines.get(key, 1)}"))

    flatten("", tree)
    return values


_HEADER = re.compile(r"^\s*\[\s*([^\[\]]+?)\s*\]\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


def _key_lines(text: str) -> dict[str, int]:
    """Map "table.key" to its line. tomllib gives no positions, so lines are scanned for keys."""
    lines: dict[str, int] = {}
    table = ""
    inside: str | None = None  # the quotes of an open multi-line string
    for number, line in enumerate(text.splitlines(), 1):
        if inside is None:
            if header := _HEADER.match(line):
                table = _bare(header[1]) + "."
                lines.setdefault(table[:-1], number)
            elif key := _KEY.match(line):
                lines.setdefault(table + _bare(key[1]), number)
        for quotes in ('"""', "'''"):
            if inside in (None, quotes) and line.count(quotes) % 2:
                inside = quotes if inside is None else None
    return lines


def _bare(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override}: no value", hint="write --set table.key=value")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text
    return key.strip(), value


def _build(
    kind: type, prefix: str, written: Mapping[str, tuple[Any, Origin]], origins: dict[str, Origin]
) -> Any:
    """Make the dataclass for one table, filling defaults and recording origins."""
    hints = get_type_hints(kind, include_extras=True)
    known = {f.name: f for f in fields(kind)}
    given: dict[str, Any] = {}
    places: list[Origin] = []
    for key, (_, origin) in written.items():
        if key.startswith(f"{prefix}."):
            name = key[len(prefix) + 1 :].split(".")[0]
            if name not in known:
                raise _unknown(f"key in [{prefix}]", name, list(known), origin)
    for name, field_ in known.items():
        key = f"{prefix}.{name}"
        if is_dataclass(hints[name]):
            given[name] = _build(cast(type, hints[name]), key, written, origins)
        elif key in written:
            value, origin = written[key]
            given[name] = _convert(value, hints[name], key, origin)
            origins[key] = origin
            places.append(origin)
        elif field_.default is MISSING and field_.default_factory is MISSING:
            raise RecipeError(f"[{prefix}] needs {name}", hint=f"add {name} = ... to [{prefix}]")
        else:
            origins[key] = DEFAULT
    try:
        return kind(**given)
    except ValueError as error:  # from __post_init__: values that do not fit together
        where = ", ".join(dict.fromkeys(str(place) for place in places)) or "defaults"
        raise RecipeError(f"{where}: [{prefix}] {error}") from None


def _unknown(what: str, name: str, known: Sequence[str], origin: Origin) -> RecipeError:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
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
        raise failures[0]
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices:
            close = difflib.get_close_matches(str(value), [str(c) for c in choices], n=1)
            known = ", ".join(repr(c) for c in choices)
            raise RecipeError(
                f"{origin}: {key} = {value!r} is none of {known}",
                hint=f"did you mean {close[0]!r}?" if close else f"write one of {known}",
            )
        return value
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        if not isinstance(value, list):
            raise _wrong_type(value, f"a list of {_name(item)}s", key, origin)
        return tuple(_convert(v, item, key, origin) for v in value)
    number = _number(value, hint, unit, key, origin)
    for mark in marks:
        if isinstance(mark, Range) and number is not None:
            low, high = mark.low, mark.high
            if (low is not None and number < low) or (high is not None and number > high):
                allowed = " and ".join(
                    [f"at least {low:g}"] * (low is not None) + [f"at most {high:g}"] * (high is not None)
                )
                raise RecipeError(f"{origin}: {key} = {value!r} is out of range", hint=f"allowed: {allowed}")
    return number


def _number(value: Any, hint: Any, unit: Unit | None, key: str, origin: Origin) -> Any:
    if unit is not None and isinstance(value, str):
        match = re.fullmatch(r"\s*([\d._]+(?:e[+-]?\d+)?)\s*([A-Za-z]*)(?:\s+\w+)?\s*", value)
        scale = 1.0 if match and not match[2] else unit.scale.get(match[2]) if match else None
        try:
            scaled = float(match[1]) * scale if match and scale is not None else None
        except ValueError:
            scaled = None
        if scaled is None or (hint is int and scaled != int(scaled)):
            raise RecipeError(
                f"{origin}: {key} = {value!r} is not {unit.name}",
                hint=f"write a number, or {unit.example}; units: {', '.join(unit.scale)}",
            )
        return int(scaled) if hint is int else scaled
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    wanted = hint if isinstance(hint, type) else object
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise _wrong_type(
            value, f"{unit.name} such as {unit.example}" if unit else f"a {_name(hint)}", key, origin
        )
    return value


def _wrong_type(value: Any, wanted: str, key: str, origin: Origin) -> RecipeError:
    return RecipeError(
        f"{origin}: {key} = {value!r} is a {_name(type(value))}, not {wanted}", hint=f"write {wanted}"
    )


_NAMES = {
    str: "string",
    int: "whole number",
    float: "number",
    bool: "true or false",
    list: "list",
    dict: "table",
}


def _name(kind: Any) -> str:
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))
