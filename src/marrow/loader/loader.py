"""The loader: batches in the global order, from any position, ready before they are needed.

    with Loader(shards, batch_rows=16, seed=0) as loader:
        for batch in loader:            # without end, unless `stop` says where
            step(batch)
            checkpoint(loader.state())  # the batches given out so far, not those read ahead

`state()` is a few numbers; a loader made from it goes on with the very next row, on any number of
ranks. The wait for a batch is charged to the stages that it was in (`loader/prefetch/supply.py`).

    plan.py, mixture.py     position -> row         order.py    this rank's rows of each batch
    reader.py, batch.py     rows -> batch           supply.py   when that is done, and by whom
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, cast

from typing_extensions import TypeVar  # of typing from 3.13 on, with a default

from marrow.core.errors import DataError, UsageError
from marrow.data.manifest import Manifest
from marrow.loader.batch import Batch, LayRows
from marrow.loader.order import MOST_POSITIONS, Jobs, Walk, merge
from marrow.loader.plan import FullShuffle, Order, WindowShuffle
from marrow.loader.prefetch.making import GroupMaker
from marrow.loader.prefetch.supply import Supply
from marrow.loader.reader import ShardReader
from marrow.loader.source import Reader, shard_counters
from marrow.loader.state import LoaderState as LoaderState
from marrow.loader.streaming.cache import Cache

B = TypeVar("B", default=Batch)
MakeOrder = Callable[[Any, int], Order]
# PERF: what is done once a job costs some 20 us, as much as 50 rows of 1024 tokens. A job of more than
# this many bytes, written and waiting beside the next, is no longer in a core's cache: 1.5 times as long.
JOB_BYTES = 512 << 10
Source = Path | str | list[Path] | tuple[Path, ...] | Reader[Any]


class Loader(Generic[B]):
    """An iterator of batches and a context manager.

    Args: source: a folder of shards, several of them, a URL, or any `Reader`. batch_rows: rows of
        a global batch, a multiple of `world`; this rank gets its contiguous part of each. start:
        first position.
        collate: (rows, samples) -> batch; by default `LayRows`, which makes a `Batch`.
        window: shards that are shuffled together (`WindowShuffle`); None shuffles all rows.
        order: (reader, seed) -> Order, in place of `window`. skip: ranges [low, high) of positions
        to leave out. stop: where to end; the last batch may be short, by whole rows of each rank.
        prefetch: batches made ahead on a thread (small ones in groups of `JOB_BYTES`); 0 makes
        them when they are asked for. workers: processes that make batches. cache: where shards of
        a URL are kept.
    Raises: UsageError for numbers that do not fit; DataError or SourceError for bad shards.
    """

    def __init__(
        self,
        source: Source,
        batch_rows: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        *,
        collate: Callable[[Any, range], B] | None = None,
        window: int | None = None,
        order: MakeOrder | None = None,
        skip: Sequence[tuple[int, int]] = (),
        stop: int | None = None,
        prefetch: int = 2,
        workers: int = 0,
        cache: Cache | None = None,
    ) -> None:
        _check_numbers(batch_rows, rank, world, start)
        self._closed = False
        self.reader: Reader[Any] = open_shards(source, cache)
        try:
            self.order = _make_order(self.reader, seed, window, order)
            self._position = start
            self._start = LoaderState(seed, start, merge(skip), self.reader.check, self.order.name)
            made = cast(Callable[[Any, range], B], collate or LayRows())
            walk = Walk(
                self.order,
                start,
                batch_rows,
                rank=rank,
                world=world,
                skip=self._start.skip,
                stop=stop,
                ahead=None if getattr(self.reader, "is_local", False) else self.reader.ahead,
            )
            self._supply: Supply[Jobs, list[tuple[B, int]]] = Supply(
                GroupMaker(self.reader, made),
                walk.many(_batches_of_job(self.reader, made, batch_rows // world)),
                prefetch=prefetch,
                workers=workers,
                describe=lambda jobs: f"positions {jobs.samples[0].start} to {jobs.samples[-1].stop - 1}",
            )
            self._batches = 0
            self._ready: list[tuple[B, int]] = []  # of the job taken last, the next one last
        except BaseException:
            self.reader.close()
            raise

    @classmethod
    def resume(
        cls,
        source: Source,
        batch_rows: int,
        state: LoaderState,
        **options: Any,
    ) -> "Loader[B]":
        """Open a loader that goes on after `state`. Options as of the class, without seed and start.

        Raises: DataError if the data or the order are not those that the state was taken from.
        """
        loader = cls(source, batch_rows, state.seed, start=state.position, skip=state.skip, **options)
        found = loader.state()
        try:
            if state.manifest and found.manifest != state.manifest:
                raise DataError(
                    f"{source} is not the data that this run was started on",
                    hint="resume with the shards of the checkpoint's own lineage, or start a new run",
                )
            if found.order != state.order:
                raise DataError(
                    f'the state is a position in the order "{state.order}", the loader\'s is "{found.order}"',
                    hint="resume with the window or mixture that the run was started with",
                )
        except DataError:
            loader.close()
            raise
        return loader

    @property
    def manifest(self) -> Manifest:
        """What the shards hold, of several folders the first."""
        assert isinstance(self.reader, ShardReader), "only shards have a manifest"
        return self.reader.manifest

    def state(self) -> LoaderState:
        """Return the state after the batches given out so far."""
        return replace(self._start, position=self._position)

    def counters(self) -> dict[str, Any]:
        """Return what happened so far: batches, seconds waited and worked by stage (`Supply.counters`).

        Of shards at a URL, under "shards", also what was found in the cache, fetched, asked for again,
        damaged, evicted (`CachedShards.counters`); worker processes count for themselves.
        """
        return self._supply.counters() | {"batches": self._batches} | shard_counters(self.reader)

    def __iter__(self) -> Iterator[B]:
        return self

    def __next__(self) -> B:
        if self._closed:
            raise UsageError("the loader is closed", hint="take batches inside its `with` block")
        if not self._ready:
            self._ready = self._supply.take()[::-1]
        batch, end = self._ready.pop()
        self._batches += 1
        # Last of all: an interrupt before this line loses no sample, the state still names it.
        self._position = end
        return batch

    def __enter__(self) -> "Loader[B]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop threads and processes and let the files go. Closing twice is fine."""
        self._closed = True
        self._ready.clear()
        self._supply.close()
        self.reader.close()


def open_shards(source: Source, cache: Cache | None = None) -> Reader[Any]:
    """Open packed shards: a folder of them, several, or those at a URL; a reader stays as it is.

    Raises: UsageError for a URL without a cache; DataError or SourceError for bad shards.
    """
    if isinstance(source, str) and "://" in source:
        from marrow.loader.streaming.shards import (
            CachedShards,  # with an object-store client: local data needs none
        )

        if cache is None:
            raise UsageError(
                f"{source} is a URL and no cache is given", hint="say cache=Cache(folder, max_bytes)"
            )
        shards = CachedShards.open(source, cache)
        assert shards.folder is not None
        return ShardReader(shards.folder, shards)
    if isinstance(source, Path | str):
        return ShardReader(Path(source))
    return ShardReader(source) if isinstance(source, list | tuple) else source


def _batches_of_job(reader: Reader[Any], collate: Any, rows: int) -> int:
    """Return how many batches of so many rows are made in one go.

    One where shards are fetched: the rows of several would want more of them at once.
    """
    if not isinstance(reader, ShardReader) or not reader.is_local or not hasattr(collate, "many"):
        return 1
    return max(1, JOB_BYTES // (rows * int(collate.row_bytes(reader.manifest.context + 1))))


def _make_order(reader: Reader[Any], seed: int, window: int | None, order: MakeOrder | None) -> Order:
    if order is not None:
        if window is not None:
            raise UsageError("window and order are both given", hint="give the window to the order")
        return order(reader, seed)
    return order_of(reader, seed, window)


def order_of(reader: Reader[Any], seed: int, window: int | None) -> Order:
    """Return the shuffled order of a reader's rows: all of them, or windows of its shards or row groups.

    Raises: UsageError for a window of a source that has no parts.
    """
    if window is None:
        return FullShuffle(reader.num_rows, seed)
    sizes = getattr(reader, "rows_of_shards", None)
    if sizes is None or window < 1:
        raise UsageError(
            f"window = {window} cannot be used with this source",
            hint="it counts shards or row groups, from 1 on; a source without them is shuffled as a whole",
        )
    return WindowShuffle(sizes, seed, window)


def _check_numbers(batch_rows: int, rank: int, world: int, start: int) -> None:
    if batch_rows < 1 or world < 1 or batch_rows % world:
        raise UsageError(
            f"a batch of {batch_rows} rows cannot be shared by {world} ranks",
            hint="batch_rows counts the rows of all ranks; make it a multiple of their number",
        )
    if not 0 <= rank < world:
        raise UsageError(f"there is no rank {rank} of {world}", hint="ranks count from 0")
    if not 0 <= start <= MOST_POSITIONS:
        raise UsageError(f"start = {start} is out of range", hint="positions are 0 to 2^63 - 1")
