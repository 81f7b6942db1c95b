"""A thread that works ahead, where that pays: the next items are ready when they are asked for.

A bounded queue of finished items; the producer sleeps when it is full and the consumer when it is
empty. An error in the producer is raised in the consumer, in its turn. `close` wakes and joins the
thread; it never outlives its owner by more than the item it is making.

Handing an item from thread to thread costs two switches of Python's lock. While the consumer comes
back sooner than that (it does nothing else, as in a test of speed), or an item is made sooner, the
thread has nothing to gain: the consumer then makes the items itself and the thread sleeps, so that
prefetching costs next to nothing where it brings nothing.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from marrow.core.errors import UsageError

T = TypeVar("T")

# PERF: what a hand-over costs where the producer is the limit: about 60 microseconds an item.
HANDOVER_S = 100e-6
FORGET = 0.9  # slowly: what is slow now and then, such as a new file, is worth working ahead for
# A consumer that is away for long is known after three items, also if it takes up to a dozen at once and
# then works; one pause in 32 items is the machine's, and wakes nobody.
LONGEST_AWAY_S = 16 * HANDOVER_S  # that one pause counts as
MEMORY = 32  # items, of the mean


class Prefetcher(Generic[T]):
    """Calls `make` again and again, ahead on its own thread, and hands the results out in order.

    `make` is called by one thread at a time: the prefetcher's or, while that would not pay, the
    consumer's. is_waited_for: the first item is wanted at once, so the consumer makes it, which no
    thread could do sooner; the thread begins with the second.
    """

    def __init__(self, make: Callable[[], T], depth: int, name: str, *, is_waited_for: bool = False) -> None:
        self._make = make
        self._depth = depth
        self._ready: deque[T] = deque()
        self._lock = threading.Lock()
        self._item = threading.Condition(self._lock)  # the consumer waits for an item
        self._room = threading.Condition(self._lock)  # the thread waits until it may make one
        self._error: BaseException | None = None
        self._closed = False
        self._making = False
        self._pays = not is_waited_for
        self._make_s = 0.0 if is_waited_for else HANDOVER_S
        self._away_s = HANDOVER_S
        self._left_s: float | None = None  # when the consumer went away with the last item
        # A daemon: a process that forgets to close can still exit.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def take(self) -> T:
        """Return the next item, waiting for it if need be.

        Raises: what `make` raised, once the items before it are taken; UsageError after close.
        """
        if self._left_s is not None:
            away_s = time.perf_counter() - self._left_s
            self._away_s += (min(away_s, LONGEST_AWAY_S) - self._away_s) / MEMORY
        pays = min(self._away_s, self._make_s) >= HANDOVER_S
        # Without the lock: a thread that does not pay sleeps until `take` wakes it, and changes nothing.
        if pays or self._pays or self._making or self._ready or self._error or self._closed:
            return self._take(pays)
        return self._make_here()

    def _take(self, pays: bool) -> T:
        """Take what the thread has made, or wait for it, or make it here."""
        with self._lock:
            self._pays = pays
            while not (self._ready or self._error or self._closed) and (self._pays or self._making):
                self._room.notify_all()  # the thread sleeps if it did not pay before
                self._item.wait()
            if self._closed:
                raise UsageError("the loader is closed", hint="take batches inside its `with` block")
            if not self._ready and self._error is not None:
                raise self._error
            if self._ready:
                item = self._ready.popleft()
                if self._pays:
                    self._room.notify_all()
                self._left_s = time.perf_counter()
                return item
        return self._make_here()

    def _make_here(self) -> T:
        """Make an item on the consumer's thread, while the other one sleeps."""
        self._making = True
        start_s = time.perf_counter()
        try:
            item = self._make()
        except BaseException as error:
            self._fail(error)
            raise
        is_first = self._left_s is None
        self._left_s = now = time.perf_counter()
        self._make_s = max(now - start_s, FORGET * self._make_s)
        self._making = False
        if is_first:  # whether it pays is not known yet; it may as well begin
            with self._lock:
                self._pays = True
                self._room.notify_all()
        return item

    def close(self) -> None:
        """Stop the thread and wait for it. Closing twice is fine."""
        with self._lock:
            self._closed = True
            self._ready.clear()
            self._item.notify_all()
            self._room.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while self._wait_for_room():
            start_s = time.perf_counter()
            try:
                item = self._make()
            except BaseException as error:  # noqa: BLE001 - it is raised in the consumer
                self._fail(error)
                return
            with self._lock:
                self._making = False
                self._make_s = max(time.perf_counter() - start_s, FORGET * self._make_s)
                if not self._closed:
                    self._ready.append(item)
                    self._item.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._making = False
            self._error = error
            self._item.notify_all()
            self._room.notify_all()

    def _wait_for_room(self) -> bool:
        with self._lock:
            while not self._closed and self._error is None and not self._may_make():
                self._room.wait()
            if self._closed or self._error is not None:
                return False
            self._making = True
            return True

    def _may_make(self) -> bool:
        return self._pays and not self._making and len(self._ready) < self._depth
