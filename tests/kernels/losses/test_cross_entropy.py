"""cross_entropy: every path against fp64 and plain torch, values and gradients."""

import math
from functools import partial

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import assert_is_node, assert_within_budget, rounded, usable

from marrow.core.errors import UsageError
from marrow.kernels.losses.cross_entropy import (
    IGNORE,
    OPERATOR,
    backward_triton,
    cross_entropy,
    forward_triton,
    in_place_triton,
)
from marrow.kernels.losses.linear_cross_entropy import linear_cross_entropy
from marrow.kernels.losses.linear_log_probs import linear_log_probs
from marrow.kernels.memory import meta, phantom

PATHS = usable(OPERATOR)
DTYPES = [torch.float32, torch.bfloat16]
PLAIN, SMOOTHED = (0.0, 0.0), (0.1, 1e-2)


def inputs(rows: int, vocab: int, options=PLAIN, seed: int = 0, scale: float = 3.0):
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(seed))
    targets[1::3] = IGNORE
    return rounded(rows, vocab, seed=seed, scale=scale), targets, *options


def assert_near_fp64(path, given, dtype):
    """At a target p (1 + 2 z lse) grad + p lse_grad and -grad meet, and may cancel: each ulp is of those."""
    logits, _, _, z = given
    grad, lse_grad = (float(rounded(len(logits), seed=seed).abs().max()) for seed in range(2))  # as in run()
    term = grad * (1 + 2 * z * float(logits.logsumexp(-1).abs().max())) + lse_grad
    assert_within_budget(OPERATOR, path, given, dtype, terms=(0.0, 0.0, term))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [PLAIN, SMOOTHED])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (3, 2), (2, 17), (2, 127), (2, 128), (2, 129)])
def test_values_and_gradients_stay_within_the_error_budget(path, dtype, options, rows, vocab):
    assert_near_fp64(path, inputs(rows, vocab, options), dtype)


@pytest.mark.parametrize("path", PATHS)
def test_a_row_of_many_blocks_stays_within_the_error_budget(path):
    assert_near_fp64(path, inputs(2, 4096 * 2 + 3, SMOOTHED), torch.float32)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25)
@hypothesis.given(
    rows=st.integers(1, 40),
    vocab=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_any_shape_stays_within_the_error_budget(path, dtype, rows, vocab, seed, scale):
    assert_near_fp64(path, inputs(rows, vocab, SMOOTHED, seed, scale), dtype)


def test_it_is_torch_s_own():
    logits, targets, *_ = inputs(9, 33)
    for smoothing in (0.0, 0.2):
        ours, lse = cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        theirs = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)  # ours is fp32
        torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-6)


def test_a_gradient_is_that_of_finite_differences():
    logits, targets, *options = inputs(4, 5, SMOOTHED)
    assert torch.autograd.gradcheck(
        lambda x: OPERATOR.run("reference", x, targets, *options), logits.requires_grad_()
    )


@pytest.mark.parametrize("path", PATHS)
def test_large_logits_lose_nothing(path):
    """The lse of logits near 10,000 has no digits behind the third: the loss must not go through it."""
    logits = torch.tensor([[10000.0, 9999.0, 9990.0]]).requires_grad_()
    losses, _ = OPERATOR.run(path, logits, torch.tensor([1]), *PLAIN)
    exact = F.cross_entropy(logits.double(), torch.tensor([1]), reduction="none")
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    (exact_grad,) = torch.autograd.grad(exact.sum(), logits)
    tolerance = 1e-3 if path == "reference" else 1e-6
    torch.testing.assert_close(losses.double(), exact, rtol=tolerance, atol=0)
    torch.testing.assert_close(grad, exact_grad, rtol=2 * tolerance, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_rows_that_are_not_finite_spoil_no_other(path):
    logits, targets = rounded(5, 40, seed=2).float(), torch.zeros(5, dtype=torch.int64)
    logits[0, 3], logits[1, 5], logits[2] = math.nan, math.inf, -math.inf
    logits[3, 7:] = -math.inf  # a masked vocabulary
    leaf = logits.clone().requires_grad_()
    losses, lse = OPERATOR.run(path, leaf, targets, *PLAIN)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    assert losses[0].isnan()
    assert not losses[1].isfinite() and not losses[2].isfinite()
    assert grad[0].isnan().any() and grad[1].isnan().any()
    torch.testing.assert_close(losses[3:], F.cross_entropy(logits[3:], targets[3:], reduction="none"))
    assert lse[2] == -math.inf
    assert (grad[3, 7:] == 0).all() and grad[3:].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_target_have_no_loss_and_no_gradient(path, dtype):
    logits = rounded(3, 20, seed=1).to(dtype).requires_grad_()
    losses, _ = OPERATOR.run(path, logits, torch.full((3,), IGNORE), *SMOOTHED)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert (losses == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("path", [path for path in PATHS if path != "reference"])
@pytest.mark.parametrize("target", [20, -1, 2**40, -(2**40)])
def test_a_target_out_of_range_is_told_by_nan_and_reads_nothing(path, target):
    logits = rounded(3, 20, seed=1).float().requires_grad_()
    losses, _ = OPERATOR.run(path, logits, torch.tensor([4, target, 5]), *PLAIN)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.isnan().tolist() == [False, True, False]
    assert grad.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("path", PATHS)
def test_views_and_empty_inputs_work(path):
    logits, targets, *options = inputs(8, 12)
    turned = logits.float().T.contiguous().T  # not contiguous
    for a, b in zip(
        OPERATOR.run(path, turned[::2], targets[::2], *options),
        OPERATOR.run(path, turned[::2].contiguous(), targets[::2].contiguous(), *options),
        strict=True,
    ):
        assert torch.equal(a, b)
    losses, lse = OPERATOR.run(path, logits[:0].float(), targets[:0], *options)
    assert losses.shape == lse.shape == (0,)


def test_threads_change_nothing():
    logits, targets, *options = inputs(33, 70, SMOOTHED)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            leaf = logits.float().requires_grad_()
            losses, lse = OPERATOR.run("cpu", leaf, targets, *options)
            found.append((losses, lse, *torch.autograd.grad((losses + lse).sum(), leaf)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif("triton" not in PATHS, reason="needs Triton or its interpreter")
def test_offsets_beyond_two_billion_elements_hit_their_tensors():
    logits, targets = meta(3 * 2**20, 4096, dtype=torch.bfloat16), meta(3 * 2**20, dtype=torch.int64)
    with phantom() as watch:
        losses, lse, sums = forward_triton(logits, targets, *SMOOTHED)
        backward_triton(losses, lse, logits, targets, sums, *SMOOTHED)
        in_place_triton(logits, targets, *SMOOTHED)
    assert watch.launches == 3


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    logits, targets, *options = inputs(5, 8, SMOOTHED)
    assert_is_node(OPERATOR, (logits.float().requires_grad_(), targets, *options))


@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        (torch.zeros(3, 5), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(3, 5), torch.zeros(3, dtype=torch.int32)),
        (torch.zeros(2, 3, 5), torch.zeros(2, dtype=torch.int64)),
    ],
    ids=["too few", "int32", "an axis too many"],
)
def test_targets_that_do_not_fit_the_rows_are_refused_by_every_loss(logits, targets):
    """C takes addresses: it would read behind the targets' end."""
    weight = torch.zeros(4, 5)
    for loss in (
        cross_entropy,
        *(partial(one, weight_VC=weight) for one in (linear_cross_entropy, linear_log_probs)),
    ):
        with pytest.raises(UsageError, match=r"targets \[\d\] of torch\.int\d\d do not fit rows"):
            loss(logits, targets_N=targets)
