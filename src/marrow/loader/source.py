"""What a loader reads from: rows by number, and shards that may still be elsewhere.

    order (position -> row)  ->  Reader.take(rows) -> T  ->  collate(T, samples) -> batch

A `Reader` knows rows by their number alone; it knows nothing of epochs, ranks or batches. A reader
of shards gets their paths from a `Files`: a plain folder here (`LocalFiles`), a cache that fetches
(`loader/streaming/shards.py`) where they are far.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
T_co = TypeVar("T_co", covariant=True)


class Reader(Protocol[T_co]):
    """Rows 0 to `num_rows` - 1 of some data. `take` and `ahead` are called from one thread at a time.

    num_rows: how many there are. check: identifies the data (a hash of its manifest); it goes into
    the loader's state, so that a run is not resumed on other data.
    """

    @property
    def num_rows(self) -> int: ...  # noqa: D102

    @property
    def check(self) -> str: ...  # noqa: D102

    def take(self, rows_B: Int64Array) -> T_co:
        """Read rows in the order asked for, int64 [B], each 0 <= row < num_rows."""
        ...

    def ahead(self, rows_N: Int64Array) -> None:
        """Hear which rows come soon, soonest first; may start to fetch them. Must not block."""
        ...

    def close(self) -> None:
        """Let go of files and connections. Closing twice is fine."""
        ...


class Files(Protocol):
    """Local paths of a dataset's shards, by their place in the manifest.

    max_open: how many shards a reader may hold at once (those of one `take` always may be); None
    where holding them costs nothing.
    """

    @property
    def max_open(self) -> int | None: ...  # noqa: D102

    def path(self, index: int) -> Path:
        """Return where shard `index` is, whole, waiting for it if need be; keep it until `release`.

        Its bytes need not be verified: the reader does that, unless `is_verified` says so.
        """
        ...

    def is_verified(self, index: int) -> bool:
        """Tell whether the bytes at `path(index)` were checked against the manifest when fetched."""
        ...

    def release(self, index: int) -> None:
        """Allow the shard to be evicted."""
        ...

    def ahead(self, indices: list[int]) -> None:
        """Hear which shards come soon, soonest first. Must not block."""
        ...

    def close(self) -> None:
        """Let go of everything. Closing twice is fine."""
        ...


class LocalFiles:
    """Shards that lie on a disk of this machine."""

    max_open: int | None = None

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)

    def path(self, index: int) -> Path:
        """Return the path."""
        return self._paths[index]

    def is_verified(self, index: int) -> bool:
        """Leave it to the reader."""
        del index
        return False

    def release(self, index: int) -> None:
        """Do nothing: the folder keeps them."""

    def ahead(self, indices: list[int]) -> None:
        """Do nothing: they are here."""

    def close(self) -> None:
        """Do nothing."""


def shard_counters(reader: Reader[Any]) -> dict[str, Any]:
    """Return what a reader counts of shards that are elsewhere, as "shards"; nothing if there are none."""
    found: dict[str, float] = getattr(reader, "counters", dict)()
    return {"shards": found} if found else {}
