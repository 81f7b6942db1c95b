"""SwiGLU: silu(gate) * up, on the fused output of the gate and up projections.

Axes: N tokens, F intermediate size; the input holds gate in its first F channels, up in its last.
Source: Shazeer 2020 (GLU variants).
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from marrow.kernels import dispatch


def swiglu(gate_up_NG: Tensor) -> Tensor:
    """Gate one half of the channels by the other.

    Args: gate_up_NG: [..., 2F], any float dtype.
    Returns: [..., F] of the same dtype.
    Cost: reads 2 N F and writes N F elements; about 5 N F FLOPs; bound by memory.
    """
    result: Tensor = dispatch.choose("swiglu", gate_up_NG.device.type)(gate_up_NG)
    return result


def swiglu_reference(gate_up_NG: Tensor) -> Tensor:
    """Compute `swiglu` in plain torch."""
    gate_NF, up_NF = gate_up_NG.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def cost(num_rows: int, intermediate_size: int, dtype_bytes: int) -> dict[str, Any]:
    """Return the bytes moved and FLOPs done by one forward."""
    elements = num_rows * intermediate_size
    return {"bytes": 3 * elements * dtype_bytes, "flops": 5 * elements}


dispatch.register("swiglu", "reference", swiglu_reference)
