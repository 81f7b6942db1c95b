"""Content-addressed blobs: a file named by the SHA-256 of its bytes.

    <folder>/ab/cd/abcd1234...      read-only, published by rename, verified before it is read

The one idea: a name is a promise about bytes, so equal files are stored once, a blob never
changes, and damage is always noticed. A blob is hashed once per process, and again whenever its
size, modification time or inode changes. What blobs *mean* is the catalog's matter.
"""

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import xxhash

from marrow.core.errors import DamagedBlob, StoreError, explain_os_errors
from marrow.core.files import fsync, publish
from marrow.core.hashes import CHUNK_BYTES, hash_file
from marrow.store.staging import Staging


@dataclass(frozen=True, slots=True)
class Blob:
    """What one pass over a file says of it: its name, its quick check, its size."""

    sha256: str
    xxh3: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Freed:
    """What a garbage collection removed."""

    num_blobs: int
    num_bytes: int


class Blobs:
    """A folder of blobs.

    Args: folder: holds the blobs. damaged: where quarantined ones go. staging: for unfinished
        files; all three on one file system.
    """

    def __init__(self, folder: Path, damaged: Path, staging: Staging) -> None:
        self._folder = folder
        self._damaged = damaged
        self._staging = staging
        self._verified: dict[str, tuple[int, int, int]] = {}

    def put_file(self, path: Path, *, move: bool = False) -> Blob:
        """Store a file's bytes; with `move` the file itself becomes the blob where it can.

        A symlink, or a file with another hard link, is always copied: its bytes belong to someone
        else, who may change them later. A damaged blob of that name is set aside and replaced.
        Raises: DiskFull, NotPermitted, SourceError. Cost: one read; none or one write; two fsyncs.
        """
        with explain_os_errors("store a file", path):
            own = move and self._is_ours(path)
            staged = path if own else self._copy(path)
            try:
                blob = measure(staged)
                if not self._is_intact(blob.sha256):
                    self.quarantine(blob.sha256)
                    self._publish(staged, blob.sha256)
            finally:
                if not own:
                    staged.unlink(missing_ok=True)
            if move:
                path.unlink(missing_ok=True)
        return blob

    def path(self, digest: str, *, anew: bool = False) -> Path:
        """Return a blob's file, its bytes verified; with `anew` also if they were verified before.

        Raises: DamagedBlob if it is missing or its bytes are not those of its name.
        """
        place = self.place(digest)
        with explain_os_errors("read a blob", place):
            try:
                stamp = _stamp(place)
                if not anew and self._verified.get(digest) == stamp:
                    return place
                found = hash_file(place)
            except FileNotFoundError:
                raise DamagedBlob(f"blob {digest[:12]} is missing at {place}", hint=_REBUILD) from None
        if found != digest:
            self._verified.pop(digest, None)
            raise DamagedBlob(
                f"blob {digest[:12]} is damaged: the bytes at {place} hash to {found[:12]}", hint=_REBUILD
            )
        self._verified[digest] = stamp
        return place

    def place(self, digest: str) -> Path:
        """Return where a blob lies or would lie, without looking."""
        if len(digest) != 64 or not set(digest) <= _HEX:
            raise StoreError(f"{digest!r} does not name a blob", hint="a blob's name is 64 hex digits")
        return self._folder / digest[:2] / digest[2:4] / digest

    def has(self, digest: str) -> bool:
        """Tell whether a blob lies here, unread. Cost: one stat."""
        return os.path.exists(f"{self._folder}/{digest[:2]}/{digest[2:4]}/{digest}")

    def quarantine(self, digest: str) -> Path | None:
        """Move a damaged blob aside, so that a rebuild can take its place.

        Returns: where it lies now, or None if it was missing.
        """
        self._verified.pop(digest, None)
        aside = self._damaged / f"{digest}-{os.urandom(4).hex()}"
        with explain_os_errors("set a damaged blob aside", aside):
            if not self.place(digest).exists():
                return None
            self._damaged.mkdir(parents=True, exist_ok=True)
            try:
                publish(self.place(digest), aside)
            except FileNotFoundError:  # another process was faster
                return None
            fsync(self.place(digest).parent)
        return aside

    def digests(self) -> Iterator[str]:
        """Yield the name of every blob that lies here."""
        for path in sorted(self._folder.glob("??/??/*")):
            yield path.name

    def check(self) -> list[str]:
        """Hash every blob anew; return the names of the damaged ones."""
        self._verified.clear()
        return [digest for digest in self.digests() if not self._is_intact(digest)]

    def collect(self, referenced: Set[str]) -> Freed:
        """Remove the blobs that nothing refers to. The caller keeps publishers away meanwhile."""
        num_blobs = num_bytes = 0
        for digest in list(self.digests()):
            if digest not in referenced:
                place = self.place(digest)
                num_bytes += place.stat().st_size
                num_blobs += 1
                place.unlink()
                self._verified.pop(digest, None)
        return Freed(num_blobs, num_bytes)

    def _is_intact(self, digest: str) -> bool:
        try:
            self.path(digest)
        except DamagedBlob:
            return False
        return True

    def _copy(self, path: Path) -> Path:
        staged = self._staging.new()
        try:
            shutil.copyfile(path, staged)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        return staged

    def _is_ours(self, path: Path) -> bool:
        """Tell whether a file can become the blob: one name only, and a rename away."""
        status = path.lstat()
        return (
            stat.S_ISREG(status.st_mode)
            and status.st_nlink == 1
            and status.st_dev == self._staging.new().parent.stat().st_dev
        )

    def _publish(self, staged: Path, digest: str) -> None:
        place = self.place(digest)
        staged.chmod(0o444)
        fsync(staged)
        for folder in (self._folder, place.parent.parent, place.parent):
            if not folder.is_dir():
                folder.mkdir(exist_ok=True, parents=folder == self._folder)
                fsync(folder.parent)
        publish(staged, place)
        self._verified[digest] = _stamp(place)


_HEX = frozenset("0123456789abcdef")
_REBUILD = "run the recipe again: what is damaged is set aside and rebuilt"


def measure(path: Path) -> Blob:
    """Hash a file both ways in one pass. Cost: one read, 1 MiB of memory."""
    sha256, xxh3, num_bytes = hashlib.sha256(), xxhash.xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            xxh3.update(chunk)
            num_bytes += len(chunk)
    return Blob(sha256.hexdigest(), xxh3.hexdigest(), num_bytes)


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
