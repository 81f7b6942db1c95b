"""Which path an operator takes, and that autograd, fakes and compilers see one operator."""

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import fsdp_job
import pytest
import torch
from torch import Tensor

from marrow.core.errors import UsageError
from marrow.kernels import dispatch
from marrow.kernels.dispatch import Case, Gradient, Operator
from marrow.kernels.norms.rms_norm import rms_norm, rms_norm_reference

CPU = Case("cpu", torch.float32)


def fake(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape)


def fake_gradient(dy: Tensor, x: Tensor, factor: float) -> Tensor:
    return torch.empty_like(dy)


class Recorder:
    """A path that computes factor * x and keeps the names of what was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def path(self, name: str):
        def forward(x, factor):
            self.calls.append(f"{name} forward")
            return factor * x, x.clone()

        def backward(dy, x, factor):
            self.calls.append(f"{name} backward")
            return factor * dy

        return forward, backward


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def scale(recorder: Recorder, request: pytest.FixtureRequest) -> Iterator[Operator]:
    """An operator with a torch path for fp32 and fp64 and one of Triton that cannot run here."""
    name = "scale_" + "".join(letter for letter in request.node.name if letter.isalnum())

    def reference(x, factor):
        recorder.calls.append("reference")
        return factor * x

    gradient = Gradient(inputs=(0,), saves=lambda i, o: (o[1], i[1]), fake=fake_gradient)
    operator = Operator(name, reference, fake=fake, gradient=gradient)
    operator.add("torch", *recorder.path("torch"), dtypes=(torch.float32, torch.float64))
    operator.add("triton", *recorder.path("triton"), unusable=lambda: "no triton here")
    yield operator
    del dispatch._operators[name]


def test_auto_takes_the_fastest_path_of_the_device(scale, recorder):
    assert torch.equal(scale(torch.ones(2), 3.0), torch.full((2,), 3.0))
    assert recorder.calls == ["torch forward"]


def test_a_slower_path_than_expected_is_one_warning_with_the_reason(scale):
    case = Case("cuda", torch.float32)
    with pytest.warns(
        RuntimeWarning, match=r"on cuda in float32 takes its torch path: triton: no triton here"
    ):
        assert scale._choose(case).name == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scale._choose(case)


def test_a_dtype_that_no_path_is_made_for_is_said_and_takes_the_reference(scale, recorder):
    with pytest.warns(
        RuntimeWarning, match="in bfloat16 takes its reference path: torch: not made for bfloat16"
    ):
        scale(torch.ones(2, dtype=torch.bfloat16), 3.0)
    assert recorder.calls == ["reference"]


def test_triton_is_not_missed_on_a_cpu_unless_it_was_asked_for(scale):
    assert scale.choose(CPU) == ("torch", "")
    dispatch.reset("triton")
    with pytest.warns(RuntimeWarning, match="takes its torch path: triton: no triton here"):
        scale(torch.ones(2), 3.0)


def test_an_interpreter_that_could_run_is_taken_only_if_asked_for(recorder):
    operator = Operator("scale_interpreted", lambda x, factor: factor * x, fake=fake)
    try:
        operator.add("torch", recorder.path("torch")[0])
        operator.add("triton", recorder.path("triton")[0])
        operator(torch.ones(2), 3.0)
        assert operator.choose(Case("cuda", torch.float32)) == ("triton", "")
        dispatch.reset("triton")
        operator(torch.ones(2), 3.0)
        assert recorder.calls == ["torch forward", "triton forward"]
    finally:
        del dispatch._operators["scale_interpreted"]


def test_a_path_that_loses_in_a_shape_class_gives_way_there_without_a_warning(recorder):
    operator = Operator(
        "scale_by_shape", lambda x, factor: factor * x, fake=fake, shape_class=lambda x, factor: len(x) > 4
    )
    try:
        operator.add("torch", recorder.path("torch")[0])
        operator.add(
            "cpu",
            recorder.path("cpu")[0],
            loses=lambda case: "torch wins on long rows" if case.shape else None,
        )
        operator(torch.ones(2), 3.0)
        operator(torch.ones(9), 3.0)
        assert recorder.calls == ["cpu forward", "torch forward"]
        assert operator.choose(Case("cpu", torch.float32, True)) == ("torch", "cpu: torch wins on long rows")
        dispatch.reset("cpu")  # asked for is asked for
        operator(torch.ones(9), 3.0)
        assert recorder.calls[-1] == "cpu forward"
    finally:
        del dispatch._operators["scale_by_shape"]


def test_reference_can_be_asked_for_without_a_warning(scale, recorder):
    dispatch.reset("reference")
    scale(torch.ones(2), 3.0)
    assert scale.choose(Case("cuda", torch.float32)) == ("reference", "")
    assert recorder.calls == ["reference"]


def test_a_path_that_the_operator_lacks_is_replaced_with_a_warning(scale):
    dispatch.reset("cpu")
    with pytest.warns(RuntimeWarning, match="takes its torch path: cpu was asked for, it has no such path"):
        scale(torch.ones(2), 3.0)


def test_the_environment_is_read_again_after_a_reset(scale, recorder, monkeypatch):
    scale(torch.ones(2), 3.0)
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    scale(torch.ones(2), 3.0)  # a choice holds until the table is reset
    dispatch.reset()
    scale(torch.ones(2), 3.0)
    assert recorder.calls == ["torch forward", "torch forward", "reference"]


@pytest.mark.parametrize("mode", ["fast", "AUTO", "tritno"])
def test_an_unknown_mode_is_refused_with_the_allowed_ones(mode, monkeypatch):
    with pytest.raises(UsageError, match="auto, triton, cpu, torch, reference"):
        dispatch.reset(mode)
    monkeypatch.setenv(dispatch.ENVIRONMENT, mode)
    with pytest.raises(UsageError, match=mode):
        dispatch.wanted()


def test_backward_follows_the_path_of_forward_and_keeps_what_it_said(scale, recorder):
    x = torch.randn(3, requires_grad=True)
    y = scale(x, 3.0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.full((3,), 3.0))
    assert recorder.calls == ["torch forward", "torch backward"]


def test_inputs_that_share_a_gradient_get_it_from_one_output(recorder):
    def fake_sum(x: Tensor, y: Tensor) -> Tensor:
        return torch.empty_like(x)

    def fake_sum_gradient(dy: Tensor) -> Tensor:
        return torch.empty_like(dy)

    gradient = Gradient(inputs=((0, 1),), saves=lambda i, o: (), fake=fake_sum_gradient)
    operator = Operator("sum_of_two", torch.add, fake=fake_sum, gradient=gradient)
    try:
        operator.add("torch", torch.add, lambda dy: 2 * dy)
        x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        for result in (operator(x, y), torch.ops.marrow.sum_of_two(x, y)):
            dx, dy = torch.autograd.grad(result.sum(), (x, y))
            assert torch.equal(dx, torch.full((2,), 2.0))
            assert torch.equal(dy, dx)
    finally:
        del dispatch._operators["sum_of_two"]


def test_no_gradient_is_prepared_where_none_is_needed(scale):
    x = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        assert not scale(x, 3.0).requires_grad
    assert scale(x, 3.0).requires_grad
    assert not scale(x.detach(), 3.0).requires_grad


def test_choices_are_listed_for_doctor(scale):
    listed = {(c.op, c.device, c.dtype): (c.path, c.reason) for c in dispatch.choices()}
    assert listed[scale.name, "cpu", "float32"] == ("torch", "")
    assert listed[scale.name, "cpu", "bfloat16"][0] == "reference"
    assert ("rms_norm", "cpu", "float32") in listed


def test_fakes_see_one_node_with_its_shapes(scale, recorder):
    with torch._subclasses.FakeTensorMode() as mode:
        assert scale(mode.from_tensor(torch.ones(4, 5)), 3.0).shape == (4, 5)
    assert recorder.calls == []


@pytest.mark.slow
def test_a_compiled_graph_shows_one_node_and_gives_the_same(scale, recorder):
    nodes = []

    def backend(graph, inputs):
        nodes.extend(node.name for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(lambda x: scale(x, 3.0), fullgraph=True, backend=backend)(torch.ones(3))
    assert nodes[0] == f"{scale.name}_default" and len(nodes) == 2  # the other takes the first result
    x = torch.randn(3, requires_grad=True)
    y = torch.compile(lambda x: scale(x, 3.0), fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 3.0))
    assert recorder.calls[-2:] == ["torch forward", "torch backward"]


@pytest.mark.slow
def test_a_compiler_is_given_the_reference_where_no_path_takes_the_dtype(scale, recorder):
    x = torch.ones(3, dtype=torch.float16)
    y = torch.compile(lambda x: scale(x, 3.0), fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, 3 * x)
    assert set(recorder.calls) <= {"reference"}


def test_the_node_itself_says_what_to_do_where_it_has_no_path(scale):
    with (
        pytest.warns(RuntimeWarning, match="reference path"),
        pytest.raises(UsageError, match="has no path for float16 on cpu"),
    ):
        getattr(torch.ops.marrow, scale.name)(torch.ones(2, dtype=torch.float16), 3.0)


def test_the_public_op_follows_the_choice():
    x, weight = torch.randn(3, 8), torch.randn(8)
    dispatch.reset("reference")
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    assert {c.path for c in dispatch.choices() if c.op == "rms_norm"} == {"reference"}


@pytest.mark.slow
def test_the_environment_decides_in_a_fresh_process():
    program = (
        "import marrow.kernels.norms.rms_norm, marrow.kernels.dispatch as d;"
        "print({c.path for c in d.choices()})"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={"MARROW_KERNELS": "reference", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "{'reference'}"


@pytest.mark.slow
def test_a_decoder_sharded_by_fsdp2_has_the_gradients_of_a_whole_one(tmp_path):
    job = Path(fsdp_job.__file__)
    result = tmp_path / "result"
    jobs = [
        subprocess.Popen([sys.executable, job, str(rank), "2", str(tmp_path / "store"), str(result)])
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in jobs] == [0, 0]
    finally:
        for process in jobs:
            process.kill()
            process.wait()
    assert float(result.read_text()) < 1e-5  # fp32; halves are averaged in another order
