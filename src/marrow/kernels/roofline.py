"""How near each operator is to what this machine can do.

Each op runs at the shapes of the quickstart (scaled by `scale`), every path that is usable here.
Its file's cost model gives bytes and FLOPs; the measured copy bandwidth and GEMM peak give the two
roofs, and the lower one is the bound. Figures above 100 % of the memory roof mean that the data
stayed in cache.

Source: Williams, Waterman and Patterson 2009.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from marrow.kernels import attention, dispatch, linear_cross_entropy, paged_attention, rms_norm, rope, swiglu
from marrow.kernels.device import best_seconds, measure_copy_bandwidth, measure_gemm_peak

OPS = ("rms_norm", "rope", "swiglu", "attention", "paged_attention", "linear_cross_entropy")
CHANNELS, HEADS, KV_HEADS, HEAD_SIZE, VOCAB, ROW_TOKENS, BLOCK = 256, 4, 2, 64, 4096, 512, 16

Case = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Row:
    """One path of one op: time of a forward, what it achieved, and the roof that bounds it."""

    op: str
    path: str
    shape: str
    microseconds: float
    gbytes: float
    gflops: float
    peak_gbytes: float
    peak_gflops: float
    bound: Literal["memory", "compute"]
    share_of_peak: float


def known() -> list[tuple[str, str]]:
    """List (op, path) for every path that can run on the CPU here."""
    return [
        (op, name)
        for op in OPS
        for name, path in dispatch.paths(op).items()
        if "cpu" in path.devices and path.unusable() is None
    ]


@torch.inference_mode()
def measure(
    *, dtype: torch.dtype = torch.float32, device: str = "cpu", seconds: float = 0.2, scale: float = 1.0
) -> list[Row]:
    """Time every path of every op.

    Args: seconds: for each path and each of the two peaks. scale: of the number of tokens (8192).
    Returns: a row for each (op, path), in a fixed order.
    """
    peak_gbytes = measure_copy_bandwidth(device=device, seconds=seconds)
    peak_gflops = measure_gemm_peak(dtype, device=device, seconds=seconds)
    rows, cases = [], {op: make(dtype, device, scale) for op, make in _CASES.items()}
    for op, name in known():
        arguments, cost = cases[op]
        function = dispatch.paths(op)[name].function
        seconds_each = best_seconds(lambda: function(*arguments), device, seconds)  # noqa: B023 (called at once)
        gbytes, gflops = cost["bytes"] / seconds_each / 1e9, cost["flops"] / seconds_each / 1e9
        memory_bound = cost["bytes"] / peak_gbytes > cost["flops"] / peak_gflops
        rows.append(
            Row(
                op=op,
                path=name,
                shape=" ".join("x".join(map(str, a.shape)) for a in arguments if isinstance(a, torch.Tensor)),
                microseconds=seconds_each * 1e6,
                gbytes=gbytes,
                gflops=gflops,
                peak_gbytes=peak_gbytes,
                peak_gflops=peak_gflops,
                bound="memory" if memory_bound else "compute",
                share_of_peak=gbytes / peak_gbytes if memory_bound else gflops / peak_gflops,
            )
        )
    return rows


def _rms_norm(dtype: torch.dtype, device: str, scale: float) -> Case:
    rows = _rows(scale) * ROW_TOKENS
    x_NC, weight_C = _normal(dtype, device, rows, CHANNELS), _normal(dtype, device, CHANNELS)
    return (x_NC, weight_C, 1e-5), rms_norm.cost(rows, CHANNELS, dtype.itemsize)


def _rope(dtype: torch.dtype, device: str, scale: float) -> Case:
    tokens = _rows(scale) * ROW_TOKENS
    angles = rope.rope_angles(torch.arange(tokens, device=device), HEAD_SIZE, 1e4, dtype)
    x_NHD = _normal(dtype, device, tokens, HEADS, HEAD_SIZE)
    return (x_NHD, *angles), rope.cost(tokens, HEADS, HEAD_SIZE, dtype.itemsize)


def _swiglu(dtype: torch.dtype, device: str, scale: float) -> Case:
    tokens, intermediate = _rows(scale) * ROW_TOKENS, 704
    gate_up_NG = _normal(dtype, device, tokens, 2 * intermediate)
    return (gate_up_NG,), swiglu.cost(tokens, intermediate, dtype.itemsize)


def _attention(dtype: torch.dtype, device: str, scale: float) -> Case:
    rows = _rows(scale)
    document_N = torch.arange(rows, device=device).repeat_interleave(ROW_TOKENS)
    q_NHD = _normal(dtype, device, rows * ROW_TOKENS, HEADS, HEAD_SIZE)
    k_NKD, v_NKD = (_normal(dtype, device, rows * ROW_TOKENS, KV_HEADS, HEAD_SIZE) for _ in range(2))
    packing = attention.pack(document_N, ROW_TOKENS, dtype)
    cost = attention.cost(rows, ROW_TOKENS, HEADS, KV_HEADS, HEAD_SIZE, dtype.itemsize)
    return (q_NHD, k_NKD, v_NKD, packing), cost


def _paged_attention(dtype: torch.dtype, device: str, scale: float) -> Case:
    sequences, blocks = _rows(scale), ROW_TOKENS // BLOCK
    keys, values = (_normal(dtype, device, sequences * blocks, BLOCK, KV_HEADS, HEAD_SIZE) for _ in range(2))
    blocks_BM = torch.randperm(sequences * blocks, device=device).view(sequences, blocks)
    starts_B = torch.arange(sequences + 1, device=device)
    ends_B = torch.full((sequences,), ROW_TOKENS, device=device)
    q_NHD = _normal(dtype, device, sequences, HEADS, HEAD_SIZE)
    cost = paged_attention.cost([ROW_TOKENS] * sequences, HEADS, KV_HEADS, HEAD_SIZE, dtype.itemsize)
    return (q_NHD, keys, values, blocks_BM, starts_B, ends_B), cost


def _linear_cross_entropy(dtype: torch.dtype, device: str, scale: float) -> Case:
    rows = _rows(scale) * ROW_TOKENS
    hidden_NC, weight_VC = _normal(dtype, device, rows, CHANNELS), _normal(dtype, device, VOCAB, CHANNELS)
    targets_N = torch.arange(rows, device=device) % VOCAB
    # Without gradients, as measured here, a third of the work.
    cost = linear_cross_entropy.cost(rows, CHANNELS, VOCAB, dtype.itemsize)
    return (hidden_NC, weight_VC, targets_N), {name: value / 3 for name, value in cost.items()}


def _rows(scale: float) -> int:
    return max(1, round(16 * scale))


def _normal(dtype: torch.dtype, device: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


_CASES: dict[str, Callable[[torch.dtype, str, float], Case]] = {
    "rms_norm": _rms_norm,
    "rope": _rope,
    "swiglu": _swiglu,
    "attention": _attention,
    "paged_attention": _paged_attention,
    "linear_cross_entropy": _linear_cross_entropy,
}
