"""The manifest of a dataset version: which files it has, each by the hash of its bytes.

A line a file, sorted by name: `sha256 bytes name`; a name that does not print on one line is
written as a JSON string. The manifest is cut into ranges of about 4,096 files, at names whose CRC
says so, hence at the same names in every version: a version that changes one file shares all
ranges but one with the version before, and comparing two versions reads only what differs.
(Source: content-defined chunking of a sorted list, as lakeFS's ranges and prolly trees do.)
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from marrow.core.errors import DamagedBlob

_CUT_MASK = 4095


class Entry(NamedTuple):
    """One file of a version. Names are relative, with "/"; bytes that are no UTF-8 as surrogates."""

    name: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Change:
    """How one file differs between two versions; None: it is not there."""

    name: str
    old: Entry | None
    new: Entry | None

    @property
    def letter(self) -> str:
        """Return A (added), D (deleted), M (modified) or R (renamed: `old` has another name)."""
        if self.old is None:
            return "A"
        if self.new is None:
            return "D"
        return "M" if self.old.name == self.new.name else "R"


def encode(entries: Sequence[Entry]) -> Iterator[bytes]:
    """Yield the ranges of a manifest. Args: entries: sorted by name."""
    lines: list[str] = []
    for name, sha256, num_bytes in entries:
        lines.append(f"{sha256} {num_bytes} {name if _is_plain(name) else json.dumps(name)}\n")
        if _is_cut(name):
            yield "".join(lines).encode()
            lines = []
    if lines:
        yield "".join(lines).encode()


def decode(data: bytes) -> list[Entry]:
    """Read one range. Raises: DamagedBlob if it is none (its hash was right: another program's)."""
    entries = []
    try:
        for line in data.decode().split("\n")[:-1]:
            sha256, num_bytes, name = line.split(" ", 2)
            if name.startswith('"'):
                name = json.loads(name)
                os.fsencode(name)  # raises for what no file can be called
            if not _is_safe(name):
                raise ValueError(f"{name!r} is not the name of a file below a folder")
            entries.append(Entry(name, sha256, int(num_bytes)))
    except ValueError as error:
        raise DamagedBlob(f"a manifest cannot be read: {error}", hint="was it written by Marrow?") from error
    return entries


def splice(
    num_ranges: int, read: Callable[[int], bytes], changes: Mapping[str, Entry | None]
) -> list[int | bytes]:
    """Change some files of a manifest; give the ranges of the new one: old ones by number, or their bytes.

    Args: read: gives the old ranges, in the order of names. changes: what a name has now, None
        if it is gone. Equal to encoding all files anew.
    Cost: reads and writes the ranges of the changed names, and log2(num_ranges) more to find each.
    """
    cached = cache(read)
    by_range: dict[int, dict[str, Entry | None]] = {}
    for name, entry in changes.items():
        low, high = 0, max(0, num_ranges - 1)  # a name behind all others belongs to the last range
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if _last_name(cached(middle)) < name else (low, middle)
        by_range.setdefault(low, {})[name] = entry
    made: list[int | bytes] = []
    carried: list[Entry] = []  # of a range whose cut is gone: they go on into the next
    for number in range(max(1, num_ranges)):
        if number not in by_range and not carried:
            made += [number][:num_ranges]
            continue
        files = {entry.name: entry for entry in (decode(cached(number)) if number < num_ranges else ())}
        for name, changed in by_range.get(number, {}).items():
            if changed is None:
                files.pop(name, None)
            else:
                files[name] = changed
        entries = carried + sorted(files.values())
        pieces = list(encode(entries))
        carried = []
        if pieces and number < num_ranges - 1 and not _is_cut(entries[-1].name):
            carried = decode(pieces.pop())
        made += pieces
    return made


def compare(old: Iterable[Entry], new: Iterable[Entry]) -> list[Change]:
    """Return the changes from old to new, sorted by name; a moved file is one change, not two."""
    before = {entry.name: entry for entry in old}
    after = {entry.name: entry for entry in new}
    changes = []
    vanished: dict[str, list[Entry]] = {}
    for name, entry in sorted(before.items()):
        if name not in after:
            vanished.setdefault(entry.sha256, []).append(entry)
    for name, entry in sorted(after.items()):
        known = before.get(name)
        if known is not None:
            if known.sha256 != entry.sha256:
                changes.append(Change(name, known, entry))
        elif entry.num_bytes and (moved := vanished.get(entry.sha256)):
            changes.append(Change(name, moved.pop(0), entry))
        else:
            changes.append(Change(name, None, entry))
    changes += [Change(entry.name, entry, None) for rest in vanished.values() for entry in rest]
    return sorted(changes, key=lambda change: change.name)


def printable(name: str) -> str:
    """Return a name that prints on one line anywhere: odd bytes as escapes."""
    return name if name.isprintable() else json.dumps(name)[1:-1]


def _is_safe(name: str) -> bool:
    """Tell whether a name stays in its folder: manifests come from remotes too."""
    if "." not in name and "//" not in name and name[:1] != "/" and "\0" not in name:
        return name != "" and name[-1] != "/"  # nearly all names end here
    parts = name.split("/")
    return "\0" not in name and not any(part in ("", ".", "..", ".git") for part in parts)


def _is_cut(name: str) -> bool:
    return zlib.crc32(os.fsencode(name)) & _CUT_MASK == 0


def _last_name(data: bytes) -> str:
    return decode(data[data.rfind(b"\n", 0, -1) + 1 :])[0].name


def _is_plain(name: str) -> bool:
    return name.isprintable() and not name.startswith('"')
