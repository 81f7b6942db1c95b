"""A worker process of the loader: takes tasks from a socket, makes batches, sends parcels back.

It imports little: torch comes only if the job needs it. It ignores Ctrl-C, which is its parent's,
and ends as soon as the parent's end of the socket closes, in the midst of a batch too.
"""

import mmap
import os
import pickle
import signal
import struct
import threading
import time
from dataclasses import dataclass, field
from multiprocessing import connection, process, reduction, spawn
from queue import SimpleQueue
from typing import Any, Self

from marrow.core.errors import MarrowError
from marrow.data.engine import portable
from marrow.loader.prefetch.parcels import Packed, Packer, anonymous_file
from marrow.loader.stages import QUEUE, STAGES, Timeline

_CELL = struct.Struct("<dq")  # since when (perf_counter), index in STAGES
_CELL_BYTES = 64  # a cache line for each worker


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker is given first. main: how to load the parent's main script, if the job needs it."""

    main: dict[str, Any] | None
    job: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """What comes back for task `number`; -1 says that the worker is set up. One of packed, error."""

    number: int
    packed: Packed | None = None
    error: Exception | None = None
    timeline: Timeline = field(default_factory=Timeline)


class Status:
    """A page that parent and workers share: what each worker is doing, and since when."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._page = mmap.mmap(descriptor, os.fstat(descriptor).st_size)

    @classmethod
    def create(cls, workers: int) -> Self:
        """Make the page for some workers."""
        status = cls(anonymous_file(workers * _CELL_BYTES))
        for number in range(workers):
            status.write(number, QUEUE)
        return status

    def write(self, number: int, stage: str) -> None:
        """Note the stage of a worker."""
        _CELL.pack_into(self._page, number * _CELL_BYTES, time.perf_counter(), STAGES.index(stage))

    def read(self, number: int) -> tuple[str, float]:
        """Return the stage of a worker and for how many seconds it has been in it."""
        since_s, index = _CELL.unpack_from(self._page, number * _CELL_BYTES)
        return STAGES[index], time.perf_counter() - since_s

    def close(self) -> None:
        """Let the page go. Closing twice is fine."""
        if self.descriptor >= 0:
            self._page.close()
            os.close(self.descriptor)
            self.descriptor = -1


def serve(socket: int, status: int, number: int) -> None:
    """Work until the socket ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: connection.Connection[Any, Any] = connection.Connection(socket)
    page = Status(status)
    page.write(number, QUEUE)
    inbox: SimpleQueue[bytes] = SimpleQueue()

    def listen() -> None:
        """Read ahead of the work, so that the parent's end is seen in the midst of a batch too."""
        try:
            while True:
                inbox.put(parent.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    packer = Packer()
    job = _set_up(parent, pickle.loads(inbox.get()))
    while True:
        task_number, task, freed = pickle.loads(inbox.get())
        packer.free(freed)
        descriptor: int | None = None
        with Timeline(lambda stage: page.write(number, stage)) as timeline:
            try:
                made = job(task)
                start_s = time.perf_counter()
                packed, descriptor = packer.pack(made)
                timeline.packing_s = time.perf_counter() - start_s
                del made  # its memory is the job's again
                answer = Answer(task_number, packed, timeline=timeline)
            except Exception as error:  # noqa: BLE001 - whatever it is, the parent raises it
                answer = Answer(task_number, error=_portable(error), timeline=timeline)
        parent.send_bytes(pickle.dumps(answer, protocol=5))
        if descriptor is not None:
            reduction.send_handle(parent, descriptor, 0)
            os.close(descriptor)


def _set_up(parent: "connection.Connection[Any, Any]", setup: Setup) -> Any:
    """Load the job; end the process if that fails."""
    try:
        if setup.main is not None:
            # Marks this process as one that is starting: a main script without its guard is refused
            # when it tries to start workers of its own, and does not go on without end.
            process.current_process()._inheriting = True  # type: ignore[attr-defined]
            try:
                spawn.prepare(setup.main)
            finally:
                del process.current_process()._inheriting  # type: ignore[attr-defined]
        job = pickle.loads(setup.job)
    except Exception as error:  # noqa: BLE001 - the parent raises it
        parent.send_bytes(pickle.dumps(Answer(-1, error=_portable(error)), protocol=5))
        raise SystemExit(1) from None
    parent.send_bytes(pickle.dumps(Answer(-1), protocol=5))
    return job


def _portable(error: Exception) -> Exception:
    """Return an error that can travel, with its traceback as a note where it is not one of our own."""
    told = portable(error)
    if told is error and not isinstance(error, MarrowError):
        import traceback  # only on the way down

        told.add_note("in a worker process:\n" + "".join(traceback.format_exception(error)))
    return told
