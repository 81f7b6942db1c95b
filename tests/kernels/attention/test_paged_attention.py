import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.kernels import dispatch
from marrow.kernels.attention.paged_attention import paged_attention_reference

PATHS = list(dispatch.paths("paged_attention"))
SIZE, BLOCK = 8, 4


class Case:
    """Sequences with known dense keys and values, scattered over a cache in random order."""

    def __init__(self, lengths, queries, *, heads=4, kv_heads=2, dtype=torch.float32, seed=0):
        make = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=make).bfloat16().to(dtype)

        self.lengths, self.queries = lengths, queries
        needed = [-(-length // BLOCK) for length in lengths]
        self.cache = [normal(sum(needed) + 3, BLOCK, kv_heads, SIZE) for _ in range(2)]
        order = torch.randperm(sum(needed), generator=make) + 3  # blocks 0 to 2 are nobody's
        self.blocks = torch.zeros(len(lengths), max(needed) + 1, dtype=torch.int32)
        self.dense = []
        for i, (length, count) in enumerate(zip(lengths, needed, strict=True)):
            own, order = order[:count], order[count:]
            self.blocks[i, :count] = own.int()
            self.dense.append([cache[own].flatten(0, 1)[:length] for cache in self.cache])
        self.starts = torch.tensor([0, *queries]).cumsum(0).int()
        self.ends = torch.tensor(lengths, dtype=torch.int32)
        self.q = normal(sum(queries), heads, SIZE)

    def arguments(self):
        return self.q, *self.cache, self.blocks, self.starts, self.ends

    def by_dense(self, dtype=torch.float64):
        """Dense attention over the same history: every query alone."""
        rows = []
        for (k, v), length, count, start in zip(
            self.dense, self.lengths, self.queries, self.starts.tolist(), strict=False
        ):
            group = self.q.shape[1] // k.shape[1]
            k, v = (x.to(dtype).repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
            for i in range(count):
                seen = length - count + i + 1
                scores = k[:, :seen] @ self.q[start + i].to(dtype)[:, :, None] * SIZE**-0.5
                rows.append((scores.mT.softmax(-1) @ v[:, :seen])[:, 0])
        return torch.stack(rows)


CASES = {
    "decode": ([9, 4, 1, 16], [1, 1, 1, 1]),
    "decode, very unequal": ([900, 5, 3, 2, 9, 1, 8, 2, 4, 4, 4, 1], [1] * 12),
    "whole prompts": ([9, 4, 17], [9, 4, 17]),
    "chunks of prompts": ([9, 12], [3, 5]),
    "all at once": ([9, 12, 7, 1, 30], [1, 12, 3, 1, 1]),
    "one": ([1], [1]),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_dense_attention_within_the_error_budget(path, case, dtype, within_budget):
    case = Case(*CASES[case], dtype=dtype)
    result = dispatch.paths("paged_attention")[path].function(*case.arguments())
    assert within_budget(result, case.by_dense(dtype), case.by_dense())


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_any_mix_of_prompts_and_decoding_equals_dense_attention(path, sequences, group, kv_heads, seed):
    lengths = [max(pair) for pair in sequences]
    queries = [min(pair) for pair in sequences]
    case = Case(lengths, queries, heads=group * kv_heads, kv_heads=kv_heads, seed=seed)
    arguments = case.arguments()
    before = [a.clone() for a in arguments]
    result = dispatch.paths("paged_attention")[path].function(*arguments)
    # fp32 softmax over at most 40 keys, summed in another order.
    torch.testing.assert_close(result.double(), case.by_dense(), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_nothing_outside_a_sequence_is_seen(path):
    """Fill all that belongs to no sequence with large numbers: not one bit may change."""
    case = Case([9, 12, 7, 1], [1, 4, 7, 1])
    function = dispatch.paths("paged_attention")[path].function
    before = function(*case.arguments())
    for cache in case.cache:
        owned = torch.zeros(cache.shape[:2], dtype=torch.bool)
        for blocks, length in zip(case.blocks, case.lengths, strict=True):
            at = torch.arange(length)
            owned[blocks[at // BLOCK].long(), at % BLOCK] = True
        cache[~owned] = 1e4
    assert torch.equal(function(*case.arguments()), before)


@pytest.mark.parametrize("path", PATHS)
def test_a_prompt_in_chunks_gives_what_it_gives_whole(path):
    whole = Case([24], [24])
    function = dispatch.paths("paged_attention")[path].function
    expected = function(*whole.arguments())
    parts = []
    for begin, end in ((0, 5), (5, 6), (6, 20), (20, 24)):
        starts, ends = torch.tensor([0, end - begin]), torch.tensor([end])
        parts.append(function(whole.q[begin:end], *whole.cache, whole.blocks, starts, ends))
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-6)


def test_sequences_may_share_blocks():
    """Two sequences with the same beginning, kept once: each equals itself alone."""
    case = Case([8, 12], [1, 1])
    case.blocks[1, :2] = case.blocks[0, :2]
    both = paged_attention_reference(*case.arguments())
    for path in PATHS:
        result = dispatch.paths("paged_attention")[path].function(*case.arguments())
        torch.testing.assert_close(result, both, rtol=1e-5, atol=1e-6)


def test_int64_and_int32_tables_are_the_same():
    case = Case([9, 12], [1, 4])
    q, keys, values, blocks, starts, ends = case.arguments()
    for path in PATHS:
        function = dispatch.paths("paged_attention")[path].function
        narrow = function(q, keys, values, blocks, starts, ends)
        assert torch.equal(narrow, function(q, keys, values, blocks.long(), starts.long(), ends.long()))
