"""The supply of batches: made when asked for, ahead on a thread, or ahead by worker processes.

    supply = Supply(job, tasks, prefetch=2, workers=0)
    batch = supply.take()           # job(task) of the next task, whoever made it
    supply.counters()               # batches, seconds waited and worked by stage, workers restarted

One idea: a batch is job(task), a function of the task alone, and batches come in the order of the
tasks; so prefetch and workers change when the work is done, never what comes out. Where they would
cost more than they bring they step aside: the thread sleeps (`prefetch.py`), and workers whose
batches are less work than handing them over are let go, with a note in the counters. The wait for a batch is
charged to the ledger as "data wait: STAGE", by the stage that the batch was in meanwhile.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from marrow.core.errors import UsageError
from marrow.core.span import charge, enclosing_ledger, is_watched, span
from marrow.loader.prefetch.thread import Prefetcher
from marrow.loader.prefetch.workers import Workers
from marrow.loader.stages import WAIT, Timeline, account

# PERF: a batch of a worker costs the parent 200 to 300 us of CPU: poll, read, unpickle, write. Its copy
# into shared memory is measured.
HANDOVER_S = 300e-6
TRIAL = 32  # batches that warm up, and then as many that are measured
# PERF: after a batch has gone through a core's cache the sums take 3 us; many in a row 1 us each.
MOST_UNREAD = 64

Task = TypeVar("Task")
T = TypeVar("T")


class Supply(Generic[Task, T]):
    """Hands out job(task) for each task, in their order. A context manager; closing twice is fine.

    Args: job: makes a batch; picklable if there are workers. tasks: taken one at a time, on one
        thread at a time. prefetch: batches made ahead on a thread, or ahead by the workers besides
        those at work; 0 makes each when it is asked for. workers: processes, 0 for none.
        timeout_s: the longest wait for a batch of a worker. describe: names a task in errors.
    """

    def __init__(
        self,
        job: Callable[[Task], T],
        tasks: Iterator[Task],
        *,
        prefetch: int = 2,
        workers: int = 0,
        timeout_s: float = 600.0,
        describe: Callable[[Task], str] = str,
    ) -> None:
        if prefetch < 0 or workers < 0:
            raise UsageError(
                f"prefetch = {prefetch} and workers = {workers} cannot be negative",
                hint="0 makes batches on the consumer's own thread",
            )
        self._job, self._tasks = job, tasks
        self._prefetch = prefetch
        self._thread: Prefetcher[tuple[T, Timeline]] | None = None
        self._workers: Workers[Task, T] | None = None
        if workers:
            self._workers = Workers(
                job, tasks, workers, workers + prefetch, timeout_s=timeout_s, describe=describe
            )
        self._closed = False
        self._batches = 0
        self._unread: list[tuple[Timeline, float, float]] = []  # batches not added up yet
        self._waited: dict[str, float] = {}
        self._worked: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._is_idle = False
        self._work_s = self._packing_s = 0.0
        self._notes: deque[str] = deque(maxlen=100)

    def take(self) -> T:
        """Return the next batch.

        Raises: what the job raised, in its turn; StopIteration after the last task; ResourceError
            for workers that die or hang; UsageError after close.
        """
        if self._closed:
            raise UsageError("the loader is closed", hint="take batches inside its `with` block")
        if not is_watched():  # PERF: the span and the ledger cost 10 us, all else in here 5
            start_s = time.perf_counter()
            value, timeline = self._next()
            self._unread.append((timeline, start_s, time.perf_counter()))
            if len(self._unread) == MOST_UNREAD:
                self._read()
            return value
        with span(WAIT):
            start_s = time.perf_counter()  # inside: what is charged below is never more than the span
            value, timeline = self._next()
            waited, worked = self._add_up(timeline, start_s, time.perf_counter())
            charge({f"{WAIT}: {stage}": seconds for stage, seconds in waited.items()})
        ledger = enclosing_ledger()
        if ledger is not None and (self._prefetch or self._workers is not None):
            for stage, seconds in worked.items():
                ledger.overlap(f"data: {stage}", seconds)
        return value

    def counters(self) -> dict[str, Any]:
        """Return what happened so far, ready for JSON.

        Returns: batches; restarts of workers; waited_s and worked_s by stage; counts, such as samples
        left out, and notes, the last 100 that say which.
        """
        self._read()
        return {
            "batches": self._batches,
            "restarts": self._workers.restarts if self._workers is not None else 0,
            "waited_s": dict(self._waited),
            "worked_s": dict(self._worked),
            "counts": dict(self._counts),
            "notes": list(self._notes),
        }

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [] if self._workers is None else self._workers.pids

    def close(self) -> None:
        """End thread and workers."""
        self._closed = True
        if self._thread is not None:
            self._thread.close()
        if self._workers is not None:
            self._workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self) -> tuple[T, Timeline]:
        if self._workers is not None:
            self._let_go_if_idle()
        if self._workers is not None:
            return self._workers.take()
        if not self._prefetch:
            return self._make()
        if self._thread is None:
            self._thread = Prefetcher(self._make, self._prefetch, "marrow-loader", is_waited_for=True)
        return self._thread.take()

    def _read(self) -> None:
        """Add up the batches that were only put aside."""
        for timeline, start_s, end_s in self._unread:
            self._add_up(timeline, start_s, end_s)
        self._unread.clear()

    def _add_up(
        self, timeline: Timeline, start_s: float, end_s: float
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Add a batch to the counters; return what of it was waited for and worked, by stage."""
        waited, worked = account(timeline.marks, start_s, end_s)
        self._batches += 1
        for stage, seconds in waited.items():
            self._waited[stage] = self._waited.get(stage, 0.0) + seconds
        for stage, seconds in worked.items():
            self._worked[stage] = self._worked.get(stage, 0.0) + seconds
            self._work_s += seconds
        self._packing_s += timeline.packing_s
        for name, number in timeline.counts.items():
            self._counts[name] = self._counts.get(name, 0) + number
        if timeline.notes:
            self._notes.extend(timeline.notes)
        return waited, worked

    def _let_go_if_idle(self) -> None:
        """End the workers if a batch is less work than handing it over, and go on in this process."""
        assert self._workers is not None
        if self._batches + len(self._unread) in (TRIAL, 2 * TRIAL):
            self._read()
        if self._batches == TRIAL:
            self._work_s = self._packing_s = 0.0
        if self._batches == 2 * TRIAL:
            work_s, handing_s = self._work_s / TRIAL, self._packing_s / TRIAL + HANDOVER_S
            self._is_idle = work_s < handing_s
            if self._is_idle:
                told = f"{work_s * 1e6:.0f} us of work and {handing_s * 1e6:.0f} us to hand over"
                self._notes.append(f"the workers were let go: a batch is {told}")
        if self._is_idle and self._workers.finish():
            self._counts["workers let go"] = len(self._workers.pids)
            self._workers.close()
            self._workers = None

    def _make(self) -> tuple[T, Timeline]:
        task = next(self._tasks)
        with Timeline() as timeline:
            value = self._job(task)
        return value, timeline
