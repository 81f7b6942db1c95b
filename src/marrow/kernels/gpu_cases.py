"""What `gpu_bench` measures: each operator at the shapes that matter, its peers there, and its goals.

The order is that of importance: one row of each group first, then the rest. A case makes its inputs only
when its turn comes, and imports its operator then: one that is not there is a word in its row. Shapes with
`is_tiny` are for trying the harness where no GPU is.

Axes: N tokens, C channels, F intermediate, H heads, K kv heads, D head size, B batch, T time, V vocabulary.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.kernels import dispatch
from marrow.kernels.gpu_bench import Case, Goal, Work
from marrow.kernels.gpu_times import BACKWARD, BOTH, FORWARD, Function, called, without_gradients

EPS = 1e-5

Makers = dict[str, Callable[[], Function]]


def all_cases() -> list[Case]:
    """List the cases, the most important first."""
    norms = [
        *_memory_bound("rms_norm", "8192x4096", _rms_norm, 2, 5),
        *_memory_bound("add_rms_norm", "8192x4096", _add_rms_norm, 4, 8),
        *_memory_bound("layer_norm", "8192x4096", _layer_norm, 2, 5),
    ]
    activations = [
        *_memory_bound("swiglu", "4096x11008", _swiglu, 3, 8),
        *_memory_bound("geglu", "4096x11008", _geglu, 3, 8),
        *_memory_bound("rope", "16384x32x128", _rope, 2, 4),
        *_memory_bound("softcap", "4096x32768", _softcap, 2, 5),
    ]
    attention = [
        _attention(head_size, tokens, direction)
        for head_size in (128, 64)
        for tokens in (4096, 1024, 16384)
        for direction in (FORWARD, BACKWARD)
    ]
    paged = [_paged(*shape) for shape in ((64, 4096), (8, 32768), (256, 1024))]
    losses = [_linear_cross_entropy()]
    int4 = [_int4(rows) for rows in (1, 16, 4, 64, 8, 32)]
    fp8 = [_fp8(size) for size in (8192, 4096)]
    search = [_top_k(1), _top_k(64)]
    rest = [_rest(*names) for names in _REST]
    groups = [norms, activations, attention, paged, losses, int4, fp8, search, rest]
    first = [norms[0], norms[2], activations[0], attention[0], attention[1], paged[0], losses[0]]
    first += [int4[0], int4[1], fp8[0], search[0]]
    return first + [case for group in groups for case in group if case not in first]


def _public(group: str, name: str) -> Callable[..., Any]:
    """Return an operator's public function."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"marrow.kernels.{group}.{name}"), name)
    return function


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for one shape: after others, `torch.compile` would make sizes variables, which is slower."""
    torch.compiler.reset()
    made: Callable[..., Any] = torch.compile(function, dynamic=False)
    return made


def _normal(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device, dtype=torch.float32) * scale).to(dtype)


# Norms and activations: bound by the bandwidth of a copy


Built = tuple[str, tuple[Any, ...], int, Callable[..., Any], dict[str, Callable[..., Any]]]


def _memory_bound(
    op: str, shape: str, build: Callable[[str, bool], Built], passes: int, passes_both: int
) -> list[Case]:
    """Make the forward and the forward+backward row.

    build: (device, is_tiny) -> group, inputs, elements of one pass, eager twin, other peers. passes: how
    often that many elements are read or written.
    """
    liger = () if op == "softcap" else (Goal("peer", 1.0, "Liger"),)
    goals = {FORWARD: (Goal("copy", 0.85), *liger), BOTH: (Goal("copy", 0.75), *liger)}

    def make(direction: str, device: str, is_tiny: bool) -> Work:
        group, inputs, elements, eager, others = build(device, is_tiny)
        if direction == BOTH:
            inputs = tuple(_leaf(x) for x in inputs)
        call = functools.partial(called, direction, inputs)
        peers: Makers = {
            name: functools.partial(call, twin) for name, twin in {"eager": eager, **others}.items()
        }
        peers["torch.compile"] = lambda: call(_compiled(eager))
        moved = 2.0 * elements * (passes if direction == FORWARD else passes_both)
        ours = call(_public(group, op))
        return Work(ours, inputs, peers, moved, 5.0 * elements, ("torch.compile",))

    return [
        Case(op, shape, direction, "bf16", goals[direction], functools.partial(make, direction))
        for direction in (FORWARD, BOTH)
    ]


def _leaf(x: Any) -> Any:
    is_float = isinstance(x, Tensor) and x.is_floating_point()
    return x.detach().requires_grad_() if is_float and x.dtype == torch.bfloat16 else x


def _rms_norm(device: str, is_tiny: bool) -> Built:
    rows, columns = (16, 64) if is_tiny else (8192, 4096)
    inputs = (_normal(device, rows, columns), _normal(device, columns), EPS)
    return "norms", inputs, rows * columns, lambda x, w, eps: F.rms_norm(x, (columns,), w, eps), {}


def _add_rms_norm(device: str, is_tiny: bool) -> Built:
    rows, columns = (16, 64) if is_tiny else (8192, 4096)
    inputs = (*(_normal(device, rows, columns) for _ in range(2)), _normal(device, columns), EPS)

    def eager(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = residual + x
        return F.rms_norm(total, (columns,), weight, eps), total

    return "norms", inputs, rows * columns, eager, {}


def _layer_norm(device: str, is_tiny: bool) -> Built:
    rows, columns = (16, 64) if is_tiny else (8192, 4096)
    inputs = (_normal(device, rows, columns), _normal(device, columns), _normal(device, columns), EPS)
    return "norms", inputs, rows * columns, lambda x, w, b, eps: F.layer_norm(x, (columns,), w, b, eps), {}


def _swiglu(device: str, is_tiny: bool) -> Built:
    rows, size = (16, 64) if is_tiny else (4096, 11008)

    def eager(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    return "activations", (_normal(device, rows, 2 * size),), rows * size, eager, {}


def _geglu(device: str, is_tiny: bool) -> Built:
    rows, size = (16, 64) if is_tiny else (4096, 11008)

    def eager(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.gelu(gate, approximate="tanh") * up

    return "activations", (_normal(device, rows, 2 * size),), rows * size, eager, {}


def _rope(device: str, is_tiny: bool) -> Built:
    from marrow.kernels.activations.rope import rope_angles  # when its turn comes

    tokens, heads, size = (16, 2, 16) if is_tiny else (16384, 32, 128)
    cos, sin = rope_angles(torch.arange(tokens, device=device), size, 1e4, torch.float32)

    def eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        left, right = x.float().chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat((left * c - right * s, right * c + left * s), -1).to(x.dtype)

    return "activations", (_normal(device, tokens, heads, size), cos, sin), tokens * heads * size, eager, {}


def _softcap(device: str, is_tiny: bool) -> Built:
    rows, columns = (16, 64) if is_tiny else (4096, 32768)
    inputs = (_normal(device, rows, columns, scale=30.0), 30.0)
    return "activations", inputs, rows * columns, lambda x, cap: cap * torch.tanh(x / cap), {}


# Attention


def _attention(head_size: int, tokens: int, direction: str) -> Case:
    """16k tokens in rows of T, 2048 channels, causal, bf16: the shapes of FlashAttention's own table."""
    flash, cudnn = "SDPA flash", "SDPA cuDNN"
    least = 0.80 if direction == FORWARD else 0.70
    goals = (Goal("peer", least, cudnn), Goal("peer", 1.0, "FlexAttention"))

    def make(device: str, is_tiny: bool) -> Work:
        from marrow.kernels.attention.attention import attention, pack  # when its turn comes

        total, row = (64, 32) if is_tiny else (16384, tokens)
        heads = 2 if is_tiny else 2048 // head_size
        batch = total // row
        inputs = tuple(_normal(device, total, heads, head_size) for _ in range(3))
        packing = pack(torch.arange(batch, device=device).repeat_interleave(row), row, is_whole=True)
        turned = tuple(x.view(batch, row, heads, head_size).transpose(1, 2).contiguous() for x in inputs)

        def sdpa(kind: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with torch.nn.attention.sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def flex() -> Function:
            from torch.nn.attention import flex_attention as module  # a compiler's import

            mask = module.create_block_mask(lambda b, h, q, k: q >= k, None, None, row, row, device=device)
            compiled = _compiled(module.flex_attention)
            return _attended(direction, lambda q, k, v: compiled(q, k, v, block_mask=mask), turned)

        backends = torch.nn.attention.SDPBackend
        kinds = {flash: backends.FLASH_ATTENTION, cudnn: backends.CUDNN_ATTENTION}
        if device == "cpu":
            kinds = {flash: backends.FLASH_ATTENTION}
        peers: Makers = {
            name: functools.partial(_attended, direction, functools.partial(sdpa, kind), turned)
            for name, kind in kinds.items()
        }
        ours = _attended(direction, lambda q, k, v: attention(q, k, v, packing), inputs)
        flops = 2.0 * total * (row + 1) * heads * head_size * (1.0 if direction == FORWARD else 2.5)
        moved = (4.0 if direction == FORWARD else 8.0) * total * heads * head_size * 2
        return Work(ours, inputs, peers | {"FlexAttention": flex}, moved, flops, ("FlexAttention",))

    return Case("attention", f"D{head_size} T{tokens}", direction, "bf16", goals, make)


def _attended(direction: str, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Function:
    """Return a call of forward, or of backward alone."""
    if direction == FORWARD:
        return functools.partial(without_gradients, function, inputs)
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    out = function(*leaves)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _paged(batch: int, context: int) -> Case:
    """One new token a sequence, 32 heads on 8 of keys and values, D 128, blocks of 16."""

    def make(device: str, is_tiny: bool) -> Work:
        from marrow.kernels.attention.paged_attention import paged_attention  # when its turn comes

        many, length = (2, 64) if is_tiny else (batch, context)
        heads, kv_heads, size, block = (4, 2, 16, 16) if is_tiny else (32, 8, 128, 16)
        blocks = length // block
        keys, values = (_normal(device, many * blocks, block, kv_heads, size) for _ in range(2))
        table = torch.randperm(many * blocks, device=device).view(many, blocks).int()
        starts = torch.arange(many + 1, device=device, dtype=torch.int32)
        ends = torch.full((many,), length, device=device, dtype=torch.int32)
        q = _normal(device, many, heads, size)

        def gathered(cache: Tensor) -> Tensor:
            return cache[table.long()].view(many, length, kv_heads, size).transpose(1, 2)

        def folded(k: Tensor, v: Tensor) -> Tensor:
            grouped = q.view(many, kv_heads, heads // kv_heads, size)
            return F.scaled_dot_product_attention(grouped, k, v)

        def dense() -> Function:
            k, v = gathered(keys).contiguous(), gathered(values).contiguous()
            return lambda: folded(k, v)

        def ours() -> Any:
            with torch.no_grad():
                return paged_attention(q, keys, values, table, starts, ends, max_queries=1, max_keys=length)

        peers: Makers = {
            "dense SDPA folded": dense,
            "gather+SDPA": lambda: lambda: folded(gathered(keys), gathered(values)),
        }
        moved = 2.0 * many * length * kv_heads * size * 2
        return Work(ours, (q, keys, values), peers, moved, 4.0 * many * length * heads * size)

    goals = (Goal("read", 0.80), Goal("peer", 1.0, "dense SDPA folded"))
    return Case("paged_attention", f"B{batch} context {context}", FORWARD, "bf16", goals, make)


# Loss


def _linear_cross_entropy() -> Case:
    def make(device: str, is_tiny: bool) -> Work:
        tokens, channels, vocabulary = (32, 16, 64) if is_tiny else (8192, 4096, 128256)
        hidden = _leaf(_normal(device, tokens, channels))
        weight = _leaf(_normal(device, vocabulary, channels, scale=channels**-0.5))
        targets = torch.randint(vocabulary, (tokens,), device=device)
        function = _public("losses", "linear_cross_entropy")

        def ours() -> Any:
            loss, count = function(hidden, weight, targets)
            return torch.autograd.grad(loss / count, (hidden, weight))

        def plain(h: Tensor, w: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(h, w).float(), targets)

        def call(loss: Callable[..., Tensor]) -> Function:
            return lambda: torch.autograd.grad(loss(hidden, weight), (hidden, weight))

        def error() -> float:
            found = function(hidden, weight, targets)[0]
            wide = weight.detach().double()
            exact = torch.zeros((), dtype=torch.float64, device=device)
            for first in range(0, tokens, 512):
                rows = slice(first, first + 512)
                logits = hidden.detach()[rows].double() @ wide.T
                exact += F.cross_entropy(logits, targets[rows], reduction="sum")
            return float(((found.detach() - exact) / exact).abs())

        peers: Makers = {
            "torch": lambda: call(plain),
            "torch.compile": lambda: call(_compiled(plain)),
        }
        inputs, flops = (hidden, weight, targets), 6.0 * tokens * channels * vocabulary
        moved = 2.0 * (2 * tokens * channels + 2 * vocabulary * channels)
        return Work(ours, inputs, peers, moved, flops, ("torch.compile",), error)

    goals = (
        Goal("peer", 1 / 1.05, "Liger"),
        Goal("memory", 1.0, "Liger"),
        Goal("memory", 1.0, "torch"),
        Goal("error", 1e-5),
    )
    return Case("linear_cross_entropy", "N8192 D4096 V128256", BOTH, "bf16", goals, make)


# Matrix products


def _int4(rows: int) -> Case:
    def make(device: str, is_tiny: bool) -> Work:
        from marrow.kernels.matmul.int4_weights import pack_int4  # when its turn comes

        outputs, inputs, group = (32, 128, 64) if is_tiny else (11008, 4096, 128)
        codes = torch.randint(16, (outputs, inputs), device=device)
        scales = torch.rand(outputs, inputs // group, device=device) * 0.01 + 0.01
        packed = pack_int4(codes, scales, torch.full_like(scales, 8))
        x = _normal(device, rows, inputs)
        function = _public("matmul", "int4_linear")

        def bf16() -> Function:
            wide = ((codes.view(outputs, -1, group) - 8) * scales[..., None]).view(outputs, inputs)
            weight = wide.bfloat16()
            return lambda: F.linear(x, weight)

        def aten() -> Function:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            tiles = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
            both = torch.stack((scales.T, torch.zeros_like(scales.T)), -1).bfloat16().contiguous()
            return lambda: torch.ops.aten._weight_int4pack_mm(x, tiles, group, both)

        peers: Makers = {"bf16 cuBLAS": bf16, "aten int4": aten}
        moved = outputs * inputs / 2 + 3.0 * outputs * inputs / group + 2.0 * rows * (inputs + outputs)
        flops = 2.0 * rows * outputs * inputs
        return Work(lambda: function(x, *packed), (x, *packed), peers, moved, flops)

    goals = (Goal("peer", 3.0 if rows <= 16 else 1.0, "bf16 cuBLAS"), Goal("peer", 1.0, "aten int4"))
    return Case("int4_linear", f"M{rows} 11008x4096", FORWARD, "bf16", goals, make)


def _fp8(size: int) -> Case:
    """Ours rounds its rows to fp8, blocks of 128; the peers get theirs rounded, with one scale."""

    def make(device: str, is_tiny: bool) -> Work:
        from marrow.kernels.matmul.fp8_linear import fp8_linear, quantise_to_fp8  # when its turn comes

        n = 256 if is_tiny else size
        x, weight = _normal(device, n, n), _normal(device, n, n)
        given = (x, *quantise_to_fp8(weight))
        one = torch.ones((), device=device)

        def scaled() -> Function:
            a, b = (y.to(torch.float8_e4m3fn) for y in (x, weight))
            return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)

        peers: Makers = {"torch._scaled_mm": scaled, "bf16 cuBLAS": lambda: lambda: F.linear(x, weight)}
        return Work(lambda: fp8_linear(*given), given, peers, 4.0 * n * n, 2.0 * n**3)

    return Case("fp8_linear", f"{size}", FORWARD, "fp8", (Goal("peer", 0.9, "torch._scaled_mm"),), make)


# Search


def _top_k(queries: int) -> Case:
    def make(device: str, is_tiny: bool) -> Work:
        vectors, size = (256, 16) if is_tiny else (1_000_000, 768)
        base = _normal(device, vectors, size, dtype=torch.float32)
        query = _normal(device, queries, size, dtype=torch.float32)
        function = _public("search", "top_k")
        peers: Makers = {"GEMM+topk": lambda: lambda: torch.topk(query @ base.T, 10)}
        moved, flops = 4.0 * vectors * size, 2.0 * queries * vectors * size
        return Work(lambda: function(query, base, 10), (query, base), peers, moved, flops)

    goals = (Goal("read", 0.85),) if queries == 1 else (Goal("peer", 1.0, "GEMM+topk"),)
    return Case("top_k", f"{queries} of 1M x 768", FORWARD, "fp32", goals, make)


# The rest: operators of which no goal is set, at the largest of their own examples, beside plain torch

_REST = (
    ("losses", "cross_entropy", BOTH),
    ("losses", "linear_log_probs", BOTH),
    ("optimisers", "adamw", FORWARD),
    ("optimisers", "newton_schulz", FORWARD),
    ("matmul", "grouped_linear", BOTH),
    ("matmul", "lora_linear", BOTH),
    ("matmul", "int8_linear", FORWARD),
    ("matmul", "quantise", FORWARD),
    ("matmul", "dequantise", FORWARD),
    ("matmul", "fake_quantise", FORWARD),
    ("sampling", "sample", FORWARD),
    ("sampling", "verify_draft", FORWARD),
)


def _rest(group: str, op: str, direction: str) -> Case:
    def make(device: str, is_tiny: bool) -> Work:
        file = "quantise" if op == "dequantise" else op
        importlib.import_module(f"marrow.kernels.{group}.{file}")  # when its turn comes
        operator = dispatch.operators()[op]
        examples = sorted(operator.examples(torch.bfloat16, device), key=lambda example: example.bytes)
        example = examples[0 if is_tiny else -1]
        wanted = operator.gradient.inputs if direction == BOTH and operator.gradient else ()
        inputs = tuple(_leaf(x) if at in wanted else x for at, x in enumerate(example.inputs))
        peers: Makers = {"torch": lambda: called(direction, inputs, operator.reference)}
        return Work(called(direction, inputs, operator), inputs, peers, example.bytes, example.flops)

    return Case(op, "largest example", direction, "bf16", (), make)
