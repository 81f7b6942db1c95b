import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.kernels import dispatch
from marrow.kernels.attention.attention import attention, attention_reference, pack

PATHS = list(dispatch.paths("attention"))
LAYOUTS = {
    "one document a row": [[12], [12]],
    "several": [[5, 7], [1, 1, 10]],
    "mixed": [[12], [3, 9]],
    "single tokens": [[1] * 12, [6, 6]],
}


def documents(lengths: list[list[int]]) -> torch.Tensor:
    flat = [length for row in lengths for length in row]
    return torch.arange(len(flat), dtype=torch.int32).repeat_interleave(torch.tensor(flat))


def qkv(tokens: int, heads: int = 4, kv_heads: int = 2, size: int = 8, seed: int = 0) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    shapes = [(tokens, heads, size), (tokens, kv_heads, size), (tokens, kv_heads, size)]
    return [torch.randn(shape, generator=make).bfloat16().double() for shape in shapes]


def run(function, tensors, packing, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    result = function(*leaves, packing)
    weights = torch.linspace(-1, 1, result.numel()).bfloat16().view(result.shape).to(dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, weights)]


def by_hand(q, k, v, lengths):
    """A second implementation: every document alone, every query alone."""
    outputs, at = [], 0
    group = q.shape[1] // k.shape[1]
    for length in (n for row in lengths for n in row):
        for i in range(at, at + length):
            for head in range(q.shape[1]):
                scores = k[at : i + 1, head // group] @ q[i, head] / q.shape[2] ** 0.5
                outputs.append(scores.softmax(0) @ v[at : i + 1, head // group])
        at += length
    return torch.stack(outputs).view(q.shape)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_document_attends_as_if_it_were_alone(path, layout):
    lengths = LAYOUTS[layout]
    q, k, v = qkv(24)
    packing = pack(documents(lengths), 12, torch.float64)
    result = dispatch.paths("attention")[path].function(q, k, v, packing)
    torch.testing.assert_close(result, by_hand(q, k, v, lengths), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_stay_within_the_error_budget(path, layout, dtype, within_budget):
    # Plain torch of the same dtype: scores and softmax as torch does them, no wider.
    def plain(q, k, v, packing):
        rows, length = packing.document_BT.shape
        q, k, v = (x.view(rows, length, -1, x.shape[-1]).transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        same = packing.document_BT[:, None, :, None] == packing.document_BT[:, None, None, :]
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~same.tril(), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)

    tensors = qkv(24)
    packing = pack(documents(LAYOUTS[layout]), 12, dtype)
    ours = run(dispatch.paths("attention")[path].function, tensors, packing, dtype)
    exact = run(attention_reference, tensors, packing, torch.float64)
    for a, b, c in zip(ours, run(plain, tensors, packing, dtype), exact, strict=True):
        assert within_budget(a, b, c)


@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_those_of_finite_differences(path):
    leaves = [t.requires_grad_() for t in qkv(6, heads=2, kv_heads=1, size=2)]
    packing = pack(documents([[2, 4]]), 6, torch.float64)
    function = dispatch.paths("attention")[path].function
    # torch's CPU backward keeps its log-sum-exp in fp32 for fp64 input: gradients to 1e-5.
    assert torch.autograd.gradcheck(lambda *ts: function(*ts, packing), leaves, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_any_packing_gives_the_reference_and_leaves_its_inputs_alone(path, rows, group, kv_heads, seed):
    longest = max(sum(row) for row in rows)
    rows = [[*row, longest - sum(row)] if sum(row) < longest else row for row in rows]
    tensors = [t.float() for t in qkv(longest * len(rows), group * kv_heads, kv_heads, 4, seed)]
    before = [t.clone() for t in tensors]
    packing = pack(documents(rows), longest)
    result = dispatch.paths("attention")[path].function(*tensors, packing)
    # fp32 softmax over at most 36 keys, summed in another order.
    torch.testing.assert_close(result, attention_reference(*tensors, packing), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_no_token_sees_another_document_or_the_future(path):
    """Change one token's key and value: only later tokens of its own document may move, bit for bit."""
    lengths = [[5, 7], [4, 8]]
    document = documents(lengths)
    q, k, v = (t.float() for t in qkv(24))
    packing = pack(document, 12)
    function = dispatch.paths("attention")[path].function
    before = function(q, k, v, packing)
    for at in range(24):
        k2, v2 = k.clone(), v.clone()
        k2[at], v2[at] = 50.0, -50.0
        moved = (function(q, k2, v2, packing) != before).flatten(1).any(1)
        may = (document == document[at]) & (torch.arange(24) >= at)
        assert torch.equal(moved, may)


def test_a_batch_of_whole_rows_needs_no_mask():
    assert pack(documents([[12], [12]]), 12).mask_B1TS is None
    assert pack(documents([[12], [11, 1]]), 12).mask_B1TS is not None


def test_equal_numbers_in_different_rows_are_different_documents():
    q, k, v = (t.float() for t in qkv(24))
    one = attention(q, k, v, pack(torch.zeros(24, dtype=torch.int32), 12))
    two = attention(q, k, v, pack(documents([[12], [12]]), 12))
    assert torch.equal(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_it_compiles_into_one_graph(masked):
    tensors = [t.float().requires_grad_() for t in qkv(24)]
    packing = pack(documents(LAYOUTS["several" if masked else "one document a row"]), 12)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors, packing), attention(*tensors, packing))
