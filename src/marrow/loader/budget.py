"""Batches of samples whose lengths differ, each up to a budget of tokens: for fine-tuning.

    plan = plan_batches(lengths, budget_tokens=8192, seed=0)
    plan.write(path)                                    # an artifact, Arrow
    Loader(PlannedReader(reader, BatchPlan.read(path)), batch_rows=world, seed=0, ...)

Which samples share a batch is settled once and kept in a file; which batch comes when is the
loader's order, a permutation of the batches each epoch. So one "row" of the planned reader is a
whole batch, each rank takes one of them, and resuming stays arithmetic. Samples are grouped with
others of about their length, among some thousands drawn by chance: every one is in exactly one batch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from marrow.core.errors import DataError, UsageError, explain_os_errors
from marrow.core.files import atomic_file
from marrow.core.hashes import hash_value
from marrow.data.packing import best_fit
from marrow.loader.plan import FullShuffle
from marrow.loader.source import Reader

Int64Array = NDArray[np.int64]
T = TypeVar("T")

VERSION = 1
POOL = 8192  # samples among which those of like length are looked for


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Which samples make which batch.

    rows: int64, the samples of batch after batch; rows_of: int64 [N+1], so that batch n has
    rows[rows_of[n]:rows_of[n+1]]. padded: whether a batch costs its longest sample times its
    samples (else their sum). padding_share: of the tokens that batches cost, those not of a sample.
    """

    rows: Int64Array
    rows_of: Int64Array
    budget_tokens: int
    seed: int
    padded: bool
    num_tokens: int
    padding_share: float

    @property
    def num_batches(self) -> int:
        """Return how many batches there are."""
        return len(self.rows_of) - 1

    @property
    def check(self) -> str:
        """Identify the plan."""
        settings = [VERSION, self.budget_tokens, self.seed, self.padded]
        return hash_value([*settings, self.rows.tolist(), self.rows_of.tolist()])[:32]

    @property
    def budget_use(self) -> float:
        """Return the share of all batches' budgets that samples fill."""
        return self.num_tokens / (self.num_batches * self.budget_tokens)

    def batch(self, index: int) -> Int64Array:
        """Return the samples of a batch, int64."""
        return self.rows[self.rows_of[index] : self.rows_of[index + 1]]

    def write(self, path: Path) -> None:
        """Write the plan as an Arrow file with one list of samples a batch. Equal plans, equal bytes."""
        lists = pa.LargeListArray.from_arrays(pa.array(self.rows_of), pa.array(self.rows))
        about = {
            "marrow.batch_plan": str(VERSION),
            "budget_tokens": str(self.budget_tokens),
            "seed": str(self.seed),
            "padded": str(int(self.padded)),
            "num_tokens": str(self.num_tokens),
            "padding_share": repr(self.padding_share),
        }
        batch = pa.record_batch({"samples": lists}).replace_schema_metadata(about)
        with (
            explain_os_errors("write the plan of batches", path),
            atomic_file(path) as file,
            pa.ipc.new_file(file, batch.schema) as arrow,
        ):
            arrow.write_batch(batch)

    @classmethod
    def read(cls, path: Path) -> "BatchPlan":
        """Read a plan. Raises: SourceError if there is none; DataError if it is something else."""
        with explain_os_errors("read the plan of batches", path):
            data = path.read_bytes()
        try:
            with pa.ipc.open_file(pa.BufferReader(data)) as file:
                batch = file.get_batch(0)
            about = {key.decode(): value.decode() for key, value in (batch.schema.metadata or {}).items()}
            if about["marrow.batch_plan"] != str(VERSION):
                raise ValueError(f"version {about['marrow.batch_plan']}, this program reads {VERSION}")
            lists = batch.column("samples")
            plan = cls(
                rows=lists.values.to_numpy(),
                rows_of=lists.offsets.to_numpy(),
                budget_tokens=int(about["budget_tokens"]),
                seed=int(about["seed"]),
                padded=bool(int(about["padded"])),
                num_tokens=int(about["num_tokens"]),
                padding_share=float(about["padding_share"]),
            )
        except (pa.ArrowException, ValueError, KeyError, IndexError, AttributeError) as error:
            raise DataError(f"{path} is no plan of batches: {error}", hint="make the plan again") from error
        if not plan.num_batches or len(np.unique(plan.rows)) != len(plan.rows):
            raise DataError(f"{path}: a sample stands in two batches, or there is none", hint="make it again")
        return plan


class PlannedReader(Generic[T]):
    """A reader whose rows are the batches of a plan: `take` of one gives that batch's samples.

    Raises: DataError if the plan is of other data.
    """

    def __init__(self, reader: Reader[T], plan: BatchPlan) -> None:
        if len(plan.rows) != reader.num_rows or int(plan.rows.max()) >= reader.num_rows:
            raise DataError(
                f"the plan is for {len(plan.rows)} samples, the data has {reader.num_rows}",
                hint="plan the batches again after a change of the data",
            )
        self.reader, self.plan = reader, plan
        self.num_rows = plan.num_batches
        self.check = hash_value([reader.check, plan.check])[:32]

    def take(self, rows_B: Int64Array) -> T:
        """Read the samples of the batches, one after the other."""
        return self.reader.take(self._samples(rows_B))

    def ahead(self, rows_N: Int64Array) -> None:
        """Pass on which samples come soon."""
        self.reader.ahead(self._samples(rows_N))

    def close(self) -> None:
        """Close the reader of the samples."""
        self.reader.close()

    def _samples(self, rows_B: Int64Array) -> Int64Array:
        if not len(rows_B):
            return np.empty(0, dtype=np.int64)
        return np.concatenate([self.plan.batch(row) for row in rows_B.tolist()])


def plan_batches(
    lengths: NDArray[Any], budget_tokens: int, seed: int, *, padded: bool = True, pool: int = POOL
) -> BatchPlan:
    """Put every sample into one batch that costs at most `budget_tokens`.

    Args: lengths: tokens of each sample, [N], each 1 to the budget. padded: a batch costs its
        longest sample times its number; False: their sum, for models without a batch axis.
        pool: samples, drawn by chance, that are sorted by length together.
    Raises: UsageError for no samples, or one that is empty or longer than the budget.
    Cost: O(N log pool), 10 million samples in about a minute.
    """
    lengths_N = np.asarray(lengths, dtype=np.int64)
    if not len(lengths_N):
        raise UsageError("there are no samples to batch", hint="give the length of each")
    bad = np.flatnonzero((lengths_N < 1) | (lengths_N > budget_tokens))
    if len(bad):
        raise UsageError(
            f"sample {bad[0]} has {lengths_N[bad[0]]} tokens; 1 to {budget_tokens} fit the budget",
            hint="cut or drop samples that are too long, or raise the budget",
        )
    fill = _fill_padded if padded else _fill_flat
    order_N = FullShuffle(len(lengths_N), seed).rows(np.arange(len(lengths_N), dtype=np.int64))
    rows: list[Int64Array] = []
    counts: list[int] = []
    cost = 0
    for low in range(0, len(order_N), max(1, pool)):
        members = order_N[low : low + max(1, pool)]
        batches, paid = fill(lengths_N[members], budget_tokens)
        rows += [members[batch] for batch in batches]
        counts += map(len, batches)
        cost += paid
    num_tokens = int(lengths_N.sum())
    return BatchPlan(
        rows=np.concatenate(rows),
        rows_of=np.concatenate(([0], np.cumsum(counts, dtype=np.int64))),
        budget_tokens=budget_tokens,
        seed=seed,
        padded=padded,
        num_tokens=num_tokens,
        padding_share=round(1 - num_tokens / cost, 6),
    )


def _fill_padded(lengths_N: Int64Array, budget: int) -> tuple[list[Int64Array], int]:
    """Cut samples, by rising length, into batches whose padded size is within the budget."""
    by_length = np.argsort(lengths_N, kind="stable")
    ends, cost, first = [], 0, 0
    lengths: list[int] = lengths_N[by_length].tolist()
    for i, length in enumerate(lengths):
        if (i - first + 1) * length > budget:
            ends.append(i)
            cost += (i - first) * lengths[i - 1]
            first = i
    cost += (len(lengths) - first) * lengths[-1]
    return np.split(by_length, ends), cost


def _fill_flat(lengths_N: Int64Array, budget: int) -> tuple[list[Int64Array], int]:
    """Put samples where they fit best; laid end to end they need no padding."""
    batches = best_fit(lengths_N.tolist(), budget)
    return [np.array(batch, dtype=np.int64) for batch in batches], int(lengths_N.sum())
