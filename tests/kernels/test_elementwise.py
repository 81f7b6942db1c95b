"""rms_norm, rope and swiglu: every registered path against fp64 and plain torch, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.kernels import dispatch
from marrow.kernels.activations.rope import rope, rope_angles
from marrow.kernels.activations.swiglu import swiglu
from marrow.kernels.norms import rms_norm as rms_norm_module
from marrow.kernels.norms.rms_norm import rms_norm

DTYPES = [torch.float32, torch.bfloat16]
OPS = ["rms_norm", "rope", "swiglu"]
CASES = [(op, path) for op in OPS for path in dispatch.paths(op)]


def inputs(op: str, rows: int, size: int, seed: int = 0) -> list[torch.Tensor]:
    """Random fp64 inputs that round to the tested dtypes' range; `size` is even."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        # Rounded to bf16, so that the fp64 result is of the very numbers that a path sees.
        return torch.randn(*shape, generator=make).bfloat16().double()

    if op == "rms_norm":
        return [normal(rows, size) * 3, normal(size)]
    if op == "swiglu":
        return [normal(rows, 2 * size) * 2]
    angles = rope_angles(torch.arange(rows) * 7, size, 10_000.0, torch.bfloat16)
    return [normal(rows, 3, size), *(angle.double() for angle in angles)]


def call(op: str, function, tensors):
    return function(*tensors, 1e-5) if op == "rms_norm" else function(*tensors)


def differentiable(op: str) -> int:
    """How many leading inputs have gradients: not RoPE's angles."""
    return {"rms_norm": 2, "rope": 1, "swiglu": 1}[op]


def run(op: str, function, tensors, dtype):
    """Value and gradients of one path in one dtype."""
    leaves = [t.to(dtype) for t in tensors]
    for leaf in leaves[: differentiable(op)]:
        leaf.requires_grad_()
    result = call(op, function, leaves)
    weights = torch.linspace(-1, 1, result.numel()).bfloat16().view(result.shape).to(dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves[: differentiable(op)], weights)]


@pytest.mark.parametrize(("op", "path"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 2), (7, 64), (700, 96)])
def test_value_and_gradients_stay_within_the_error_budget(op, path, dtype, rows, size, within_budget):
    tensors = inputs(op, rows, size)
    functions = {name: p.function for name, p in dispatch.paths(op).items()}
    ours = run(op, functions[path], tensors, dtype)
    plain = run(op, functions["reference"], tensors, dtype)
    exact = run(op, functions["reference"], tensors, torch.float64)
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert within_budget(a, b, c)


@pytest.mark.parametrize(("op", "path"), CASES)
def test_gradients_are_those_of_finite_differences(op, path):
    tensors = inputs(op, 3, 4)
    for leaf in tensors[: differentiable(op)]:
        leaf.requires_grad_()
    function = dispatch.paths(op)[path].function
    assert torch.autograd.gradcheck(lambda *ts: call(op, function, ts), tensors)


@pytest.mark.parametrize(("op", "path"), CASES)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), half=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_any_shape_gives_the_reference_and_leaves_its_inputs_alone(op, path, rows, half, seed):
    tensors = [t.float() for t in inputs(op, rows, 2 * half, seed)]
    before = [t.clone() for t in tensors]
    result = call(op, dispatch.paths(op)[path].function, tensors)
    expected = call(op, dispatch.paths(op)["reference"].function, tensors)
    # fp32 sums of up to 80 squares in another order: a few ulp.
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize(("op", "path"), CASES)
def test_views_and_empty_inputs_work(op, path):
    function = dispatch.paths(op)[path].function
    tensors = [t.float() for t in inputs(op, 6, 8)]
    wide = torch.cat([tensors[0], tensors[0]], dim=0)[::2]
    strided = [wide, *tensors[1:]]
    torch.testing.assert_close(call(op, function, strided), call(op, function, [wide.clone(), *tensors[1:]]))
    empty = [tensors[0][:0], *(t if op == "rms_norm" else t[:0] for t in tensors[1:])]
    assert call(op, function, empty).shape[0] == 0


def test_rms_norm_statistics_do_not_overflow_half_precision():
    x = torch.full((2, 8), 3e4, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, torch.ones(8, dtype=torch.bfloat16), 1e-5), torch.ones_like(x))


def test_rms_norm_is_torch_s_own():
    x, weight = torch.randn(5, 64), torch.randn(64)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), F.rms_norm(x, (64,), weight, 1e-6))


def test_rope_keeps_lengths_and_depends_on_distance_only():
    q, k = torch.randn(1, 2, 64, dtype=torch.float64), torch.randn(1, 2, 64, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        angles = [rope_angles(torch.tensor([at]), 64, 1e4, torch.float64) for at in (query_at, key_at)]
        return (rope(q, *angles[0]) * rope(k, *angles[1])).sum(-1)

    # Angles are made in fp32: a relative 1e-7 on an angle of up to 100.
    torch.testing.assert_close(score(17, 5), score(100, 88), rtol=1e-4, atol=1e-4)
    rotated = rope(q, *rope_angles(torch.tensor([9]), 64, 1e4, torch.float64))
    torch.testing.assert_close(rotated.norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=1e-6)


def test_swiglu_gates_the_last_half_by_the_first():
    gate_up = torch.tensor([[0.0, 1e4, 2.0, 3.0]])
    assert swiglu(gate_up).tolist() == [[0.0, 3e4]]


@pytest.mark.parametrize(("op", "path"), CASES)
@pytest.mark.slow
def test_each_op_compiles_into_one_graph_and_equals_its_eager_path(op, path):
    dispatch.reset(path)
    public = {"rms_norm": rms_norm, "rope": rope, "swiglu": swiglu}[op]
    tensors = [t.float() for t in inputs(op, 5, 8)]
    for leaf in tensors[: differentiable(op)]:
        leaf.requires_grad_()
    compiled = torch.compile(lambda *ts: call(op, public, ts), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), call(op, public, tensors))


@pytest.mark.slow
def test_a_compiler_is_given_the_reference_where_a_path_is_for_eager_only():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(swiglu, fullgraph=True, backend=backend)(torch.randn(4, 8, requires_grad=True))
    assert "silu" in graphs[0].code
    assert "autograd_function" not in graphs[0].code


def test_the_size_of_blocks_changes_nothing(monkeypatch):
    tensors = inputs("rms_norm", 50, 8)
    function = dispatch.paths("rms_norm")["torch"].function
    whole = run("rms_norm", function, tensors, torch.float64)
    for elements in (1, 64, 100):
        monkeypatch.setattr(rms_norm_module, "BLOCK_ELEMENTS", elements)
        for a, b in zip(run("rms_norm", function, tensors, torch.float64), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
