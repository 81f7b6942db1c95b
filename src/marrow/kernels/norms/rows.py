"""How the norms share rows out: tiles of whole rows on a GPU, parts of 64 rows on a CPU.

Gradients of weights are sums over all rows. Summed one by one in fp32 they lose digits with the number of
rows; here each part or program sums a few, and torch adds those sums pairwise.
"""

import torch
from torch import Tensor

from marrow.kernels import tile

PART = 64  # rows of a part: its sum, in fp32, costs 3 % of the traffic of bf16 rows


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


def row_tiles(op: str, rows: int, columns: int, dtype: torch.dtype) -> tuple[int, dict[str, int]]:
    """Return how many tiles the forward of `op` has, and its ROWS, BLOCK and num_warps."""
    default = _tile(rows, columns, dtype, 4096)
    warps = default["num_warps"]
    candidates = [{"num_warps": other} for other in (warps // 2, warps * 2) if 1 <= other <= 32]
    candidates += [{"ROWS": default["ROWS"] * 2}]
    options = tile.config(op, (default["BLOCK"], str(dtype)), default, candidates)
    return -(-rows // options["ROWS"]), options


def backward_tiles(op: str, x_NC: Tensor, rows: int, columns: int) -> tuple[int, dict[str, int]]:
    """Return how many programs the backward of `op` has, which share the tiles, and its options.

    Few programs, as each writes a sum of the weight's gradient; enough to hide the latency of memory.
    """
    default = _tile(rows, columns, x_NC.dtype, 2048)  # half of forward's: twice as much is kept in registers
    default["PROGRAMS"] = max(1, min(8, 32 // default["num_warps"]))  # a multiprocessor
    candidates = [{"PROGRAMS": other} for other in (1, 2, 4, 8, 16) if other != default["PROGRAMS"]]
    candidates += [{"ROWS": default["ROWS"] * 2}]
    options = tile.config(f"{op}_backward", (default["BLOCK"], str(x_NC.dtype)), default, candidates)
    programs = options.pop("PROGRAMS") * tile.multiprocessors(x_NC.device)
    return min(-(-rows // options["ROWS"]), programs), options


def _tile(rows: int, columns: int, dtype: torch.dtype, num_bytes: int) -> dict[str, int]:
    """Return ROWS, BLOCK and num_warps of a tile: one row, or short rows, but no more than there are."""
    options = tile.row_options(columns, dtype)
    row_bytes = options["BLOCK"] * dtype.itemsize
    height = min(max(1, num_bytes // row_bytes), 1 << max(0, rows - 1).bit_length())
    warps = max(options["num_warps"], min(4, height * row_bytes // (32 * 16)))  # 16 bytes a thread
    return {**options, "ROWS": height, "num_warps": warps}
