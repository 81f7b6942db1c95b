"""RMS normalisation: y = x / sqrt(mean(x^2) + eps) * weight, over the last axis, in fp32.

Axes: N tokens (any leading axes), C channels. Source: Zhang and Sennrich 2019.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.kernels import dispatch


def rms_norm(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Scale each row to unit root mean square, then by `weight_C`.

    Args: x_NC: [..., C], any float dtype. weight_C: [C]. eps: > 0, added to the mean square.
    Returns: [..., C] of x's dtype; statistics in fp32 (fp64 for fp64).
    Cost: reads and writes N C elements; 4 N C FLOPs; bound by memory.
    """
    result: Tensor = dispatch.choose("rms_norm", x_NC.device.type)(x_NC, weight_C, eps)
    return result


def rms_norm_reference(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Compute `rms_norm` in plain torch."""
    wide_NC = x_NC.to(torch.promote_types(x_NC.dtype, torch.float32))
    scale_N1 = torch.rsqrt(wide_NC.square().mean(-1, keepdim=True) + eps)
    return (wide_NC * scale_N1 * weight_C).to(x_NC.dtype)


def rms_norm_torch(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """Compute `rms_norm` with torch's own operator."""
    return F.rms_norm(x_NC, (x_NC.shape[-1],), weight_C, eps)


def cost(num_rows: int, num_channels: int, dtype_bytes: int) -> dict[str, Any]:
    """Return the bytes moved and FLOPs done by one forward."""
    elements = num_rows * num_channels
    return {"bytes": 2 * elements * dtype_bytes, "flops": 4 * elements}


dispatch.register("rms_norm", "reference", rms_norm_reference)
dispatch.register("rms_norm", "torch", rms_norm_torch)
