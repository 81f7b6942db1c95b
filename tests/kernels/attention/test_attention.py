"""attention: every path against fp64, plain torch, a loop over queries, transformers and FlexAttention."""

from dataclasses import replace

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import assert_is_node, assert_within_budget, rounded, run, usable

from marrow.core.errors import UsageError
from marrow.kernels.attention.attention import OPERATOR, attention, attention_reference, pack
from marrow.kernels.attention.attention_torch import seen_by

PATHS = usable(OPERATOR)
FAST = [path for path in PATHS if path != "triton"]  # the interpreter costs a second a case
DTYPES = [torch.float32, torch.bfloat16]
LAYOUTS = {
    "one document a row": [[12], [12]],
    "several": [[5, 7], [1, 1, 10]],
    "mixed": [[12], [3, 9]],
    "single tokens": [[1] * 12, [6, 6]],
}


def documents(lengths: list[list[int]]) -> torch.Tensor:
    flat = [length for row in lengths for length in row]
    return torch.arange(len(flat), dtype=torch.int32).repeat_interleave(torch.tensor(flat))


def inputs(lengths, *, heads=4, kv_heads=2, size=8, window=0, softcap=0.0, seed=0):
    """All inputs of the operator, in fp64 that bf16 holds."""
    packing = pack(documents(lengths), sum(lengths[0]))
    tokens = packing.first_N.numel()
    q, k, v = (rounded(tokens, n, size, seed=seed + i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    plain = packing.first_N, packing.last_N, packing.row_tokens, packing.is_whole
    return q, k, v, *plain, window, softcap


def plain_torch(given, dtype):
    """Results and gradients of plain torch in a dtype: scores and softmax as torch does them, no wider."""

    def function(q, k, v):
        first, _, row_tokens, _, window, softcap = given[3:]
        q, k, v = (x.unflatten(0, (-1, row_tokens)).transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        at = torch.arange(row_tokens)
        first = first.view(-1, row_tokens) - torch.arange(q.shape[0])[:, None] * row_tokens
        seen = (at >= first[:, :, None]) & (at <= at[:, None])
        if window:
            seen &= at > at[:, None] - window
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = torch.tanh(scores / softcap) * softcap if softcap else scores
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)

    leaves = [x.to(dtype).requires_grad_() for x in given[:3]]
    result = function(*leaves)
    grad = rounded(*result.shape, seed=0).to(dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, grad)]


def assert_near_fp64(path, given, dtype):
    """Assert the plain budget, where an ulp of a gradient is one of the terms it is the sum of.

    Plain torch passes through them as every algorithm does. ds = p (dp - sum p dp), which cancels to nothing
    where a query sees one key: there plain torch is exact by luck, for it subtracts a number from itself,
    while do o, what stands for the sum since FlashAttention, is rounded elsewhere. An ulp of a score s is
    |s| ulp of its p: one key alone is exact in plain torch here too, but exp(s - lse) has the ulp of lse.
    """
    q, k, v, first, _, row_tokens, _, window, softcap = given
    group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    grad = rounded(*q.shape, seed=0)
    q, k, v, grad = (x.unflatten(0, (-1, row_tokens)).transpose(1, 2) for x in (q, k, v, grad))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    p = scores.masked_fill(~seen_by(first, row_tokens, window), float("-inf")).softmax(-1) * (
        1 + scores.abs()
    )
    dp = grad.abs() @ v.abs().mT
    ds = p * (dp + (p * dp).sum(-1, keepdim=True)) * scale
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (ds.mT @ q.abs(), p.mT @ grad.abs()))
    terms = (0.0, *(float(x.max()) for x in (ds @ k.abs(), dk, dv)))
    assert_within_budget(OPERATOR, path, given, dtype, plain=plain_torch, terms=terms)


def by_hand(given):
    """A second implementation: every query of every head alone."""
    q, k, v, first, _, _, _, window, softcap = given
    group, outputs = q.shape[1] // k.shape[1], []
    for i in range(q.shape[0]):
        low = max(int(first[i]), i - window + 1) if window else int(first[i])
        for head in range(q.shape[1]):
            scores = k[low : i + 1, head // group] @ q[i, head] / q.shape[2] ** 0.5
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            outputs.append(scores.softmax(0) @ v[low : i + 1, head // group])
    return torch.stack(outputs).view(q.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (1, 0.0), (3, 0.0), (0, 2.0)])
def test_the_reference_sees_each_document_as_if_it_were_alone(layout, window, softcap):
    given = inputs(LAYOUTS[layout], window=window, softcap=softcap)
    torch.testing.assert_close(OPERATOR.reference(*given), by_hand(given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (1, 0.0), (3, 0.0), (0, 2.0)])
def test_value_and_gradients_stay_within_the_error_budget(path, layout, dtype, window, softcap):
    assert_near_fp64(path, inputs(LAYOUTS[layout], window=window, softcap=softcap), dtype)


@pytest.mark.parametrize("path", [path for path in PATHS if path == "triton"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([[1]], {"heads": 1, "kv_heads": 1}),
        ([[31]], {"heads": 2, "kv_heads": 1, "size": 16}),
        ([[33]], {"heads": 3, "kv_heads": 1, "window": 1}),
        ([[17, 1, 47]], {"heads": 2, "kv_heads": 2, "size": 13}),
        ([[20], [13, 7]], {"heads": 2, "kv_heads": 1, "window": 6}),
        ([[32, 8]], {"heads": 1, "kv_heads": 1, "softcap": 2.0}),
    ],
)
def test_kernels_stay_within_the_error_budget_at_the_edges_of_blocks(path, dtype, lengths, options):
    """Blocks are of 32 queries and 16 keys in the interpreter."""
    assert_near_fp64(path, inputs(lengths, **options), dtype)


@pytest.mark.parametrize("path", [path for path in PATHS if path == "triton"])
@pytest.mark.parametrize(
    ("lengths", "window"),
    [
        ([[112]], 31),
        ([[112]], 47),
        ([[112]], 48),
        ([[112]], 49),
        ([[112]], 63),
        ([[47, 65]], 0),
        ([[63, 49]], 0),
    ],
)
def test_the_blocks_that_need_no_mask_end_where_a_window_or_a_document_does(path, lengths, window):
    """Between the diagonal and there no score is masked: one block too many is seen in a single number.

    Queries collect by blocks of 32 from blocks of 16 keys, and keys by blocks of 32 from 16 queries.
    """
    assert_near_fp64(path, inputs(lengths, heads=1, kv_heads=1, window=window), torch.float32)


@pytest.mark.parametrize("path", [path for path in FAST if path != "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@hypothesis.given(
    rows=st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=4), min_size=1, max_size=3),
    group=st.integers(1, 8),
    kv_heads=st.integers(1, 2),
    size=st.sampled_from([1, 8, 24, 32, 64]),
    window=st.sampled_from([0, 0, 1, 16, 65]),
    softcap=st.sampled_from([0.0, 0.0, 2.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_any_packing_stays_within_the_error_budget(
    path, dtype, rows, group, kv_heads, size, window, softcap, seed
):
    longest = max(sum(row) for row in rows)
    rows = [[*row, longest - sum(row)] if sum(row) < longest else row for row in rows]
    options = {"heads": group * kv_heads, "kv_heads": kv_heads, "size": size, "seed": seed}
    given = inputs(rows, **options, window=window, softcap=softcap)
    assert_near_fp64(path, given, dtype)


@pytest.mark.parametrize("path", PATHS)
def test_no_token_sees_another_document_or_the_future(path):
    """Change one token's key and value: only later tokens of its own document may move, bit for bit."""
    lengths = [[5, 7], [4, 8]]
    document = documents(lengths)
    q, k, v, *rest = (
        x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs(lengths)
    )
    before = OPERATOR.run(path, q, k, v, *rest)
    for at in (0, 4, 5, 11, 12, 17, 23):
        k2, v2 = k.clone(), v.clone()
        k2[at], v2[at] = 50.0, -50.0
        moved = (OPERATOR.run(path, q, k2, v2, *rest) != before).flatten(1).any(1)
        may = (document == document[at]) & (torch.arange(24) >= at)
        assert torch.equal(moved, may), at


@pytest.mark.parametrize("path", PATHS)
def test_scores_that_would_overflow_do_not(path):
    """The softmax is shifted by the largest score: exp of 1000 is not computed."""
    q, k, v, *rest = inputs([[9]], heads=1, kv_heads=1)
    result, *grads = run(OPERATOR, path, (q * 64, k * 64, v, *rest), torch.float32)
    assert result.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


# The others multiply values that are not seen by a p of 0, and 0 times NaN is NaN.
ISOLATED = [path for path in PATHS if path == "cpu"]


def all_of(path, q, k, v, grad, rest):
    """Results and gradients of a path, one row a token each."""
    o, lse = OPERATOR.paths[path].forward(q, k, v, *rest)
    return o, lse.T, *OPERATOR.paths[path].backward(grad, q, k, v, o, lse, *rest)


def spoil(given, first, filler, at):
    """Put a filler in the last head of q, k, v and the gradient at a token; say which tokens do not care."""
    spoilt = [x.clone() for x in given]
    for x in spoilt:
        x[at, -1, 3] = filler
    return spoilt, first != first[at]


@pytest.mark.parametrize("path", ISOLATED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filler", [float("nan"), float("inf")])
@pytest.mark.parametrize("window", [0, 5])
def test_what_is_not_finite_changes_no_bit_of_other_documents(path, dtype, filler, window):
    """Documents that share blocks with one that has NaN or infinity: results and all gradients."""
    lengths = [[20, 13, 70, 25], [100, 28]]
    q, k, v, *rest = inputs(lengths, heads=4, kv_heads=2, size=24, window=window)
    given = [x.to(dtype) for x in (q, k, v, rounded(*q.shape, seed=3))]
    clean = all_of(path, *given, rest)
    for at in (0, 19, 20, 32, 64, 102, 127, 128, 227, 228, 255):
        spoilt, others = spoil(given, rest[0], filler, at)
        found = all_of(path, *spoilt, rest)
        for name, one, other in zip(("o", "lse", "dq", "dk", "dv"), found, clean, strict=True):
            assert torch.equal(one[others], other[others]), (name, at)
        assert not any(x[at].isfinite().all() for x in found), at


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("which", range(3))
def test_what_is_not_finite_is_not_finite_for_those_who_see_it(path, which):
    q, k, v, *rest = inputs([[9, 5, 17, 2]], heads=2, kv_heads=1, size=8)
    (q, k, v)[which][11, 0, 3] = float("nan")
    expected = by_hand((q, k, v, *rest)).isfinite()
    result = OPERATOR.run(path, q.float(), k.float(), v.float(), *rest).isfinite()
    assert not expected.all() and not result[~expected].any()
    if path in ISOLATED:
        assert torch.equal(result, expected)


@pytest.mark.parametrize("path", PATHS)
def test_views_and_empty_inputs_work(path):
    q, k, v, *rest = (
        x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs([[12]])
    )
    expected = OPERATOR.run(path, q, k, v, *rest)
    fused = torch.cat([q, k, v], 1)  # as a fused projection gives them
    views = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    torch.testing.assert_close(OPERATOR.run(path, *views, *rest), expected, rtol=0, atol=0)
    none = torch.zeros(0, dtype=torch.int32)
    assert OPERATOR.run(path, q[:0], k[:0], v[:0], none, none, 12, True, 0, 0.0).shape == (0, 4, 8)


def test_a_gradient_is_that_of_finite_differences():
    for window, softcap in ((0, 0.0), (2, 0.0), (0, 1.5)):
        q, k, v, *rest = inputs([[2, 4]], heads=2, kv_heads=1, size=2, window=window, softcap=softcap)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        assert torch.autograd.gradcheck(lambda *ts, rest=rest: OPERATOR.run("reference", *ts, *rest), leaves)


@pytest.mark.parametrize("one", PATHS[1:])
@pytest.mark.parametrize("other", PATHS[1:])
def test_any_backward_may_follow_any_forward(one, other):
    given = [
        x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs([[5, 7]])
    ]
    o, lse = OPERATOR.paths[one].forward(*given)
    assert lse.is_contiguous() and lse.shape == (4, 12)
    grad = rounded(*o.shape, seed=7).float()
    found = OPERATOR.paths[other].backward(grad, *given[:3], o, lse, *given[3:])
    leaves = [x.requires_grad_() for x in given[:3]]
    expected = torch.autograd.grad(OPERATOR.reference(*given), leaves, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # fp32, sums of 12 in another order


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_nothing(dtype):
    if "cpu" not in PATHS:
        pytest.skip("there is no C path")
    given = inputs([[70, 30], [100]], heads=4, kv_heads=2, size=32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(OPERATOR, "cpu", given, dtype)
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(run(OPERATOR, "cpu", given, dtype), one, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_a_batch_of_whole_rows_is_known():
    assert pack(documents([[12], [12]]), 12).is_whole
    assert not pack(documents([[12], [11, 1]]), 12).is_whole
    packing = pack(documents([[5, 7], [12]]), 12)
    assert packing.first_N.tolist() == [0] * 5 + [5] * 7 + [12] * 12
    assert packing.last_N.tolist() == [4] * 5 + [11] * 7 + [23] * 12


def test_equal_numbers_in_different_rows_are_different_documents():
    q, k, v = (x.float() for x in inputs([[12], [12]])[:3])
    one = attention(q, k, v, pack(torch.zeros(24, dtype=torch.int32), 12))
    two = attention(q, k, v, pack(documents([[12], [12]]), 12))
    assert torch.equal(one, two)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize(
    ("row_tokens", "window", "said"),
    [
        (0, 0, "24 tokens in rows of 0"),
        (9, 0, "in rows of 9"),
        (-12, 0, "rows of -12"),
        (12, -1, "window = -1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_after_a_call_whose_tensors_did(
    path, row_tokens, window, said, monkeypatch
):
    """The tensors are the same: rows of 0 tokens would divide by it, and others leave memory as it was."""
    monkeypatch.setenv("MARROW_KERNELS", path)
    q, k, v = (x.float() for x in inputs([[12], [12]])[:3])
    packing = pack(documents([[12], [12]]), 12)
    attention(q, k, v, packing)
    with pytest.raises(UsageError, match=said):
        attention(q, k, v, replace(packing, row_tokens=row_tokens), window=window)


def test_it_is_torch_s_own():
    q, k, v = (x.float() for x in inputs([[12], [12]])[:3])
    rows = [x.view(2, 12, -1, 8).transpose(1, 2) for x in (q, k, v)]
    theirs = (
        F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)
    )
    torch.testing.assert_close(attention(q, k, v, pack(torch.zeros(24), 12)), theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile"
)  # its plain form is the oracle
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (0, 2.0)])
def test_it_is_what_transformers_and_flex_attention_compute(window, softcap):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    q, k, v = (x.float() for x in inputs([[20, 12]], size=16)[:3])
    document = documents([[20, 12]])
    ours = attention(q, k, v, pack(document, 32), window=window, softcap=softcap)

    def seen(b, h, i, j):
        return (document[i] == document[j]) & (j <= i) & ((i - j < window) if window else (i >= j))

    rows = [x[None].transpose(1, 2) for x in (q, k, v)]
    flex = flex_attention(
        *rows,
        score_mod=(lambda s, b, h, i, j: softcap * torch.tanh(s / softcap)) if softcap else None,
        block_mask=create_block_mask(seen, None, None, 32, 32, device="cpu"),
        enable_gqa=True,
    )
    torch.testing.assert_close(ours, flex[0].transpose(0, 1), rtol=1e-5, atol=1e-5)  # fp32, another order
    at = torch.arange(32)
    mask = torch.where(seen(0, 0, at[:, None], at[None]), 0.0, float("-inf"))[None, None]
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    module.config = type("Config", (), {"attn_logit_softcapping": softcap or None})()
    eager, _ = eager_attention_forward(module, *rows, mask, scaling=16**-0.5, softcap=softcap or None)
    torch.testing.assert_close(ours, eager[0], rtol=1e-5, atol=1e-5)


def test_the_reference_keeps_its_public_form():
    q, k, v, *rest = inputs([[5, 7]])
    packing = pack(documents([[5, 7]]), 12)
    assert torch.equal(attention_reference(q, k, v, packing), OPERATOR.reference(q, k, v, *rest))


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    q, k, v, *rest = inputs([[5, 7]])
    assert_is_node(OPERATOR, (*(x.float().requires_grad_() for x in (q, k, v)), *rest))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["several", "one document a row"])
def test_the_public_function_compiles_into_one_graph(layout):
    q, k, v = (x.float().requires_grad_() for x in inputs(LAYOUTS[layout])[:3])
    packing = pack(documents(LAYOUTS[layout]), 12)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, packing), attention(q, k, v, packing))
