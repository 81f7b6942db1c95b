import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.kernels import dispatch
from marrow.kernels.losses import linear_cross_entropy as module
from marrow.kernels.losses.linear_cross_entropy import (
    IGNORE,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

PATHS = list(dispatch.paths("linear_cross_entropy"))


@pytest.fixture(params=[64, 1 << 21], ids=["many chunks", "one chunk"])
def _chunked(request, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_LOGITS", request.param)


def inputs(rows: int, channels: int, vocab: int, seed: int = 0):
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, channels, generator=make).bfloat16().double()
    weight = torch.randn(vocab, channels, generator=make).mul(0.3).bfloat16().double()
    targets = torch.randint(0, vocab, (rows,), generator=make)
    targets[::3] = IGNORE
    return hidden, weight, targets


def run(function, hidden, weight, targets, dtype):
    leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    loss = function(*leaves, targets)
    return [loss.detach(), *torch.autograd.grad(loss / 7, leaves)]


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_stay_within_the_error_budget(path, dtype, within_budget):
    tensors = inputs(40, 16, 24)

    def plain(hidden, weight, targets):  # torch with logits of the tested dtype
        logits = (hidden @ weight.T).float()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    ours = run(dispatch.paths("linear_cross_entropy")[path].function, *tensors, dtype)
    exact = run(linear_cross_entropy_reference, *tensors, torch.float64)
    for a, b, c in zip(ours, run(plain, *tensors, dtype), exact, strict=True):
        assert within_budget(a, b, c)


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_those_of_finite_differences(path):
    hidden, weight, targets = inputs(7, 3, 12)
    function = dispatch.paths("linear_cross_entropy")[path].function
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradcheck(lambda h, w: function(h, w, targets), leaves)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 50), channels=st.integers(1, 9), vocab=st.integers(1, 40), seed=st.integers(0, 2**31)
)
def test_any_shape_gives_the_reference_and_leaves_its_inputs_alone(path, rows, channels, vocab, seed):
    hidden, weight, targets = inputs(rows, channels, vocab, seed)
    before = [t.clone() for t in (hidden, weight, targets)]
    function = dispatch.paths("linear_cross_entropy")[path].function
    for a, b in zip(
        run(function, hidden, weight, targets, torch.float64),
        run(linear_cross_entropy_reference, hidden, weight, targets, torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip((hidden, weight, targets), before, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_rows_without_a_target_have_no_loss_and_no_gradient(path):
    dispatch.reset(path)
    hidden, weight, targets = inputs(9, 4, 6)
    hidden.requires_grad_()
    loss, count = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert count == 6
    assert (hidden.grad[targets == IGNORE] == 0).all()
    assert (hidden.grad[targets != IGNORE] != 0).any(1).all()
    none, nothing = linear_cross_entropy(hidden, weight, torch.full((9,), IGNORE))
    assert (none.item(), nothing.item()) == (0.0, 0)


def test_equal_logits_cost_the_logarithm_of_the_vocabulary():
    loss, count = linear_cross_entropy(torch.zeros(5, 4), torch.randn(32, 4), torch.arange(5))
    assert loss.item() / count.item() == pytest.approx(math.log(32), rel=1e-6)


def test_huge_logits_do_not_overflow():
    hidden, weight = torch.full((2, 1), 1e4, requires_grad=True), torch.tensor([[1.0], [-1.0]])
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert torch.isfinite(hidden.grad).all()


def test_the_logits_of_all_rows_are_never_in_memory(monkeypatch):
    """Ask the largest tensor that any operator makes: a chunk of logits, or a gradient."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    monkeypatch.setattr(module, "CHUNK_LOGITS", 4096)
    hidden, weight = torch.randn(1024, 8, requires_grad=True), torch.randn(256, 8, requires_grad=True)
    with Largest():
        linear_cross_entropy(hidden, weight, torch.zeros(1024, dtype=torch.int64))[0].backward()
    assert largest <= max(4096, hidden.numel(), weight.numel())


def test_without_gradients_none_are_made():
    hidden, weight, targets = inputs(9, 4, 6)
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, targets)[0].backward()
    assert weight.grad is not None and hidden.grad is None


# torch's own tracer makes an instance of every autograd.Function, and warns of itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
def test_it_compiles_into_one_graph():
    hidden, weight, targets = inputs(9, 4, 6)
    for path in PATHS:
        dispatch.reset(path)
        grads = []
        for function in (
            linear_cross_entropy,
            torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager"),
        ):
            leaf = weight.clone().requires_grad_()
            loss, _ = function(hidden, leaf, targets)
            loss.backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)
