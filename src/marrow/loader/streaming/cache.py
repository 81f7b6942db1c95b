"""A folder of fetched files within a byte limit, shared by all processes of a host.

    shards/KEY    a whole, checked file. Who uses it holds a shared flock on it (a `Pin`); who wants
                  to evict it needs an exclusive one. Its mtime is when it was last used.
    parts/KEY     a file being fetched, already as long as it will be. Its fetcher holds an
                  exclusive flock (a `Claim`), so nobody fetches it twice; at the end it is renamed.
    spare/        evicted files that the next parts are written over (`spares.py`); they count, too
    lock          serialises admitting, publishing and evicting; holds an upper bound of the bytes used.
    clock         its mtime is the last tick of the order of use.

One idea: all state is in the folder and in locks that the kernel holds. A process that dies, at
any instruction, lets go of its locks, and what it left is as if it had never begun: a part
without a lock is free for the next fetcher, and evicted first. There is nothing to repair, no
shared memory, no daemon, and the folder may be deleted while jobs run.

The order of use is a logical clock: a tick is later than all before it even where the machine's
clock was set back. Local disks only: on NFS the locks work, but are slow.
"""

import contextlib
import errno
import fcntl
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from marrow.core.errors import ResourceError, explain_os_errors
from marrow.loader.streaming.spares import Spares

# When the limit is met, this share more is evicted, so that not every file costs a walk of the folder.
SLACK = 1 / 32
_AGES = 1 << 70  # more ns than any time has


@dataclass(frozen=True, slots=True)
class Usage:
    """What is in the folder.

    pinned: in use by some process. part: being fetched, or left behind. spare: to be written over.
    """

    num_files: int
    num_bytes: int
    pinned_bytes: int
    part_bytes: int
    spare_bytes: int


class Pin:
    """A file that stays in the cache until `close`. Closing twice is fine."""

    def __init__(self, cache: "Cache", path: Path, descriptor: int) -> None:
        self.path = path
        self.num_bytes = os.fstat(descriptor).st_size
        self.inode = os.fstat(descriptor).st_ino
        self.descriptor = descriptor
        self._cache = cache
        cache._opened.add(self)

    def close(self) -> None:
        """Allow the file to be evicted."""
        if self.descriptor >= 0:
            self._cache._opened.discard(self)
            # Explicitly, not by close alone: a forked child may still hold the same open file.
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            os.close(self.descriptor)
            self.descriptor = -1


class Claim:
    """The right to fetch a file: write its bytes to `descriptor`, then `Cache.publish` it.

    `close` gives the right up; a published claim has become a pin.
    """

    def __init__(self, cache: "Cache", key: str, path: Path, descriptor: int, num_bytes: int) -> None:
        self.key = key
        self.path = path
        self.num_bytes = num_bytes
        self.descriptor = descriptor
        self._cache = cache
        cache._opened.add(self)

    def close(self) -> None:
        """Remove the part and let go of it."""
        if self.descriptor >= 0:
            self._cache._opened.discard(self)
            if _is_named(self.descriptor, self.path):
                self.path.unlink(missing_ok=True)
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            os.close(self.descriptor)
            self.descriptor = -1


class Busy(Exception):
    """Not now: `full` if all bytes are pinned or in flight, else another process fetches the file."""

    def __init__(self, *, full: bool) -> None:
        super().__init__()
        self.full = full


class Cache:
    """Files by key, least recently used first to go. Safe from many threads and processes.

    Args: folder: made if need be; any number of caches, also of other jobs, may share it.
        max_bytes: of all its files together, those in flight with their full length.
    Raises: ResourceError if a single file exceeds max_bytes; NotPermitted; DiskFull.
    Cost: 4 system calls to pin; a walk of the folder (stat of each file) when the limit is met.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder.absolute()
        self.max_bytes = max_bytes
        self.evicted = 0
        self.evicted_bytes = 0
        self._shards, self._parts = self.folder / "shards", self.folder / "parts"
        self._spares = Spares(self.folder / "spare")
        self._lock_path, self._clock = self.folder / "lock", self.folder / "clock"
        self._thread_lock = threading.Lock()
        self._lock_descriptor = -1
        self._opened: set[Pin | Claim] = set()
        _caches.add(self)
        self._make_folders()

    def __reduce__(self) -> tuple[type["Cache"], tuple[Path, int]]:
        return Cache, (self.folder, self.max_bytes)

    def pin(self, key: str) -> Pin | None:
        """Hold a file in the cache; None if it is not there."""
        path = self._shards / key
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                return None
            # Blocks only while someone evicts or publishes this very file: microseconds.
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is_named(descriptor, path):
                self._touch(descriptor)
                return Pin(self, path, descriptor)
            os.close(descriptor)

    def claim(
        self,
        key: str,
        num_bytes: int,
        *,
        beside: bool = False,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Claim:
        """Get the right to fetch a file, and room for it.

        Args: beside: fetch it although another process does. give_up: called while there is no room;
            closes a pin of the caller and tells whether there was one. The folder's lock is held, so
            that nobody else gets the room that it frees; it must not use this cache but for that.
        Raises: Busy; ResourceError if it can never fit. The file may have come meanwhile: `pin` first,
            and again after Busy.
        """
        if num_bytes > self.max_bytes:
            raise ResourceError(
                f"a file of {num_bytes} bytes does not fit into the cache {self.folder} of {self.max_bytes}",
                hint="give the cache several times the size of the largest shard",
            )
        path = self._parts / (f"{key}~{uuid.uuid4().hex[:12]}" if beside else key)
        with self._locked() as lock:
            # Either another process fetches it, or it was published since the caller looked.
            if not _is_free(path) or (self._shards / key).exists():
                raise Busy(full=False)
            path.unlink(missing_ok=True)  # what a killed fetcher left
            while not self._make_room(lock, num_bytes):
                if not give_up():
                    raise Busy(full=True)
            descriptor = self._spares.take(path)
            if descriptor < 0:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                os.ftruncate(descriptor, num_bytes)
            except BaseException:
                os.close(descriptor)
                raise
        return Claim(self, key, path, descriptor, num_bytes)

    def part_written_ns(self, key: str) -> int:
        """Return when the file being fetched last grew, by its mtime; 0 if there is none."""
        return _mtime_ns(self._parts / key)

    def publish(self, claim: Claim) -> Pin | None:
        """Make a fetched and checked file visible to all, pinned; None if the folder was deleted."""
        path = self._shards / claim.key
        with self._locked():
            descriptor = claim.descriptor
            if not _is_named(descriptor, claim.path):
                claim.close()
                return None
            claim.path.rename(path)
            # To change a lock is to drop it for a moment; nobody evicts while `lock` is held.
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._touch(descriptor)
            self._opened.discard(claim)
            claim.descriptor = -1
        return Pin(self, path, descriptor)

    def discard(self, pin: Pin) -> None:
        """Take a damaged file out of the cache; who has it mapped keeps the old bytes."""
        with self._locked():
            if _is_named(pin.descriptor, pin.path):
                pin.path.unlink(missing_ok=True)
        pin.close()

    def evict(self, num_bytes: int) -> int:
        """Evict at least so many bytes, if so many are not in use, whatever the limit; return them."""
        with self._locked() as lock:
            files = self._walk()
            used = sum(size for _, size, _ in files)
            retired = self._retire(files, used - num_bytes + sum(self._spares.sizes().values()))
            freed = self._spares.clear()
            _note(lock, used - retired)
            return freed

    def usage(self) -> Usage:
        """Look at the folder. Cost: an open and a lock for each file."""
        files = self._walk()
        parts = [(path, size) for _, size, path in files if path.parent == self._parts]
        shards = [(path, size) for _, size, path in files if path.parent == self._shards]
        pinned = sum(size for path, size in shards if not _is_free(path))
        spare = sum(self._spares.sizes().values())
        return Usage(len(shards), sum(s for _, s in shards), pinned, sum(s for _, s in parts), spare)

    def close(self) -> None:
        """Let go of everything that this object still holds. Closing twice is fine."""
        for opened in list(self._opened):
            opened.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the folder's lock; gives its descriptor. Makes the folder anew if it was deleted."""
        with self._thread_lock, explain_os_errors("use the cache", self.folder):
            while True:
                try:
                    descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
                except FileNotFoundError:
                    self._make_folders()
                    continue
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if _is_named(descriptor, self._lock_path):
                    break
                os.close(descriptor)
            self._lock_descriptor = descriptor
            try:
                if not all(folder.is_dir() for folder in (self._parts, self._shards, self._spares.folder)):
                    self._make_folders()
                yield descriptor
            finally:
                self._lock_descriptor = -1
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                os.close(descriptor)

    def _make_folders(self) -> None:
        with explain_os_errors("make the cache", self.folder):
            for folder in (self._shards, self._parts, self._spares.folder):
                folder.mkdir(parents=True, exist_ok=True)

    def _make_room(self, lock: int, num_bytes: int) -> bool:
        """Evict until `num_bytes` fit in place of the first spare; tell whether they do."""
        noted = os.pread(lock, 32, 0)
        bound = int(noted) if noted.isdigit() else None
        spare = self._spares.first_bytes()
        if bound is None or bound - spare + num_bytes > self.max_bytes:
            files = self._walk()
            used = sum(size for _, size, _ in files)
            most = self.max_bytes - num_bytes
            if used > most:
                used -= self._retire(files, int(most - self.max_bytes * SLACK))
            bound = used + self._spares.trim(max(0, most - used))
            if used > most:
                _note(lock, bound)
                return False
            spare = self._spares.first_bytes()
        _note(lock, bound - spare + num_bytes)
        return True

    def _retire(self, files: list[tuple[int, int, Path]], keep_bytes: int) -> int:
        """Make spares of the least recently used files that nobody holds; return their bytes."""
        used = sum(size for _, size, _ in files)
        freed = 0
        # Parts first: one that nobody holds was left by a killed fetcher.
        for _, size, path in sorted(files, key=lambda file: (file[2].parent != self._parts, file[0])):
            if used - freed <= keep_bytes:
                break
            if _with_lock(path, partial(self._spares.add, path)):
                freed += size
                if path.parent == self._shards:
                    self.evicted += 1
                    self.evicted_bytes += size
        return freed

    def _walk(self) -> list[tuple[int, int, Path]]:
        """List (time of last use, bytes, path) of all files but the spares."""
        found = []
        for folder in (self._shards, self._parts):
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat(follow_symlinks=False)
                        found.append((stat.st_mtime_ns, stat.st_size, folder / entry.name))
        now = _mtime_ns(self._clock)
        # A time later than the clock's was not written here: nobody knows when such a file was used.
        return [(mtime if mtime <= now else mtime - _AGES, size, path) for mtime, size, path in found]

    def _touch(self, descriptor: int) -> None:
        """Note that a file is used now, later than all uses before."""
        tick = max(time.time_ns(), _mtime_ns(self._clock) + 1)
        _set_mtime(self._clock, tick)
        os.utime(descriptor, ns=(tick, tick))


def _mtime_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _set_mtime(path: Path, mtime_ns: int) -> None:
    try:
        os.utime(path, ns=(mtime_ns, mtime_ns))
    except FileNotFoundError:
        with contextlib.suppress(FileNotFoundError):  # the folder may be gone
            path.touch()
            os.utime(path, ns=(mtime_ns, mtime_ns))


def _note(lock: int, num_bytes: int) -> None:
    """Write the bound of the bytes used. A full disk must not stop it: without a note, one walks."""
    os.ftruncate(lock, 0)
    try:
        os.pwrite(lock, b"%d" % num_bytes, 0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _is_named(descriptor: int, path: Path) -> bool:
    """Tell whether the open file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _is_free(path: Path) -> bool:
    return _with_lock(path, lambda: None)


def _with_lock(path: Path, action: Callable[[], None]) -> bool:
    """Do something with a file that no process holds; tell whether it was so, or there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_named(descriptor, path):
            action()
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # explicitly: see Pin.close
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)


_caches: "weakref.WeakSet[Cache]" = weakref.WeakSet()


def _after_fork() -> None:
    """In a forked child: let go of the parent's open files without unlocking them.

    The locks belong to the open files that both share; the parent's close alone must end them.
    """
    for cache in list(_caches):
        cache._thread_lock = threading.Lock()
        for descriptor in (cache._lock_descriptor, *(opened.descriptor for opened in cache._opened)):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        for opened in cache._opened:
            opened.descriptor = -1
        cache._opened, cache._lock_descriptor = set(), -1


os.register_at_fork(after_in_child=_after_fork)
