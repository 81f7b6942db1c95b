"""Rows in blocks that stay in a core's cache.

A chain of eager operators over a large tensor goes to memory and back once an operator. Taken
block by block, only the first read and the last write do. The `torch` paths of the elementwise
operators are built on this; inside torch.compile they are not used.
"""

from collections.abc import Iterator

from torch import Tensor

BLOCK_ELEMENTS = 1 << 17  # 512 KiB of fp32: three of them fit a 2 MiB cache


def row_blocks(x_NC: Tensor) -> Iterator[slice]:
    """Yield slices over the first axis that hold about `BLOCK_ELEMENTS` elements each."""
    rows = x_NC.shape[0]
    step = max(1, BLOCK_ELEMENTS * rows // max(1, x_NC.numel()))
    for start in range(0, rows, step):
        yield slice(start, start + step)
