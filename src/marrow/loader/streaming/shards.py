"""Shards that lie at a URL, as local paths: fetched ahead of use, checked, kept in a shared cache.

    with CachedShards.open("s3://corpus/shards", Cache(folder, max_bytes)) as shards:
        shards.ahead([3, 1, 2])        # in the order of use; fetching starts on threads
        path = shards.path(3)          # waits for it; it stays until release
        shards.release(3)

It is a `Files` (`source.py`). A shard is fetched by one process of the host, whoever wants it
first (`cache.py`), and checked once by each process (`fetch.py`). Shards fetched ahead stay
pinned until they are used, in at most half of the cache: the plan of a job never evicts what it
is about to need. A shard that someone waits for goes before all that is planned.

`counters()` says what happened; waits are charged to the stage "fetch" or "verify".
"""

import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from marrow.core.errors import UsageError, explain_os_errors
from marrow.core.files import temporary_beside
from marrow.core.hashes import hash_value
from marrow.data.manifest import FILE_NAME as MANIFEST_FILE
from marrow.data.manifest import Manifest
from marrow.loader.stages import stage
from marrow.loader.streaming.cache import Cache, Pin
from marrow.loader.streaming.fetch import Errand, Fetcher
from marrow.loader.streaming.fetch import ShardFile as ShardFile
from marrow.store.remote.client import Remote
from marrow.store.remote.retry import Retry

IN_FLIGHT = 16
# Room may come by another process, which notifies nobody here: so often the plan is tried again.
_LOOK_AGAIN_S = 0.1


@dataclass(slots=True)
class _Slot:
    """One shard in this process.

    pin: it is here. users: paths given out and not released. doing: the stage that a thread has it
    in, "" if none. wanted: how many wait for it. error: of the last try.
    """

    pin: Pin | None = None
    users: int = 0
    doing: str = ""
    wanted: int = 0
    error: Exception | None = None
    checked_inode: int = -1


class CachedShards:
    """The shards of a dataset at a URL, through a cache. Safe from many threads.

    Args: url: where the files are. files: their names below it, sizes and checks. cache: shared
        with others. in_flight: fetched side by side. folder: where their manifest is. remote: open
        already, and closed with this.
    Cost: `in_flight` threads while there is something to fetch, a few MiB of memory for each.
    """

    _plan: list[int]  # the next one last

    def __init__(
        self,
        url: str,
        files: Sequence[ShardFile],
        cache: Cache,
        *,
        in_flight: int = IN_FLIGHT,
        retry: Retry | None = None,
        folder: Path | None = None,
        remote: Remote | None = None,
    ) -> None:
        self.url = url
        self.files = tuple(files)
        self.cache = cache
        self.folder = folder
        self._in_flight = in_flight
        self._retry = retry
        self._most_ahead = cache.max_bytes // 2
        largest = max((file.num_bytes for file in self.files), default=1)
        self.max_open: int | None = max(1, self._most_ahead // max(1, largest))
        self._start(remote)
        _all.add(self)

    @classmethod
    def open(
        cls, url: str, cache: Cache, *, in_flight: int = IN_FLIGHT, retry: Retry | None = None
    ) -> "CachedShards":
        """Open token shards by the manifest at the URL; `folder` then holds a copy of it.

        Raises: SourceError if there is none; DataError if it is damaged.
        """
        remote = Remote.open(url, retry)
        text = remote.read(MANIFEST_FILE)
        folder = cache.folder / "manifests" / hash_value([url, text.hex()])[:40]
        _keep(folder / MANIFEST_FILE, text)
        shards = Manifest.read(folder).shards
        files = [ShardFile(s.name, s.num_bytes, s.xxh3) for s in shards]
        return cls(url, files, cache, in_flight=in_flight, retry=retry, folder=folder, remote=remote)

    def __reduce__(self) -> tuple[Any, ...]:
        options = {"in_flight": self._in_flight, "retry": self._retry, "folder": self.folder}
        return _reopen, (self.url, self.files, self.cache, options)

    def __enter__(self) -> "CachedShards":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def path(self, index: int) -> Path:
        """Return where shard `index` is, whole and checked, waiting for it; kept until `release`.

        Raises: as `Fetcher.bring`; UsageError after `close`.
        """
        with self._changed:
            self._check_open()
            slot = self._slot(index)
            if slot.pin is not None and not slot.users and not slot.pin.path.exists():
                self._drop(index)  # someone deleted the cache
            if slot.pin is None and not slot.doing:
                self._pin_checked(index, slot)
            if slot.pin is None:
                self._wait(index, slot)
            assert slot.pin is not None
            if index in self._ahead:
                self._not_ahead(index)
            if index not in self._used:  # also one that was given up in use and has come again
                self._used[index] = None
                self._used_bytes += self.files[index].num_bytes
            slot.users += 1
            return slot.pin.path

    def is_verified(self, index: int) -> bool:
        """Say yes: `path` gives checked files only."""
        del index
        return True

    def release(self, index: int) -> None:
        """Take one `path` back; after the last the shard may be evicted."""
        with self._changed:
            slot = self._slot(index)
            slot.users = max(0, slot.users - 1)
            if slot.users or slot.pin is None or index in self._ahead:
                return
            if index in self._used:
                self._not_used(index)
            if not slot.wanted:  # else whoever waits has it next
                self._let_go(slot)

    def ahead(self, indices: Sequence[int]) -> None:
        """Fetch these shards soon, in this order, instead of what was planned before."""
        with self._changed:
            if self._closed:
                return
            planned = dict.fromkeys(indices)
            for index in [index for index in self._ahead if index not in planned]:
                self._drop(index)
            # PERF: a loader says this for each batch, and it is mostly what was said before in another
            # order. Nobody is woken then: 16 threads that look for work each time halved a loader's rate.
            before, self._plan = self._plan, [i for i in reversed(planned) if self._is_to_fetch(i)]
            if not set(before).issuperset(self._plan):
                self._hire(len(self._plan))
                self._jobs.notify()

    def counters(self) -> dict[str, float]:
        """Return what happened so far in this process; requests and errors of the endpoint too."""
        return {
            **self._fetcher.counts.as_dict(),
            "evicted": self.cache.evicted,
            "evicted_bytes": self.cache.evicted_bytes,
            **self._fetcher.remote.counters.as_dict(),
        }

    def close(self) -> None:
        """End the threads and let all shards go. Closing twice is fine."""
        with self._changed:
            self._closed = True
            self._fetcher.close()
            self._plan = []
            self._changed.notify_all()
            self._jobs.notify_all()
        until_s = time.monotonic() + 1.0
        for thread in self._threads:
            # One that waits for a dead endpoint ends by its timeout; what it holds is its own.
            thread.join(max(0.0, until_s - time.monotonic()))
        with self._changed:
            for slot in self._slots.values():
                self._let_go(slot)

    def _start(self, remote: Remote | None = None) -> None:
        """Begin, or begin anew in a forked child, where no thread and no lock of the parent is."""
        remote = remote or Remote(self.url, self._retry)
        self._fetcher = Fetcher(remote, self.files, self.cache, self._give_up)
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # a slot: who waits in `path` hears of it
        self._jobs = threading.Condition(lock)  # a job, or room for one: one idle thread hears of it
        self._slots: dict[int, _Slot] = {}
        self._plan = []
        self._wanted: list[int] = []
        self._ahead: dict[int, None] = {}
        self._ahead_bytes = 0
        self._used: dict[int, None] = {}
        self._used_bytes = 0
        self._flying_bytes = 0
        self._look_again_s = 0.0
        self._idle = 0
        self._threads: list[threading.Thread] = []
        self._closed = False

    def _slot(self, index: int) -> _Slot:
        slot = self._slots.get(index)
        if slot is None:
            slot = self._slots[index] = _Slot()
        return slot

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the shards are closed", hint="read them inside their `with` block")

    def _pin_checked(self, index: int, slot: _Slot) -> None:
        """Take a file from the cache if this process has checked it before. Costs microseconds."""
        if slot.checked_inode == -1:
            return
        pin = self.cache.pin(self._fetcher.key(index))
        if pin is not None and pin.inode != slot.checked_inode:
            pin.close()
        elif pin is not None:
            slot.pin = pin
            self._fetcher.count(hits=1)

    def _wait(self, index: int, slot: _Slot) -> None:
        """Have a shard fetched before all others and wait until it is here."""
        start_s = time.perf_counter()
        slot.wanted += 1
        slot.error = None  # what failed ahead of time is tried once more
        self._hire(1)
        try:
            while slot.pin is None:
                if slot.error is not None:
                    raise slot.error
                self._check_open()
                if not slot.doing and index not in self._wanted:
                    self._wanted.append(index)
                    self._jobs.notify()
                with stage("verify" if slot.doing == "verify" else "fetch"):
                    self._changed.wait()
        finally:
            slot.wanted -= 1
            self._fetcher.count(waits=1, wait_s=time.perf_counter() - start_s)

    def _let_go(self, slot: _Slot) -> None:
        if slot.pin is not None:
            slot.pin.close()
            slot.pin = None
            self._look_again_s = 0.0
            self._changed.notify_all()
            self._jobs.notify()

    def _not_ahead(self, index: int) -> None:
        del self._ahead[index]
        self._ahead_bytes -= self.files[index].num_bytes
        self._jobs.notify()

    def _not_used(self, index: int) -> None:
        del self._used[index]
        self._used_bytes -= self.files[index].num_bytes

    def _drop(self, index: int) -> None:
        """Let go of a shard that was fetched ahead; it may be evicted now."""
        if index in self._ahead:
            self._not_ahead(index)
        self._let_go(self._slot(index))

    def _give_up(self, num_bytes: int, is_stuck: bool) -> bool:
        """Make room for a shard that someone waits for; tell whether there was something to give up.

        First what was fetched ahead, last. Then, if this process alone holds more than the cache
        has, or has waited long for others who may wait for it, what was given out longest ago:
        whoever has mapped it keeps it, the name goes.
        """
        with self._changed:
            if self._ahead:
                self._drop(next(reversed(self._ahead)))
                self._fetcher.count(dropped_ahead=1)
                return True
            if self._used and (is_stuck or self._used_bytes + num_bytes > self.cache.max_bytes):
                index = next(iter(self._used))
                self._not_used(index)
                self._let_go(self._slot(index))
                self._fetcher.count(overdrawn=1)
                return True
        return False

    def _hire(self, jobs: int) -> None:
        """See that there are threads for so many more jobs."""
        while len(self._threads) < self._in_flight and self._idle < jobs:
            # A daemon: a process that forgets to close can still exit.
            thread = threading.Thread(target=self._work, name="marrow-fetch", daemon=True)
            self._idle += 1
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        """Bring shards until closed; on a thread of its own."""
        while True:
            with self._changed:
                while (index := self._next()) is None:
                    if self._closed:
                        return
                    self._jobs.wait(_LOOK_AGAIN_S if self._plan else None)
                self._jobs.notify()  # the next thread, which looks whether there is more to do
                slot, num_bytes = self._slot(index), self.files[index].num_bytes
                slot.doing = "fetch"
                self._idle -= 1
                self._flying_bytes += num_bytes
            pin: Pin | None = None
            error: Exception | None = None
            try:
                pin = self._fetcher.bring(self._errand(index, slot))
            except Exception as caught:  # noqa: BLE001 - it is raised in `path`
                error = caught
            with self._changed:
                slot.doing = ""
                self._idle += 1
                self._flying_bytes -= num_bytes
                self._brought(index, slot, pin, error)
                self._changed.notify_all()

    def _brought(self, index: int, slot: _Slot, pin: Pin | None, error: Exception | None) -> None:
        slot.error = error
        if pin is None:
            if error is None and slot.wanted:
                self._wanted.append(index)
            elif error is None and not self._closed:  # no room for the plan: later
                self._plan.append(index)
                self._look_again_s = time.monotonic() + _LOOK_AGAIN_S
        elif self._closed:
            pin.close()
        else:
            slot.pin, slot.checked_inode = pin, pin.inode
            if not slot.wanted:
                self._ahead[index] = None
                self._ahead_bytes += pin.num_bytes

    def _errand(self, index: int, slot: _Slot) -> Errand:
        def say(doing: str) -> None:
            with self._changed:
                slot.doing = doing
                self._changed.notify_all()

        return Errand(index, slot.checked_inode, lambda: slot.wanted > 0, say)

    def _is_to_fetch(self, index: int) -> bool:
        slot = self._slots.get(index)
        return slot is None or (slot.pin is None and not slot.doing)

    def _next(self) -> int | None:
        """Choose what to fetch: what someone waits for, else what comes next in the plan."""
        while self._wanted:
            slot = self._slot(index := self._wanted.pop(0))
            if slot.wanted and slot.pin is None and not slot.doing:
                return index
        if self._closed or time.monotonic() < self._look_again_s:
            return None
        while self._plan:
            slot = self._slot(index := self._plan[-1])
            if slot.pin is None and not slot.doing:
                soon = self._ahead_bytes + self._flying_bytes
                if soon and soon + self.files[index].num_bytes > self._most_ahead:
                    return None
                return self._plan.pop()
            self._plan.pop()
        return None


def _keep(path: Path, text: bytes) -> None:
    """Write a small file unless it is there, whole or not at all; no fsync, since it is compared."""
    with explain_os_errors("use the cache", path):
        if path.exists() and path.read_bytes() == text:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(path)
        try:
            temporary.write_bytes(text)
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)


def _reopen(url: str, files: Sequence[ShardFile], cache: Cache, options: dict[str, Any]) -> CachedShards:
    return CachedShards(url, files, cache, **options)


_all: "weakref.WeakSet[CachedShards]" = weakref.WeakSet()


def _after_fork() -> None:
    for shards in list(_all):
        shards._start()


os.register_at_fork(after_in_child=_after_fork)
