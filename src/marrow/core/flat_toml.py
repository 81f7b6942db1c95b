"""A TOML file as flat "table.key" entries, each with the line it was written on.

`tomllib` gives values and no positions, so the lines are found by a second look at the text, in
which strings and comments cannot be mistaken for keys: multi-line strings and comments are
blanked first, and lines inside an open bracket are passed over.

A flat key is written as TOML writes it: `join_key` quotes a name that is not bare, such as the
column "price (EUR)" in `data.expect."price (EUR)".min`, and `split_key` takes it apart again.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from marrow.core.errors import RecipeError


class Table:
    """Stands for a table in flat entries; its keys have entries of their own."""

    def __repr__(self) -> str:
        return "{...}"


TABLE: Final = Table()


@dataclass(frozen=True, slots=True)
class FlatToml:
    """`values`: "table.key" -> value, or TABLE. `lines`: where keys and headers stand."""

    path: Path
    values: Mapping[str, Any]
    lines: Mapping[str, int]

    def place(self, key: str) -> str:
        """Return "path:line" of a key: its own, else that of what it stands in or first contains."""
        return f"{self.path}:{self._line(key)}"

    def _line(self, key: str) -> int:
        if key in self.lines:
            return self.lines[key]
        inside = [line for name, line in self.lines.items() if name.startswith(f"{key}.")]
        if inside:
            return min(inside)
        parent = split_key(key)[:-1]
        return self._line(join_key(*parent)) if parent else 1


def read_flat(path: Path) -> FlatToml:
    """Read a TOML file.

    Raises: RecipeError, with the line where the text is no TOML, or with a near name if there is
        no such file.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
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
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        said = re.sub(r" \(at (line \d+, column \d+|end of document)\)", "", str(error))
        found = re.search(r"at line (\d+)", str(error))
        line = int(found[1]) if found else max(1, len(text.rstrip().split("\n")))
        raise RecipeError(
            f"{path}:{line}: {said}", hint="this is not valid TOML; strings need quotes, keys stand once"
        ) from None
    return FlatToml(path, dict(flatten("", tree)), key_lines(text))


def flatten(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield a value under its key; for a table TABLE, then its keys; "" is the file itself."""
    if not isinstance(value, dict):
        yield key, value
        return
    if key:
        yield key, TABLE
    for name, item in value.items():
        yield from flatten(f"{key}.{join_key(name)}" if key else join_key(name), item)


_BARE = re.compile(r"[A-Za-z0-9_-]+")
_PART = r"""(?:[\w-]+|"(?:\\.|[^"\\])*"|'[^']*')"""
_DOTTED = rf"{_PART}(?:\s*\.\s*{_PART})*"


def join_key(*names: str) -> str:
    """Write names as one dotted TOML key; those that are not bare are quoted."""
    return ".".join(name if _BARE.fullmatch(name) else quoted(name) for name in names)


def quoted(text: str) -> str:
    """Write a TOML string: as JSON does, but for DEL, which TOML does not take as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def split_key(key: str) -> list[str]:
    """Take a dotted key apart into its names; what is no TOML key is parted at its dots."""
    if '"' not in key and "'" not in key:
        return [part.strip() for part in key.split(".")]
    try:
        tree: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return [part.strip().strip("\"'") for part in key.split(".")]
    names = []
    while isinstance(tree, dict):
        [(name, tree)] = tree.items()
        names.append(name)
    return names


def cut_setting(text: str) -> tuple[str, str, str]:
    """Part `key=value` at the first `=` outside quotes, as `str.partition` would."""
    if found := re.match(rf"\s*{_DOTTED}\s*(?==)", text):
        return found[0].strip(), "=", text[found.end() + 1 :]
    key, equals, value = text.partition("=")
    return key.strip(), equals, value


_BLANKED = re.compile(
    r'"""(?:\\[\s\S]|[^\\])*?"{3,5}' r"|'''[\s\S]*?'{3,5}" r'|"(?:\\.|[^"\\\n])*"' r"|'[^'\n]*'" r"|\#[^\n]*"
)
_HEADER = re.compile(rf"^\s*\[{{1,2}}\s*({_DOTTED})\s*\]{{1,2}}\s*$")
_KEY = re.compile(rf"^\s*({_DOTTED})\s*=")
_STRING = re.compile(r"\"(?:\\.|[^\"\\])*\"|'[^']*'")


def key_lines(text: str) -> dict[str, int]:
    """Map "table.key", and "table" of a header, to the line where it first stands (from 1)."""
    lines: dict[str, int] = {}
    table = ""
    depth = 0  # open brackets of a value that goes on over several lines
    for number, line in enumerate(_BLANKED.sub(_blank, text).split("\n"), 1):
        if depth == 0:
            if header := _HEADER.match(line):
                table = _bare(header[1]) + "."
                lines.setdefault(table[:-1], number)
                continue
            if key := _KEY.match(line):
                lines.setdefault(table + _bare(key[1]), number)
        plain = _STRING.sub("", line)
        depth += plain.count("[") + plain.count("{") - plain.count("]") - plain.count("}")
    return lines


def _blank(found: re.Match[str]) -> str:
    """Leave of a comment or multi-line string only its line ends; short strings may be keys."""
    text = found[0]
    if text.startswith(('"""', "'''", "#")):
        return "\n" * text.count("\n")
    return text


def _bare(key: str) -> str:
    return join_key(*split_key(key))
