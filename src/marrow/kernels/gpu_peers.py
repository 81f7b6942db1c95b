"""Liger-Kernel's operators, as peers of the GPU bench, where that package is installed.

Each does what its own documentation says, on the very inputs that ours gets; in place where that is its
default. Needs `liger-kernel` (bench/requirements-kernels.txt) on the path, and Triton; where it is missing,
the row says so.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from marrow.kernels.gpu_times import Function, called

# Ours -> Liger's module, and its autograd function.
_FUNCTIONS = {
    "rms_norm": ("rms_norm", "LigerRMSNormFunction"),
    "add_rms_norm": ("fused_add_rms_norm", "LigerFusedAddRMSNormFunction"),
    "layer_norm": ("layer_norm", "LigerLayerNormFunction"),
    "swiglu": ("swiglu", "LigerFusedGateUpSiLUMulFunction"),
    "geglu": ("geglu", "LigerGELUMulFunction"),
    "rope": ("rope", "LigerRopeFunction"),
    "linear_cross_entropy": ("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"),
}


def peers(op: str, direction: str, inputs: tuple[Any, ...]) -> dict[str, Callable[[], Function]]:
    """Return {"Liger": what prepares its call}, or nothing where Liger has no such operator."""
    if op not in _FUNCTIONS:
        return {}
    return {"Liger": lambda: _prepared(op, direction, inputs)}


def _prepared(op: str, direction: str, inputs: tuple[Any, ...]) -> Function:
    module, name = _FUNCTIONS[op]
    apply = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply
    if op == "linear_cross_entropy":
        hidden, weight, targets = inputs
        return lambda: torch.autograd.grad(_first(apply(hidden, weight, targets)), (hidden, weight))
    if op == "add_rms_norm":
        return called(direction, inputs, lambda residual, x, weight, eps: apply(x, residual, weight, eps))
    if op == "geglu":
        return called(direction, inputs, lambda gate_up: apply(*gate_up.chunk(2, -1)))
    if op == "rope":
        return _rope(direction, inputs, apply)
    return called(direction, inputs, apply)


def _rope(direction: str, inputs: tuple[Any, ...], apply: Callable[..., Any]) -> Function:
    """Turn queries and keys: half of our heads each, so that as much is read and written."""
    x, cos, sin = inputs
    tokens, heads, size = x.shape
    halves = x.detach().view(1, tokens, 2, heads // 2, size).unbind(2)
    turned = tuple(half.contiguous().transpose(1, 2).requires_grad_(x.requires_grad) for half in halves)
    wide = tuple(torch.cat((angle, angle), -1)[None] for angle in (cos, sin))
    return called(direction, (*turned, *wide), lambda q, k, c, s: apply(q, k, c, s))


def _first(found: Any) -> Tensor:
    result: Tensor = found[0] if isinstance(found, tuple) else found
    return result
