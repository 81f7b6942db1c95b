"""Search by int8 codes: the results of exact search to the bit, because no bound lies below its score."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_checks import assert_is_node, filled_with_nan, usable
from torch import Tensor

from marrow.core.errors import UsageError
from marrow.kernels import dispatch
from marrow.kernels.search import top_k as exact
from marrow.kernels.search.top_k import Found, top_k
from marrow.kernels.search.top_k_int8 import (
    OPERATOR,
    Packed,
    bounds_reference,
    forward_cpu,
    quantise_vectors,
    top_k_int8,
)

PATHS = [path for path in usable(OPERATOR) if path != "reference"]
needs_c = pytest.mark.skipif("cpu" not in PATHS, reason="there is no C compiler")


@pytest.fixture(autouse=True)
def one_thread_and_path() -> None:
    """What exact search is compared with takes the same path: the interpreter of Triton sums otherwise."""
    torch.set_num_threads(1)
    dispatch.reset(PATHS[-1])


def found(path: str, vectors: Tensor, queries: Tensor, k: int, rows: Tensor | None = None) -> Found:
    packed = quantise_vectors(vectors)
    given = [x.clone() for x in (*packed, vectors, queries)]
    with filled_with_nan():
        result = Found(*OPERATOR.run(path, vectors, *packed, queries, k, rows))
    for now, then in zip((*packed, vectors, queries), given, strict=True):
        assert torch.equal(now.float().nan_to_num(), then.float().nan_to_num()), "an input was written"
    return result


def same_as_exact(path: str, vectors: Tensor, queries: Tensor, k: int, rows: Tensor | None = None) -> bool:
    dispatch.reset(path)
    ours = found(path, vectors, queries, k, rows)
    theirs = exact.OPERATOR(vectors, queries, k, rows)
    return torch.equal(ours.scores_QK, theirs[0]) and torch.equal(ours.rows_QK, theirs[1])


def numbers(kind: str, *shape: int, seed: int) -> Tensor:
    """Return numbers whose scores are spread, all alike, of all sizes, or mostly equal."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "alike":
        return 1 + 1e-3 * normal
    if kind == "of all sizes":
        return normal * 10.0 ** torch.randint(-25, 14, (*shape[:-1], 1), generator=generator)
    return normal.round() if kind == "mostly equal" else normal


KINDS = ["spread", "alike", "of all sizes", "mostly equal"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(0, 1100),
    columns=st.integers(1, 140),
    queries=st.integers(0, 6),
    k=st.integers(1, 30),
    seed=st.integers(0, 1 << 30),
    is_filtered=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_results_are_those_of_exact_search_to_the_bit(
    path: str,
    dtype: torch.dtype,
    kind: str,
    rows: int,
    columns: int,
    queries: int,
    k: int,
    seed: int,
    is_filtered: bool,
) -> None:
    vectors = numbers(kind, rows, columns, seed=seed).to(dtype)
    listed = torch.arange(rows)[seed % 3 :: 3] if is_filtered else None
    assert same_as_exact(path, vectors, numbers(kind, queries, columns, seed=seed + 1), k, listed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [1, 63, 64, 384, 1000])
def test_no_score_exceeds_its_bound(kind: str, columns: int) -> None:
    """In fp64, whose own errors are a billionth of the slack that the errors hold for fp32 sums."""
    for seed in range(5):
        vectors, asked = (numbers(kind, n, columns, seed=seed + n) for n in (300, 20))
        bounds_QN = bounds_reference(quantise_vectors(vectors), asked)
        scores_QN = asked.double() @ vectors.double().T
        assert bool((scores_QN <= bounds_QN).all())


def test_the_bound_is_near_enough_to_be_of_use() -> None:
    """For normal numbers the rest of a vector is 0.7 % of it, by the step of its largest number."""
    vectors, asked = torch.randn(500, 384), torch.randn(10, 384)
    slack_QN = bounds_reference(quantise_vectors(vectors), asked) - asked.double() @ vectors.double().T
    lengths_QN = asked.norm(dim=1)[:, None] * vectors.norm(dim=1)
    assert float((slack_QN / lengths_QN).max()) < 0.02
    assert float((slack_QN / lengths_QN).mean()) < 0.012


def test_a_vector_at_the_edge_of_its_bound_is_found() -> None:
    """The rest of a vector along the query itself: its estimate is as much too low as it can be."""
    columns = 64
    query = torch.ones(1, columns)
    # 127 sets the scale to 1; every other number is rounded down by nearly a half.
    hidden = torch.full((1, columns), 10.49)
    shown = torch.full((1, columns), 10.0)
    hidden[0, 0] = shown[0, 0] = 127
    shown[0, 1] += 15  # estimates: shown beats hidden; scores: hidden beats shown
    for vectors in (torch.cat([shown, hidden]), torch.cat([hidden, shown])):
        packed = quantise_vectors(vectors)
        estimates = (packed.codes_NP[:, :columns].float() - 128).sum(1) * packed.scales_N
        best = int((vectors @ query[0]).argmax())
        assert int(estimates.argmax()) != best, "the case is as it is meant"
        assert top_k_int8(query, packed, vectors, 1).rows_QK.item() == best


@needs_c
def test_few_vectors_are_scored_and_their_number_is_told() -> None:
    vectors, asked = torch.randn(20_000, 96), torch.randn(3, 96)
    *_, rescored = forward_cpu(vectors, *quantise_vectors(vectors), asked, 10, None)
    assert 30 <= rescored.item() < 3 * 1500


@needs_c
def test_without_a_bound_every_vector_is_scored() -> None:
    vectors, asked = torch.randn(500, 20), torch.full((1, 20), 1e-35)
    *_, rescored = forward_cpu(vectors, *quantise_vectors(vectors), asked, 10, None)
    assert rescored.item() == 500
    assert same_as_exact("cpu", vectors, asked, 10)


@pytest.mark.parametrize("path", PATHS)
def test_numbers_that_are_not_finite_are_treated_as_in_exact_search(path: str) -> None:
    vectors = torch.randn(80, 32)
    vectors[3], vectors[5, 2], vectors[7, 0], vectors[9], vectors[11] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        0,
        1e38,
    )
    for value in (1.0, 0.0, torch.nan, torch.inf, 3e38):
        asked = torch.randn(2, 32)
        asked[0, 0] = value
        assert same_as_exact(path, vectors, asked, 80), value
    assert bool(quantise_vectors(vectors).errors_N[[3, 5, 7]].isinf().all())


@needs_c
def test_threads_do_not_change_a_bit() -> None:
    vectors, asked = torch.randn(3001, 100), torch.randn(5, 100)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert same_as_exact("cpu", vectors, asked, 11)


def test_codes_are_the_nearest_and_rest_is_what_they_lack() -> None:
    vectors = torch.randn(100, 70).bfloat16()
    packed = quantise_vectors(vectors)
    codes_NC = packed.codes_NP[:, :70].double() - 128
    back_NC = codes_NC * packed.scales_N[:, None].double()
    assert bool(
        ((back_NC - vectors.double()).abs() <= packed.scales_N[:, None].double() / 2 * 1.000001).all()
    )
    assert int(codes_NC.abs().max()) == 127
    assert bool((packed.codes_NP[:, 70:] == 128).all())
    rest_N = (vectors.double() - back_NC).norm(dim=1)
    assert bool((packed.errors_N >= rest_N).all())


def test_the_size_of_chunks_does_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.randn(100, 20)
    expected = quantise_vectors(vectors)
    monkeypatch.setattr("marrow.kernels.search.top_k_int8._ROWS_AT_ONCE", 7)
    assert all(torch.equal(a, b) for a, b in zip(quantise_vectors(vectors), expected, strict=True))


def test_no_vectors_can_be_packed_and_searched() -> None:
    nothing = torch.empty(0, 8)
    assert top_k_int8(torch.ones(1, 8), quantise_vectors(nothing), nothing, 2).rows_QK.tolist() == [[-1, -1]]


def test_what_does_not_fit_is_refused() -> None:
    vectors, asked = torch.randn(9, 8), torch.randn(1, 8)
    packed = quantise_vectors(vectors)
    with pytest.raises(UsageError, match="are not of vectors"):
        top_k_int8(asked, packed, vectors[:8], 1)
    with pytest.raises(UsageError, match="k = 0"):
        top_k_int8(asked, packed, vectors, 0)
    with pytest.raises(UsageError, match="too many"):
        quantise_vectors(torch.empty(0, 16_385))


def test_the_public_function_takes_a_mask() -> None:
    vectors, asked = torch.randn(200, 20), torch.randn(2, 20)
    mask = torch.rand(200) < 0.3
    ours = top_k_int8(asked, quantise_vectors(vectors), vectors, 5, among=mask)
    theirs = top_k(asked, vectors, 5, among=mask)
    assert torch.equal(ours.rows_QK, theirs.rows_QK) and torch.equal(ours.scores_QK, theirs.scores_QK)


def test_the_operator_is_a_node_of_a_graph() -> None:
    vectors = torch.randn(50, 16)
    assert_is_node(OPERATOR, (vectors, *quantise_vectors(vectors), torch.randn(2, 16), 3, None))


def test_codes_need_not_be_contiguous() -> None:
    vectors, asked = torch.randn(24, 60).T, torch.randn(2, 24)
    packed = quantise_vectors(vectors)
    scales_N = torch.stack([packed.scales_N] * 2, 1)[:, 0]
    strided = Packed(packed.codes_NP.T.contiguous().T, scales_N, packed.errors_N)
    ours = top_k_int8(asked, strided, vectors, 4)
    assert torch.equal(ours.rows_QK, top_k(asked, vectors, 4).rows_QK)
