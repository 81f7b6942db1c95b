"""The bytes of datasets: large files are blobs, small ones lie in packs; both go by their SHA-256.

`Deposit` brings new bytes in: everything is written to staging, made durable with one sync, and
only then moved to its place and that made durable too. Killed at any moment, it leaves whole
blobs and packs that nothing refers to yet, which `collect` removes.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from marrow.core.errors import DamagedBlob, DiskFull, explain_os_errors
from marrow.core.hashes import CHUNK_BYTES
from marrow.store.blobs import Blobs, Freed
from marrow.store.datasets.packs import (
    MAX_MEMBER_BYTES,
    MAX_PACK_BYTES,
    Member,
    Packs,
    PackWriter,
    total_bytes,
)
from marrow.store.durable import make_durable
from marrow.store.staging import Staging
from marrow.store.threads import default_threads, in_order

TINY_PACK_BYTES = 1 << 20
MAX_TINY_PACKS = 16
"""More packs than that of less bytes than that are written as one."""


@dataclass(frozen=True, slots=True)
class Damage:
    """What a check of all bytes found: hashes whose bytes are gone now; what was set aside."""

    digests: frozenset[str]
    num_checked: int
    num_bytes: int
    aside: tuple[str, ...]


class Contents:
    """Blobs and packs, read as one."""

    def __init__(self, blobs: Blobs, packs: Packs, staging: Staging) -> None:
        self.blobs = blobs
        self.packs = packs
        self.staging = staging

    def has(self, digest: str) -> bool:
        """Tell whether the bytes are here, unread. Packs count as of their last refresh."""
        return self.packs.has(digest) or self.blobs.has(digest)

    def read(self, digest: str) -> bytes:
        """Return verified bytes; meant for small ones. Raises: DamagedBlob."""
        if self.packs.has(digest):
            return self.packs.read(digest)
        place = self.blobs.place(digest)
        if not place.exists():
            return self.packs.read(digest)  # refreshes, then says what is missing
        data = place.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise DamagedBlob(f"blob {digest[:12]} is damaged at {place}", hint=_VERIFY)
        return data

    def copy(self, digest: str, target: Path) -> None:
        """Write the bytes to a new file, hashing what is written. Raises: DamagedBlob, FileExistsError.

        The file is removed again if the bytes are damaged. Nothing is flushed to disk.
        """
        place = self.blobs.place(digest)
        packed = self.packs.read(digest) if self.packs.has(digest) or not place.exists() else None
        with target.open("xb") as out:  # outside the try: a file that is there stays
            try:
                if packed is not None:
                    out.write(packed)
                    out.flush()
                    return
                with place.open("rb", buffering=0) as source:
                    found = copy_and_hash(source.fileno(), out.fileno())[0]
                if found != digest:
                    raise DamagedBlob(f"blob {digest[:12]} is damaged at {place}", hint=_VERIFY)
            except BaseException:
                target.unlink(missing_ok=True)
                raise

    def verify(self, tell: Callable[[int], None] = lambda _: None, threads: int | None = None) -> Damage:
        """Hash every blob and pack member; set aside what is damaged, save what is good in its pack.

        Args: tell: called with the bytes checked so far. Cost: reads everything, in threads.
        """
        lost: set[str] = set()
        aside: list[str] = []
        checked = num_bytes = 0
        threads = threads or default_threads()
        for digest, size in in_order(self._blob_size, list(self.blobs.digests()), threads):
            checked += 1
            if size is not None:
                num_bytes += size
            elif self.blobs.quarantine(digest) is not None:
                lost.add(digest)
                aside.append(digest)
            tell(num_bytes)
        aside += self.packs.refresh()
        for name, found in in_order(self._pack_members, list(self.packs.names()), threads):
            if found is None:
                self.packs.quarantine(name)
                aside.append(name)
                continue
            good, bad = found
            checked += len(good) + len(bad)
            num_bytes += total_bytes(good)
            tell(num_bytes)
            if bad:
                self._rewrite({name: {member.digest for member in good}})
                self.packs.quarantine(name)
                aside.append(name)
                lost.update(member.digest for member in bad)
        self.packs.refresh()
        return Damage(frozenset(d for d in lost if not self.has(d)), checked, num_bytes, tuple(aside))

    def _blob_size(self, digest: str) -> tuple[str, int | None]:
        """Return the size of a blob that is whole, else None."""
        try:
            return digest, self.blobs.path(digest, anew=True).stat().st_size
        except (DamagedBlob, FileNotFoundError):
            return digest, None

    def _pack_members(self, name: str) -> tuple[str, tuple[list[Member], list[Member]] | None]:
        """Return the good and the bad members of a pack, None if it is none."""
        try:
            return name, self.packs.check(name)
        except (DamagedBlob, FileNotFoundError):
            return name, None

    def collect(self, live: Set[str]) -> Freed:
        """Remove what nothing refers to. Packs mostly dead are written anew, many tiny ones as one.

        The caller keeps publishers and readers away. A crash leaves a member in two packs at worst.
        """
        freed = self.blobs.collect(live)
        num, num_bytes = freed.num_blobs, freed.num_bytes
        seen: set[str] = set()
        anew: dict[str, set[str]] = {}
        tiny: dict[str, set[str]] = {}
        for name in list(self.packs.names()):
            try:
                members = self.packs.members(name)
            except DamagedBlob:
                continue  # verify's matter
            kept = [m for m in members if m.digest in live and m.digest not in seen]
            kept_bytes, all_bytes = total_bytes(kept), total_bytes(members)
            seen.update(member.digest for member in kept)
            wanted = {member.digest for member in kept}
            if not kept or (len(kept) < len(members) and kept_bytes * 2 <= all_bytes):
                anew[name] = wanted
                num += len(members) - len(kept)
                num_bytes += all_bytes - kept_bytes
            elif all_bytes < TINY_PACK_BYTES and len(kept) == len(members):
                tiny[name] = wanted
        if len(tiny) > MAX_TINY_PACKS:
            anew |= tiny
        for name in self._rewrite(anew):
            self.packs.place(name).unlink(missing_ok=True)
        self.packs.refresh()
        return Freed(num, num_bytes)

    def _rewrite(self, wanted: Mapping[str, Set[str]]) -> list[str]:
        """Write some members of some packs to new packs; return the packs that all of them came from.

        A pack with a damaged member stays, for verify to find it and say so.
        """
        done: list[str] = []
        with Deposit(self) as deposit:
            for name, digests in wanted.items():
                if not digests or self.packs.copy_members(name, digests, deposit.writer()) == len(digests):
                    done.append(name)
            deposit.publish()
        return [name for name in done if name not in deposit.published]


class Deposit:
    """New bytes on their way in; a context manager. Without `publish` nothing of it stays."""

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._blobs: dict[str, Path] = {}
        self._packs: dict[str, Path] = {}
        self._members: set[str] = set()
        self._writer: PackWriter | None = None
        self.num_bytes = 0
        self.published: set[str] = set()

    def __enter__(self) -> "Deposit":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.discard()
        for path in (*self._blobs.values(), *self._packs.values()):
            path.unlink(missing_ok=True)

    def has(self, digest: str) -> bool:
        """Tell whether the bytes are in the store, or in this deposit."""
        return digest in self._members or digest in self._blobs or self._contents.has(digest)

    def add(self, digest: str, data: bytes) -> None:
        """Add bytes that hash to `digest`, unless they are known."""
        if self.has(digest):
            return
        self.num_bytes += len(data)
        if len(data) > MAX_MEMBER_BYTES:
            self.add_blob(digest, data)
            return
        self.writer().add(digest, data)
        self._members.add(digest)

    def add_blob(self, digest: str, data: bytes) -> None:
        """Add bytes as a blob of their own, however few: manifests, which artifacts refer to."""
        if digest not in self._blobs and not self._contents.blobs.place(digest).exists():
            staged = self._contents.staging.new()
            self._blobs[digest] = staged
            staged.write_bytes(data)

    def add_file(self, digest: str, staged: Path, num_bytes: int) -> None:
        """Take over a staged file whose bytes hash to `digest`; it is removed if they are known."""
        if self.has(digest):
            staged.unlink()
            return
        self._blobs[digest] = staged
        self.num_bytes += num_bytes

    def keep_blob(self, digest: str, staged: Path) -> None:
        """Take over a staged file as a blob, also if a pack holds its bytes; in place of a damaged one."""
        self._blobs[digest] = staged

    def writer(self) -> PackWriter:
        """Return the pack that takes the next small file; a new one when the last is full."""
        if self._writer is not None and self._writer.num_bytes >= MAX_PACK_BYTES:
            self._finish_pack()
        if self._writer is None:
            self._writer = PackWriter(self._contents.staging.new())
        return self._writer

    def publish(self) -> None:
        """Make everything durable and visible. Raises: DiskFull, NotPermitted.

        Cost: two waits for the disk, however many files.
        """
        self._finish_pack()
        blobs, packs = self._contents.blobs, self._contents.packs
        if not self._blobs and not self._packs:
            return
        moves = [(path, blobs.place(digest)) for digest, path in self._blobs.items()]
        moves += [(path, packs.place(name)) for name, path in self._packs.items()]
        with explain_os_errors("write to the store", packs.folder):
            for staged, _ in moves:
                staged.chmod(0o444)
            make_durable(staged for staged, _ in moves)
            folders: dict[Path, None] = {}
            for staged, place in moves:
                _make_folder(place.parent, folders)
                staged.rename(place)
                folders[place.parent] = None
            make_durable(folders)
        self._blobs, self._packs, self._members = {}, {}, set()
        packs.refresh()

    def _finish_pack(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            if not len(writer):
                writer.discard()
                return
            name = writer.finish()
            self._packs[name] = writer.path
            self.published.add(name)


def copy_and_hash(source: int, target: int, limit: int | None = None) -> tuple[str, int]:
    """Copy an open file to another in one pass; return SHA-256 and size. Cost: 1 MiB of memory.

    Args: limit: stop once more bytes than that came: a file may grow faster than it is read.
    PERF: hashing while copying reads the file once; a reflink or copy_file_range would need a
    second read to hash.
    """
    sha256, num_bytes = hashlib.sha256(), 0
    while chunk := os.read(source, CHUNK_BYTES):
        sha256.update(chunk)
        view = memoryview(chunk)
        while view:
            view = view[os.write(target, view) :]
        num_bytes += len(chunk)
        if limit is not None and num_bytes > limit:
            break
    return sha256.hexdigest(), num_bytes


def need_room(folder: Path, num_bytes: int) -> None:
    """Raise DiskFull if so many bytes do not fit, before anything is written."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise DiskFull(
            f"{num_bytes:,} bytes do not fit on the disk of {folder}: {free:,} are free",
            hint="free some space, or set MARROW_HOME to a folder on a larger disk",
        )


def _make_folder(folder: Path, touched: dict[Path, None]) -> None:
    """Make a folder and its parents; note the folders whose entries changed."""
    if not folder.is_dir():
        _make_folder(folder.parent, touched)
        folder.mkdir(exist_ok=True)
        touched[folder.parent] = None


_VERIFY = "marrow data verify sets it aside; marrow data pull brings it back"
