"""How near each operator is to what this machine can do.

Each op runs at the shapes of the quickstart (scaled by `scale`), every path that is usable here.
Its file's cost model gives bytes and FLOPs; the measured copy bandwidth and GEMM peak give the two
roofs, and the one that it is nearer to is its bound. More than 100 % of the memory roof means that data
stayed in cache.

Source: Williams, Waterman and Patterson 2009.
"""

from collections.abc import Callable
from typing import Any

import torch

from marrow.kernels import dispatch
from marrow.kernels.activations import rope, swiglu
from marrow.kernels.attention import attention, paged_attention
from marrow.kernels.device import best_seconds, measure_copy_bandwidth, measure_gemm_peak
from marrow.kernels.losses import linear_cross_entropy
from marrow.kernels.norms import rms_norm

OPS = ("rms_norm", "rope", "swiglu", "attention", "paged_attention", "linear_cross_entropy")
CHANNELS, HEADS, KV_HEADS, HEAD_SIZE, VOCAB, ROW_TOKENS, BLOCK = 256, 4, 2, 64, 4096, 512, 16

Case = tuple[tuple[Any, ...], dict[str, Any]]


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
) -> list[dict[str, Any]]:
    """Time every path of every op.

    Args: seconds: for each path and each of the two peaks. scale: of the number of tokens (8192).
    Returns: a JSON-able row for each (op, path), in a fixed order: op, path, dtype, shape,
        microseconds of a forward, gbytes_per_s, gflops, their peaks, bound, share_of_peak.
    """
    peak_gbytes = measure_copy_bandwidth(device=device, seconds=seconds)
    peak_gflops = measure_gemm_peak(dtype, device=device, seconds=seconds)
    rows, cases = [], {op: make(dtype, device, scale) for op, make in _CASES.items()}
    for op, name in known():
        arguments, cost = cases[op]
        function = dispatch.paths(op)[name].function
        took_s = best_seconds(lambda: function(*arguments), device, seconds)  # noqa: B023 (called at once)
        gbytes, gflops = cost["bytes"] / took_s / 1e9, cost["flops"] / took_s / 1e9
        memory, compute = gbytes / peak_gbytes, gflops / peak_gflops
        rows.append(
            {
                "op": op,
                "path": name,
                "dtype": str(dtype).removeprefix("torch."),
                "shape": " ".join(
                    "x".join(map(str, a.shape)) for a in arguments if isinstance(a, torch.Tensor)
                ),
                "microseconds": took_s * 1e6,
                "gbytes_per_s": gbytes,
                "gflops": gflops,
                "peak_gbytes_per_s": peak_gbytes,
                "peak_gflops": peak_gflops,
                "bound": "memory" if memory > compute else "compute",
                "share_of_peak": max(memory, compute),
            }
        )
    return rows


def describe(row: dict[str, Any]) -> str:
    """Return one line of text for a row of `measure`."""
    return (
        f"{row['op']:<21}{row['path']:<10}{row['dtype']:<9}{row['microseconds']:>10,.0f} us"
        f"{row['gbytes_per_s']:>9.2f} GB/s{row['gflops']:>9.1f} GFLOP/s"
        f"{row['share_of_peak']:>6.0%} of {row['bound']} peak"
    )


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
