"""paged_attention: every path against dense attention in fp64, whatever the mix of prompts and decoding."""

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import ULP, assert_is_node, assert_near, filled_with_nan, rounded, usable

from marrow.core.errors import UsageError
from marrow.kernels.attention import paged_attention as module
from marrow.kernels.attention import paged_flash
from marrow.kernels.attention.attention import attention, pack
from marrow.kernels.attention.paged_attention import OPERATOR, QUANTISED, paged_attention, quantise_kv

PATHS = usable(OPERATOR)
FAST = [path for path in PATHS if path != "triton"]  # the interpreter costs a second a case
DTYPES = [torch.float32, torch.bfloat16]
CODES = list(QUANTISED)


class Case:
    """Sequences with known dense keys and values, scattered over a cache in random order."""

    def __init__(
        self,
        lengths,
        queries,
        *,
        heads=4,
        kv_heads=2,
        size=8,
        block=4,
        dtype=torch.float32,
        codes=None,
        seed=0,
    ):
        self.lengths, self.queries, self.block = lengths, queries, block
        needed = [-(-length // block) for length in lengths]
        shape = (sum(needed) + 3, block, kv_heads, size)
        self.cache = [rounded(*shape, seed=seed + i).to(dtype) for i in range(2)]
        self.scales = (None, None)
        exact = [x.double() for x in self.cache]
        if codes is not None:
            self.cache, self.scales = zip(*(quantise_kv(x, codes) for x in self.cache), strict=True)
            exact = [x.double() * s.double()[..., None] for x, s in zip(self.cache, self.scales, strict=True)]
        order = (
            torch.randperm(sum(needed), generator=torch.Generator().manual_seed(seed)) + 3
        )  # 0 to 2 are nobody's
        self.blocks = torch.zeros(len(lengths), max(1, *needed) + 1, dtype=torch.int32)
        self.dense = []
        for i, (length, count) in enumerate(zip(lengths, needed, strict=True)):
            own, order = order[:count], order[count:]
            self.blocks[i, :count] = own.int()
            self.dense.append([cache[own].flatten(0, 1)[:length] for cache in exact])
        self.starts = torch.tensor([0, *queries]).cumsum(0).int()
        self.ends = torch.tensor(lengths, dtype=torch.int32)
        self.q = rounded(sum(queries), heads, size, seed=seed + 2).to(dtype)

    def arguments(self, window=0, softcap=0.0):
        most = max(self.queries, default=0), self.blocks.shape[1] * self.block
        return self.q, *self.cache, *self.scales, self.blocks, self.starts, self.ends, *most, window, softcap

    def by_dense(self, dtype=torch.float64, window=0, softcap=0.0, *, sizes=False):
        """Dense attention over the same history, sequence by sequence.

        sizes: not the sums, but how large their terms are: an ulp of a score s is |s| ulp of its p.
        """
        rows = [self.q[:0].to(dtype)]
        starts = self.starts.tolist()
        for (k, v), length, count, start in zip(self.dense, self.lengths, self.queries, starts, strict=False):
            group = self.q.shape[1] // k.shape[1]
            k, v = (x.to(dtype).repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
            q = self.q[start : start + count].to(dtype).transpose(0, 1)
            scores = q @ k.mT * self.q.shape[2] ** -0.5
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            last = torch.arange(length - count, length)[:, None]
            at = torch.arange(length)
            seen = (at <= last) & (at > last - window) if window else at <= last
            p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            result = (p * (1 + scores.abs())).nan_to_num() @ v.abs() if sizes else p @ v
            rows.append(result.transpose(0, 1))
        return torch.cat(rows)

    def assert_near_fp64(self, path, window=0, softcap=0.0, codes=None):
        given = self.arguments(window, softcap)
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in given]
        with filled_with_nan():
            result = OPERATOR.run(path, *given)
        exact, plain = (self.by_dense(dtype, window, softcap) for dtype in (torch.float64, self.q.dtype))
        sizes = self.by_dense(window=window, softcap=softcap, sizes=True)
        term = float(sizes.max()) if sizes.numel() else 0.0
        assert_near(result, plain, exact, term=term, what=f"{path} {self.lengths} {self.queries}")
        for now, then in zip(given, before, strict=True):
            if isinstance(now, torch.Tensor):
                assert torch.equal(now.view(torch.uint8), then.view(torch.uint8)), "an input was written"
        return result


CASES = {
    "decode": ([9, 4, 1, 16], [1, 1, 1, 1]),
    "decode, very unequal": ([900, 5, 3, 2, 9, 1, 8, 2, 4, 4, 4, 1], [1] * 12),
    "whole prompts": ([9, 4, 17], [9, 4, 17]),
    "chunks of prompts": ([9, 12], [3, 5]),
    "all at once": ([9, 12, 7, 1, 30], [1, 12, 3, 1, 1]),
    "a chunk of 64, one less, one more": ([64, 63, 65, 128, 129], [1, 2, 1, 64, 1]),
    "one": ([1], [1]),
}


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_equals_dense_attention_within_the_error_budget(path, case, dtype):
    Case(*CASES[case], dtype=dtype).assert_near_fp64(path)


@pytest.mark.parametrize("path", [path for path in PATHS if path == "triton"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "queries", "options"),
    [
        ([1], [1], {"heads": 1, "kv_heads": 1}),
        ([31, 33, 5], [1, 1, 1], {"heads": 3, "kv_heads": 1, "size": 13}),
        ([9, 12, 7, 0, 40], [1, 12, 3, 0, 1], {"kv_heads": 1, "block": 16}),
        ([300], [1], {"heads": 2, "kv_heads": 2, "block": 16}),  # is split
    ],
)
def test_the_kernel_stays_within_the_error_budget(path, dtype, lengths, queries, options):
    Case(lengths, queries, dtype=dtype, **options).assert_near_fp64(path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("window", "softcap"), [(1, 0.0), (5, 0.0), (70, 0.0), (0, 2.0)])
def test_windows_and_softcaps_stay_within_the_error_budget(path, window, softcap):
    case = Case([70, 3, 12], [2, 3, 1], heads=2, kv_heads=1, block=16, seed=1)
    case.assert_near_fp64(path, window, softcap)


@pytest.mark.parametrize("path", [path for path in FAST if path != "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None)
@hypothesis.given(
    sequences=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=6),
    group=st.integers(1, 8),
    kv_heads=st.integers(1, 4),
    size=st.sampled_from([3, 8, 16, 32, 64]),
    block=st.sampled_from([1, 4, 16, 48]),
    codes=st.sampled_from([None, None, *CODES]),
    window=st.sampled_from([0, 0, 1, 40]),
    softcap=st.sampled_from([0.0, 0.0, 2.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_any_mix_of_prompts_and_decoding_equals_dense_attention(
    path, dtype, sequences, group, kv_heads, size, block, codes, window, softcap, seed
):
    lengths, queries = [max(pair) for pair in sequences], [min(min(pair), 40) for pair in sequences]
    heads = {"heads": group * kv_heads, "kv_heads": kv_heads, "size": size, "block": block}
    Case(lengths, queries, **heads, dtype=dtype, codes=codes, seed=seed).assert_near_fp64(
        path, window, softcap
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantised_cache_is_read_as_what_it_stands_for(path, codes, dtype):
    """Against fp64 of the dequantised numbers; the error of quantising itself is the next test's."""
    Case([20, 3], [2, 1], size=16, block=16, codes=codes, dtype=dtype).assert_near_fp64(path)


@pytest.mark.parametrize(("codes", "most"), [(torch.int8, 0.5 / 127), (torch.float8_e4m3fn, 2.0**-4)])
def test_quantising_errs_by_half_a_step_at_most(codes, most):
    """int8: half of 1/127 of the token's largest number. e4m3: half of 2^-3 of the number itself."""
    x = torch.randn(50, 4, 64, generator=torch.Generator().manual_seed(0))
    x[3], x[4, 1] = 0.0, 1e-30
    kept, scale = quantise_kv(x, codes)
    error = (kept.double() * scale.double()[..., None] - x.double()).abs()
    size = (
        x.abs().amax(-1, keepdim=True)
        if codes == torch.int8
        else x.abs() + x.abs().amax(-1, keepdim=True) * 2**-8
    )
    assert (error <= size.double() * (most + 1e-6)).all()
    assert (kept[3].float() == 0).all()


@pytest.mark.parametrize(("codes", "most"), [(torch.int8, 0.01), (torch.float8_e4m3fn, 0.05)])
def test_a_quantised_cache_costs_little(codes, most):
    """Root mean square error of the result, over that of the result: 1 % for int8, 5 % for e4m3 at most."""
    exact = Case([200] * 4, [1] * 4, size=64, block=16)
    kept = Case([200] * 4, [1] * 4, size=64, block=16, codes=codes)
    result, expected = (
        OPERATOR.run(PATHS[-1] if PATHS[-1] != "triton" else "torch", *kept.arguments()),
        exact.by_dense(),
    )
    assert (result - expected).square().mean().sqrt() < most * expected.square().mean().sqrt()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("filler", [1e4, float("nan"), float("inf")])
def test_nothing_outside_a_sequence_is_seen(path, filler):
    """Fill all that belongs to no sequence, stale NaN included: not one bit may change."""
    case = Case([9, 12, 7, 1], [1, 4, 7, 1])
    before = OPERATOR.run(path, *case.arguments())
    for cache in case.cache:
        owned = torch.zeros(cache.shape[:2], dtype=torch.bool)
        for blocks, length in zip(case.blocks, case.lengths, strict=True):
            at = torch.arange(length)
            owned[blocks[at // case.block].long(), at % case.block] = True
        cache[~owned] = filler
    assert torch.equal(OPERATOR.run(path, *case.arguments()), before)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("codes", [None, *CODES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_that_nobody_sees_may_be_anything(path, codes, dtype):
    """Fill with NaN what is past a sequence's end or before its first query's window, scales too.

    Blocks come from torch.empty, and blocks before a window may be another sequence's by now.
    """
    queries, window = [1, 4, 7, 1, 1], 5
    case = Case([90, 12, 40, 1, 70], queries, codes=codes, dtype=dtype, block=16, size=16)
    before = OPERATOR.run(path, *case.arguments(window))
    seen = torch.zeros(case.cache[0].shape[:2], dtype=torch.bool)
    for blocks, length, count in zip(case.blocks, case.lengths, queries, strict=True):
        at = torch.arange(max(0, length - count - window + 1), length)
        seen[blocks[at // case.block].long(), at % case.block] = True
    case.cache = [x.clone() for x in case.cache]
    case.scales = [x if x is None else x.clone() for x in case.scales]
    for x in (*case.cache, *case.scales):
        if x is not None:
            x.view(torch.uint8)[~seen] = 0xFF if x.dtype == torch.int8 else 0x7F  # in e4m3 NaN
            if x.dtype.itemsize > 1:
                x[~seen] = float("nan")
    assert torch.equal(OPERATOR.run(path, *case.arguments(window)), before)


@pytest.mark.parametrize("path", PATHS)
def test_a_query_that_sees_nothing_gets_zeros(path):
    case = Case([5, 0, 3], [1, 2, 1], block=16)
    result = OPERATOR.run(path, *case.arguments())
    assert (result[1:3] == 0).all()
    assert (result[[0, 3]] != 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_sequences_without_queries_and_empty_calls_work(path):
    case = Case([5, 8, 3], [2, 0, 1], block=16)
    case.assert_near_fp64(path)
    assert OPERATOR.run(path, *Case([5], [0]).arguments()).shape == (0, 4, 8)


@pytest.mark.parametrize("path", PATHS)
def test_where_blocks_lie_changes_no_bit(path):
    case = Case([40, 23], [1, 3], block=16)
    before = OPERATOR.run(path, *case.arguments())
    order = torch.randperm(case.cache[0].shape[0], generator=torch.Generator().manual_seed(1))
    case.cache = [cache[order] for cache in case.cache]
    case.blocks = order.argsort()[case.blocks.long()].int()
    assert torch.equal(OPERATOR.run(path, *case.arguments()), before)


@pytest.mark.parametrize("path", PATHS)
def test_a_prompt_in_chunks_gives_what_it_gives_whole(path):
    whole = Case([24], [24])
    q, *cache = whole.arguments()[:3]
    expected = OPERATOR.run(path, *whole.arguments())
    parts = []
    for begin, end in ((0, 5), (5, 6), (6, 20), (20, 24)):
        starts, ends = torch.tensor([0, end - begin]), torch.tensor([end])
        some = (None, None, whole.blocks, starts, ends, end - begin, 28, 0, 0.0)
        parts.append(OPERATOR.run(path, q[begin:end], *cache, *some))
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", [path for path in PATHS if path in ("cpu", "triton")])
def test_splits_of_the_keys_add_up_to_the_whole(path, monkeypatch):
    case = Case([330, 70, 1], [1, 2, 1], heads=2, kv_heads=1, block=16)
    results = []
    for split in (False, True):
        if path == "cpu":
            monkeypatch.setattr(module, "SPLIT_KEYS", 64 if split else 1 << 20)
        else:
            monkeypatch.setattr(paged_flash, "_splits", lambda *given, split=split: 4 if split else 1)
        results.append(case.assert_near_fp64(path))
    assert not torch.equal(*results)  # or nothing was split
    torch.testing.assert_close(*results, rtol=0, atol=4 * ULP[torch.float32] * results[0].abs().max().item())


@pytest.mark.parametrize("path", PATHS)
def test_it_is_attention_with_its_keys_elsewhere(path):
    case = Case([40], [40], block=16)
    k, v = (x.float() for x in case.dense[0])
    expected = attention(case.q, k, v, pack(torch.zeros(40), 40))
    torch.testing.assert_close(OPERATOR.run(path, *case.arguments()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_sequences_may_share_blocks(path):
    """Two sequences with the same beginning, kept once: each equals itself alone."""
    case = Case([8, 12], [1, 1])
    case.blocks[1, :2] = case.blocks[0, :2]
    both = OPERATOR.reference(*case.arguments())
    torch.testing.assert_close(OPERATOR.run(path, *case.arguments()), both, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_int64_and_int32_tables_are_the_same(path):
    given = list(Case([9, 12], [1, 4]).arguments())
    narrow = OPERATOR.run(path, *given)
    given[5:8] = [x.long() for x in given[5:8]]
    assert torch.equal(OPERATOR.run(path, *given), narrow)


def test_threads_change_nothing():
    if "cpu" not in PATHS:
        pytest.skip("there is no C path")
    case, threads = (
        Case([2100, 3, 70, 9], [1, 3, 70, 1], block=16, dtype=torch.bfloat16),
        torch.get_num_threads(),
    )
    try:
        torch.set_num_threads(1)
        one = OPERATOR.run("cpu", *case.arguments())
        torch.set_num_threads(2)
        assert torch.equal(OPERATOR.run("cpu", *case.arguments()), one)
    finally:
        torch.set_num_threads(threads)


def test_the_public_function_takes_scales_and_bounds():
    case = Case([20, 3], [2, 1], block=16, codes=torch.int8)
    given = case.q, *case.cache, case.blocks, case.starts, case.ends
    with_bounds = paged_attention(*given, scales=case.scales, max_queries=2, max_keys=20)
    assert torch.equal(paged_attention(*given, scales=case.scales), with_bounds)
    with pytest.raises(UsageError, match="scales"):
        paged_attention(*given)
    with pytest.raises(UsageError, match="window = -1"):
        paged_attention(*given, scales=case.scales, window=-1)


LISTS = {
    "a block that is not of the cache": (
        "blocks",
        (1, 2),
        8,
        r"sequence 1 has block 8 in place 2 .* 0 to 7\n",
    ),
    "a negative block": ("blocks", (0, 0), -1, r"sequence 0 has block -1 in place 0 of its list"),
    "a block far away": ("blocks", (1, 0), 2**31 - 1, r"sequence 1 has block 2147483647"),
    "more keys than its list": ("ends", 0, 17, r"sequence 0 has 17 keys, must be 0 to 16\n"),
    "fewer keys than none": ("ends", 0, -1, r"sequence 0 has -1 keys"),
    "starts that fall": ("starts", 1, 9, r"sequence 1 begins at query 9 and stops at 8\n"),
    "starts beyond the queries": ("starts", 2, 9, r"starts_B goes from 0 to 9, must go from 0 to 8\n"),
    "starts before the queries": ("starts", 0, -1, r"starts_B goes from -1 to 8"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("wrong", LISTS)
def test_lists_that_lead_elsewhere_are_refused(path, wrong):
    """They are addresses: followed, they would read memory of somebody else, or write it."""
    name, at, number, said = LISTS[wrong]
    case = Case([5, 12], [3, 5])
    assert case.cache[0].shape[0] == 8 and case.blocks.shape == (2, 4)
    getattr(case, name)[at] = number
    with pytest.raises(UsageError, match=said) as told:
        OPERATOR.run(path, *case.arguments())
    assert told.value.hint


@pytest.mark.parametrize("path", PATHS)
def test_the_last_place_of_a_list_and_the_last_block_are_of_use(path):
    case = Case([16, 0], [3, 0])
    case.blocks = case.blocks[:, :4]
    assert (
        case.blocks.shape[1] * case.block == case.lengths[0] and case.blocks.max() == len(case.cache[0]) - 1
    )
    case.assert_near_fp64(path)


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    assert_is_node(OPERATOR, Case([9, 12], [1, 4]).arguments())
