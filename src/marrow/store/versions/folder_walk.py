"""What lies in a user's folder now: names and stamps, one stat a file, no byte read.

Files are kept a folder at a time, their numbers in one array: what the index knows of a folder is
then compared as bytes, not file by file (`folder_index.py`). Only `ctime` tells for sure that a
file has not changed: the kernel sets it at every change, and no program can set it back.
"""

import errno
import os
import re
import stat
import time
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from marrow.core.errors import SourceError, explain_os_errors
from marrow.core.files import TEMPORARY

Links = Literal["refuse", "follow", "skip"]

Stamp = tuple[int, int, int, int]
"""size, mtime_ns, ctime_ns, inode"""

FINE_GRAIN_NS = 50_000_000
"""Kernel clocks tick every 1 to 10 ms; five ticks of the slowest."""
COARSE_GRAIN_NS = 2_500_000_000
"""FAT counts in two seconds, some network file systems in one."""

_INT64 = (1 << 63) - 1
_SKIPPED = {".git", ".marrow"}
_LEFTOVER = re.compile(re.escape(TEMPORARY) + r"\d+-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Seen:
    """A file of the folder as it is now."""

    name: str
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Listing:
    """The files that lie directly in one folder, in the system's order.

    prefix: the folder's name with a "/" behind, "" for the top. stamps: int64, four a file.
    """

    prefix: str
    names: list[str]
    stamps: "array[int]"

    def seen(self) -> Iterator[Seen]:
        """Yield the files."""
        stamps = zip(*[iter(self.stamps)] * 4, strict=True)
        for name, (size, mtime, ctime, inode) in zip(self.names, stamps, strict=True):
            yield Seen(self.prefix + name, (size, mtime, ctime, inode))


def walk(folder: Path, *, links: Links = "refuse", avoid: Path | None = None) -> list[Seen]:
    """List the files of a folder, sorted by name. Raises: as `scan`."""
    found = [seen for listing in scan(folder, links=links, avoid=avoid) for seen in listing.seen()]
    found.sort(key=lambda seen: seen.name)
    return found


def scan(folder: Path, *, links: Links = "refuse", avoid: Path | None = None) -> list[Listing]:
    """List the files of a folder and of those below it; one stat each, no byte read.

    `.git`, the store itself (`avoid`) and leftovers of killed checkouts are passed over. Empty
    folders are not kept.
    Args: links: "refuse" symbolic links, "follow" them to the bytes they point to, "skip" them.
    Raises: SourceError for links that are refused, sockets and devices, names too long, two names
        that differ only in Unicode's normal form; NotPermitted.
    """
    with explain_os_errors("read the folder", folder):
        found = list(_listings(str(folder), links, _identity(avoid)))
    _check_names(found)
    return found


def is_settled(stamp: Stamp, read_ns: int) -> bool:
    """Tell whether a file read at that time could not have changed since and kept its times."""
    ctime_ns = stamp[2]
    grain = FINE_GRAIN_NS if ctime_ns % 1_000_000 else COARSE_GRAIN_NS
    return read_ns - ctime_ns > grain


def stamp_of(status: os.stat_result) -> Stamp:
    """Return what tells a changed file from an unchanged one."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & _INT64


def now_ns() -> int:
    """Return the time that file times are compared with."""
    return time.time_ns()


def _listings(root: str, links: Links, avoided: tuple[int, int] | None) -> Iterator[Listing]:
    waiting = [("", root)]
    loops: set[tuple[int, int]] = set()
    while waiting:
        prefix, place = waiting.pop()
        names: list[str] = []
        stamps = array("q")
        with _explain_long_paths(place), os.scandir(place) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                kind = stat.S_IFMT(status.st_mode)
                if kind == stat.S_IFLNK:
                    if links == "skip":
                        continue
                    status = _followed(entry, f"{prefix}{entry.name}", links)
                    kind = stat.S_IFMT(status.st_mode)
                if kind == stat.S_IFREG:
                    name = entry.name
                    if not name.startswith(TEMPORARY) or not _LEFTOVER.fullmatch(name):
                        names.append(name)
                        stamps.extend(stamp_of(status))
                elif kind == stat.S_IFDIR:
                    identity = status.st_dev, status.st_ino
                    if entry.name in _SKIPPED or identity == avoided or _LEFTOVER.fullmatch(entry.name):
                        continue
                    if links == "follow":
                        if identity in loops:
                            continue  # a link to a folder above, or a second one to the same folder
                        loops.add(identity)
                    waiting.append((f"{prefix}{entry.name}/", entry.path))
                else:
                    raise SourceError(
                        f"{prefix + entry.name!r} is no file, folder or link",
                        hint="move it out of the folder",
                    )
        if names:
            yield Listing(prefix, names, stamps)


def _followed(entry: "os.DirEntry[str]", name: str, links: Links) -> os.stat_result:
    if links == "refuse":
        raise SourceError(
            f"{name!r} is a symbolic link to {os.readlink(entry.path)!r}",
            hint="--follow-links commits the bytes that it points to, or move it out of the folder",
        )
    try:
        return entry.stat()
    except OSError as error:
        raise SourceError(
            f"the symbolic link {name!r} leads nowhere: {error.strerror}", hint="mend or remove the link"
        ) from error


@contextmanager
def _explain_long_paths(place: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise SourceError(
            f"{place[:100]}... and below is a path too long to read: above {len(os.fsencode(place)):,} bytes",
            hint="the system takes paths up to 4,096 bytes: give fewer or shorter folders",
        ) from error


def _check_names(found: Iterable[Listing]) -> None:
    normal: dict[str, str] = {}
    for listing in found:
        if listing.prefix.isascii() and "".join(listing.names).isascii():
            continue
        for part in listing.names:
            name = listing.prefix + part
            if not name.isascii():
                form = unicodedata.normalize("NFC", name)
                if other := normal.get(form):
                    one, two = sorted((other, name))
                    raise SourceError(
                        f"{one!a} and {two!a} look the same and differ only in Unicode's normal form: "
                        "on some systems one would overwrite the other",
                        hint="rename one of them",
                    )
                normal[form] = name


def _identity(path: Path | None) -> tuple[int, int] | None:
    if path is None:
        return None
    status = path.stat()
    return status.st_dev, status.st_ino
