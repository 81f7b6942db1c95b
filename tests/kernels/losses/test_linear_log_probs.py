"""linear_log_probs: every path in one chunk and in many, against fp64 and plain torch."""

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import assert_is_node, assert_near, rounded, run, usable

from marrow.core.errors import UsageError
from marrow.kernels.losses import chunks as chunking
from marrow.kernels.losses.linear_log_probs import IGNORE, OPERATOR, linear_log_probs

PATHS = usable(OPERATOR)
DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = [(1.0, False), (0.7, True), (3.0, True)]


@pytest.fixture(params=[1, 1 << 21], ids=["many chunks", "one chunk"])
def _chunked(request, monkeypatch):
    monkeypatch.setitem(chunking.CHUNK_LOGITS, "cpu", request.param)
    monkeypatch.setattr(chunking, "MIN_ROWS", 3)


def inputs(rows: int, channels: int, vocab: int, options=OPTIONS[0], seed: int = 0):
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    targets[1::3] = IGNORE
    hidden, weight = rounded(rows, channels, seed=seed), rounded(vocab, channels, seed=seed + 1, scale=0.3)
    return hidden, weight, targets, *options, True, True


def plain(given, dtype, logits_dtype):
    """Compute it in torch with all logits, in a dtype; the logits are rounded to one of their own."""
    hidden, weight, targets, scale, entropy, *_ = given
    leaves = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    logits = F.linear(*leaves)
    logits = logits + (F.linear(hidden.to(logits_dtype), weight.to(logits_dtype)) - logits).detach()
    log = (logits.to(torch.promote_types(dtype, torch.float32)) * scale).log_softmax(-1)
    is_none = targets == IGNORE
    results = [log.gather(1, targets.clamp(min=0)[:, None])[:, 0].masked_fill(is_none, 0.0)]
    results.append(-(log.exp() * log).sum(-1).masked_fill(is_none, 0.0) if entropy else log.new_empty(0))
    wanted = [each for each in results if each.requires_grad]
    grads = [rounded(*each.shape, seed=i).to(each.dtype) for i, each in enumerate(wanted)]
    return [each.detach() for each in results] + list(torch.autograd.grad(wanted, leaves, grads))


def assert_near_fp64(path, given, dtype):
    """Let a path err as plain torch does, or as the rounding of logits alone does, which both share.

    Torch's own errors, of 5 ulp of an entropy, may happen to cancel that of the logits: ours need not.
    """
    # Gradients of logits, p at most 1 each way, cancel in sums with the other factor's values.
    terms = 0.0, 0.0, *(2 * float(each.abs().max()) for each in (given[1], given[0]))
    wide = torch.float64
    ours, theirs = run(OPERATOR, path, given, dtype), plain(given, dtype, dtype)
    shared, exact = plain(given, wide, dtype), plain(given, wide, wide)
    for a, b, m, c, term in zip(ours, theirs, shared, exact, terms, strict=True):
        assert a.dtype == b.dtype
        worse = torch.where((m - c).abs() > (b.double() - c).abs(), m, b.double())
        assert_near(a, worse, c, term=term, what=f"{path} {dtype}")


@pytest.mark.usefixtures("_chunked")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("rows", "channels", "vocab"), [(1, 1, 1), (2, 3, 2), (7, 16, 129)])
def test_values_and_gradients_stay_within_the_error_budget(path, dtype, options, rows, channels, vocab):
    assert_near_fp64(path, inputs(rows, channels, vocab, options), dtype)


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
    assert_near_fp64(path, inputs(rows, channels, vocab, OPTIONS[1], seed), dtype)


def test_a_gradient_is_that_of_finite_differences():
    hidden, weight, *rest = inputs(5, 3, 7, OPTIONS[1])
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: OPERATOR.run("reference", *given, *rest), leaves)


@pytest.mark.parametrize("path", PATHS)
def test_rows_without_a_target_have_neither_value_nor_gradient(path):
    hidden, weight, _, *rest = inputs(4, 3, 7, OPTIONS[1])
    hidden = hidden.float().requires_grad_()
    found = OPERATOR.run(path, hidden, weight.float(), torch.full((4,), IGNORE), *rest[:3], False)
    (grad,) = torch.autograd.grad(sum(each.sum() for each in found), hidden)
    assert all((each == 0).all() for each in found) and (grad == 0).all()


@pytest.mark.parametrize("path", [path for path in PATHS if path != "reference"])
def test_a_target_out_of_range_is_told_by_nan(path):
    hidden, weight, _, *rest = inputs(3, 3, 7, OPTIONS[1])
    targets = torch.tensor([0, 7, 6])
    for each in OPERATOR.run(path, hidden.float(), weight.float(), targets, *rest):
        assert each.isnan().tolist() == [False, True, False]


def test_a_weight_for_each_row_weighs_its_gradient():
    hidden, weight, targets, *_ = inputs(8, 4, 11)
    leaf, factors = hidden.float().requires_grad_(), torch.randn(8)
    log_probs, entropy = linear_log_probs(leaf, weight.float(), targets)
    assert entropy is None
    (ours,) = torch.autograd.grad((log_probs * factors).sum(), leaf)
    logits = F.linear(leaf, weight.float())
    theirs = -F.cross_entropy(logits, targets, reduction="none")
    (expected,) = torch.autograd.grad((theirs * factors).sum(), leaf)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    hidden, weight, targets, *_ = inputs(2, 2, 3)
    with pytest.raises(UsageError, match="temperature"):
        linear_log_probs(hidden, weight, targets, temperature=temperature)


def test_views_and_empty_inputs_work():
    hidden, weight, targets, *rest = inputs(8, 4, 11, OPTIONS[1])
    weight = weight.float().T.contiguous().T
    for path in PATHS:
        found = OPERATOR.run(path, hidden.float()[::2], weight, targets[::2], *rest)
        expected = OPERATOR.run("reference", hidden.float()[::2], weight, targets[::2], *rest)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        leaf = weight.clone().requires_grad_()
        empty = OPERATOR.run(path, hidden.float()[:0], leaf, targets[:0], *rest)
        assert empty[0].shape == empty[1].shape == (0,)
        (grad,) = torch.autograd.grad(empty[0].sum(), leaf)
        assert (grad == 0).all()


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    hidden, weight, *rest = inputs(5, 4, 8, OPTIONS[1])
    assert_is_node(OPERATOR, (hidden.float().requires_grad_(), weight.float().requires_grad_(), *rest))
