"""Packs: many small files in one, so that a hundred thousand of them cost a few flushes.

    <folder>/<name>.pack     members' bytes, one after the other
                             index: (SHA-256, offset, size) of each member, sorted: 48 bytes each
                             footer: number of members, magic

A pack is named by the SHA-256 of its index. The index names every member's bytes by their hash, so
the name vouches for all of it, and no byte is hashed twice. A member is verified when it is read.
Where a member lies is known from the packs' indexes alone; there is no other record to lose.
"""

import hashlib
import os
import struct
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from marrow.core.errors import DamagedBlob, explain_os_errors
from marrow.store.staging import Staging

MAX_MEMBER_BYTES = 128 << 10
"""Files below it are packed: above, one file more costs less than its bytes."""
MAX_PACK_BYTES = 64 << 20
FEW = 64  # members that are looked for without going through all

SUFFIX = ".pack"
FOOTER = struct.Struct("<Q8s")
_MEMBER = struct.Struct("<32sQQ")
_MAGIC = b"MARROWP1"
_HEX = frozenset("0123456789abcdef")

Read = Callable[[int, int], bytes]
"""(start, length) -> the bytes there"""


@dataclass(frozen=True, slots=True)
class Member:
    """Where a small file lies in its pack."""

    digest: str
    offset: int
    num_bytes: int


class PackWriter:
    """Writes one pack to a path; the members' hashes are the caller's word."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self._members: dict[bytes, tuple[int, int]] = {}
        self._file: IO[bytes] = path.open("wb", buffering=1 << 20)

    def __len__(self) -> int:
        return len(self._members)

    def add(self, digest: str, data: bytes) -> None:
        """Append a member, unless it is there already."""
        key = bytes.fromhex(digest)
        if key not in self._members:
            self._members[key] = (self.num_bytes, len(data))
            self._file.write(data)
            self.num_bytes += len(data)

    def finish(self) -> str:
        """Write index and footer and close the file; return the pack's name. Nothing is flushed to disk."""
        index = encode_index(self._members)
        self._file.write(index)
        self._file.write(FOOTER.pack(len(self._members), _MAGIC))
        self._file.close()
        return hashlib.sha256(index).hexdigest()

    def discard(self) -> None:
        """Close and remove the file; fine at any time."""
        self._file.close()
        self.path.unlink(missing_ok=True)


class Packs:
    """A folder of packs. `refresh` reads the indexes of those that are new."""

    def __init__(self, folder: Path, damaged: Path, staging: Staging) -> None:
        self.folder = folder
        self._damaged = damaged
        self._staging = staging
        self._indexes: dict[str, bytes] = {}  # of every pack, as they lie there
        self._places: dict[str, tuple[str, int, int]] = {}  # of the packs that were gone through
        self._waiting: dict[str, bytes] = {}  # the other packs' indexes
        self._num_asked = 0
        self._lock = threading.Lock()

    def refresh(self) -> list[str]:
        """Notice new packs and those that are gone. A pack whose index is damaged is set aside.

        Returns: the names of packs that were set aside. Cost: 48 bytes read and hashed a new member.
        """
        with self._lock:
            return self._refresh(set(self.names()))

    def _refresh(self, present: set[str]) -> list[str]:
        if self._indexes.keys() - present:  # a member may lie in two packs: begin anew
            self._indexes, self._places = {}, {}
            self._waiting = {}
        aside = []
        waiting = dict(self._waiting)
        for name in sorted(present - self._indexes.keys()):
            try:
                self._indexes[name] = waiting[name] = self._index(name)
            except FileNotFoundError:
                continue  # a collection was faster
            except DamagedBlob:
                self.quarantine(name)
                aside.append(name)
        self._waiting, self._num_asked = waiting, 0
        return aside

    def _find(self, digest: str) -> tuple[str, int, int] | None:
        """Return pack, offset and size of a member.

        PERF: the first few are looked for in the indexes as they are: to note where each of 20,000
        members lies takes 20 ms, which a commit of one file need not pay.
        """
        place = self._places.get(digest)
        if place is not None or not self._waiting:
            return place
        waiting = self._waiting
        self._num_asked += 1
        if self._num_asked <= FEW:
            key = bytes.fromhex(digest)
            for name, index in waiting.items():
                at = index.find(key)
                while at > 0 and at % _MEMBER.size:  # bytes that look like it, across two members
                    at = index.find(key, at + 1)
                if at >= 0:
                    return name, *_MEMBER.unpack_from(index, at)[1:]
            return None
        with self._lock:
            for name, index in self._waiting.items():
                for found, offset, length in _MEMBER.iter_unpack(index):
                    self._places[found.hex()] = (name, offset, length)
            self._waiting = {}  # after the places: other threads look too
            return self._places.get(digest)

    def _index(self, name: str) -> bytes:
        with self.place(name).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            return read_index(name, size, lambda start, length: os.pread(file.fileno(), length, start))

    def names(self) -> Iterator[str]:
        """Yield the name of every pack that lies here, in order."""
        if self.folder.is_dir():
            yield from sorted(p.removesuffix(SUFFIX) for p in os.listdir(self.folder) if p.endswith(SUFFIX))

    def place(self, name: str) -> Path:
        """Return where a pack lies or would lie."""
        assert len(name) == 64 and set(name) <= _HEX, name
        return self.folder / f"{name}{SUFFIX}"

    def has(self, digest: str) -> bool:
        """Tell whether a member was there at the last refresh; its bytes are not read."""
        return self._find(digest) is not None

    def pack_of(self, digest: str) -> str | None:
        """Return the name of a pack that holds the member, None if none does."""
        place = self._find(digest)
        return None if place is None else place[0]

    def read(self, digest: str) -> bytes:
        """Return a member's bytes, verified.

        Raises: DamagedBlob if no pack holds it or its bytes are damaged.
        """
        for _ in range(2):  # a collection may have moved it into another pack
            place = self._find(digest)
            if place is not None:
                name, offset, num_bytes = place
                try:
                    with self.place(name).open("rb", buffering=0) as file:
                        data = os.pread(file.fileno(), num_bytes, offset)
                except FileNotFoundError:
                    data = None
                if data is not None and hashlib.sha256(data).hexdigest() == digest:
                    return data
                if data is not None:
                    raise DamagedBlob(
                        f"{digest[:12]} is damaged in pack {name[:12]}",
                        hint="marrow data verify sets it aside",
                    )
            self.refresh()
        raise DamagedBlob(
            f"the small file {digest[:12]} is missing: no pack holds it",
            hint="pull it from a remote, or commit the folder again",
        )

    def members(self, name: str) -> list[Member]:
        """Return what a pack says it holds. Raises: DamagedBlob if its index is not that of its name."""
        return members_of(self._index(name))

    def check(self, name: str) -> tuple[list[Member], list[Member]]:
        """Hash every member of a pack; return the good and the damaged ones. Raises: DamagedBlob."""
        good: list[Member] = []
        bad: list[Member] = []
        with self.place(name).open("rb", buffering=0) as file:
            for member in sorted(self.members(name), key=lambda member: member.offset):
                data = os.pread(file.fileno(), member.num_bytes, member.offset)
                (good if hashlib.sha256(data).hexdigest() == member.digest else bad).append(member)
        return good, bad

    def quarantine(self, name: str) -> None:
        """Move a damaged pack aside. The caller has saved what is good in it."""
        with explain_os_errors("set a damaged pack aside", self._damaged):
            self._damaged.mkdir(parents=True, exist_ok=True)
            try:
                self.place(name).rename(self._damaged / f"{name}{SUFFIX}-{os.urandom(4).hex()}")
            except FileNotFoundError:  # another process was faster
                return

    def copy_members(self, name: str, wanted: Collection[str], writer: PackWriter) -> int:
        """Add the wanted members of a pack to another, those that are not damaged; return how many."""
        copied = 0
        with self.place(name).open("rb", buffering=0) as file:
            for member in sorted(self.members(name), key=lambda member: member.offset):
                if member.digest in wanted:
                    data = os.pread(file.fileno(), member.num_bytes, member.offset)
                    if hashlib.sha256(data).hexdigest() == member.digest:
                        writer.add(member.digest, data)
                        copied += 1
        return copied


def encode_index(members: dict[bytes, tuple[int, int]]) -> bytes:
    """Write an index: the members sorted by hash."""
    return b"".join(_MEMBER.pack(key, *members[key]) for key in sorted(members))


def read_index(name: str, size: int, read: Read) -> bytes:
    """Read a pack's index through `read(start, length)`; works over a network too.

    Raises: DamagedBlob if it is not the index that the name promises.
    """
    if size >= FOOTER.size:
        count, magic = FOOTER.unpack(bytes(read(size - FOOTER.size, FOOTER.size)))
        start = size - FOOTER.size - count * _MEMBER.size
        if magic == _MAGIC and start >= 0:
            index = bytes(read(start, count * _MEMBER.size))
            if hashlib.sha256(index).hexdigest() == name:
                return index
    raise DamagedBlob(f"pack {name[:12]} is damaged: its index is not that of its name", hint=_VERIFY)


def members_of(index: bytes) -> list[Member]:
    """Return what an index says that its pack holds."""
    return [Member(key.hex(), offset, length) for key, offset, length in _MEMBER.iter_unpack(index)]


def total_bytes(members: Iterable[Member]) -> int:
    """Return the bytes of some members."""
    return sum(member.num_bytes for member in members)


_VERIFY = "marrow data verify sets it aside; marrow data pull brings it back"
