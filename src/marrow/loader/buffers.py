"""Memory for batches that is used again when nobody holds the last batch that lay in it.

A fresh array of some hundred kilobytes costs more in page faults than the batch costs to fill. So
a `Ring` keeps what it handed out, and hands it out again once its own reference is the only one:
every tensor, view, `numpy()` or buffer made from it holds a reference to the array, however it was
made, so memory that anything can still see is never written to.
"""

import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ALIGN_BYTES = 64  # of a cache line and of AVX-512


# The list's own, and what this Python counts beside it for the argument of the call.
_kept = [np.empty(1, dtype=np.uint8)]
_ONLY_OURS = sys.getrefcount(_kept[0])


class Ring:
    """Slabs of bytes, each for one batch at a time. Safe from several threads.

    Args: most: slabs kept; a consumer that holds on to more batches gets fresh memory.
    """

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._slabs: list[NDArray[np.uint8]] = []
        self._skips: list[int] = []  # bytes before the first that is aligned
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:  # a child process has its own
        return Ring, (self._most,)

    def take(self, shape: int | tuple[int, ...], dtype: Any = np.uint8) -> NDArray[Any]:
        """Return an array, not cleared, aligned to 64 bytes. Cost: under a microsecond."""
        slabs, num_bytes = self._slabs, np.dtype(dtype).itemsize
        for size in (shape,) if isinstance(shape, int) else shape:
            num_bytes *= size
        with self._lock:
            for i in range(len(slabs) - 1, -1, -1):
                if sys.getrefcount(slabs[i]) == _ONLY_OURS:
                    slab, skip = slabs[i], self._skips[i]
                    if len(slab) >= skip + num_bytes:
                        return np.ndarray(shape, dtype, slab, skip)
                    del slabs[i], self._skips[i], slab  # of a smaller batch
            slab = np.empty(num_bytes + _ALIGN_BYTES, dtype=np.uint8)
            skip = -slab.ctypes.data % _ALIGN_BYTES
            if len(slabs) < self._most:
                slabs.append(slab)
                self._skips.append(skip)
        return np.ndarray(shape, dtype, slab, skip)
