"""Engines: the same results in the same order, whoever computes them, and whatever happens to them."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pieces
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError, RequestError, ResourceError, UsageError
from marrow.core.span import Ledger
from marrow.data.engine import ATTEMPTS, IN_FLIGHT, INLINE, Engine, Processes, Threads

MAKE: dict[str, Callable[[], Engine]] = {
    "inline": lambda: INLINE,
    "threads": lambda: Threads(3),
    "processes": lambda: Processes(2),
}


@pytest.fixture(params=list(MAKE))
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = MAKE[request.param]()
    yield made
    made.close()


@pytest.fixture
def processes() -> Iterator[Processes]:
    with Processes(2) as made:
        yield made


@pytest.fixture(scope="module")
def kept() -> Iterator[list[Engine]]:
    """One of each for properties, so that workers are started once."""
    engines = [make() for make in MAKE.values()]
    yield engines
    for made in engines:
        made.close()


def is_running(pid: int) -> bool:
    """Tell whether a process works: one that ended, but nobody has asked how, is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(happened: Callable[[], bool], seconds: float = 10) -> None:
    end_s = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.01)


# Results


@settings(deadline=None, max_examples=30)
@given(numbers=st.lists(st.integers(-(10**30), 10**30), max_size=40))
def test_every_engine_gives_the_results_of_map_in_its_order(kept: list[Engine], numbers: list[int]) -> None:
    for made in kept:
        assert list(made.map(pieces.square, numbers)) == [number * number for number in numbers]


def test_an_engine_serves_many_calls_and_calls_within_calls(engine: Engine) -> None:
    outer = engine.map(pieces.square, range(5))
    assert next(outer) == 0
    assert list(engine.map(pieces.square, range(3))) == [0, 1, 4]
    assert list(outer) == [1, 4, 9, 16]


def test_pieces_really_run_elsewhere(processes: Processes) -> None:
    ids = set(processes.map(pieces.process_id, range(12)))
    assert ids == set(processes.pids)
    assert len(ids) == 2 and os.getpid() not in ids
    with Threads(3) as threads:
        ids = set(threads.map(pieces.thread_id, range(12)))
    assert len(ids) == 3 and threading.get_ident() not in ids


@pytest.mark.parametrize("name", ["threads", "processes"])
def test_items_are_taken_as_they_are_needed(name: str) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with MAKE[name]() as made:  # type: ignore[attr-defined]
        results = made.map(pieces.square, items())
        for number in range(5):
            assert next(results) == number**2
            assert len(taken) <= number + IN_FLIGHT * made.workers
        results.close()  # type: ignore[attr-defined]
    assert len(taken) < 20


def test_large_pieces_and_results_pass(processes: Processes) -> None:
    """More than a socket's buffer in both directions at once must not lock both sides."""
    blob = bytes(3 << 20)
    assert list(processes.map(len, [blob] * 5)) == [3 << 20] * 5
    assert [len(made) for made in processes.map(pieces.large, [3 << 20] * 5)] == [3 << 20] * 5


def test_the_wait_is_a_part_of_the_ledger(processes: Processes) -> None:
    with Ledger("step") as ledger:
        list(processes.map(pieces.process_id, range(6)))
    parts = ledger.summary().parts
    assert parts["workers"].count == 6
    assert parts["workers"].seconds > 0.05, "six pieces of 20 ms on two workers"


# Errors


def test_an_error_of_a_piece_is_raised_in_its_turn(engine: Engine) -> None:
    results = engine.map(pieces.fail_at_three, range(50))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="piece 3 is broken") as error:
        next(results)
    assert (error.value.message, error.value.hint) == ("piece 3 is broken", "mend it")
    assert list(engine.map(pieces.square, [2])) == [4], "the engine goes on"


def test_errors_keep_what_they_carry(engine: Engine) -> None:
    with pytest.raises(RequestError) as error:
        list(engine.map(pieces.refuse, [1]))
    assert (error.value.status, error.value.param, error.value.hint) == (429, "n", "ask otherwise")


def test_an_error_that_cannot_travel_is_told_in_words(processes: Processes) -> None:
    with pytest.raises(RuntimeError, match=r"Odd: 1 and 2\n.*\n.*fail_oddly".replace(".*", "(?s:.*)")):
        list(processes.map(pieces.fail_oddly, [1]))


def test_an_error_of_the_items_ends_the_work(engine: Engine) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        list(engine.map(pieces.square, items()))
    assert list(engine.map(pieces.square, [2])) == [4]


def test_what_cannot_be_sent_is_a_clear_error(processes: Processes) -> None:
    with pytest.raises(UsageError, match="cannot be sent to another process") as error:
        list(processes.map(lambda number: number, [1]))
    assert "top level" in str(error.value.hint)
    with pytest.raises(UsageError, match="the piece"):
        list(processes.map(pieces.square, [threading.Lock()]))  # type: ignore[list-item]
    with pytest.raises(TypeError, match="pickle"):
        list(processes.map(threading.Semaphore, [1]))
    assert list(processes.map(pieces.square, [2])) == [4]


@pytest.mark.parametrize("kind", [Threads, Processes])
def test_no_workers_are_refused(kind: type[Threads] | type[Processes]) -> None:
    with pytest.raises(UsageError, match="0 workers"):
        kind(0)


# Workers that die


def test_a_piece_whose_worker_was_killed_is_run_again(processes: Processes, tmp_path: Path) -> None:
    places = [(str(tmp_path), number) for number in range(12)]
    assert list(processes.map(pieces.die_once, places)) == [number**2 for number in range(12)]
    assert processes.restarts == 4, "each third piece killed its worker once"


def test_a_piece_that_kills_every_worker_is_named(processes: Processes) -> None:
    results = processes.map(pieces.die, range(6))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ResourceError, match=rf"died {ATTEMPTS} times \(signal 9\) at the piece 2\n") as error:
        next(results)
    assert "memory" in str(error.value.hint)
    assert list(processes.map(pieces.square, range(4))) == [0, 1, 4, 9]


def test_a_worker_that_leaves_by_itself_is_noticed(processes: Processes) -> None:
    with pytest.raises(ResourceError, match=r"exit status 7"):
        list(processes.map(pieces.leave, [1]))


def test_idle_workers_killed_between_calls_are_replaced(processes: Processes) -> None:
    list(processes.map(pieces.process_id, range(6)))
    before = processes.pids
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert list(processes.map(pieces.square, range(6))) == [0, 1, 4, 9, 16, 25]
    assert not set(before) & set(processes.pids)


@pytest.mark.slow
def test_workers_killed_at_random_change_no_result(processes: Processes) -> None:
    done = threading.Event()

    def kill() -> None:
        while not done.wait(0.15):
            for pid in processes.pids[:1]:
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        results = list(processes.map(pieces.slow_square, range(60)))
    finally:
        done.set()
        killer.join()
    assert results == [number**2 for number in range(60)]
    assert processes.restarts >= 2


# The end


@pytest.mark.parametrize("name", ["threads", "processes"])
def test_nothing_of_a_call_runs_on_after_its_end(name: str, tmp_path: Path) -> None:
    with MAKE[name]() as made:  # type: ignore[attr-defined]
        results = made.map(pieces.sleep_then_mark, [(str(tmp_path), 0.2)] * 8)
        next(results)
        results.close()  # type: ignore[attr-defined]
        before = sorted(path.name for path in tmp_path.iterdir())
        time.sleep(0.3)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        assert len(before) < 16, "not all pieces were done"


def test_closing_ends_all_processes_and_twice_is_fine() -> None:
    processes = Processes(2)
    list(processes.map(pieces.process_id, range(6)))
    pids = processes.pids
    assert len(pids) == 2 and all(map(is_running, pids))
    processes.close()
    processes.close()
    assert not any(map(is_running, pids))
    assert list(processes.map(pieces.square, [3])) == [9], "it starts again if it is asked"
    processes.close()


PROGRAM = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import pieces
from marrow.data.engine import Processes
processes = Processes(2)
if sys.argv[3] == "leave":
    list(processes.map(pieces.process_id, range(8)))
    print(*processes.pids, flush=True)
    sys.exit()
def tell():
    while len(processes.pids) < 2:
        time.sleep(0.01)
    print(*processes.pids, flush=True)
threading.Thread(target=tell).start()
try:
    next(processes.map(pieces.sleep_then_mark, [(sys.argv[2], 60.0)] * 8))
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


def start(tmp_path: Path, mode: str) -> "subprocess.Popen[str]":
    arguments = [
        sys.executable,
        "-W",
        "error",
        "-c",
        PROGRAM,
        str(Path(pieces.__file__).parent),
        str(tmp_path),
        mode,
    ]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_parent_however_it_ends(tmp_path: Path, how: signal.Signals) -> None:
    with start(tmp_path, "stay") as parent:
        assert parent.stdout is not None and parent.stderr is not None
        pids = list(map(int, parent.stdout.readline().split()))
        wait_until(lambda: len(list(tmp_path.glob("started-*"))) == 2)
        parent.send_signal(how)
        said, problems = parent.communicate(timeout=10)
    if how == signal.SIGINT:
        assert (said, parent.returncode) == ("interrupted\n", 130)
    assert problems == ""
    wait_until(lambda: not any(map(is_running, pids)))
    assert not list(tmp_path.glob("ended-*"))


def test_an_engine_that_nobody_closes_ends_with_the_program(tmp_path: Path) -> None:
    with start(tmp_path, "leave") as parent:
        said, problems = parent.communicate(timeout=20)
    assert (problems, parent.returncode) == ("", 0)
    wait_until(lambda: not any(map(is_running, map(int, said.split()))))
