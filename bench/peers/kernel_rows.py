"""What bench/kernels.py measures: each row's setup, our call, its peers' calls, and the goals.

Losses and sampling stand in files of their own beside this one.

A row is made when it is measured, so that only its own tensors are in memory. Figures beside the speed
(errors of quantised rows against fp64, recall of a search) are computed here, once, before anything is timed.
"""

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Work = Callable[[], Any]
BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Row:
    """Ours and its peers.

    goals: peer -> the least ratio of its time over ours. notes: what else is worth a word.
    is_telling: calls return their own CPU seconds, for they run elsewhere.
    """

    ours: Work
    peers: Mapping[str, Work]
    goals: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    is_telling: bool = False
    close: Work = lambda: None


def versions() -> dict[str, str]:
    """Return the versions of the peers."""
    return {"faiss-cpu": importlib.metadata.version("faiss-cpu")}


def normal(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    """Return normal numbers."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


# Norms and activations


def eager_add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Add and normalise as model code in plain torch does."""
    summed = residual + x
    wide = summed.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype), summed


def add_rms_norm_row() -> Row:
    """Residual add and RMSNorm; the copy moves as many bytes."""
    from marrow.kernels.norms.add_rms_norm import add_rms_norm

    residual, x, weight = normal(8192, 4096), normal(8192, 4096), normal(4096)
    compiled = torch.compile(eager_add_rms_norm)
    source = normal(2 * 8192, 4096)
    target = torch.empty_like(source)
    return Row(
        lambda: add_rms_norm(residual, x, weight, 1e-5),
        {
            "torch.compile": lambda: compiled(residual, x, weight),
            "eager": lambda: eager_add_rms_norm(residual, x, weight),
            "copy of as many bytes": lambda: target.copy_(source),
        },
        {"torch.compile": 1.3, "eager": 5.0, "copy of as many bytes": 0.8},
    )


def swiglu_row() -> Row:
    """SwiGLU of fused gate and up."""
    from marrow.kernels.activations.swiglu import swiglu

    def eager(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    gate_up = normal(4096, 2 * 11008)
    compiled = torch.compile(eager)
    return Row(
        lambda: swiglu(gate_up),
        {"torch.compile": lambda: compiled(gate_up), "eager": lambda: eager(gate_up)},
        {"torch.compile": 1.7},
    )


# Products with quantised weights

OUTPUTS, INPUTS, GROUP = 11008, 4096, 128


@cache
def matrices() -> dict[str, Any]:
    """Make one matrix and its packed forms, for all rows of this kind; ours and aten's have equal numbers."""
    from marrow.kernels.matmul.int4_weights import pack_int4
    from marrow.kernels.matmul.int8_linear import quantise_to_int8

    q = torch.randint(0, 16, (OUTPUTS, INPUTS), dtype=torch.int32)
    scales = torch.rand(OUTPUTS, INPUTS // GROUP).half() / 100
    zeros = torch.full_like(scales, 8).to(torch.uint8)
    aten_scales = torch.stack([scales.T.bfloat16(), torch.zeros_like(scales.T.bfloat16())], -1).contiguous()
    plain = normal(OUTPUTS, INPUTS, scale=0.02)
    int8, steps = quantise_to_int8(plain)
    return {
        "int4": pack_int4(q, scales, zeros),
        "int4 wide": ((q - 8).double().view(OUTPUTS, -1, GROUP) * scales.double()[..., None]).view(
            OUTPUTS, -1
        ),
        "aten int4": torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1),
        "aten scales": aten_scales,
        "int8": (int8, steps),
        "int8 wide": int8.double() * steps.double()[:, None],
        "aten steps": steps.bfloat16(),
        "bf16": plain,
    }


def error_of(found: Tensor, x: Tensor, weight: Tensor) -> str:
    """Say how far a product is from fp64 with the same quantised weights."""
    exact = x.double() @ weight.T
    return f"{float((found.double() - exact).norm() / exact.norm()):.2%} of y's norm"


def int4_row(rows: int) -> Row:
    """4-bit weights; x goes to 8 bits on our side, so its error is told."""
    from marrow.kernels.matmul.int4_linear import int4_linear

    made, x = matrices(), normal(rows, INPUTS)
    aten = torch.ops.aten._weight_int4pack_mm_for_cpu

    def theirs() -> Tensor:
        return aten(x, made["aten int4"], GROUP, made["aten scales"])

    goals = {"aten int4pack": 2.5} if rows == 1 else {"aten int4pack": 2.0, "bf16 F.linear": 1.0}
    return Row(
        lambda: int4_linear(x, *made["int4"]),
        {"aten int4pack": theirs, "bf16 F.linear": lambda: F.linear(x, made["bf16"])},
        goals,
        {
            "error": error_of(int4_linear(x, *made["int4"]), x, made["int4 wide"]),
            "aten's": error_of(theirs(), x, made["int4 wide"]),
        },
    )


def int8_row(rows: int) -> Row:
    """8-bit weights; x goes to 8 bits on our side."""
    from marrow.kernels.matmul.int8_linear import int8_linear

    made, x = matrices(), normal(rows, INPUTS)
    aten = torch.ops.aten._weight_int8pack_mm

    def theirs() -> Tensor:
        return aten(x, made["int8"][0], made["aten steps"])

    return Row(
        lambda: int8_linear(x, *made["int8"]),
        {"aten int8pack": theirs, "bf16 F.linear": lambda: F.linear(x, made["bf16"])},
        {"aten int8pack": 2.0, "bf16 F.linear": 1.0} if rows > 1 else {},
        {
            "error": error_of(int8_linear(x, *made["int8"]), x, made["int8 wide"]),
            "aten's": error_of(theirs(), x, made["int8 wide"]),
        },
    )


# Attention


def attention_row(is_backward: bool) -> Row:
    """Packed rows in training: 4 x 512 tokens, 3 heads of 64; SDPA with its own causal mask."""
    from marrow.kernels.attention.attention import attention, pack

    rows, row_tokens, heads, size = 4, 512, 3, 64
    tokens = rows * row_tokens
    packing = pack(torch.arange(tokens) // row_tokens, row_tokens)
    leaves = [normal(tokens, heads, size, scale=1 + side / 8).requires_grad_() for side in range(3)]
    gradient = normal(tokens, heads, size)

    def theirs() -> Tensor:
        q, k, v = (x.view(rows, row_tokens, heads, size).transpose(1, 2) for x in leaves)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)

    def ours() -> Tensor:
        return attention(*leaves, packing)

    def both(forward: Callable[[], Tensor]) -> Work:
        def work() -> Any:
            with torch.inference_mode(False), torch.enable_grad():
                return torch.autograd.grad(forward(), leaves, gradient)

        return work

    if is_backward:
        return Row(both(ours), {"SDPA": both(theirs)})
    return Row(ours, {"SDPA": theirs})


# Attention over paged caches


def paged_row(code: str = "bf16") -> Row:
    """One new token for each of 8 sequences of 4096: ours reads the blocks where they stand."""
    from marrow.kernels.attention.paged_attention import OPERATOR, quantise_kv

    sequences, length, heads, kv_heads, size, block = 8, 4096, 32, 8, 128, 16
    blocks = sequences * length // block
    q = normal(sequences, heads, size)
    caches = [normal(blocks, block, kv_heads, size, scale=1 + side / 8) for side in range(2)]
    table = torch.randperm(blocks, dtype=torch.int32).view(sequences, -1)
    starts = torch.arange(sequences + 1, dtype=torch.int32)
    ends = torch.full((sequences,), length, dtype=torch.int32)
    plain = (table, starts, ends, 1, length, 0, 0.0)
    dense = [cache[table.long()].flatten(1, 2).transpose(1, 2).contiguous() for cache in caches]

    def gather() -> Tensor:
        k, v = (cache[table].flatten(1, 2).transpose(1, 2) for cache in caches)
        x = q.view(sequences, 1, heads, size).transpose(1, 2)
        return F.scaled_dot_product_attention(x, k, v, enable_gqa=True).transpose(1, 2).reshape(q.shape)

    def folded() -> Tensor:
        x = q.view(sequences, kv_heads, -1, size)
        return F.scaled_dot_product_attention(x, *dense).view(q.shape)

    given: tuple[Any, ...] = (*caches, None, None)
    if code != "bf16":
        types = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
        (keys, key_scales), (values, value_scales) = (quantise_kv(cache, types[code]) for cache in caches)
        given = (keys, values, key_scales, value_scales)

    def ours() -> Tensor:
        return OPERATOR(q, *given, *plain)

    k, v = (side.double() for side in dense)
    exact = F.scaled_dot_product_attention(q.double().view(sequences, kv_heads, -1, size), k, v).view(q.shape)
    error = float((ours().double() - exact).norm() / exact.norm())
    peers = {"gather + SDPA": gather, "dense SDPA, GQA folded": folded}
    goals = {"gather + SDPA": 10.0, "dense SDPA, GQA folded": 1.5} if code == "bf16" else {}
    return Row(ours, peers, goals, {"error": f"{error:.2%} of y's norm"})


# Search


@cache
def collection() -> dict[str, Any]:
    """Make 200,000 vectors and the indexes of all sides."""
    import faiss

    from marrow.kernels.search.top_k_int8 import quantise_vectors

    faiss.omp_set_num_threads(1)
    vectors = normal(200_000, 384, dtype=torch.float32)
    flat = faiss.IndexFlatIP(384)
    scalar = faiss.IndexScalarQuantizer(384, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    scalar.train(vectors.numpy())
    for index in (flat, scalar):
        index.add(vectors.numpy())
    return {"vectors": vectors, "packed": quantise_vectors(vectors), "flat": flat, "scalar": scalar}


def recall_of(found: Any, queries: Tensor) -> str:
    """Say which share of the ten best rows, by fp64 scores, was found."""
    best = (queries.double() @ collection()["vectors"].double().T).topk(10).indices
    shares = [
        len(set(a) & set(b)) / 10 for a, b in zip(torch.as_tensor(found).tolist(), best.tolist(), strict=True)
    ]
    return f"{sum(shares) / len(shares):.4f}"


def search_row(queries: int, is_int8: bool) -> Row:
    """Return the ten best of 200,000 x 384."""
    from marrow.kernels.search.top_k import top_k
    from marrow.kernels.search.top_k_int8 import top_k_int8

    made, asked = collection(), normal(queries, 384, dtype=torch.float32)
    vectors, numbers = made["vectors"], asked.numpy()

    def ours() -> Any:
        return top_k_int8(asked, made["packed"], vectors, 10) if is_int8 else top_k(asked, vectors, 10)

    peers: dict[str, Work] = {
        "faiss flat": lambda: made["flat"].search(numbers, 10),
        "faiss SQ8": lambda: made["scalar"].search(numbers, 10),
        "torch GEMM + topk": lambda: torch.topk(asked @ vectors.T, 10),
    }
    if queries > 1:
        peers.pop("faiss SQ8")  # as slow as so many single queries
        goals = {"faiss flat": 1.0, "torch GEMM + topk": 1.0}
    else:
        goals = {"faiss flat": 4.5, "faiss SQ8": 2.3} if is_int8 else {"faiss flat": 1.5}
    many = normal(32, 384, dtype=torch.float32)
    found = top_k_int8(many, made["packed"], vectors, 10) if is_int8 else top_k(many, vectors, 10)
    notes = {"recall": recall_of(found.rows_QK, many)}
    if queries == 1:
        notes["SQ8's"] = recall_of(made["scalar"].search(many.numpy(), 10)[1], many)
    return Row(ours, peers, goals, notes)


# The thresholds themselves

_MALLOC = """
import sys, time
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from marrow.kernels.device import raise_malloc_thresholds
from peers.kernel_rows import eager_add_rms_norm, normal
if {raised}: raise_malloc_thresholds()
given = normal(8192, 4096), normal(8192, 4096), normal(4096)
work = torch.compile(eager_add_rms_norm) if {compiled} else eager_add_rms_norm
with torch.inference_mode():
    work(*given)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        for _ in range(3):
            work(*given)
        print((time.process_time() - start) / 3, flush=True)
"""


class Process:
    """A process that runs add + RMSNorm when asked, with the thresholds raised or not."""

    def __init__(self, raised: bool, compiled: bool) -> None:
        code = _MALLOC.format(path=[str(Path(__file__).parents[1])], raised=raised, compiled=compiled)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the process did not start")

    def seconds(self) -> float:
        """Run it; return the CPU seconds of a call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def malloc_row(compiled: bool) -> Row:
    """Run the same plain code in two processes, with the thresholds raised and without."""
    raised, left = Process(True, compiled), Process(False, compiled)

    def close() -> None:
        raised.close()
        left.close()

    return Row(raised.seconds, {"malloc as it is": left.seconds}, is_telling=True, close=close)


ROWS: dict[str, Callable[[], Row]] = {
    "add + RMSNorm bf16 8192x4096": add_rms_norm_row,
    "SwiGLU bf16 4096x11008": swiglu_row,
    "attention forward bf16 4 x 512, 3 of 64": lambda: attention_row(False),
    "attention forward + backward, the same": lambda: attention_row(True),
    "malloc thresholds, eager add + RMSNorm": lambda: malloc_row(False),
    "malloc thresholds, compiled add + RMSNorm": lambda: malloc_row(True),
    "paged decode 8 x 4096, 32/8 heads of 128": paged_row,
    "paged decode, int8 cache": lambda: paged_row("int8"),
    "paged decode, fp8 cache": lambda: paged_row("fp8"),
    "top-10, 1 query, fp32 200k x 384": lambda: search_row(1, False),
    "top-10, 1 query, int8 + rescore": lambda: search_row(1, True),
    "top-10, 64 queries, fp32 200k x 384": lambda: search_row(64, False),
    "top-10, 64 queries, int8 + rescore": lambda: search_row(64, True),
    **{f"int4 linear 11008x4096, M={m}": lambda m=m: int4_row(m) for m in (1, 4, 8, 16, 32, 64)},
    **{f"int8 linear 11008x4096, M={m}": lambda m=m: int8_row(m) for m in (1, 4, 8, 16, 32, 64)},
}
