"""Engines: how independent pieces of work are run, one after the other or many at once.

    with Processes(4) as engine:
        for table in engine.map(read_piece, pieces):    # in the order of the pieces
            writer.write(table)

One idea: what is computed is a function of the piece alone, so the engine changes when it is done
and never what comes out. Results come in the order of the items; at most twice as many pieces as
workers are in flight, taken or finished. A worker process that dies (kill -9, out of memory) is
noticed by the end of its socket; its piece is run again by a fresh one, at most `ATTEMPTS` times.

Processes are new interpreters, never forks: an object-store client used by the parent hangs in a
forked child. They import the function's module alone, not the main script, and end with their
parent, however it ends. `data/ray_engine.py` runs the same pieces on a Ray cluster.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from marrow.core.errors import ResourceError, UsageError
from marrow.core.span import span

Item = TypeVar("Item")
Result = TypeVar("Result")
Pending = TypeVar("Pending")

ATTEMPTS = 3  # how often a piece is tried whose workers die
IN_FLIGHT = 2  # pieces for each worker: one at work, one that is waiting or done
_NAME_LETTERS = 120


class Engine(Protocol):
    """Runs a function on many pieces."""

    @property
    def workers(self) -> int:
        """How many pieces are at work at once."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results in the order of the items.

        Args: function: of the top level of a module, since other processes import it. items:
            taken as they are needed, on this thread; picklable for processes.
        Raises: the first error of a piece, in the order of the items; nothing of this call runs
            any more when it is raised. ResourceError if a piece's workers die again and again.
        """

    def close(self) -> None:
        """End the workers; closing twice is fine."""


def split_evenly(items: Sequence[Item], most: int) -> list[Sequence[Item]]:
    """Cut items into at most so many pieces of neighbours, whose sizes differ by one at most."""
    count = min(len(items), most)
    edges = [len(items) * i // count for i in range(count + 1)] if count else [0]
    return [items[low:high] for low, high in pairwise(edges)]


class _Closing:
    """What opens is a context manager."""

    def close(self) -> None:
        """End the workers."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Inline(_Closing):
    """Runs pieces on the caller's thread, one after the other."""

    workers = 1

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield `function(item)` for each item; see `Engine.map`."""
        return map(function, items)


INLINE = Inline()


class Threads(_Closing):
    """Runs pieces on threads of this process: for work that leaves Python's lock (Arrow, hashing)."""

    def __init__(self, workers: int) -> None:
        _check(workers)
        self.workers = workers
        self._pool: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results in the order of the items; see `Engine.map`."""
        return self.run(function, items, lambda: None)

    def run(
        self, function: Callable[[Item], Result], items: Iterable[Item], stop: Callable[[], None]
    ) -> Iterator[Result]:
        """Do as `map`; call `stop` when it ends early, before waiting for pieces at work."""
        pool = self._pool = self._pool or ThreadPoolExecutor(self.workers, thread_name_prefix="engine")
        flying: set[Future[Result]] = set()

        def start(item: Item) -> Future[Result]:
            future = pool.submit(function, item)
            flying.add(future)
            future.add_done_callback(flying.discard)
            return future

        try:
            yield from in_order(start, Future.result, items, IN_FLIGHT * self.workers)
        finally:
            working = [future for future in list(flying) if not future.cancel()]
            if working:
                stop()
            wait(working)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


class Processes(_Closing):
    """Runs pieces in other processes: for Python code, which holds Python's lock.

    Each worker is led by one thread here. `restarts` counts the workers that died and were
    replaced.
    """

    def __init__(self, workers: int) -> None:
        _check(workers)
        self.workers = workers
        self.restarts = 0
        self._threads = Threads(workers)
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._children: set[_Child] = set()
        # Also at the interpreter's exit, for an engine that nobody closed.
        self._end = weakref.finalize(self, _kill_all, self._children)

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that live now."""
        with self._lock:
            return sorted(child.pid for child in self._children)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results in the order of the items; see `Engine.map`."""
        job = _Job(self, _pickled(function, "the function"))
        return self._threads.run(job.run, items, job.stop)

    def close(self) -> None:
        """End the worker processes."""
        self._threads.close()
        with self._lock:
            children = list(self._children)
            self._children.clear()
            self._idle.clear()
        _kill_all(children)

    def _take(self) -> "_Child":
        with self._lock:
            if self._idle:
                return self._idle.pop()
        child = _Child()
        with self._lock:
            self._children.add(child)
        return child

    def _give_back(self, child: "_Child") -> None:
        with self._lock:
            self._idle.append(child)

    def _bury(self, child: "_Child") -> str:
        """Forget a dead worker; return how it ended."""
        code = child.close()
        with self._lock:
            self._children.discard(child)
            self.restarts += 1
        return f"signal {-code}" if code < 0 else f"exit status {code}"


class _Job:
    """One call of `map`: which workers are at its pieces, and whether it was ended early."""

    def __init__(self, engine: Processes, function: bytes) -> None:
        self._engine = engine
        self._function = function
        self._lock = threading.Lock()
        self._busy: set[_Child] = set()
        self._stopped = False

    def run(self, item: Any) -> Any:
        """Have one piece done by a worker process, on the thread that leads it."""
        data = _pickled(item, "the piece")
        ended = ""
        for _ in range(ATTEMPTS):
            child = self._engine._take()
            with self._lock:
                if self._stopped:
                    self._engine._give_back(child)
                    raise ResourceError("the work was ended early")
                self._busy.add(child)
            try:
                answer = child.run(self._function, data)
            except (EOFError, OSError):
                ended = self._engine._bury(child)
                continue
            finally:
                with self._lock:
                    self._busy.discard(child)
            self._engine._give_back(child)
            done, value = pickle.loads(answer)
            if done:
                return value
            raise value
        raise ResourceError(
            f"worker processes died {ATTEMPTS} times ({ended}) at the piece {_named(item)}",
            hint="signal 9 is often the system's answer to a lack of memory: use fewer workers; "
            "with --engine inline the same error shows itself where it happens",
        )

    def stop(self) -> None:
        """End the workers that are at this job's pieces; nobody waits for their results."""
        with self._lock:
            self._stopped = True
            for child in self._busy:
                child.kill()


class _Child:
    """A worker process and the socket to it."""

    def __init__(self) -> None:
        here, there = socket.socketpair()
        # The import path travels along: the child must find the modules that the parent finds.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from marrow.data.engine import serve; serve({there.fileno()})"
        )
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[there.fileno()], stdin=subprocess.DEVNULL
            )
        self._connection = Connection(here.detach())
        self._lock = threading.Lock()
        self.pid = self._process.pid

    def run(self, function: bytes, item: bytes) -> bytes:
        """Return the pickle of (True, the result) or (False, the error).

        Raises: EOFError, OSError if the process died.
        """
        self._connection.send_bytes(function)
        self._connection.send_bytes(item)
        return self._connection.recv_bytes()

    def kill(self) -> int:
        """End the process, wait for it and return its exit code; safe to call twice."""
        self._process.kill()
        with self._lock:  # closing would not wake the thread that reads; the process's death does
            return self._process.wait()

    def close(self) -> int:
        """End the process and close the socket, as `kill` does."""
        code = self.kill()
        self._connection.close()
        return code


def serve(descriptor: int) -> None:
    """Work as a worker process: take pieces from the socket and answer, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends its workers
    connection = Connection(descriptor)
    inbox: deque[bytes] = deque()
    arrived = threading.Semaphore(0)

    def listen() -> None:
        """Read ahead of the work, so that the parent's end is seen in the midst of a piece too."""
        try:
            while True:
                inbox.append(connection.recv_bytes())
                arrived.release()
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        arrived.acquire()
        arrived.acquire()
        function, item = inbox.popleft(), inbox.popleft()
        connection.send_bytes(_answer(function, item))


def in_order(
    start: Callable[[Item], Pending],
    finish: Callable[[Pending], Result],
    items: Iterable[Item],
    limit: int,
) -> Iterator[Result]:
    """Keep up to `limit` pieces in flight and yield their results in the order of the items."""
    pending: deque[Pending] = deque()
    for item in items:
        pending.append(start(item))
        if len(pending) >= limit:
            with span("workers"):
                result = finish(pending.popleft())
            yield result
    while pending:
        with span("workers"):
            result = finish(pending.popleft())
        yield result


def _answer(function: bytes, item: bytes) -> bytes:
    try:
        value = pickle.loads(function)(pickle.loads(item))
        return pickle.dumps((True, value), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent raises it
        return pickle.dumps((False, portable(error)))


def portable(error: Exception) -> Exception:
    """Return an error as one that another process can raise: itself where pickle can carry it."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    except Exception:  # noqa: BLE001 - any class may refuse in its own way
        pass
    lines = "".join(traceback.format_exception(error))
    return RuntimeError(f"{type(error).__name__}: {error}\nin a worker process:\n{lines}")


def _pickled(value: Any, what: str) -> bytes:
    try:
        return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"{what} {_named(value)} cannot be sent to another process: {error}",
            hint="functions must stand at the top level of a module; or use threads",
        ) from error


def _named(item: Any) -> str:
    text = str(item)
    return text if len(text) <= _NAME_LETTERS else text[:_NAME_LETTERS] + "..."


def _kill_all(children: Iterable[_Child]) -> None:
    for child in list(children):
        child.close()


def _check(workers: int) -> None:
    if workers < 1:
        raise UsageError(f"{workers} workers cannot do any work", hint="give 1 or more")
