"""A token depends on its logits, its sampling, its seed and its position, and on nothing else."""

import math

import pytest
import torch

from marrow.core.records import Sampling
from marrow.kernels.sampling.draws import uniform
from marrow.serve.sampling import Draw, choice_seed, draw, logprobs


def rows(count: int, vocabulary: int = 50) -> torch.Tensor:
    return torch.randn(count, vocabulary, generator=torch.Generator().manual_seed(1)) * 2


def frequencies(logits_V: torch.Tensor, sampling: Sampling, count: int = 20_000) -> torch.Tensor:
    draws = [Draw(sampling, 7, position) for position in range(count)]
    tokens = draw(logits_V.expand(count, -1), draws)
    return torch.bincount(torch.tensor(tokens), minlength=len(logits_V)) / count


def is_drawn_from(measured_V: torch.Tensor, expected_V: torch.Tensor, count: int = 20_000) -> bool:
    # 5 standard deviations of a binomial share: the seed is fixed, so this passes for ever or never.
    tolerance_V = 5 * (expected_V * (1 - expected_V) / count).sqrt() + 1e-9
    return bool(((measured_V - expected_V).abs() <= tolerance_V).all())


def test_the_draw_follows_the_softmax() -> None:
    logits_V = rows(1, 12)[0]
    assert is_drawn_from(frequencies(logits_V, Sampling(temperature=1.0)), logits_V.softmax(-1))
    assert is_drawn_from(frequencies(logits_V, Sampling(temperature=0.5)), (logits_V / 0.5).softmax(-1))


def test_top_k_keeps_the_k_likeliest() -> None:
    logits_V = rows(1, 12)[0]
    kept = torch.zeros(12).index_fill(0, logits_V.topk(3).indices, 1)
    expected_V = logits_V.softmax(-1) * kept
    assert is_drawn_from(frequencies(logits_V, Sampling(top_k=3)), expected_V / expected_V.sum())


def test_top_p_keeps_the_least_set_that_reaches_p() -> None:
    logits_V = torch.tensor([0.1, 0.5, 0.25, 0.15]).log()
    expected_V = torch.tensor([0.0, 2 / 3, 1 / 3, 0.0])
    assert is_drawn_from(frequencies(logits_V, Sampling(top_p=0.6)), expected_V)
    assert frequencies(logits_V, Sampling(top_p=1e-6), 100).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=5), Sampling(top_p=0.8, temperature=1.7)])
def test_a_row_draws_the_same_alone_and_in_any_batch(sampling: Sampling) -> None:
    logits_SV = rows(64)
    draws = [Draw(sampling if row % 3 else Sampling(temperature=0), row, row * 5) for row in range(64)]
    together = draw(logits_SV, draws)
    alone = [draw(logits_SV[row : row + 1], [draws[row]])[0] for row in range(64)]
    assert together == alone


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    greedy = Draw(Sampling(temperature=0), 0, 0)
    assert draw(torch.tensor([[1.0, 3.0, 3.0]]), [greedy]) == [1]


def test_spoiled_rows_are_told_and_others_are_not_touched() -> None:
    logits_SV = rows(4)
    logits_SV[1, 7] = math.nan
    logits_SV[2] = -math.inf
    for temperature in (0.0, 1.0):
        tokens = draw(logits_SV, [Draw(Sampling(temperature=temperature), 3, 3)] * 4)
        assert [token == -1 for token in tokens] == [False, True, True, False]


def test_impossible_tokens_are_never_drawn() -> None:
    logits_V = torch.full((40,), -math.inf)
    logits_V[[3, 39]] = 0.0
    assert set(draw(logits_V.expand(500, -1), [Draw(Sampling(), 1, p) for p in range(500)])) == {3, 39}


def test_uniform_numbers_are_even_and_unrelated() -> None:
    values = uniform(torch.arange(-5, 200)[:, None], torch.arange(200))
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01  # 7 standard errors of 41,000 uniform numbers
    for a, b in ((values[:-1], values[1:]), (values[:, :-1], values[:, 1:])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 0.025  # 5 / sqrt(41,000)
    assert len({choice_seed(5, index) for index in range(1000)}) == 1000
    assert choice_seed(5, 0) == 5


def test_logprobs_are_those_of_the_plain_softmax() -> None:
    logits_V = rows(1)[0]
    expected_V = logits_V.log_softmax(-1)
    report = logprobs(logits_V, 4, 3)
    assert report.logprob == pytest.approx(float(expected_V[4]))
    assert [id for id, _ in report.top] == expected_V.topk(3).indices.tolist()
    assert logprobs(logits_V, 4, 0).top == ()
