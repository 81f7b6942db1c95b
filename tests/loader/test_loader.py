import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError, UsageError
from marrow.core.span import Ledger
from marrow.loader.batch import Batch, StackRows, make_batch
from marrow.loader.loader import Loader, LoaderState
from marrow.loader.plan import FullShuffle


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name == "marrow-loader"] == []


def take(loader: Loader, count: int) -> list[Batch]:
    with loader:
        return [next(loader) for _ in range(count)]


def content(batch: Batch) -> tuple[bytes, ...]:
    tensors = (batch.tokens_N, batch.targets_N, batch.positions_N, batch.document_N)
    return tuple(tensor.numpy().tobytes() for tensor in tensors)


def rows_of(batches: list[Batch]) -> list[bytes]:
    """The inputs of each row, in order: what tells one row from another."""
    return [row.numpy().tobytes() for batch in batches for row in batch.tokens_N.reshape(batch.rows, batch.T)]


# Order


@settings(deadline=None, max_examples=30)
@given(
    batch_rows=st.integers(1, 9), seed=st.integers(0, 99), stop=st.integers(0, 60), prefetch=st.integers(0, 3)
)
def test_resuming_anywhere_equals_never_stopping(
    shards: Path, batch_rows: int, seed: int, stop: int, prefetch: int
) -> None:
    unbroken = take(Loader(shards, batch_rows, seed), stop + 3)
    with Loader(shards, batch_rows, seed, prefetch=prefetch) as loader:
        for _ in range(stop):
            next(loader)
        state = LoaderState.from_json(loader.state().to_json())
    assert state.position == stop * batch_rows
    resumed = take(Loader.resume(shards, batch_rows, state, prefetch=prefetch), 3)
    assert list(map(content, resumed)) == list(map(content, unbroken[stop:]))
    assert [batch.samples for batch in resumed] == [batch.samples for batch in unbroken[stop:]]


def test_every_epoch_holds_every_row_once(shards: Path) -> None:
    with Loader(shards, 1, seed=3) as loader:
        num_rows = loader.manifest.num_rows
        epochs = [rows_of([next(loader) for _ in range(num_rows)]) for _ in range(3)]
    with Loader(shards, 1, seed=4) as loader:
        other_seed = rows_of([next(loader) for _ in range(num_rows)])
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2]) == sorted(other_seed)
    assert len({tuple(order) for order in (*epochs, other_seed)}) == 4


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_ranks_reads_the_same_global_order(shards: Path, world: int) -> None:
    alone = rows_of(take(Loader(shards, 12, seed=0), 9))
    ranks = [take(Loader(shards, 12, seed=0, rank=rank, world=world), 9) for rank in range(world)]
    together = [row for step in zip(*ranks, strict=True) for row in rows_of(list(step))]
    assert together == alone
    positions = [p for step in zip(*ranks, strict=True) for batch in step for p in batch.samples]
    assert positions == list(range(9 * 12))


def test_the_number_of_ranks_may_change_on_resume(shards: Path) -> None:
    alone = rows_of(take(Loader(shards, 12, seed=0), 6))
    with Loader(shards, 12, seed=0, rank=1, world=2) as loader:
        for _ in range(4):
            next(loader)
        state = loader.state()
    ranks = [take(Loader.resume(shards, 12, state, rank=rank, world=3), 2) for rank in range(3)]
    together = [row for step in zip(*ranks, strict=True) for row in rows_of(list(step))]
    assert together == alone[4 * 12 :]


def test_the_batch_size_may_change_on_resume(shards: Path) -> None:
    alone = rows_of(take(Loader(shards, 1, seed=0), 30))
    with Loader(shards, 10, seed=0) as loader:
        head = rows_of([next(loader)])
        state = loader.state()
    assert head + rows_of(take(Loader.resume(shards, 4, state), 5)) == alone


def test_batches_go_on_over_the_end_of_an_epoch(shards: Path) -> None:
    alone = rows_of(take(Loader(shards, 1, seed=0), 400))
    assert rows_of(take(Loader(shards, 100, seed=0), 4)) == alone


@settings(deadline=None, max_examples=20)
@given(
    skip=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=4),
    batch_rows=st.integers(1, 6),
    start=st.integers(0, 30),
)
def test_skipped_positions_are_never_given_out(
    shards: Path, skip: list[tuple[int, int]], batch_rows: int, start: int
) -> None:
    ranges = [(low, low + length) for low, length in skip]
    with Loader(shards, 1, seed=0) as loader:
        every = rows_of([next(loader) for _ in range(200)])
    wanted = [p for p in range(start, 200) if not any(low <= p < high for low, high in ranges)]
    with Loader(shards, batch_rows, seed=0, start=start, skip=ranges) as loader:
        first = [next(loader) for _ in range(5)]
        state = LoaderState.from_json(loader.state().to_json())
    resumed = take(Loader.resume(shards, batch_rows, state), 5)
    assert rows_of(first + resumed) == [every[p] for p in wanted[: 10 * batch_rows]]
    for i, batch in enumerate(first):
        mine = wanted[i * batch_rows : (i + 1) * batch_rows]
        assert batch.samples == range(mine[0], mine[-1] + 1)


def test_the_state_counts_what_was_given_out_not_what_was_read_ahead(shards: Path) -> None:
    with Loader(shards, 4, seed=0, prefetch=8) as loader:
        assert loader.state().position == 0
        next(loader)
        time.sleep(0.05)  # the thread reads ahead
        assert loader.state().position == 4


# State


def test_the_state_is_for_humans(shards: Path) -> None:
    with Loader(shards, 4, seed=9, start=7, skip=[(5, 6), (6, 9)]) as loader:
        values = json.loads(loader.state().to_json())
    manifest = values.pop("manifest")
    assert values == {"seed": 9, "position": 7, "skip": [[5, 9]], "order": "full"}
    assert len(manifest) == 32


def test_resuming_on_other_data_is_refused(shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    with Loader(shards, 4, seed=0) as loader:
        state = loader.state()
    Loader.resume(copy, 4, state).close()
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tokenizer_sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="not the data") as error:
        Loader.resume(copy, 4, state)
    assert error.value.hint


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"seed": 1, "position": "x", "skip": [], "manifest": ""}'])
def test_a_damaged_state_is_a_clear_error(text: str) -> None:
    with pytest.raises(DataError, match="no loader state"):
        LoaderState.from_json(text)


def test_resuming_takes_milliseconds_at_any_position(shards: Path) -> None:
    def resume_s(position: int) -> float:
        start_s = time.process_time()
        loader = Loader.resume(shards, 8, LoaderState(seed=0, position=position), prefetch=0)
        next(loader)
        elapsed_s = time.process_time() - start_s
        loader.close()
        return elapsed_s

    for position in (0, 10**6, 10**15):
        assert min(resume_s(position) for _ in range(5)) < 10e-3


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((0, 0), {}),
        ((5, 0), {"world": 2}),
        ((4, 0), {"rank": 2, "world": 2}),
        ((4, 0), {"rank": -1}),
        ((4, 0), {"start": -1}),
        ((4, 0), {"prefetch": -1}),
        ((4, 0), {"skip": [(5, 5)]}),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    shards: Path, arguments: tuple[int, int], options: dict[str, int]
) -> None:
    with pytest.raises(UsageError):
        Loader(shards, *arguments, **options)  # type: ignore[arg-type]


# Faults


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_damaged_shard_reaches_the_consumer(shards: Path, tmp_path: Path, prefetch: int) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    path = copy / "train-00001.arrow"
    data = bytearray(path.read_bytes())
    data[-300] ^= 0xFF
    path.write_bytes(data)
    with (
        pytest.raises(DataError, match=r"train-00001\.arrow") as error,
        Loader(copy, 4, seed=0, prefetch=prefetch) as loader,
    ):
        list(islice(loader, 1000))
    assert error.value.hint


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_closed_loader_gives_nothing(shards: Path, prefetch: int) -> None:
    loader = Loader(shards, 4, seed=0, prefetch=prefetch)
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(UsageError, match="closed"):
        next(loader)


def test_batches_outlive_the_loader(shards: Path) -> None:
    with Loader(shards, 4, seed=0) as loader:
        batch = next(loader)
    assert int(batch.tokens_N.sum()) > 0


def test_an_error_in_the_loop_leaves_no_thread(shards: Path) -> None:
    with pytest.raises(ZeroDivisionError), Loader(shards, 4, seed=0) as loader:
        print([1 // (batch.samples.start * 0) for batch in loader])  # the fixture looks for threads


PROGRAM = """
import sys, time
from pathlib import Path
from marrow.loader.loader import Loader, LoaderState
shards, states, out = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
state = LoaderState.from_json(states.read_text()) if states.exists() else LoaderState(seed=5, position=0)
with Loader.resume(shards, 3, state) as loader, out.open("a") as log:
    for batch in loader:
        log.write(f"{batch.samples.start} {batch.samples.stop} {int(batch.tokens_N.sum())}\\n")
        log.flush()
        temporary = states.with_suffix(".tmp")
        temporary.write_text(loader.state().to_json())
        temporary.rename(states)
        time.sleep(0.002)
"""


def start_program(shards: Path, folder: Path) -> subprocess.Popen[bytes]:
    arguments = [str(shards), str(folder / "state.json"), str(folder / "log")]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, *arguments], stderr=subprocess.PIPE, env=environment
    )


def wait_for_lines(path: Path, count: int) -> None:
    until = time.monotonic() + 60
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < until, "the program does not get on"
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on_where_it_was(shards: Path, tmp_path: Path) -> None:
    for lines in (5, 12):
        process = start_program(shards, tmp_path)
        wait_for_lines(tmp_path / "log", lines)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    seen = [tuple(map(int, line.split())) for line in (tmp_path / "log").read_text().splitlines()]
    assert len(seen) >= 12
    # A batch that was logged, but whose state was not yet renamed, is given out again: at most one a kill.
    unique = list(dict.fromkeys(seen))
    assert len(unique) >= len(seen) - 2
    unbroken = take(Loader(shards, 3, seed=5), len(unique))
    assert unique == [(b.samples.start, b.samples.stop, int(b.tokens_N.sum())) for b in unbroken]


@pytest.mark.slow
def test_ctrl_c_ends_it_at_once_without_a_hanging_thread(shards: Path, tmp_path: Path) -> None:
    process = start_program(shards, tmp_path)
    wait_for_lines(tmp_path / "log", 3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert stderr.count(b"Traceback") == 1
    assert b"KeyboardInterrupt" in stderr


# Ledger


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_wait_is_split_by_stage_and_adds_up(shards: Path, prefetch: int) -> None:
    with Ledger("train") as ledger:
        loader = Loader(shards, 4, seed=0, prefetch=prefetch)
        take(loader, 50)
    summary = ledger.summary()
    waits = {name: part for name, part in summary.parts.items() if name.startswith("data wait: ")}
    assert {"data wait: queue", "data wait: decode"} <= set(waits) or prefetch
    assert sum(part.seconds for part in summary.parts.values()) == pytest.approx(summary.wall_s, rel=0.02)
    counters = loader.counters()
    assert counters["batches"] == 50
    total_s = sum(part.seconds for part in waits.values())
    assert total_s == pytest.approx(sum(counters["waited_s"].values()), rel=1e-6)
    assert bool(summary.overlapped) == bool(prefetch)


def test_two_loaders_live_side_by_side(shards: Path) -> None:
    with Loader(shards, 2, seed=0) as one, Loader(shards, 2, seed=0) as two:
        for a, b in zip(one, two, strict=False):
            assert torch.equal(a.tokens_N, b.tokens_N)
            if a.samples.start > 20:
                break


def test_a_wide_row_works_too(make_shards: object) -> None:
    folder = make_shards(num_documents=3, context=500, shard_bytes=1 << 20)  # type: ignore[operator]
    [batch] = take(Loader(folder, 7, seed=0), 1)
    assert batch.tokens_N.shape == (7 * 500,)
    assert np.isin(batch.targets_N.numpy(), [-100]).any()


# Orders, sources and collates


def test_windows_of_shards_resume_and_share_as_well(shards: Path) -> None:
    alone = rows_of(take(Loader(shards, 12, 0, window=2), 30))
    assert alone != rows_of(take(Loader(shards, 12, 0), 30))
    with Loader(shards, 12, 0, 0, 2, window=2) as loader:
        for _ in range(7):
            next(loader)
        state = LoaderState.from_json(loader.state().to_json())
    assert state.order == "window of 2 shards"
    ranks = [take(Loader.resume(shards, 6, state, rank=rank, world=3, window=2), 40) for rank in range(3)]
    together = [row for step in zip(*ranks, strict=True) for row in rows_of(list(step))]
    assert together == alone[84 : 84 + 240]
    for window in (None, 3):
        with pytest.raises(DataError, match="position in the order") as error:
            Loader.resume(shards, 6, state, window=window)
        assert error.value.hint


@pytest.mark.parametrize("batch_rows", [1, 7, 200])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_stacked_rows_are_the_laid_ones(shards: Path, batch_rows: int, prefetch: int) -> None:
    """Two collates, one order; many small batches are made in one pass, and look as if alone."""
    with Loader(shards, batch_rows, 3, collate=StackRows(), prefetch=prefetch) as loader:
        stacked = [next(loader).clone() for _ in range(40)]
    with Loader(shards, batch_rows, 3, collate=lambda rows, span: make_batch(rows, span)) as loader:
        one_by_one = [next(loader) for _ in range(40)]
    laid = take(Loader(shards, batch_rows, 3, prefetch=prefetch), 40)
    assert list(map(content, laid)) == list(map(content, one_by_one))
    for tokens, batch, other in zip(stacked, laid, one_by_one, strict=True):
        assert torch.equal(tokens[:, :-1].reshape(-1), batch.tokens_N)
        assert (batch.num_targets, batch.samples) == (other.num_targets, other.samples)
        counted = batch.targets_N != -100
        assert torch.equal(tokens[:, 1:].reshape(-1)[counted], batch.targets_N[counted])


def test_a_batch_that_is_held_never_changes(shards: Path) -> None:
    """Memory is used again, but not while anything can see it: a view of a slice is enough."""
    with Loader(shards, 4, 0) as loader:
        held = []
        for number, batch in zip(range(300), loader, strict=False):
            if number % 3 == 0:
                held.append((batch.targets_N.view(4, -1)[1:, 2], batch.targets_N.view(4, -1)[1:, 2].clone()))
    assert all(torch.equal(view, copy) for view, copy in held)


@pytest.mark.slow
def test_worker_processes_give_the_same_batches(shards: Path) -> None:
    here = take(Loader(shards, 4, 1), 80)
    there = take(Loader(shards, 4, 1, workers=1), 80)
    assert list(map(content, there)) == list(map(content, here))


@pytest.mark.slow
def test_without_a_compiler_batches_are_the_same(shards: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from marrow.loader.loader import Loader\n"
        "with Loader(Path(sys.argv[1]), 4, 1) as loader:\n"
        "    print([next(loader).targets_N.tolist() for _ in range(5)])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(shards)],
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ, OMP_NUM_THREADS="1", MARROW_KERNELS="reference"),
    )
    assert json.loads(done.stdout) == [batch.targets_N.tolist() for batch in take(Loader(shards, 4, 1), 5)]


def test_a_run_of_rows_may_be_as_small_as_can_be(make_shards: object) -> None:
    folder = make_shards(num_documents=4, context=8, shard_bytes=18)  # type: ignore[operator]
    with Loader(folder, 3, 0, stop=7, window=1) as loader:
        assert loader.manifest.shards[0].num_rows == 1
        assert [batch.rows for batch in loader] == [3, 3, 1]


@pytest.mark.parametrize("start", [1 << 63, (1 << 63) - 2])
def test_positions_end_at_2_to_the_63(shards: Path, start: int) -> None:
    with pytest.raises(UsageError, match="2\\^63"), Loader(shards, 4, 0, start=start, prefetch=0) as loader:
        list(loader)


def test_a_skip_beyond_the_end_ends_at_once(shards: Path) -> None:
    with Loader(shards, 4, 0, skip=[(0, 10**9)], stop=10**6) as loader:
        assert list(loader) == []


def test_a_url_needs_a_cache() -> None:
    with pytest.raises(UsageError, match="no cache"):
        Loader("http://127.0.0.1:9/shards", 4, 0)


def test_two_ways_to_name_an_order_are_one_too_many(shards: Path) -> None:
    with pytest.raises(UsageError, match="both given"):
        Loader(shards, 4, 0, window=2, order=lambda reader, seed: FullShuffle(reader.num_rows, seed))
    with pytest.raises(UsageError, match="cannot be used"):
        Loader(shards, 4, 0, window=0)


def test_resume_takes_milliseconds_with_a_long_history_of_skips(shards: Path) -> None:
    skip = tuple((10**6 * n, 10**6 * n + 500) for n in range(1000))
    state = LoaderState(0, 10**9 + 7, skip)
    times = []
    for _ in range(5):
        start_s = time.process_time()
        with Loader.resume(shards, 8, state, prefetch=0) as loader:
            next(loader)
        times.append(time.process_time() - start_s)
    assert min(times) < 10e-3
