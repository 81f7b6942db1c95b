"""linear_cross_entropy: every path in one chunk and in many, against fp64 and plain torch."""

import math

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import assert_near, filled_with_nan, rounded, usable

from marrow.kernels import dispatch
from marrow.kernels.losses import chunks as chunking
from marrow.kernels.losses.cross_entropy import cross_entropy_reference
from marrow.kernels.losses.linear_cross_entropy import IGNORE, OPERATOR, linear_cross_entropy

PATHS = usable(OPERATOR)
DTYPES = [torch.float32, torch.bfloat16]
PLAIN, SMOOTHED = (0.0, 0.0), (0.1, 1e-2)


@pytest.fixture(params=[1, 1 << 21], ids=["many chunks", "one chunk"])
def _chunked(request, monkeypatch):
    monkeypatch.setitem(chunking.CHUNK_LOGITS, "cpu", request.param)
    monkeypatch.setattr(chunking, "MIN_ROWS", 3)


def inputs(rows: int, channels: int, vocab: int, seed: int = 0):
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    targets[::3] = IGNORE
    return rounded(rows, channels, seed=seed), rounded(vocab, channels, seed=seed + 1, scale=0.3), targets


def run(function, hidden, weight, dtype):
    """Return the loss and both gradients of a third of it."""
    leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    with filled_with_nan():
        loss = function(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss / 3, leaves)]


def assert_near_fp64(path, given, options, dtype):
    hidden, weight, targets = given
    before = [each.clone() for each in given]

    def plain(hidden, weight):  # torch with logits of the tested dtype
        return cross_entropy_reference(F.linear(hidden, weight), targets, *options)[0].sum()

    def ours(hidden, weight):
        return OPERATOR.run(path, hidden, weight, targets, True, True, *options)

    def rounding(hidden, weight):  # fp64 but for the rounding of logits, which ours and torch share
        logits = F.linear(hidden, weight)
        short = F.linear(hidden.to(dtype), weight.to(dtype))
        logits = logits + (short - logits).detach()
        return cross_entropy_reference(logits, targets, *options)[0].sum()

    found, theirs = run(ours, hidden, weight, dtype), run(plain, hidden, weight, dtype)
    shared, exact = (run(each, hidden, weight, torch.float64) for each in (rounding, plain))
    # Gradients of logits, a third of 1 each way and more, cancel in sums with the other factor's values.
    terms = 0.0, *(float(each.detach().abs().max()) for each in (weight, hidden))
    for a, b, m, c, term in zip(found, theirs, shared, exact, terms, strict=True):
        assert a.dtype == b.dtype
        worse = torch.where((m - c).abs() > (b.double() - c).abs(), m, b.double())  # torch's may cancel
        assert_near(a, worse, c, term=term, what=f"{path} {dtype}")
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [PLAIN, SMOOTHED])
@pytest.mark.parametrize(("rows", "channels", "vocab"), [(1, 1, 1), (2, 3, 2), (7, 16, 129)])
def test_loss_and_gradients_stay_within_the_error_budget(path, dtype, options, rows, channels, vocab):
    assert_near_fp64(path, inputs(rows, channels, vocab), options, dtype)


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("path", [path for path in PATHS if path != "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(
    max_examples=15, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None
)
@hypothesis.given(
    rows=st.integers(1, 40),
    channels=st.integers(1, 40),
    vocab=st.integers(1, 200),
    seed=st.integers(0, 2**31),
)
def test_any_shape_stays_within_the_error_budget(path, dtype, rows, channels, vocab, seed):
    assert_near_fp64(path, inputs(rows, channels, vocab, seed), SMOOTHED, dtype)


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("path", ["reference", "torch"])
def test_gradients_are_those_of_finite_differences(path):
    hidden, weight, targets = inputs(7, 3, 12)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    given = targets, True, True, *SMOOTHED
    assert torch.autograd.gradcheck(lambda h, w: OPERATOR.run(path, h, w, *given), leaves)


@pytest.mark.parametrize("path", PATHS)
def test_rows_without_a_target_have_no_loss_and_no_gradient(path):
    hidden, weight, targets = inputs(9, 4, 6)
    hidden = hidden.float().requires_grad_()
    weight = weight.float()
    loss = OPERATOR.run(path, hidden, weight, targets, True, False, *PLAIN)
    loss.backward()
    assert (hidden.grad[targets == IGNORE] == 0).all()
    assert (hidden.grad[targets != IGNORE] != 0).any(1).all()
    none = OPERATOR.run(path, hidden, weight, torch.full((9,), IGNORE), True, False, *PLAIN)
    assert none.item() == 0.0
    empty = OPERATOR.run(path, hidden[:0], weight, targets[:0], True, False, *PLAIN)
    assert empty.item() == 0.0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [3, 300, 1300])
def test_the_mean_over_targets_bends_no_gradient(path, count):
    """1 / count in bf16 errs by up to 2^-9, all gradients by the same: their mean ratio to fp64 must not."""
    hidden, weight, targets = inputs(40, 32, 50)

    def gradients(path, dtype):
        leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        loss = OPERATOR.run(path, *leaves, targets, True, True, 0.0, 0.0)
        return torch.autograd.grad(loss / count, leaves)

    for low, exact in zip(
        gradients(path, torch.bfloat16), gradients("reference", torch.float64), strict=True
    ):
        # Each element errs by 2^-9 of its own, either way: over a thousand of them the mean by some 2^-13.
        ratio = (low.double() * exact).sum() / exact.square().sum()
        assert abs(ratio.item() - 1) < 2**-11


def test_rows_with_a_target_are_counted():
    hidden, weight, targets = inputs(9, 4, 6)
    assert linear_cross_entropy(hidden, weight, targets)[1] == 6


def test_no_rows_have_no_gradient():
    weight = torch.randn(6, 4, requires_grad=True)
    loss, count = linear_cross_entropy(torch.randn(0, 4), weight, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert count == 0 and (weight.grad == 0).all()


def test_equal_logits_cost_the_logarithm_of_the_vocabulary():
    loss, count = linear_cross_entropy(torch.zeros(5, 4), torch.randn(32, 4), torch.arange(5))
    assert loss.item() / count.item() == pytest.approx(math.log(32), rel=1e-6)


def test_huge_logits_do_not_overflow():
    hidden, weight = torch.full((2, 1), 1e4, requires_grad=True), torch.tensor([[1.0], [-1.0]])
    loss, _ = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("path", [path for path in PATHS if path not in ("reference", "triton")])
def test_the_logits_of_all_rows_are_never_in_memory(path, monkeypatch):
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

    monkeypatch.setitem(chunking.CHUNK_LOGITS, "cpu", 4096)
    monkeypatch.setattr(chunking, "MIN_ROWS", 16)
    hidden, weight = torch.randn(1024, 8, requires_grad=True), torch.randn(256, 8, requires_grad=True)
    with Largest():
        given = torch.zeros(1024, dtype=torch.int64), True, True, *PLAIN
        OPERATOR.run(path, hidden, weight, *given).backward()
    assert 4096 <= largest <= max(4096, hidden.numel(), weight.numel())


def test_without_gradients_none_are_made():
    hidden, weight, targets = inputs(9, 4, 6)
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, targets)[0].backward()
    assert weight.grad is not None and hidden.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets)[0].requires_grad


def test_threads_change_nothing():
    hidden, weight, targets = inputs(33, 16, 70)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(
                OPERATOR.paths["cpu"].forward(hidden.float(), weight.float(), targets, *(True,) * 2, *PLAIN)
            )
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):  # torch's matrix products may differ by their order of sums
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# torch's own tracer makes an instance of every autograd.Function, and warns of itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
def test_it_compiles_into_one_graph():
    hidden, weight, targets = (each.float() if each.is_floating_point() else each for each in inputs(9, 4, 6))
    for path in PATHS:
        dispatch.reset(path)
        torch._dynamo.reset()
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


@pytest.mark.slow
def test_torch_library_accepts_it():
    hidden, weight, targets = (each.float() if each.is_floating_point() else each for each in inputs(5, 4, 6))
    given = hidden.requires_grad_(), weight.requires_grad_(), targets, True, True, *PLAIN
    torch.library.opcheck(torch.ops.marrow.linear_cross_entropy.default, given)
