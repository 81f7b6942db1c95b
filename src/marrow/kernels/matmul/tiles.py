"""AMX for bf16: whether this CPU lends it to `csrc/linear.h`, and the memory that it needs."""

from functools import cache

import torch
from torch import Tensor

from marrow.kernels import native

_ROWS, _INPUTS = 16, 32


@cache
def has_tiles() -> bool:
    """Return whether the CPU has AMX for bf16, the compiler knows it, and Linux lends it."""
    found = torch.zeros(1, dtype=torch.int32)
    native.function("grouped_linear", "grouped_linear_tiles", "p")(*native.pointers(found))
    return bool(found)


def room_for_tiles(rows: int, inputs: int, groups: int = 1) -> Tensor:
    """Return memory for rows of bf16, in `groups` parts, each in whole tiles of 16 rows by 32 inputs."""
    padded = -(-rows // _ROWS) + groups - 1
    return torch.empty(padded * _ROWS * -(-inputs // _INPUTS) * _INPUTS, dtype=torch.bfloat16)
