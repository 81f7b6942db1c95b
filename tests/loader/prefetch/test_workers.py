"""Workers: any number of them gives the same batches in the same order, whatever happens to them."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loader_jobs as jobs
import numpy as np
import pytest
import torch

from marrow.core.errors import MarrowError, ResourceError, UsageError
from marrow.loader.prefetch.workers import Workers


def children() -> list[int]:
    """The living children of this process."""
    found = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [
        int(pid)
        for pid in found
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    ]


def shared_memory() -> list[str]:
    """Names that Python and torch give; other programs of the machine have theirs."""
    return sorted(
        name for name in os.listdir("/dev/shm") if name.startswith(("torch_", "psm_", "marrow", "pymp"))
    )


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = children(), shared_memory()
    yield
    gc.collect()
    assert (children(), shared_memory()) == before


def all_of(
    job: Callable[[int], Any], count: int, workers: int = 2, ahead: int = 4, **options: Any
) -> list[Any]:
    pool = Workers(job, iter(range(count)), workers, ahead, **options)
    try:
        found = []
        while True:
            try:
                found.append(pool.take()[0])
            except StopIteration:
                return found
    finally:
        pool.close()


def is_batch(found: Any, task: int) -> bool:
    made = jobs.arrays(task)
    return list(found) == list(made) and all(np.array_equal(found[key], made[key]) for key in made)


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_come_in_the_order_of_the_tasks(workers: int) -> None:
    found = all_of(jobs.arrays, 60, workers)
    assert len(found) == 60
    assert all(is_batch(batch, task) for task, batch in enumerate(found))


def test_all_workers_have_a_part() -> None:
    found = all_of(jobs.who, 60, 3, 6)
    assert [task for task, _ in found] == list(range(60))
    assert len({pid for _, pid in found}) == 3


@pytest.mark.slow
def test_tensors_of_all_kinds_arrive_as_they_were() -> None:
    for task, found in enumerate(all_of(jobs.tensors, 6, 1)):
        made = jobs.tensors(task)
        assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in made.items()}
        assert all(torch.equal(found[name], made[name]) for name in made)
        found["turned"] += 1  # the memory is the consumer's


@pytest.mark.slow
def test_a_batch_that_is_kept_is_never_written_to_again() -> None:
    pool = Workers(jobs.arrays, iter(range(200)), 2, 4)
    kept = [(task, pool.take()[0]["large"][3:5]) for task in range(200)]
    assert all((rows == task).all() for task, rows in kept)
    pool.close()
    assert all((rows == task).all() for task, rows in kept), "memory outlives the workers"


def test_memory_is_used_again_once_a_batch_is_let_go() -> None:
    pool = Workers(jobs.arrays, iter(range(400)), 2, 4)
    for _ in range(340):
        pool.take()
    # Five in flight, and for each worker those whose end it has not heard of: two tasks' worth.
    assert _mapped() <= 5 + 2 * 2 * 2
    pool.close()


def _mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:marrow")


@pytest.mark.slow
def test_no_descriptor_is_left_by_opening_and_closing() -> None:
    all_of(jobs.arrays, 5)
    before = descriptors()
    for _ in range(3):
        all_of(jobs.arrays, 5)
    gc.collect()
    assert descriptors() == before


def test_a_worker_that_makes_arrays_never_loads_torch() -> None:
    assert all_of(jobs.loaded_modules, 2, 1) == [[], []]


@pytest.mark.slow
def test_each_worker_has_one_thread_for_its_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert all_of(jobs.threads_of_pools, 1, 1) == ["1"]


@pytest.mark.parametrize("when", [7, *(pytest.param(when, marks=pytest.mark.slow) for when in (0, 1, 30))])
def test_a_killed_worker_loses_and_doubles_nothing(when: int) -> None:
    pool = Workers(jobs.slow, iter(range(40)), 2, 6)
    for task in range(40):
        if task == when:
            os.kill(pool.pids[task % 2], signal.SIGKILL)
        assert is_batch(pool.take()[0], task)
    assert pool.restarts == 1
    with pytest.raises(StopIteration):
        pool.take()
    pool.close()


@pytest.mark.slow
def test_workers_killed_at_random_for_long_change_nothing() -> None:
    draw = np.random.default_rng(0)
    pool = Workers(jobs.slow, iter(range(400)), 3, 6)
    for task in range(400):
        if task > 10 and draw.random() < 0.05:
            os.kill(pool.pids[int(draw.integers(3))], signal.SIGKILL)
        assert is_batch(pool.take()[0], task)
    assert pool.restarts > 5
    pool.close()


@pytest.mark.slow
def test_a_batch_that_kills_its_worker_once_is_made_again(tmp_path: Path) -> None:
    found = all_of(jobs.DiesAt(5, tmp_path), 12)
    assert all(is_batch(batch, task) for task, batch in enumerate(found))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_batch_that_always_kills_its_worker_is_named(tmp_path: Path) -> None:
    pool = Workers(jobs.DiesAt(5, tmp_path, 99), iter(range(12)), 2, 4, describe=lambda task: f"batch {task}")
    for task in range(5):
        assert is_batch(pool.take()[0], task)
    with pytest.raises(ResourceError, match=r"died 3 times \(signal 9\) over batch 5"):
        pool.take()
    assert len(list(tmp_path.iterdir())) == 3
    pool.close()


@pytest.mark.slow
def test_a_dead_worker_whose_socket_lives_on_is_noticed(tmp_path: Path) -> None:
    start_s = time.monotonic()
    found = all_of(jobs.GrandchildAt(3, tmp_path), 8, 1)
    assert all(is_batch(batch, task) for task, batch in enumerate(found))
    assert time.monotonic() - start_s < 7, "before the grandchild ended"


@pytest.mark.slow
def test_a_worker_that_hangs_is_named_with_its_stage() -> None:
    pool = Workers(
        jobs.HangsAt(2), iter(range(9)), 2, 4, timeout_s=0.7, describe=lambda task: f"batch {task}"
    )
    for task in range(2):
        assert is_batch(pool.take()[0], task)
    start_s = time.monotonic()
    with pytest.raises(
        ResourceError, match=r"batch 2 .* 0\.7 s: worker \d \(pid \d+\) is in stage transform"
    ):
        pool.take()
    assert 0.6 < time.monotonic() - start_s < 5
    with pytest.raises(ResourceError, match="batch 2"):
        pool.take()
    pool.close()


def test_an_error_comes_in_its_turn_with_the_workers_traceback() -> None:
    pool = Workers(jobs.FailsAt(3), iter(range(9)), 2, 6)
    for task in range(3):
        assert is_batch(pool.take()[0], task)
    for _ in range(2):
        with pytest.raises(ValueError, match="task 3 is bad") as caught:
            pool.take()
        assert "loader_jobs.py" in caught.value.__notes__[0]
    pool.close()


def test_an_error_that_cannot_travel_comes_as_text() -> None:
    with pytest.raises(RuntimeError, match=r"Homemade: task 1 is bad"):
        all_of(jobs.FailsAt(1, jobs.Homemade), 3)


@pytest.mark.parametrize("job", [lambda task: task, open(os.devnull)])  # noqa: SIM115
def test_work_that_cannot_be_sent_is_refused_before_anything_starts(job: Any) -> None:
    with pytest.raises(UsageError, match="cannot be sent to a worker"):
        Workers(job, iter(range(3)), 1, 1)
    if hasattr(job, "close"):
        job.close()


def test_work_that_a_worker_cannot_load_is_refused() -> None:
    with pytest.raises(UsageError, match="no module named surprise"):
        all_of(jobs.Unloadable(), 3)


def test_no_worker_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="0 workers"):
        Workers(jobs.arrays, iter(()), 0, 1)


def test_closing_twice_and_in_the_midst_is_fine() -> None:
    pool = Workers(jobs.slow, iter(range(100)), 2, 8)
    pool.take()
    pool.close()
    pool.close()
    with pytest.raises(UsageError, match="closed"):
        pool.take()


def test_closing_before_anything_was_taken_is_fine() -> None:
    before = children(), shared_memory()
    pool = Workers(jobs.arrays, iter(range(100)), 2, 8)
    pool.close()
    assert (children(), shared_memory()) == before
    with pytest.raises(UsageError, match="closed"):
        pool.take()


def test_no_more_is_made_than_room_allows() -> None:
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for task in range(100):
            taken.append(task)
            yield task

    pool = Workers(jobs.arrays, tasks(), 2, 3)
    pool.take()
    time.sleep(0.2)
    assert len(taken) == 1 + 4  # the one taken, and ahead + 1
    pool.close()


def test_workers_that_wait_use_no_cpu() -> None:
    pool = Workers(jobs.arrays, iter(range(50)), 2, 2)
    pool.take()
    time.sleep(0.2)
    before = _cpu_of(pool.pids), time.process_time()
    time.sleep(0.4)
    # Ticks of 10 ms; one may fall into the span by chance.
    assert _cpu_of(pool.pids) - before[0] <= 2
    assert time.process_time() - before[1] < 0.05
    pool.close()


def _cpu_of(pids: list[int]) -> int:
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(field[11]) + int(field[12]) for field in fields)


SCRIPT = """
import os, sys, time
import loader_jobs as jobs
from marrow.loader.prefetch.workers import Workers

def local(task):
    return task * 10

{guard}
    pool = Workers({job}, iter(range(10)), 2, 2)
    pool.take()
    print(*pool.pids, flush=True)
    {then}
"""
GUARD = 'if __name__ == "__main__":'


def run_script(tmp_path: Path, job: str, then: str = "", guard: str = GUARD) -> "subprocess.Popen[str]":
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(job=job, then=then or "pool.close()", guard=guard))
    return subprocess.Popen(
        [sys.executable, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(jobs.__file__).parent)},
    )


def gone(pid: int) -> bool:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.slow
def test_a_function_of_the_main_script_is_found(tmp_path: Path) -> None:
    out, err = run_script(tmp_path, "local").communicate(timeout=60)
    assert (len(out.split()), err) == (2, "")


def test_a_main_script_without_its_guard_is_told_so(tmp_path: Path) -> None:
    process = run_script(tmp_path, "local", guard="if True:")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert '__name__ == "__main__"' in err


@pytest.mark.slow
def test_an_interpreter_that_ends_without_closing_takes_its_workers_along(tmp_path: Path) -> None:
    process = run_script(tmp_path, "jobs.slow", "pass")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert all(gone(int(pid)) for pid in out.split()[-2:])


@pytest.mark.parametrize("way", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_workers_end_with_their_parent_in_the_midst_of_a_batch(way: signal.Signals, tmp_path: Path) -> None:
    before = shared_memory()
    process = run_script(tmp_path, "jobs.HangsAt(1)", "pool.take()")
    assert process.stdout is not None and process.stderr is not None
    pids = process.stdout.readline().split()[-2:]
    process.send_signal(way)
    process.wait(30)
    assert all(gone(int(pid)) for pid in pids)
    assert shared_memory() == before
    if way == signal.SIGINT:  # Ctrl-C is the parent's alone: no traceback of a worker in between
        assert process.stderr.read().count("KeyboardInterrupt") == 1
    process.stdout.close()
    process.stderr.close()


def test_all_errors_are_of_the_tree() -> None:
    assert issubclass(ResourceError, MarrowError) and issubclass(UsageError, MarrowError)
