"""What is known of a user's folder, so that unchanged files are not read again.

Like git's index: for each file its size, times and inode at the moment its bytes were hashed. All
equal now: the bytes are the same and the hash is known. A file changed within the granularity of
the file system's clock of being read could change once more and keep its times (git calls it
racy); such a file is left out and read again next time. Only `ctime` counts here: the kernel
sets it at every change, and no program can set it back.

The index is a cache: damaged, lost or written by another version, it costs one full read. What
must not be lost with it (which version the folder stands on) is small and lies beside it.
"""

import errno
import hashlib
import json
import os
import re
import stat
import time
import unicodedata
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import xxhash

from marrow.core.errors import SourceError, explain_os_errors
from marrow.core.files import TEMPORARY, atomic_file

Links = Literal["refuse", "follow", "skip"]

Stamp = tuple[int, int, int, int]
"""size, mtime_ns, ctime_ns, inode"""

FINE_GRAIN_NS = 50_000_000
"""Kernel clocks tick every 1 to 10 ms; five ticks of the slowest."""
COARSE_GRAIN_NS = 2_500_000_000
"""FAT counts in two seconds, some network file systems in one."""

_INT64 = (1 << 63) - 1
_MAGIC = b"marrow-index 1\n"
_SKIPPED = {".git", ".marrow"}
_LEFTOVER = re.compile(re.escape(TEMPORARY) + r"\d+-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Seen:
    """A file of the folder as it is now."""

    name: str
    stamp: Stamp


@dataclass
class FolderIndex:
    """The known hashes of a folder's files, and the versions that it stands on, by name."""

    path: Path
    known: dict[str, tuple[Stamp, str]] = field(default_factory=dict)
    bases: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def open(cls, home: Path, folder: Path) -> "FolderIndex":
        """Read the index of a folder; empty if there is none that can be read."""
        key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
        path = home / "indexes" / key
        index = cls(path)
        try:
            index.known = _unpack(path.read_bytes())
        except (FileNotFoundError, ValueError):
            index.known = {}
        try:
            found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            index.bases = {str(name): [str(i) for i in ids] for name, ids in found["bases"].items()}
        except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError):
            index.bases = {}
        return index

    def digest(self, seen: Seen) -> str | None:
        """Return the hash of a file that has not changed since it was read, else None."""
        known = self.known.get(seen.name)
        return known[1] if known is not None and known[0] == seen.stamp else None

    def save(self, known: Mapping[str, tuple[Stamp, str]]) -> None:
        """Replace what is known. Cost: about 100 bytes a file; not flushed to disk: it is a cache."""
        self.known = dict(known)
        self._replace(self.path, _pack(self.known))

    def stand_on(self, name: str, *artifact_ids: str) -> None:
        """Note the version of a name that the folder stands on.

        Several while a commit is under way: that needs to outlive a kill, which needs no fsync.
        """
        self.bases[name] = list(artifact_ids)
        if len(artifact_ids) > 1:
            self._replace(self.path.with_suffix(".json"), self._bases_text().encode())
        else:
            self._save_bases()

    def forget(self, name: str) -> None:
        """Note that the folder stands on no version of a name."""
        self.bases.pop(name, None)
        self._save_bases()

    def _save_bases(self) -> None:
        with (
            explain_os_errors("write the index of a folder", self.path),
            atomic_file(self.path.with_suffix(".json"), "w") as file,
        ):
            file.write(self._bases_text())

    def _bases_text(self) -> str:
        return json.dumps({"bases": self.bases})

    def _replace(self, path: Path, data: bytes) -> None:
        with explain_os_errors("write the index of a folder", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{os.urandom(6).hex()}")
            try:
                temporary.write_bytes(data)
                temporary.rename(path)
            finally:
                temporary.unlink(missing_ok=True)


def is_settled(stamp: Stamp, read_ns: int) -> bool:
    """Tell whether a file read at that time could not have changed since and kept its times."""
    ctime_ns = stamp[2]
    grain = FINE_GRAIN_NS if ctime_ns % 1_000_000 else COARSE_GRAIN_NS
    return read_ns - ctime_ns > grain


def stamp_of(status: os.stat_result) -> Stamp:
    """Return what tells a changed file from an unchanged one."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & _INT64


def walk(folder: Path, *, links: Links = "refuse", avoid: Path | None = None) -> list[Seen]:
    """List the files of a folder, sorted by name; one stat each, no byte read.

    `.git`, the store itself (`avoid`) and leftovers of killed checkouts are passed over. Empty
    folders are not kept.
    Args: links: "refuse" symbolic links, "follow" them to the bytes they point to, "skip" them.
    Raises: SourceError for links that are refused, sockets and devices, names too long, two names
        that differ only in Unicode's normal form; NotPermitted.
    """
    found: list[Seen] = []
    with explain_os_errors("read the folder", folder):
        avoided = _identity(avoid)
        for name, status in _files_below(str(folder), links, avoided):
            found.append(Seen(name, stamp_of(status)))
    found.sort(key=lambda seen: seen.name)
    _check_names(found)
    return found


def _files_below(
    root: str, links: Links, avoided: tuple[int, int] | None
) -> Iterator[tuple[str, os.stat_result]]:
    waiting = [("", root)]
    loops: set[tuple[int, int]] = set()
    while waiting:
        prefix, place = waiting.pop()
        with _explain_long_paths(place), os.scandir(place) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                name = f"{prefix}{entry.name}"
                if stat.S_ISLNK(status.st_mode):
                    if links == "skip":
                        continue
                    status = _followed(entry, name, links)
                if stat.S_ISREG(status.st_mode):
                    if not entry.name.startswith(TEMPORARY) or not _LEFTOVER.fullmatch(entry.name):
                        yield name, status
                elif stat.S_ISDIR(status.st_mode):
                    identity = status.st_dev, status.st_ino
                    if entry.name in _SKIPPED or identity == avoided or _LEFTOVER.fullmatch(entry.name):
                        continue
                    if links == "follow":
                        if identity in loops:
                            continue  # a link to a folder above, or a second one to the same folder
                        loops.add(identity)
                    waiting.append((f"{name}/", entry.path))
                else:
                    raise SourceError(
                        f"{name!r} is no file, folder or link", hint="move it out of the folder"
                    )


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


def _check_names(found: list[Seen]) -> None:
    normal: dict[str, str] = {}
    for seen in found:
        if not seen.name.isascii():
            form = unicodedata.normalize("NFC", seen.name)
            if other := normal.get(form):
                raise SourceError(
                    f"{other!a} and {seen.name!a} look the same and differ only in Unicode's normal form: "
                    "on some systems one would overwrite the other",
                    hint="rename one of them",
                )
            normal[form] = seen.name


def _identity(path: Path | None) -> tuple[int, int] | None:
    if path is None:
        return None
    status = path.stat()
    return status.st_dev, status.st_ino


def _pack(known: Mapping[str, tuple[Stamp, str]]) -> bytes:
    numbers = array("q")
    for stamp, _ in known.values():
        numbers.extend(stamp)
    names = b"\0".join(os.fsencode(name) for name in known)
    digests = bytes.fromhex("".join(digest for _, digest in known.values()))
    body = len(known).to_bytes(8, "little") + numbers.tobytes() + digests + names
    return _MAGIC + xxhash.xxh3_128_digest(body) + body


def _unpack(data: bytes) -> dict[str, tuple[Stamp, str]]:
    body = data[len(_MAGIC) + 16 :]
    if not data.startswith(_MAGIC) or xxhash.xxh3_128_digest(body) != data[len(_MAGIC) : len(_MAGIC) + 16]:
        raise ValueError("not an index, or damaged")
    count = int.from_bytes(body[:8], "little")
    if not count:
        return {}
    digests_at = 8 + 32 * count
    names_at = digests_at + 32 * count
    numbers = array("q")
    numbers.frombytes(body[8:digests_at])
    stamps: Any = zip(*[iter(numbers)] * 4, strict=True)
    text = body[digests_at:names_at].hex()
    digests = (text[start : start + 64] for start in range(0, len(text), 64))
    names = map(os.fsdecode, body[names_at:].split(b"\0"))
    return dict(zip(names, zip(stamps, digests, strict=True), strict=True))


def now_ns() -> int:
    """Return the time that file times are compared with."""
    return time.time_ns()
