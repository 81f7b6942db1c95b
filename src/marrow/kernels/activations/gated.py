"""What SwiGLU and GeGLU share: the layout of gate and up, and how a GPU cuts it into tiles."""

from torch import Tensor

_ELEMENTS = 2048  # of a tile: with 4 warps two loads of 16 bytes a thread in bf16


def gated_shape(gate_up_NG: Tensor) -> tuple[int, int]:
    """Return N, over all leading axes, and F, half the last."""
    size = gate_up_NG.shape[-1] // 2
    return gate_up_NG.numel() // max(1, 2 * size), size


def gated_tiles(rows: int, size: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return a grid of tiles over [rows, size], and the ROWS and BLOCK of one."""
    block = min(_ELEMENTS, 1 << max(4, (size - 1).bit_length()))
    height = min(_ELEMENTS // block, 1 << max(0, rows - 1).bit_length())
    return (-(-rows // height), -(-size // block)), {"ROWS": height, "BLOCK": block, "num_warps": 4}
