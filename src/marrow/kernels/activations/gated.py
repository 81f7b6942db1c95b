"""What SwiGLU and GeGLU share: the layout of gate and up, and how a GPU cuts it into tiles."""

import torch
from torch import Tensor

from marrow.kernels import tile

_ELEMENTS = 2048  # of a tile: with 4 warps two loads of 16 bytes a thread in bf16


def gated_shape(gate_up_NG: Tensor) -> tuple[int, int]:
    """Return N, over all leading axes, and F, half the last."""
    size = gate_up_NG.shape[-1] // 2
    return gate_up_NG.numel() // max(1, 2 * size), size


def gated_tiles(op: str, rows: int, size: int, dtype: torch.dtype) -> tuple[tuple[int, int], dict[str, int]]:
    """Return a grid of tiles over [rows, size] for `op`, and ROWS, BLOCK and num_warps of one."""
    block = min(_ELEMENTS, 1 << max(4, (size - 1).bit_length()))
    height = min(_ELEMENTS // block, 1 << max(0, rows - 1).bit_length())
    default = {"ROWS": height, "BLOCK": block, "num_warps": 4}
    candidates = [{"num_warps": 8}, {"num_warps": 2}, {"BLOCK": block // 2}, {"ROWS": 2 * height}]
    options = tile.config(op, (block, str(dtype)), default, candidates)
    return (-(-rows // options["ROWS"]), -(-size // options["BLOCK"])), options
