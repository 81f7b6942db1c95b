"""Brings one shard into the cache: found there and checked, or fetched and checked while it comes.

What arrives damaged is fetched again, `TRIES` times; what fails for a moment is tried again by
`store/remote/client.py`. If another process fetches the same shard, it is waited for; if that process
stands still (stopped, not dead: death frees its claim), the shard is fetched beside it.
"""

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import xxhash

from marrow.core.errors import Conflict, DataError, DiskFull, ResourceError
from marrow.core.hashes import hash_value
from marrow.loader.streaming.cache import Busy, Cache, Claim, Pin
from marrow.store.remote.client import Remote

# A shard that arrives damaged so often is damaged where it lies.
TRIES = 3
# How long one waits for room that others hold before it is an error.
PATIENCE_S = 60.0
# After so long two jobs that wait for each other's room are taken to be stuck.
STUCK_S = 2.0
# How long another process's fetch may stand still before one does not wait for it any more.
STALLED_S = 120.0
# How often one looks again at what only another process can change.
POLL_S = 0.01
CHUNK_BYTES = 4 << 20
# What a thread fetches into, again and again: small enough to stay in a core's cache until it is checked
# and written.
SCRATCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A file of a dataset. xxh3: 32 hex digits, or "" where its format records none."""

    name: str
    num_bytes: int
    xxh3: str = ""


@dataclass(slots=True)
class Counts:
    """What happened in this process.

    hits, misses: shards found in the cache, and fetched. verified: checked, while fetched or once
    per process. damaged: arrived, or found, with wrong bytes. waits, wait_s: of the consumer, for a
    shard that was not ready. shared_waits: for another process's fetch. full_waits: for room.
    dropped_ahead: fetched ahead and given up for one that was needed first. overdrawn: given up in
    use, since this process alone holds more than the cache has, or was stuck. disk_full: writes that found no
    space. fetch_s: of all threads together.
    """

    hits: int = 0
    misses: int = 0
    verified: int = 0
    damaged: int = 0
    waits: int = 0
    wait_s: float = 0.0
    shared_waits: int = 0
    full_waits: int = 0
    dropped_ahead: int = 0
    overdrawn: int = 0
    disk_full: int = 0
    fetched_bytes: int = 0
    fetch_s: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """Return all of them by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(slots=True)
class Errand:
    """One shard to bring.

    wanted: whether someone waits for it; what is only fetched ahead gives up where there is no
    room. checked_inode: the file that this process has checked before. say: told "verify" and
    "fetch" as that is what is done.
    """

    index: int
    checked_inode: int
    wanted: Callable[[], bool]
    say: Callable[[str], None]


class Fetcher:
    """Brings shards of one dataset. Safe from many threads.

    Args: give_up: called with the bytes of a shard that someone waits for and that has no room, and
        whether it has waited long; lets go of another one of this process and says whether there was
        one. The cache's lock may be held: whoever gives room up is the one who gets it.
    """

    def __init__(
        self, remote: Remote, files: tuple[ShardFile, ...], cache: Cache, give_up: Callable[[int, bool], bool]
    ) -> None:
        self.remote = remote
        self.counts = Counts()
        self._files = files
        self._cache = cache
        self._give_up = give_up
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._of_thread = threading.local()

    def count(self, **amounts: float) -> None:
        """Add to the counts."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self.counts, name, getattr(self.counts, name) + amount)

    def close(self) -> None:
        """End what other threads are doing, soon."""
        self._stop.set()
        self.remote.close()

    def key(self, index: int) -> str:
        """Name a shard in the cache: another URL, size or check is another file."""
        file = self._files[index]
        name = hash_value([self.remote.url, file.name, file.num_bytes, file.xxh3])[:40]
        return name + Path(file.name).suffix

    def bring(self, errand: Errand) -> Pin | None:
        """Return a shard, pinned and checked; None if there is no room for it now, or after `close`.

        Raises: DataError naming it if it arrives damaged time after time; SourceError, NotPermitted,
            Unreachable from the endpoint; DiskFull; ResourceError if others keep all of the cache.
        """
        key = self.key(errand.index)
        damaged = 0
        waiting = _Waiting(self._cache, key)
        while not self._stop.is_set():
            try:
                pin = self._cache.pin(key)
                if pin is not None and self._is_whole(errand, pin):
                    self.count(hits=1)
                    return pin
                if pin is not None:
                    self._cache.discard(pin)
                    problem = "it was in the cache with other bytes"
                else:
                    claim = self._claim(errand, key, waiting)
                    pin, problem = self._fetch(errand.index, claim)
                    if pin is not None:
                        return pin
            except Busy as busy:
                if busy.full and not errand.wanted():
                    return None
                if waiting.look(busy):
                    self.count(**{"full_waits" if busy.full else "shared_waits": 1})
                if waiting.for_room_s > PATIENCE_S:
                    raise self._too_small() from None
                self._stop.wait(POLL_S)
                continue
            if problem:
                damaged += 1
                self._note_damage(errand.index, damaged, problem)
        return None

    def _claim(self, errand: Errand, key: str, waiting: "_Waiting") -> Claim:
        num_bytes = self._files[errand.index].num_bytes

        def give_up() -> bool:
            return errand.wanted() and self._give_up(num_bytes, waiting.for_room_s > STUCK_S)

        return self._cache.claim(key, num_bytes, beside=waiting.is_stalled, give_up=give_up)

    def _fetch(self, index: int, claim: Claim) -> tuple[Pin | None, str]:
        """Fetch a shard; return its pin, or what was wrong ("" if the folder went, or `close` came)."""
        file = self._files[index]
        try:
            start_s = time.perf_counter()
            check, position = xxhash.xxh3_128(), 0
            for chunk in self.remote.stream(file.name, scratch=self._scratch()):
                if self._stop.is_set():
                    return None, ""
                if position + len(chunk) > file.num_bytes:
                    return None, f"more than its {file.num_bytes} bytes came"
                check.update(chunk)
                self._write(claim.descriptor, chunk, position)
                position += len(chunk)
            self.count(fetch_s=time.perf_counter() - start_s, fetched_bytes=position)
            if position != file.num_bytes:
                return None, f"{position} bytes came instead of {file.num_bytes}"
            if file.xxh3 and check.hexdigest() != file.xxh3:
                return None, f"its xxh3 is {check.hexdigest()} instead of {file.xxh3}"
            pin = self._cache.publish(claim)
            if pin is not None:
                self.count(misses=1, verified=1)
            return pin, ""
        except Conflict:
            return None, "it was written anew while it came"
        finally:
            claim.close()

    def _scratch(self) -> memoryview:
        """Return this thread's memory to fetch into."""
        scratch: memoryview | None = getattr(self._of_thread, "scratch", None)
        if scratch is None:
            scratch = self._of_thread.scratch = memoryview(bytearray(SCRATCH_BYTES))
        return scratch

    def _write(self, descriptor: int, chunk: bytes | memoryview, position: int) -> None:
        """Write all of a chunk; if the disk is full, evict what can be and go on."""
        view = memoryview(chunk)
        while view:
            try:
                written = os.pwrite(descriptor, view, position)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self.count(disk_full=1)
                wanting = max(len(view), CHUNK_BYTES)
                if not self._cache.evict(wanting) and not self._give_up(wanting, False):
                    raise DiskFull(
                        f"cannot cache a shard: no space left at {self._cache.folder}",
                        hint="free some space, or put the cache on a larger disk; its limit of "
                        f"{self._cache.max_bytes} bytes is more than the disk has",
                    ) from error
                continue
            view, position = view[written:], position + written

    def _is_whole(self, errand: Errand, pin: Pin) -> bool:
        """Check a file that this process did not fetch, once."""
        file = self._files[errand.index]
        if pin.num_bytes != file.num_bytes:
            return False
        if errand.checked_inode == pin.inode or not file.xxh3:
            return True
        errand.say("verify")
        check, position = xxhash.xxh3_128(), 0
        while chunk := os.pread(pin.descriptor, CHUNK_BYTES, position):
            check.update(chunk)
            position += len(chunk)
        errand.say("fetch")
        self.count(verified=1)
        return check.hexdigest() == file.xxh3

    def _note_damage(self, index: int, times: int, problem: str) -> None:
        self.count(damaged=1)
        if times >= TRIES:
            raise DataError(
                f"shard {self.remote.url}/{self._files[index].name} is damaged: {problem} ({times} tries)",
                hint="write it again from its source, with its manifest",
            )

    def _too_small(self) -> ResourceError:
        usage = self._cache.usage()
        return ResourceError(
            f"the cache {self._cache.folder} of {self._cache.max_bytes} bytes stays full: "
            f"{usage.pinned_bytes} bytes are in use, {usage.part_bytes} are being fetched",
            hint="give it more bytes, or the other job a cache of its own; a reader that shuffles over "
            "many shards at once wants a smaller window",
        )


class _Waiting:
    """How long one has waited for room, and how long another process's fetch of the shard has not moved.

    These are two clocks: who has waited long for a fetch that then fails has not waited for room.
    """

    def __init__(self, cache: Cache, key: str) -> None:
        self._cache = cache
        self._key = key
        self._is_for_room: bool | None = None  # None: has not waited
        self._since_s = 0.0
        self._written_ns = 0
        self._moved_s = 0.0

    @property
    def for_room_s(self) -> float:
        return time.monotonic() - self._since_s if self._is_for_room else 0.0

    @property
    def is_stalled(self) -> bool:
        return self._is_for_room is not None and time.monotonic() - self._moved_s > STALLED_S

    def look(self, busy: Busy) -> bool:
        """Note what one waits for; tell whether it is another thing than before."""
        now_s, written_ns = time.monotonic(), self._cache.part_written_ns(self._key)
        if self._is_for_room is None or written_ns != self._written_ns:
            self._moved_s, self._written_ns = now_s, written_ns
        is_another = self._is_for_room is not busy.full
        if is_another:
            self._is_for_room, self._since_s = busy.full, now_s
        return is_another
