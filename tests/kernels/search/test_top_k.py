"""Exact search: the same rows as a sort of all scores, whatever the path, the threads and the batch."""

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_checks import ULP, assert_is_node, filled_with_nan, usable
from torch import Tensor

from marrow.core.errors import UsageError
from marrow.kernels import tile
from marrow.kernels.memory import checked, meta, phantom
from marrow.kernels.search import top_k as module
from marrow.kernels.search.top_k import OPERATOR, Found, top_k, top_k_reference

PATHS = [path for path in usable(OPERATOR) if path not in ("reference", "triton")]
EVERY = [*PATHS, "triton"] if "triton" in usable(OPERATOR) else PATHS
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def whole(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return small integers: their products are exact in any order of sums, and many are equal."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def found(path: str, vectors: Tensor, queries: Tensor, k: int, rows: Tensor | None = None) -> Found:
    before = vectors.clone(), queries.clone()
    with filled_with_nan(), checked():
        result = Found(*OPERATOR.run(path, vectors, queries, k, rows))
    assert torch.equal(vectors.nan_to_num(), before[0].nan_to_num()), "an input was written"
    assert torch.equal(queries.nan_to_num(), before[1].nan_to_num()), "an input was written"
    return result


def same(ours: Found, theirs: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(ours.scores_QK, theirs[0].float()) and torch.equal(ours.rows_QK, theirs[1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.integers(0, 1100),
    columns=st.integers(1, 70),
    queries=st.integers(0, 19),
    k=st.integers(1, 40),
    seed=st.integers(0, 1 << 30),
    is_filtered=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_any_shape_gives_what_a_sort_of_all_scores_gives(
    path: str, dtype: torch.dtype, rows: int, columns: int, queries: int, k: int, seed: int, is_filtered: bool
) -> None:
    """Scores of small integers are exact: equal scores, which abound, must be in order of rows."""
    vectors, asked = whole(rows, columns, seed=seed, dtype=dtype), whole(queries, columns, seed=seed + 1)
    listed = None
    if is_filtered:
        listed = (torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 0.4).nonzero()[:, 0]
    expected = top_k_reference(vectors.double(), asked.double(), k, listed)
    assert same(found(path, vectors, asked, k, listed), expected)


@pytest.mark.parametrize(
    ("rows", "columns", "queries", "k"),
    [(1, 1, 1, 1), (130, 17, 1, 5), (31, 300, 3, 1), (65, 16, 17, 32), (0, 4, 2, 3), (40, 16, 1, 40)],
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_triton_gives_what_a_sort_of_all_scores_gives(
    dtype: torch.dtype, rows: int, columns: int, queries: int, k: int
) -> None:
    vectors, asked = whole(rows, columns, seed=1, dtype=dtype), whole(queries, columns, seed=2, dtype=dtype)
    for listed in (None, torch.arange(0, rows, 3)):
        expected = top_k_reference(vectors.double(), asked.double(), k, listed)
        assert same(found("triton", vectors, asked, k, listed), expected)


@pytest.mark.parametrize("path", EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_err_no_more_than_sums_in_fp32_do(path: str, dtype: torch.dtype) -> None:
    """Sums of 384 products in fp32: 2 ulp of the largest, beside 1.5 times torch's own error."""
    torch.manual_seed(seed := int(torch.seed()) % 1000)
    print("seed", seed)
    vectors, asked = torch.randn(150, 384).to(dtype), torch.randn(2, 384)
    ours = found(path, vectors, asked, 7)
    exact = asked.double() @ vectors.double().T
    plain = asked @ vectors.float().T
    allowed = 1.5 * (plain - exact).abs().max() + 2 * ULP[torch.float32] * exact.abs().max()
    assert (ours.scores_QK - exact.gather(1, ours.rows_QK)).abs().max() <= allowed
    kth = exact.sort(descending=True).values[:, 6:7]
    assert bool((exact.gather(1, ours.rows_QK) >= kth - 2 * allowed).all()), "what is not among the best"


@pytest.mark.parametrize("path", EVERY)
def test_scores_that_are_no_numbers_are_no_results(path: str) -> None:
    vectors = whole(40, 16, seed=3)
    vectors[3], vectors[5], vectors[8, 0], vectors[9, 0] = torch.nan, torch.inf, torch.inf, -torch.inf
    asked = torch.ones(2, 16)
    asked[1] = -1
    expected = top_k_reference(vectors, asked, 40)
    assert expected[1][0, :2].tolist() == [5, 8] and 3 not in expected[1] and 9 not in expected[1][0]
    assert expected[1][0, -2:].tolist() == [-1, -1] and expected[0][0, -1] == -torch.inf
    assert same(found(path, vectors, asked, 40), expected)
    nothing = found(path, vectors, torch.full((1, 16), torch.nan), 3)
    assert nothing.rows_QK.tolist() == [[-1] * 3] and bool((nothing.scores_QK == -torch.inf).all())


@pytest.mark.parametrize("path", EVERY)
def test_negative_zero_equals_zero(path: str) -> None:
    vectors = torch.tensor([[-0.0], [0.0], [-0.0]])
    assert found(path, vectors, torch.ones(1, 1), 3).rows_QK.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("path", EVERY)
def test_equal_rows_are_found_in_their_order_through_blocks_and_splits(path: str) -> None:
    vectors = torch.ones(700 if path != "triton" else 150, 16)
    for queries in (1, 5):
        rows = found(path, vectors, torch.ones(queries, 16), 9).rows_QK
        assert rows.tolist() == [list(range(9))] * queries


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("path", PATHS)
def test_scores_in_order_are_no_worst_case_that_fails(path: str, order: int) -> None:
    """Rising scores replace the results at every row."""
    vectors = torch.arange(5000.0)[:, None] * order
    expected = list(range(4999, 4979, -1)) if order == 1 else list(range(20))
    assert found(path, vectors, torch.ones(1, 1), 20).rows_QK.tolist() == [expected]


def test_threads_and_batches_do_not_change_a_bit() -> None:
    vectors, asked = torch.randn(3001, 100), torch.randn(21, 100)
    alone = found("cpu", vectors, asked, 11)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert same(found("cpu", vectors, asked, 11), alone)
    torch.set_num_threads(1)
    for query in (0, 7, 20):
        one = found("cpu", vectors, asked[query : query + 1], 11)
        assert same(one, (alone.scores_QK[query : query + 1], alone.rows_QK[query : query + 1]))


def test_vectors_need_not_be_contiguous() -> None:
    vectors, asked = whole(24, 300, seed=4).T, whole(24, 3, seed=5).T
    for path in EVERY:
        assert same(found(path, vectors, asked, 4), top_k_reference(vectors, asked, 4)), path
        listed = torch.arange(0, 600, 2)[::3]
        expected = top_k_reference(vectors, asked, 4, listed[:50])
        assert same(found(path, vectors, asked, 4, listed[:50]), expected), path


def test_a_mask_and_a_list_of_rows_mean_the_same() -> None:
    vectors, asked = whole(200, 20, seed=6), whole(2, 20, seed=7)
    mask = torch.rand(200) < 0.2
    numbers = mask.nonzero()[:, 0]
    shuffled = torch.cat([numbers, numbers])[torch.randperm(2 * len(numbers))]
    by_mask, by_list = top_k(asked, vectors, 5, among=mask), top_k(asked, vectors, 5, among=shuffled)
    assert same(by_mask, by_list)
    assert bool(mask[by_mask.rows_QK].all())
    assert same(by_mask, top_k_reference(vectors, asked, 5, numbers))


def test_nothing_to_look_at_gives_no_results() -> None:
    vectors, asked = whole(9, 8, seed=8), whole(2, 8, seed=9)
    empty = top_k(asked, vectors, 3, among=torch.zeros(9, dtype=torch.bool))
    assert empty.rows_QK.tolist() == [[-1] * 3] * 2


@pytest.mark.parametrize(
    ("queries", "vectors", "k", "among", "said"),
    [
        ((2, 8), (9, 7), 1, None, "do not fit"),
        ((8,), (9, 8), 1, None, "do not fit"),
        ((2, 8), (9, 8), 0, None, "k = 0"),
        ((2, 8), (9, 8), 1, torch.ones(8, dtype=torch.bool), "a mask of"),
        ((2, 8), (9, 8), 1, torch.tensor([0, 9]), "rows 0 to 9 of 9"),
        ((2, 8), (9, 8), 1, torch.tensor([-1]), "rows -1"),
    ],
)
def test_what_does_not_fit_is_refused(
    queries: tuple[int, ...], vectors: tuple[int, ...], k: int, among: Tensor | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        top_k(torch.ones(queries), torch.ones(vectors), k, among=among)


def test_a_file_in_memory_is_searched_in_place(tmp_path: Path) -> None:
    vectors = np.memmap(tmp_path / "vectors", np.float32, "w+", shape=(300, 16))
    vectors[:] = whole(300, 16, seed=10).numpy()
    asked = whole(1, 16, seed=11)
    assert same(top_k(asked, torch.from_numpy(vectors), 3), top_k_reference(torch.tensor(vectors), asked, 3))


def test_the_operator_is_a_node_of_a_graph() -> None:
    assert_is_node(OPERATOR, (whole(50, 16, seed=12), whole(2, 16, seed=13), 3, None))
    assert_is_node(OPERATOR, (whole(50, 16, seed=12), whole(2, 16, seed=13), 3, torch.arange(0, 50, 7)))


@pytest.mark.parametrize("queries", [1, 16])
def test_more_than_two_to_the_31_numbers_are_within_reach(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile, "multiprocessors", lambda device: 10_000)  # short shares for each program
    vectors = meta(3 * 2**18 + 5, 8192, dtype=torch.bfloat16)
    with phantom() as watch:
        module.forward_triton(vectors, meta(queries, 8192, dtype=torch.bfloat16), 10, None)
    assert watch.launches == 1


def test_rows_beyond_two_to_the_31_numbers_are_read_in_c() -> None:
    """Memory that was never written takes none: two rows of it are read, one is written."""
    with mmap.mmap(-1, 140_000 << 15) as holes:
        vectors = torch.frombuffer(holes, dtype=torch.bfloat16).view(140_000, 1 << 14)
        vectors[139_999, -1] = 3.0
        result = top_k(torch.ones(1, 1 << 14), vectors, 2, among=torch.tensor([5, 139_999]))
        assert result.rows_QK.tolist() == [[139_999, 5]]
        assert result.scores_QK.tolist() == [[3.0, 0.0]]
        del vectors


def test_rows_of_any_whole_dtype_are_found_and_others_refused() -> None:
    """C reads 64 bits a row: numbers of 32 would be read two at once."""
    queries, vectors = torch.eye(4)[:1], torch.arange(20.0).reshape(5, 4)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        found = top_k(queries, vectors, 2, among=torch.tensor([3, 1, 0], dtype=dtype))
        assert found.rows_QK.tolist() == [[3, 1]]
    with pytest.raises(UsageError, match=r"rows of torch\.float32"):
        top_k(queries, vectors, 2, among=torch.tensor([3.0, 1.0]))
