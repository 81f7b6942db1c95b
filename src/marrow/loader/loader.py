"""The loader: batches in the global order, from any position, ready before they are needed.

    with Loader(shards, batch_rows=16, seed=0) as loader:
        for batch in loader:            # without end: epoch follows epoch
            step(batch)
            checkpoint(loader.state())  # the batches given out so far, not those read ahead

`state()` is three numbers and a check; a loader made from it goes on with the very next row, on
any number of ranks. The wait for a batch is charged to the span "data wait"; the work done
meanwhile on the loader's thread is listed apart as "data".
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from marrow.core.errors import DataError, UsageError
from marrow.core.hashes import check_file
from marrow.core.span import Ledger, span
from marrow.data.manifest import FILE_NAME as MANIFEST_FILE
from marrow.data.manifest import Manifest
from marrow.loader.batch import Batch, make_batch
from marrow.loader.plan import Plan
from marrow.loader.prefetch import Prefetcher
from marrow.loader.reader import ShardReader

Ranges = tuple[tuple[int, int], ...]

# PERF: rows of a batch of 16 take numpy 300 us, those of 2048 positions 1.2 ms.
_PLAN_AHEAD = 2048


@dataclass(frozen=True, slots=True)
class LoaderState:
    """Where a run stands in the global order.

    position: the first one not yet given out, counted over epochs and ranks. skip: [low, high)
    positions never given out. manifest: check of the shards' manifest, so that a state is not
    used on other data.
    """

    seed: int
    position: int
    skip: Ranges = ()
    manifest: str = ""

    def to_json(self) -> str:
        """Write the state for a human and for `from_json`."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "LoaderState":
        """Read what `to_json` wrote. Raises: DataError if it is something else."""
        try:
            values = json.loads(text)
            skip = tuple((int(low), int(high)) for low, high in values["skip"])
            return cls(int(values["seed"]), int(values["position"]), skip, str(values["manifest"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"this is no loader state: {error!r}", hint="the checkpoint is damaged; use an earlier one"
            ) from error


class Loader:
    """An endless iterator of batches and a context manager.

    Args: batch_rows: rows of a global batch, a multiple of `world`; this rank gets its contiguous
        part of each. start: first position. skip: ranges [low, high) of positions to leave out.
        prefetch: batches made ahead on a thread; 0 makes each when it is asked for. ledger: where
        the thread's work is listed.
    Raises: UsageError for numbers that do not fit; DataError or SourceError for bad shards.
    """

    def __init__(
        self,
        shards_folder: Path,
        batch_rows: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        *,
        skip: Sequence[tuple[int, int]] = (),
        prefetch: int = 2,
        ledger: Ledger | None = None,
    ) -> None:
        _check_numbers(batch_rows, rank, world, start, prefetch)
        self._reader = ShardReader(shards_folder)
        self._plan = Plan(self._reader.manifest.num_rows, seed)
        self._rank, self._world = rank, world
        self._prefetch = prefetch
        self._ledger = ledger
        self._state = LoaderState(seed, start, _merge(skip), check_file(shards_folder / MANIFEST_FILE))
        self._order = _Order(self._plan, start, batch_rows, self._state.skip)
        self._thread: Prefetcher[tuple[Batch, int]] | None = None
        self._closed = False

    @classmethod
    def resume(cls, shards_folder: Path, batch_rows: int, state: LoaderState, **options: Any) -> "Loader":
        """Open a loader that goes on after `state`. Options as of the class, without seed and start.

        Raises: DataError if the shards are not those that the state was taken from.
        """
        loader = cls(shards_folder, batch_rows, state.seed, start=state.position, skip=state.skip, **options)
        if state.manifest and loader.state().manifest != state.manifest:
            loader.close()
            raise DataError(
                f"{shards_folder} is not the data that this run was started on",
                hint="resume with the shards of the checkpoint's own lineage, or start a new run",
            )
        return loader

    @property
    def manifest(self) -> Manifest:
        """What the shards hold."""
        return self._reader.manifest

    def state(self) -> LoaderState:
        """Return the state after the batches given out so far."""
        return self._state

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise UsageError("the loader is closed", hint="take batches inside its `with` block")
        with span("data wait"):
            if self._prefetch == 0:
                batch, end = self._make()
            else:
                if self._thread is None:
                    self._thread = Prefetcher(self._make, self._prefetch, "marrow-loader")
                batch, end = self._thread.take()
        if self._prefetch and self._ledger is not None:
            self._ledger.overlap("data", batch.build_s)
        # Last of all: an interrupt before this line loses no sample, the state still names it.
        self._state = replace(self._state, position=end)
        return batch

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and let the files go. Closing twice is fine."""
        self._closed = True
        if self._thread is not None:
            self._thread.close()
            self._thread = None
        self._reader.close()

    def _make(self) -> tuple[Batch, int]:
        """Make this rank's part of the next global batch; return it and where the batch ends."""
        start_s = time.perf_counter()
        positions_B, rows_B = self._order.next_batch()
        size = len(rows_B) // self._world
        mine = slice(self._rank * size, (self._rank + 1) * size)
        samples = range(int(positions_B[mine][0]), int(positions_B[mine][-1]) + 1)
        batch = make_batch(self._reader.take(rows_B[mine]), samples)
        return replace(batch, build_s=time.perf_counter() - start_s), int(positions_B[-1]) + 1


class _Order:
    """Walks the plan from a position, batch by batch, leaving the skipped ranges out."""

    def __init__(self, plan: Plan, start: int, batch_rows: int, skip: Ranges) -> None:
        self._plan = plan
        self._next = start
        self._batch_rows = batch_rows
        self._skip = [(low, high) for low, high in skip if high > start]
        self._positions = np.empty(0, dtype=np.int64)
        self._rows = np.empty(0, dtype=np.int64)

    def next_batch(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        while len(self._positions) < self._batch_rows:
            self._extend(max(self._batch_rows, min(_PLAN_AHEAD, self._plan.num_rows)))
        size = self._batch_rows
        batch = self._positions[:size], self._rows[:size]
        self._positions, self._rows = self._positions[size:], self._rows[size:]
        return batch

    def _extend(self, count: int) -> None:
        while self._skip and self._skip[0][0] <= self._next:
            self._next = max(self._next, self._skip.pop(0)[1])
        end = self._next + count
        if self._skip:
            end = min(end, self._skip[0][0])
        positions = np.arange(self._next, end, dtype=np.int64)
        self._positions = np.concatenate((self._positions, positions))
        self._rows = np.concatenate((self._rows, self._plan.rows(positions)))
        self._next = end


def _merge(skip: Sequence[tuple[int, int]]) -> Ranges:
    """Sort ranges and join those that touch."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(skip):
        if not 0 <= low < high:
            raise UsageError(f"skip range ({low}, {high}) is empty or negative", hint="write [low, high)")
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def _check_numbers(batch_rows: int, rank: int, world: int, start: int, prefetch: int) -> None:
    if batch_rows < 1 or world < 1 or batch_rows % world:
        raise UsageError(
            f"a batch of {batch_rows} rows cannot be shared by {world} ranks",
            hint="batch_rows counts the rows of all ranks; make it a multiple of their number",
        )
    if not 0 <= rank < world:
        raise UsageError(f"there is no rank {rank} of {world}", hint="ranks count from 0")
    if start < 0 or prefetch < 0:
        raise UsageError(f"start = {start} and prefetch = {prefetch} cannot be negative")
