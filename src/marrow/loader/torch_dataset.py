"""The loader as PyTorch knows it: an `IterableDataset` that says where it stands.

    data = LoaderDataset("pages/*.parquet", 64, transform=prepare)
    for batch in data: ...                                        # one epoch, plain loop
    DataLoader(data, batch_size=None, num_workers=4)              # PyTorch's own workers
    LoaderDataset("shards/", 8, samples=True)                     # Hugging Face's Trainer: it batches itself
    data.state_dict(), data.load_state_dict(...)                  # torchdata's StatefulDataLoader, Lightning

A pass is one epoch of the global order, from its start or from the state that was loaded; the next
pass is the next epoch, unless `set_epoch` says otherwise. Worker w of W of a DataLoader makes the
batches w, w + W, ...: nothing twice, nothing left out, and since a DataLoader takes from its workers
in turns, in the same order whatever W is. `state_after(batches)` is the state by arithmetic, for
loops that count steps and keep no state of their data.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from marrow.core.errors import DataError, UsageError, explain_os_errors
from marrow.loader.batch import LayRows
from marrow.loader.formats.litdata import LitdataReader
from marrow.loader.formats.mds import MdsReader
from marrow.loader.formats.parquet import ParquetReader
from marrow.loader.loader import open_shards, order_of
from marrow.loader.order import Job, Walk, merge
from marrow.loader.plan import Order
from marrow.loader.prefetch.making import Maker
from marrow.loader.prefetch.supply import Supply
from marrow.loader.reader import Rows, ShardReader
from marrow.loader.samples import Collate, OnError, Transform
from marrow.loader.source import Reader, shard_counters
from marrow.loader.streaming.cache import Cache

Int64Array = NDArray[np.int64]
State = dict[str, Any]
Source = str | Path | Sequence[str | Path] | Reader[Any]


def open_source(
    source: Source, columns: Sequence[str] | None = None, cache: Cache | None = None
) -> Reader[Any]:
    """Open whatever holds rows: Marrow's shards, MDS, litdata chunks, Parquet, or a reader as it is.

    A folder is known by what lies in it: manifest.json (shards), index.json (MDS or litdata), else Parquet.
    At a URL are shards, which `cache` keeps here.
    """
    if not isinstance(source, str | Path | Sequence):
        return source
    if isinstance(source, str) and "://" in source:
        return open_shards(source, cache)
    with explain_os_errors("read the source", str(source)):
        if isinstance(source, str | Path) and (path := Path(source)).is_dir():
            if (path / "manifest.json").is_file():
                return ShardReader(path)
            if (path / "index.json").is_file():
                is_litdata = b'"chunks"' in (path / "index.json").read_bytes()
                return LitdataReader(path) if is_litdata else MdsReader(path)
        return ParquetReader(source, columns)


class LoaderDataset(IterableDataset[Any]):
    """Batches, or samples, in the global order.

    Args: source: see `open_source`. batch_rows: rows of a batch of all ranks; with `samples`, the
        rows that are read together (give the batch size of the DataLoader, and the order is the
        same on any number of its workers). samples: yield single samples, for those who batch
        themselves. transform, on_error: see `loader/samples.py`. collate: (rows, positions) -> batch
        in place of the default, which is `CausalRows` for shards and `Collate` for all else.
        window: shards or row groups shuffled together; None shuffles all rows. shuffle: False for
        the order of the files. rank, world: this process's share; leave them where a framework
        shares out the batches itself (Accelerate, the Trainer). skip: positions to leave out.
        prefetch, workers: as of `Supply`; unused within a DataLoader's worker, which is one itself.
        cache: where shards of a URL are kept.
    """

    def __init__(
        self,
        source: Source,
        batch_rows: int,
        *,
        seed: int = 0,
        samples: bool = False,
        transform: Transform | None = None,
        on_error: OnError = "raise",
        collate: Callable[[Any, range], Any] | None = None,
        columns: Sequence[str] | None = None,
        window: int | None = None,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        skip: Sequence[tuple[int, int]] = (),
        prefetch: int = 2,
        workers: int = 0,
        cache: Cache | None = None,
    ) -> None:
        super().__init__()
        if batch_rows < 1 or world < 1 or batch_rows % world or not 0 <= rank < world:
            raise UsageError(
                f"batches of {batch_rows} rows cannot be shared by rank {rank} of {world}",
                hint="batch_rows counts the rows of all ranks; make it a multiple of their number",
            )
        self.reader = open_source(source, columns, cache)
        self._opened_by = os.getpid()
        self.batch_rows, self.seed = batch_rows, seed
        self._skip = merge(skip)
        self._order = _order_of(self.reader, seed, window, shuffle)
        self._collate = _collate_of(self.reader, collate, transform, on_error, self._skip, samples)
        self._samples = samples
        self._rank, self._world = rank, world
        self._prefetch, self._workers = prefetch, workers
        self._place = _Place(0)
        self._is_loaded = False
        self._counters: dict[str, Any] = {}

    @property
    def epoch(self) -> int:
        """Return which epoch the next sample is of."""
        return self._place.position // self.reader.num_rows

    def __len__(self) -> int:
        """Return how many batches, or samples, this rank gets in an epoch."""
        low, high = self.epoch * self.reader.num_rows, (self.epoch + 1) * self.reader.num_rows
        skipped = sum(max(0, min(high, end) - max(low, start)) for start, end in self._skip)
        whole, rest = divmod(self.reader.num_rows - skipped, self.batch_rows)
        if self._samples:
            return (whole * self.batch_rows + rest - rest % self._world) // self._world
        return whole + (rest >= self._world)

    def set_epoch(self, epoch: int) -> None:
        """Begin the next pass at the start of an epoch; a state within that epoch that was loaded stays."""
        if not (self._is_loaded and epoch == self.epoch):
            self._place = _Place(epoch * self.reader.num_rows)
            self._is_loaded = True

    def state_dict(self) -> State:
        """Return where this process stands, ready for JSON."""
        return {
            "position": self._place.position,
            "lead": self._place.lead,
            "inside": self._place.inside,
            "batch_rows": self.batch_rows,
            "seed": self.seed,
            "check": self.reader.check,
            "order": self._order.name,
        }

    def state_after(self, items: int, epoch: int = 0) -> State:
        """Return the state after `items` batches (or samples) of each rank in an epoch. No data is read."""
        rows = items * self._world if self._samples else items * self.batch_rows
        position = epoch * self.reader.num_rows
        for low, high in self._skip:
            if low < position + rows and high > position:
                rows += high - max(low, position)
        return self.state_dict() | {"position": position + rows, "lead": 0, "inside": 0}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next pass where a state says.

        Raises: DataError for a state of other data, seed or order; UsageError for one of a DataLoader's
            worker, if batches are of another size now.
        """
        try:
            place = _Place(int(state["position"]), int(state["lead"]), int(state["inside"]))
            found = {name: state[name] for name in ("check", "seed", "order")}
        except (KeyError, TypeError, ValueError) as error:
            raise _no_state(repr(error)) from error
        if min(place.position, place.lead, place.inside) < 0:
            raise _no_state(f"{place}")
        mine = {"check": self.reader.check, "seed": self.seed, "order": self._order.name}
        for name, what in (("check", "data"), ("seed", "seed"), ("order", "order")):
            if found[name] != mine[name]:
                raise DataError(
                    f"the state is of other {what}: {found[name]!r}, this is {mine[name]!r}",
                    hint="resume with the data, seed and window that the run was started with",
                )
        if (place.lead or place.inside) and state["batch_rows"] != self.batch_rows:
            raise UsageError(
                f"the state is of one worker in the midst of batches of {state['batch_rows']} rows",
                hint=f"resume with batch_rows={state['batch_rows']}, or take state_after(steps)",
            )
        self._place = place
        self._is_loaded = True

    def counters(self) -> dict[str, Any]:
        """Return what happened in this process's last pass (as `Loader.counters`)."""
        return self._counters

    def __iter__(self) -> Iterator[Any]:
        """Yield one epoch, or what is left of it; see the module."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        start = self._place if self._is_loaded else _Place(self.epoch * self.reader.num_rows)
        self._is_loaded = False
        if not start.lead and not start.inside:
            start = _Place(start.position, worker)
        stop = (start.position // self.reader.num_rows + 1) * self.reader.num_rows
        walk = Walk(
            self._order,
            start.position,
            self.batch_rows,
            rank=self._rank,
            world=self._world,
            skip=self._skip,
            stop=stop,
            ahead=self._own_reader().ahead,
        )
        jobs: Iterator[Job] = islice(walk, start.lead, None, workers)
        supply = Supply(
            _Numbered(Maker(self._own_reader(), self._collate)),
            jobs,
            prefetch=self._prefetch if info is None else 0,
            workers=self._workers if info is None else 0,
            describe=lambda job: f"the batch of positions {job.samples.start} to {job.samples.stop - 1}",
        )
        self._place = start
        with supply:
            yield from self._given(supply, start, workers)
            self._counters = supply.counters() | shard_counters(self._own_reader())
        self._place = _Place(stop)

    def _given(self, supply: "Supply[Job, _Made]", start: "_Place", workers: int) -> Iterator[Any]:
        inside = start.inside
        while True:
            try:
                made = supply.take()
            except StopIteration:
                return
            self._counters = supply.counters() | shard_counters(self._own_reader())
            after = _Place(made.end, workers - 1)
            if not self._samples:
                self._place = after
                yield made.batch
                continue
            for number in range(inside, len(made.batch)):
                is_last = number + 1 == len(made.batch)
                self._place = after if is_last else _Place(made.start, 0, number + 1)
                yield made.batch[number]
            inside = 0

    def _own_reader(self) -> Reader[Any]:
        """Return the reader; a process that was forked opens files of its own."""
        if self._opened_by != os.getpid():
            self.reader = pickle.loads(pickle.dumps(self.reader))
            self._opened_by = os.getpid()
        return self.reader

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_counters": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._opened_by = os.getpid()  # unpickling opened it here


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a process stands.

    Batches are counted from `position` on. The first `lead` of them are other workers'; of the
    one after, `inside` samples were given out.
    """

    position: int
    lead: int = 0
    inside: int = 0


@dataclass(frozen=True, slots=True)
class _Made:
    """A batch, or a list of samples, with the positions that it begins and ends at."""

    batch: Any
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Numbered:
    """Makes a batch that knows its positions."""

    maker: Maker[Any]

    def __call__(self, job: Job) -> _Made:
        batch, end = self.maker(job)
        return _Made(batch, job.samples.start, end)


class CausalRows:
    """Packed rows -> what a Hugging Face model takes: dictionaries of int64 [B, T].

    input_ids; position_ids, from 0 at each document, by which models keep documents apart; labels
    and shift_labels: the next token of the same document, -100 where there is none. Both are the
    targets, already shifted: a loss that gets shift_labels does not shift again.
    """

    def __init__(self) -> None:
        self._lay = LayRows()

    def __call__(self, picked: Rows, samples: range) -> dict[str, Tensor]:
        """Make the dictionary of a batch."""
        batch = self._lay(picked, samples)
        shape = (batch.rows, batch.T)
        targets = batch.targets_N.reshape(shape)
        return {
            "input_ids": batch.tokens_N.reshape(shape),
            "position_ids": batch.positions_N.reshape(shape),
            "labels": targets,
            "shift_labels": targets,
        }


@dataclass(frozen=True, slots=True)
class _Apart:
    """Takes a batch of dictionaries apart into one for each row."""

    collate: Callable[[Any, range], dict[str, Tensor]]

    def __call__(self, picked: Any, samples: range) -> list[dict[str, Tensor]]:
        columns = self.collate(picked, samples)
        rows = len(next(iter(columns.values())))
        return [{name: column[row].clone() for name, column in columns.items()} for row in range(rows)]


def _listed(samples: list[Any]) -> list[Any]:
    return samples


@dataclass(frozen=True, slots=True)
class InOrder:
    """The order of the files: position p is row p of its epoch."""

    num_rows: int

    @property
    def name(self) -> str:
        """Return what the state calls it."""
        return "in order"

    def rows(self, positions_N: Int64Array) -> Int64Array:
        """Return the rows at many positions."""
        return positions_N % self.num_rows

    def ahead(self, position: int, count: int) -> Int64Array:
        """Return the next `count` rows."""
        return self.rows(np.arange(position, position + count, dtype=np.int64))


def _no_state(why: str) -> DataError:
    return DataError(f"this is no state of a LoaderDataset: {why}", hint="use what state_dict() gave")


def _order_of(reader: Reader[Any], seed: int, window: int | None, shuffle: bool) -> Order:
    if not shuffle:
        if window is not None:
            raise UsageError("window without shuffle has no meaning", hint="leave one of them out")
        return InOrder(reader.num_rows)
    return order_of(reader, seed, window)


def _collate_of(
    reader: Reader[Any],
    collate: Callable[[Any, range], Any] | None,
    transform: Transform | None,
    on_error: OnError,
    skip: tuple[tuple[int, int], ...],
    samples: bool,
) -> Callable[[Any, range], Any]:
    if collate is not None:
        if transform is not None:
            raise UsageError("transform and collate are both given", hint="collate=Collate(transform, ...)")
        return collate
    if isinstance(reader, ShardReader):
        if transform is not None:
            raise UsageError("packed rows have no transform", hint="give a collate, or read Parquet")
        return _Apart(CausalRows()) if samples else CausalRows()
    return Collate(transform, on_error, _listed if samples else None, skip)
