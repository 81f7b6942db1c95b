"""Worker processes: batches made ahead where Python transforms would hold this process's lock.

    tasks (batch k: its positions and rows) -> the idlest worker -> job(task) -> parcel -> take(), in order

One idea: a batch is a function of its task alone, so it does not matter which worker makes it, how
many there are, or whether one dies half way: a worker that is gone (kill -9, out of memory) is
noticed by the end of its socket, its batches are made again by a fresh one and counted. Batches
come in the order of the tasks; nothing is lost and nothing comes twice.

No thread helps here: the consumer's own calls of `take` hand out tasks and collect parcels, and a
worker always has a second task to go on with. Workers are new interpreters, never forks (an
object-store client that the parent has used hangs in a forked child), and they end with their
parent, however it ends. Arrays come through shared memory without a name (`parcels.py`).
"""

import os
import pickle
import select
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection, process, reduction, spawn
from socket import socketpair
from typing import Any, Generic, TypeVar

from marrow.core.errors import ResourceError, UsageError
from marrow.loader.prefetch.parcels import Unpacker
from marrow.loader.prefetch.worker import Answer, Setup, Status
from marrow.loader.stages import Timeline

Task = TypeVar("Task")
T = TypeVar("T")

ATTEMPTS = 3  # how often a batch is tried whose workers die
IN_HAND = 2  # tasks a worker has: one at work, one to go on with
START_S = 300.0  # a worker may take this long to import what it needs
LOOK_EVERY_S = 1.0  # a worker is looked after this often, should its socket outlive it


_GUARD = 'a script that starts workers needs `if __name__ == "__main__":` around its main part'


@dataclass(slots=True)
class _Worker:
    """A process, the socket to it, what it was given, and its memory."""

    number: int
    process: "subprocess.Popen[bytes]"
    socket: "connection.Connection[Any, Any]"
    unpacker: Unpacker = field(default_factory=Unpacker)
    given: deque[int] = field(default_factory=deque)
    is_ready: bool = False

    def end(self) -> int:
        """Kill the process and close the socket; return its exit status."""
        self.process.kill()
        self.socket.close()
        return self.process.wait()


class Workers(Generic[Task, T]):
    """Runs `job` on each task in other processes and hands the results out in the order of the tasks.

    Args: job: picklable; called as job(task) in the worker. tasks: taken as room allows, on the
        consumer's thread. ahead: results made ahead, besides the one awaited. timeout_s: the
        longest that `take` waits for one result. describe: names a task in errors.
    restarts: workers that died and were replaced.
    """

    def __init__(
        self,
        job: Callable[[Task], T],
        tasks: Iterator[Task],
        workers: int,
        ahead: int,
        *,
        timeout_s: float = 600.0,
        describe: Callable[[Task], str] = str,
    ) -> None:
        if workers < 1:
            raise UsageError(f"{workers} workers cannot make a batch", hint="give 1 or more")
        self.restarts = 0
        self._tasks, self._describe, self._timeout_s = tasks, describe, timeout_s
        self._limit = max(ahead + 1, workers)
        self._setup = _pickled_setup(job)
        self._status = Status.create(workers)
        self._waiting: dict[int, Task] = {}  # given or to be given, result not here
        self._unassigned: deque[int] = deque()
        self._done: dict[int, tuple[T | Exception, bool, Timeline]] = {}
        self._attempts: dict[int, int] = {}
        self._next_in = self._next_out = self._failed_starts = 0
        self._no_more = self._closed = False
        self._error: Exception | None = None
        self._workers: dict[int, _Worker] = {}
        self._by_descriptor: dict[int, _Worker] = {}
        self._poll = select.poll()  # PERF: kept, since to make one for each wait costs 50 us
        # Also at the interpreter's exit, for workers that nobody closed.
        self._end = weakref.finalize(self, _end_all, self._workers)
        for number in range(workers):
            self._workers[number] = self._start(number)

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [worker.process.pid for worker in self._workers.values()]

    def take(self) -> tuple[T, Timeline]:
        """Return the next result and the stages it went through.

        Raises: what the job raised, in its turn and again; ResourceError if workers die again and
            again, or if the result takes longer than `timeout_s`; StopIteration after the last
            task; UsageError after close.
        """
        if self._closed:
            raise UsageError("the loader is closed", hint="take batches inside its `with` block")
        if self._error is not None:
            raise self._error
        number = self._next_out
        started = time.monotonic()
        until = started + self._timeout_s
        self._hand_out()
        if number == self._next_in:
            raise StopIteration
        while number not in self._done:
            self._collect(min(LOOK_EVERY_S, max(0.0, until - time.monotonic())))
            if self._is_starting(number) and time.monotonic() - started < START_S:
                until = time.monotonic() + self._timeout_s  # imports are no batch
            if number not in self._done and time.monotonic() >= until:
                self._error = self._late(number)
                raise self._error
        value, is_good, timeline = self._done[number]
        if not is_good:
            assert isinstance(value, Exception)
            self._error = value
            raise value
        # Last of all: an interrupt before this line loses no batch.
        del self._done[number]
        self._attempts.pop(number, None)
        self._next_out += 1
        self._hand_out()
        return value, timeline  # type: ignore[return-value]  # is_good tells which

    def finish(self) -> bool:
        """Take no more tasks; return whether all that were taken have been handed out."""
        self._no_more = True
        return self._next_out == self._next_in

    def close(self) -> None:
        """End the workers. Closing twice is fine."""
        self._closed = True
        self._end()
        self._done.clear()
        self._status.close()

    def _hand_out(self) -> None:
        """Take tasks as long as there is room, and give them to the workers that have the fewest."""
        while not self._no_more and self._next_in - self._next_out < self._limit:
            try:
                self._waiting[self._next_in] = next(self._tasks)
            except StopIteration:
                self._no_more = True
                break
            self._unassigned.append(self._next_in)
            self._next_in += 1
        while self._unassigned:
            worker = min(self._workers.values(), key=lambda one: (len(one.given), one.number))
            if len(worker.given) >= IN_HAND:
                return
            number = self._unassigned[0]
            worker.given.append(number)
            self._unassigned.popleft()
            try:
                data = pickle.dumps((number, self._waiting[number], worker.unpacker.freed()), protocol=5)
                worker.socket.send_bytes(data)
            except OSError:
                self._replace(worker)

    def _collect(self, timeout_s: float) -> None:
        """Wait for news from any worker and take it in."""
        news = self._poll.poll(timeout_s * 1e3)
        for descriptor, _ in news:
            worker = self._by_descriptor[descriptor]
            try:
                self._receive(worker)
            except (EOFError, OSError):
                self._replace(worker)
        if not news:
            for worker in list(self._workers.values()):  # a grandchild may hold the socket of a dead worker
                if worker.process.poll() is not None:
                    self._replace(worker)
        self._hand_out()

    def _receive(self, worker: _Worker) -> None:
        answer: Answer = pickle.loads(worker.socket.recv_bytes())
        descriptor = None
        if answer.packed is not None and answer.packed.num_bytes:
            descriptor = reduction.recv_handle(worker.socket)
        if answer.number < 0:
            worker.is_ready = True
            if answer.error is not None:
                raise _refused(answer.error)
            return
        value: Any = answer.error
        if answer.packed is not None:
            value = worker.unpacker.open(answer.packed, descriptor)
        self._done[answer.number] = (value, answer.error is None, answer.timeline)
        del self._waiting[answer.number]
        worker.given.remove(answer.number)

    def _replace(self, worker: _Worker) -> None:
        """Have the batches of a dead worker made by a fresh one."""
        while _has_news(worker):  # what it finished before it died counts
            try:
                self._receive(worker)
            except (EOFError, OSError):
                break
        del self._by_descriptor[worker.socket.fileno()]
        self._poll.unregister(worker.socket.fileno())
        status = worker.end()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        self._failed_starts = 0 if worker.is_ready else self._failed_starts + 1
        if not worker.is_ready and (status >= 0 or self._failed_starts >= ATTEMPTS):
            raise ResourceError(
                f"a worker of the loader ended while it started ({how}); stderr may say why",
                hint=_GUARD,
            )
        self.restarts += 1
        left = list(worker.given)
        if left and worker.is_ready:
            first = left[0]  # the one at work; the others only waited
            self._attempts[first] = self._attempts.get(first, 0) + 1
            if self._attempts[first] >= ATTEMPTS:
                left.remove(first)
                task = self._waiting.pop(first)
                error = ResourceError(
                    f"workers died {ATTEMPTS} times ({how}) over {self._describe(task)}",
                    hint="signal 9 is often the system's answer to a lack of memory: use fewer workers or "
                    "smaller batches; with workers=0 the fault shows itself where it happens",
                )
                self._done[first] = (error, False, Timeline())
        self._unassigned.extendleft(reversed(left))
        self._workers[worker.number] = self._start(worker.number)

    def _start(self, number: int) -> _Worker:
        here, there = socketpair()
        # Only what must be known before anything is imported; the rest comes through the socket.
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; from marrow.loader.prefetch.worker import serve; "
            f"serve({there.fileno()}, {self._status.descriptor}, {number})"
        )
        # One thread each: as many libraries' pools as workers would fight for the cores.
        environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | os.environ
        with there:
            child = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[there.fileno(), self._status.descriptor],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        worker = _Worker(number, child, connection.Connection(here.detach()))
        worker.socket.send_bytes(self._setup)
        self._by_descriptor[worker.socket.fileno()] = worker
        self._poll.register(worker.socket.fileno(), select.POLLIN)
        return worker

    def _is_starting(self, number: int) -> bool:
        """Tell whether a batch waits for a worker that is not set up yet."""
        return any(number in worker.given and not worker.is_ready for worker in self._workers.values())

    def _late(self, number: int) -> ResourceError:
        """Say where the batch that did not come in time is."""
        task = self._describe(self._waiting[number])
        for worker in self._workers.values():
            if number in worker.given:
                stage, since_s = self._status.read(worker.number)
                pid = worker.process.pid
                where = f"worker {worker.number} (pid {pid}) is in stage {stage} for {since_s:.0f} s"
                break
        else:
            where = "no worker has come to it"
        return ResourceError(
            f"{task} is not there after {self._timeout_s:g} s: {where}",
            hint="look at what the worker does (py-spy dump --pid), or raise timeout_s if it only is slow",
        )


def _has_news(worker: _Worker) -> bool:
    try:
        return worker.socket.poll(0)
    except OSError:
        return False


def _refused(error: Exception) -> UsageError:
    if isinstance(error, UsageError):
        return error
    return UsageError(
        f"a worker of the loader cannot use what it was given: {error}",
        hint="functions for workers must stand at the top level of a module or script; "
        "in a notebook, move them to a file and import them",
    )


def _pickled_setup(job: Callable[..., Any]) -> bytes:
    if getattr(process.current_process(), "_inheriting", False):  # a worker that loads its parent's script
        raise UsageError("the main script starts workers while a worker loads it", hint=_GUARD)
    try:
        data = pickle.dumps(job, protocol=5)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"the loader's work cannot be sent to a worker: {error}",
            hint="transforms for workers must be functions or classes at the top level of a module, "
            "not lambdas or inner functions, and hold no open files; or use workers=0",
        ) from error
    main: dict[str, Any] | None = None
    if b"__main__" in data:  # only then is the main script run again in the worker
        main = spawn.get_preparation_data("marrow-loader-worker")
        main.pop("authkey", None)  # a secret of multiprocessing, of no use to us
    return pickle.dumps(Setup(main, data), protocol=5)


def _end_all(workers: dict[int, _Worker]) -> None:
    for worker in list(workers.values()):
        worker.end()
    workers.clear()
