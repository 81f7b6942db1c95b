"""A thread that works ahead: the next items are ready when they are asked for.

A bounded queue of finished items; the producer sleeps when it is full and the consumer when it is
empty. An error in the producer is raised in the consumer, in its turn. `close` wakes and joins the
thread; it never outlives its owner by more than the item it is making.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from marrow.core.errors import UsageError

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls `make` again and again on its own thread and hands the results out in order."""

    def __init__(self, make: Callable[[], T], depth: int, name: str) -> None:
        self._make = make
        self._depth = depth
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False
        # A daemon: a process that forgets to close can still exit.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def take(self) -> T:
        """Return the next item, waiting for it if need be.

        Raises: what `make` raised, once the items before it are taken; UsageError after close.
        """
        with self._changed:
            while not self._ready and self._error is None and not self._closed:
                self._changed.wait()
            if self._closed:
                raise UsageError("the loader is closed", hint="take batches inside its `with` block")
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item
            assert self._error is not None
            raise self._error

    def close(self) -> None:
        """Stop the thread and wait for it. Closing twice is fine."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while self._wait_for_room():
            try:
                item = self._make()
            except BaseException as error:  # noqa: BLE001 - it is raised in the consumer
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                if not self._closed:
                    self._ready.append(item)
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        with self._changed:
            while len(self._ready) >= self._depth and not self._closed:
                self._changed.wait()
            return not self._closed
