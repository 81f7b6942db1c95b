"""Reading a folder into a deposit: changed files only, hashed and copied in one pass, by threads.

hashlib and the system calls release the GIL, so threads help. Their results are taken in the
order of names, so a pack's bytes do not depend on how many there are. A file is looked at before
and after it is read: one that changes meanwhile is read again, and given up with an error after
three times. The hash is always that of the bytes that were stored.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from marrow.core.errors import NotPermitted, SourceError, explain_os_errors
from marrow.core.hashes import CHUNK_BYTES
from marrow.core.progress import Progress, silent
from marrow.core.span import span
from marrow.store.datasets.contents import Contents, Deposit, copy_and_hash
from marrow.store.datasets.manifests import Entry
from marrow.store.datasets.packs import MAX_MEMBER_BYTES
from marrow.store.threads import default_threads, in_order
from marrow.store.versions.folder_index import unsettled
from marrow.store.versions.folder_walk import Seen, Stamp, is_settled, now_ns, stamp_of

BATCH_FILES = 64
BATCH_BYTES = 4 << 20
ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Taken:
    """What reading files gave: entries sorted by name, what the index keeps, how much was read."""

    entries: list[Entry]
    known: dict[str, tuple[Stamp, str]]
    num_read: int
    bytes_read: int


@dataclass(frozen=True, slots=True)
class _Read:
    """One file that was read: small ones with their bytes, large ones staged; neither if known."""

    name: str
    stamp: Stamp
    digest: str
    data: bytes | None = None
    staged: Path | None = None
    is_settled: bool = True


def take_in(
    folder: Path,
    changed: list[Seen],
    contents: Contents,
    deposit: Deposit,
    *,
    sizes: Set[int] = frozenset(),
    progress: Progress = silent,
    threads: int | None = None,
) -> Taken:
    """Hash and store the files that changed.

    Args: sizes: of files that are probably known under another name: hashed before they are copied.
    Raises: SourceError (a file changed while it was read, or vanished), DiskFull, NotPermitted.
    Cost: one read of what changed; memory: 200 bytes a file, and 4 MiB for each of 2 x `threads`.
    """
    entries: list[Entry] = []
    known: dict[str, tuple[Stamp, str]] = {}
    total = sum(seen.stamp[0] for seen in changed)
    done = 0
    with span("read and store"):
        reader = _Reader(folder, contents, sizes)
        for batch in in_order(reader.read, _batches(changed), threads or default_threads()):
            for read in batch:
                with explain_os_errors("write to the store", contents.packs.folder):
                    if read.data is not None:
                        deposit.add(read.digest, read.data)
                    elif read.staged is not None:
                        deposit.add_file(read.digest, read.staged, read.stamp[0])
                entries.append(Entry(read.name, read.digest, read.stamp[0]))
                stamp = read.stamp if read.is_settled else unsettled(read.stamp)
                known[read.name] = (stamp, read.digest)
                done += read.stamp[0]
            progress(done, total, "bytes", {"files": f"{len(entries):,}"})
    entries.sort()
    return Taken(entries, known, len(changed), total)


class _Reader:
    """Reads batches of files; safe from several threads."""

    def __init__(self, folder: Path, contents: Contents, sizes: Set[int]) -> None:
        self._root = f"{folder}/"
        self._contents = contents
        self._sizes = sizes

    def read(self, batch: list[Seen]) -> list[_Read]:
        """Read the files of a batch: small ones to memory, large ones to staging."""
        return [self._one(seen) for seen in batch]

    def _one(self, seen: Seen) -> _Read:
        path = self._root + seen.name
        for _ in range(ATTEMPTS):
            descriptor = _open(path)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    break
                stamp = stamp_of(status)
                small = stamp[0] <= MAX_MEMBER_BYTES
                read = (self._small if small else self._large)(seen.name, descriptor, stamp)
                if read is not None:
                    return read
            finally:
                os.close(descriptor)
        raise SourceError(
            f"{seen.name!r} changed each of the {ATTEMPTS} times that it was read",
            hint="commit when nothing writes to the folder any more",
        )

    def _small(self, name: str, descriptor: int, stamp: Stamp) -> _Read | None:
        data = os.read(descriptor, stamp[0] + 1)
        if len(data) != stamp[0] or stamp_of(os.fstat(descriptor)) != stamp:
            return None
        digest = hashlib.sha256(data).hexdigest()
        settled = is_settled(stamp, now_ns())
        return _Read(name, stamp, digest, None if self._contents.has(digest) else data, None, settled)

    def _large(self, name: str, descriptor: int, stamp: Stamp) -> _Read | None:
        if stamp[0] in self._sizes:
            digest = _hash(descriptor, stamp[0])
            if self._contents.has(digest) and stamp_of(os.fstat(descriptor)) == stamp:
                return _Read(name, stamp, digest, is_settled=is_settled(stamp, now_ns()))
            os.lseek(descriptor, 0, os.SEEK_SET)
        with explain_os_errors("write to the store", self._contents.packs.folder):
            staged = self._contents.staging.new()
            target = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        keep = False
        try:
            with explain_os_errors("store a file", staged):
                digest, num_bytes = copy_and_hash(descriptor, target, stamp[0])
            if num_bytes != stamp[0] or stamp_of(os.fstat(descriptor)) != stamp:
                return None
            keep = not self._contents.has(digest)
            return _Read(name, stamp, digest, None, staged if keep else None, is_settled(stamp, now_ns()))
        finally:
            os.close(target)
            if not keep:
                staged.unlink()


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError as error:
        raise NotPermitted(
            f"no permission to read {path}", hint="make it readable, or move it out of the folder"
        ) from error
    except FileNotFoundError as error:
        raise SourceError(
            f"{path} vanished while the folder was read",
            hint="commit when nothing writes to the folder any more",
        ) from error


def _hash(descriptor: int, num_bytes: int) -> str:
    sha256 = hashlib.sha256()
    while num_bytes > 0 and (chunk := os.read(descriptor, min(CHUNK_BYTES, num_bytes))):
        sha256.update(chunk)
        num_bytes -= len(chunk)
    return sha256.hexdigest()


def _batches(changed: Iterable[Seen]) -> Iterator[list[Seen]]:
    """Group files so that a batch is worth a thread's turn and its bytes fit in memory."""
    batch: list[Seen] = []
    size = 0
    for seen in changed:
        if batch and (len(batch) == BATCH_FILES or size + seen.stamp[0] > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(seen)
        size += seen.stamp[0]
    if batch:
        yield batch
