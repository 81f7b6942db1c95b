"""A worker's loop, run in this process over a real socket: what it answers, what it says it is doing.

The loop ends its process when the socket ends; here that is noted instead. A job that raises SystemExit
ends the loop itself.
"""

import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection, reduction
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from marrow.core.errors import DataError
from marrow.loader.prefetch.parcels import INLINE_BYTES, Unpacker
from marrow.loader.prefetch.worker import Answer, Setup, Status, serve
from marrow.loader.stages import QUEUE, STAGES, count, stage, totals

END = "end"
LOOKED = threading.Event()


class Odd(Exception):
    """An error that pickle cannot carry."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def job(task: Any) -> Any:
    """Do what the task says."""
    if task == END:
        raise SystemExit
    if isinstance(task, Exception):
        raise task
    if task == "unpicklable":
        return lambda: None
    if task == "odd":
        raise Odd(1, 2)
    if task == "wait":
        with stage("transform"):
            return LOOKED.wait(10)
    with stage("decode"):
        count("samples left out", "row 3")
        return np.full(task, task, np.int64)


class Parent:
    """The other end: sends tasks, opens what comes back."""

    def __init__(self, work: Callable[[Any], Any] | bytes, main: dict[str, Any] | None = None) -> None:
        ours, theirs = socket.socketpair()
        self.pipe: connection.Connection[Any, Any] = connection.Connection(ours.detach())
        self.worker_end = theirs.detach()
        self.status = Status.create(3)
        self.unpacker = Unpacker()
        self._setup = Setup(main, work if isinstance(work, bytes) else pickle.dumps(work))

    def set_up(self) -> Answer:
        self.pipe.send_bytes(pickle.dumps(self._setup))
        return self.answer()

    def ask(self, number: int, task: Any) -> Any:
        """Send a task and return its answer, opened."""
        self.send(number, task)
        answer = self.answer()
        assert answer.number == number
        if answer.packed is None:
            return answer
        descriptor = reduction.recv_handle(self.pipe) if answer.packed.num_bytes else None
        return answer, self.unpacker.open(answer.packed, descriptor)

    def send(self, number: int, task: Any) -> None:
        self.pipe.send_bytes(pickle.dumps((number, task, self.unpacker.freed())))

    def answer(self) -> Answer:
        assert self.pipe.poll(10), "no answer"
        answer = pickle.loads(self.pipe.recv_bytes())
        assert isinstance(answer, Answer)
        return answer


Played = Callable[..., Any]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    """Run a worker's loop beside `script(parent)`, which is the other end; return what that returns."""
    ended: SimpleQueue[int] = SimpleQueue()
    monkeypatch.setattr(os, "_exit", ended.put)
    before = signal.getsignal(signal.SIGINT)

    def run(script: Callable[[Parent], Any], work: Any = job, **options: Any) -> Any:
        parent = Parent(work, **options)
        found: list[Any] = []

        def act() -> None:
            try:
                found.append(script(parent))
            except BaseException as error:  # noqa: BLE001 - raised below, in the test's thread
                found.append(error)
            finally:
                parent.send(-2, END)

        thread = threading.Thread(target=act)
        thread.start()
        page = os.dup(parent.status.descriptor)
        with pytest.raises(SystemExit):
            serve(parent.worker_end, page, 1)
        os.close(page)
        thread.join(10)
        parent.pipe.close()
        parent.status.close()
        assert ended.get(timeout=10) == 0, "the end of the socket is the end of the process"
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    yield run
    signal.signal(signal.SIGINT, before)


def test_a_worker_is_set_up_then_answers_each_task_by_its_number(play: Played) -> None:
    def script(parent: Parent) -> list[Any]:
        answer = parent.set_up()
        assert (answer.number, answer.packed, answer.error) == (-1, None, None)
        return [parent.ask(number, size)[1].tolist() for number, size in ((7, 3), (8, 0), (2, 1))]

    assert play(script) == [[3, 3, 3], [], [1]]


def test_large_arrays_come_in_memory_that_is_used_again_when_let_go(play: Played) -> None:
    size = INLINE_BYTES  # of 8 bytes each

    def script(parent: Parent) -> list[tuple[int, int]]:
        parent.set_up()
        seen = []
        for number in range(4):
            answer, array = parent.ask(number, size)
            assert (array == size).all() and len(answer.packed.head) < 1000
            seen.append((answer.packed.crate, answer.packed.num_bytes > 0))
            del array
        kept = [parent.ask(number, size)[1] for number in range(4, 7)]
        assert all((one == size).all() for one in kept)
        assert len({one.ctypes.data for one in kept}) == 3, "what is kept is never written to"
        return seen

    assert play(script) == [(0, True), (0, False), (0, False), (0, False)]


def test_the_stages_of_a_batch_and_what_it_counted_come_with_it(play: Played) -> None:
    def script(parent: Parent) -> Answer:
        parent.set_up()
        answer: Answer = parent.ask(0, INLINE_BYTES)[0]
        return answer

    timeline = play(script).timeline
    assert [name for _, name in timeline.marks] == [QUEUE, "decode", QUEUE, QUEUE]
    assert timeline.counts == {"samples left out": 1} and timeline.notes == ["row 3"]
    assert 0 < timeline.packing_s < 1 and set(totals(timeline.marks)) == {"decode"}


def test_the_page_says_what_a_worker_is_doing_and_for_how_long(play: Played) -> None:
    def script(parent: Parent) -> list[str]:
        parent.set_up()
        parent.send(0, "wait")
        until_s = time.monotonic() + 10
        while parent.status.read(1)[0] != "transform":
            assert time.monotonic() < until_s
            time.sleep(0.001)
        first_s, then_s = (parent.status.read(1)[1] for _ in range(2))
        assert 0 <= first_s < then_s
        busy = [parent.status.read(number)[0] for number in range(3)]
        LOOKED.set()
        assert parent.answer().error is None
        assert parent.status.read(1)[0] == QUEUE
        return busy

    assert play(script) == [QUEUE, "transform", QUEUE], "and the cells of others are left alone"


def test_an_error_of_the_tree_comes_back_as_it_was_and_work_goes_on(play: Played) -> None:
    error = DataError("row 9 is damaged", hint="copy it again")

    def script(parent: Parent) -> tuple[Answer, Any]:
        parent.set_up()
        return parent.ask(0, error), parent.ask(1, 2)[1]

    answer, after = play(script)
    assert isinstance(answer.error, DataError) and answer.error.hint == "copy it again"
    assert str(answer.error) == str(error) and not getattr(answer.error, "__notes__", [])
    assert after.tolist() == [2, 2]


def test_another_error_brings_the_workers_traceback(play: Played) -> None:
    def script(parent: Parent) -> Answer:
        parent.set_up()
        answer: Answer = parent.ask(0, ValueError("of the user's own transform"))
        return answer

    error = play(script).error
    assert isinstance(error, ValueError)
    (note,) = error.__notes__
    assert note.startswith("in a worker process:\n") and "in job" in note and "ValueError" in note


@pytest.mark.parametrize(("task", "words"), [("odd", "1 and 2"), ("unpicklable", "pickle")])
def test_what_cannot_travel_comes_as_words(play: Played, task: str, words: str) -> None:
    def script(parent: Parent) -> Answer:
        parent.set_up()
        answer: Answer = parent.ask(0, task)
        assert parent.ask(1, 1)[1].tolist() == [1]
        return answer

    answer = play(script)
    assert answer.packed is None and words in str(answer.error)


@pytest.mark.parametrize("work", [b"no pickle", b"cno_such_module\nwork\n.", b""])
def test_a_job_that_cannot_be_loaded_ends_the_worker_with_the_reason(play: Played, work: bytes) -> None:
    answer = play(lambda parent: parent.set_up(), work)
    assert answer.number == -1 and isinstance(answer.error, Exception)


def test_a_main_script_that_fails_is_told_and_leaves_no_mark(play: Played, tmp_path: Any) -> None:
    from multiprocessing import process

    script = tmp_path / "script.py"
    script.write_text("raise RuntimeError('the script is broken')\n")
    answer = play(lambda parent: parent.set_up(), main={"init_main_from_path": str(script)})
    assert "the script is broken" in str(answer.error)
    assert not hasattr(process.current_process(), "_inheriting")


def test_ctrl_c_is_the_parents(play: Played) -> None:
    seen: list[Any] = []

    def script(parent: Parent) -> None:
        parent.set_up()
        seen.append(signal.getsignal(signal.SIGINT))

    play(script)
    assert seen == [signal.SIG_IGN]


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_can_be_written_to_the_page_by_each_worker(name: str) -> None:
    status = Status.create(4)
    for number in range(4):
        assert status.read(number)[0] == QUEUE
    status.write(2, name)
    found, for_s = status.read(2)
    assert found == name and 0 <= for_s < 10
    assert [status.read(number)[0] for number in (0, 1, 3)] == [QUEUE] * 3
    copy = Status(os.dup(status.descriptor))
    assert copy.read(2)[0] == name, "both look at one page"
    for one in (status, status, copy):
        one.close()
