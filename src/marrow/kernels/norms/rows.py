"""How the norms share rows out: tiles of whole rows on a GPU, parts of 64 rows on a CPU.

Gradients of weights are sums over all rows. Summed one by one in fp32 they lose digits with the number of
rows; here each part or program sums a few, and torch adds those sums pairwise.
"""

import torch
from torch import Tensor

from marrow.kernels import tile

PART = 64  # rows of a part: its sum, in fp32, costs 3 % of the traffic of bf16 rows
_ELEMENTS = 2048  # of a tile of short rows: 16 bytes a thread and load at 4 warps and above


def count_rows(x_NC: Tensor) -> int:
    """Return how many rows there are over all leading axes."""
    return x_NC.numel() // max(1, x_NC.shape[-1])


def in_dtype_of(x_NC: Tensor, weight_C: Tensor) -> Tensor:
    """Return the weight as C reads it: contiguous, in x's dtype (rounded where that is narrower)."""
    weight_C = weight_C.contiguous()
    return weight_C if weight_C.dtype == x_NC.dtype else weight_C.to(x_NC.dtype)  # to() takes a microsecond


def parts(scale_N: Tensor) -> int:
    """Return how many parts there are, from one number a row."""
    return -(-scale_N.numel() // PART)


def row_tiles(rows: int, columns: int, dtype: torch.dtype) -> tuple[int, dict[str, int]]:
    """Return how many tiles a forward has, and its ROWS, BLOCK and num_warps."""
    options = tile.row_options(columns, dtype)
    # one row where only one fits, and no more than there are
    height = min(max(1, _ELEMENTS // options["BLOCK"]), 1 << max(0, rows - 1).bit_length())
    options["ROWS"] = height
    options["num_warps"] = max(options["num_warps"], min(4, height * options["BLOCK"] // 256), 1)
    return -(-rows // height), options


def backward_tiles(x_NC: Tensor, rows: int, columns: int) -> tuple[int, dict[str, int]]:
    """Return how many programs a backward has, which share the tiles, and its options.

    Few programs, as each writes a sum of the weight's gradient; enough to hide the latency of memory.
    """
    tiles, options = row_tiles(rows, columns, x_NC.dtype)
    programs = max(1, min(8, 32 // options["num_warps"])) * tile.multiprocessors(x_NC.device)
    return min(tiles, programs), options
