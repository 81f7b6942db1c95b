"""sample: every path against the sort in fp64, what it keeps exactly, what it draws in distribution."""

import math
import random

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import filled_with_nan, usable

from marrow.core.errors import UsageError
from marrow.kernels.memory import meta, phantom
from marrow.kernels.sampling.draws import Draw, Draws, uniform
from marrow.kernels.sampling.sample import OPERATOR, forward_triton, sample

PATHS = usable(OPERATOR)
FAST = [path for path in PATHS if path != "triton"]
INFINITY = float("inf")


def run(path, logits, draws, num_top=-1):
    packed = Draws.of(draws)
    with filled_with_nan():
        given = logits, packed.factors_S6, packed.keys_S4, packed.history_N, packed.starts_S1
        return OPERATOR.run(path, *given, num_top)


def kept(path, logits_V, draw):
    return run(path, logits_V[None], [draw])[1].item()


def random_rows(seed: int, largest: int = 3000) -> tuple[torch.Tensor, list[Draw]]:
    """Return rows and draws of every kind: ties, impossible tokens, all filters, histories."""
    pick, make = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, vocab = (
        pick.randint(1, 4),
        pick.choice([v for v in (1, 2, 5, 17, 100, 1000, 3001) if v <= largest + 1]),
    )
    logits = torch.randn(rows, vocab, generator=make) * pick.choice([0.5, 3, 10])
    if pick.random() < 0.4:
        logits = logits.round()
    if pick.random() < 0.3:
        logits[torch.rand(rows, vocab, generator=make) < 0.5] = -INFINITY
    draws = [
        Draw(
            temperature=pick.choice([0, 0.3, 1, 1, 2]),
            top_k=pick.choice([0, 0, 1, 3, 50, vocab, vocab + 5, vocab // 2]),
            top_p=pick.choice([1, 1, 0.0, 0.1, 0.5, 0.9, 0.999]),
            min_p=pick.choice([0, 0, 0.01, 0.3, 1.0]),
            seed=pick.randint(-(2**63), 2**64 - 1),
            position=pick.randint(0, 1000),
            repetition=pick.choice([1, 1.3]),
            presence=pick.choice([0, 0.5]),
            frequency=pick.choice([0, 0.2]),
            history=tuple(pick.randrange(vocab) for _ in range(pick.choice([0, 0, 7, 30]))),
            num_drawn=pick.choice([0, 3]),
        )
        for _ in range(rows)
    ]
    return logits, draws


def assert_like_the_sort(path, seed, largest=3000):
    """Tokens, numbers of kept tokens and lists are those of the reference; log probabilities within fp32."""
    logits, draws = random_rows(seed, largest)
    before = logits.clone()
    ours, theirs = (run(each, logits, draws, min(3, logits.shape[1])) for each in (path, "reference"))
    for number in (0, 1, 3):
        assert torch.equal(ours[number], theirs[number]), (number, draws)
    for number in (2, 4):  # logits of up to 40 in fp32: two roundings of 2^-19
        torch.testing.assert_close(ours[number], theirs[number], rtol=0, atol=1e-5, equal_nan=True)
    assert torch.equal(logits, before)


# A value within 1e-7 of a filter's edge could fall on the other side in fp32; seeds are fixed.
@pytest.mark.parametrize("seed", range(150))
def test_what_is_kept_and_drawn_is_what_a_sort_keeps_and_draws(seed):
    for path in FAST:
        assert_like_the_sort(path, seed)


@pytest.mark.skipif("triton" not in PATHS, reason="needs Triton or its interpreter")
@pytest.mark.parametrize("seed", range(6))
def test_the_triton_path_keeps_and_draws_the_same(seed):
    assert_like_the_sort("triton", seed, largest=100)


@pytest.mark.slow
@pytest.mark.skipif("triton" not in PATHS, reason="needs Triton or its interpreter")
@pytest.mark.parametrize("seed", range(100, 140))
def test_the_triton_path_keeps_and_draws_the_same_in_many_blocks(seed):
    assert_like_the_sort("triton", seed)


def test_a_large_vocabulary_is_no_different():
    logits = torch.randn(2, 40_000, generator=torch.Generator().manual_seed(5)) * 3
    for seed, (top_k, top_p, min_p) in enumerate(
        [(0, 1, 0), (50, 0.9, 0), (0, 0.95, 0), (0, 1, 0.02), (9000, 1, 0)]
    ):
        draws = [Draw(0.8, top_k, top_p, min_p, seed=seed, position=row) for row in range(2)]
        ours, theirs = run("cpu", logits, draws, 20), run("reference", logits, draws, 20)
        assert all(torch.equal(ours[number], theirs[number]) for number in (0, 1, 3))


def chi_square(counts_V: torch.Tensor, expected_V: torch.Tensor) -> float:
    """Return Pearson's statistic in standard deviations from its mean; impossible tokens must not occur."""
    possible = expected_V > 0
    assert (counts_V[~possible] == 0).all()
    share = counts_V.sum() * expected_V[possible]
    freedom = max(1, int(possible.sum()) - 1)
    statistic = ((counts_V[possible] - share).square() / share).sum()
    return float((statistic - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize(
    "draw",
    [
        Draw(),
        Draw(temperature=0.5),
        Draw(top_k=3),
        Draw(top_p=0.7, temperature=1.7),
        Draw(min_p=0.2),
        Draw(top_k=9, top_p=0.8, min_p=0.05, repetition=1.5, history=(0, 3, 3)),
    ],
)
def test_draws_follow_the_distribution(path, draw):
    """A right sampler fails one of these 12 fixed runs with probability below 1e-4 (6 sigma)."""
    logits_V = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 1.5
    count = 20_000
    packed = Draws.of([draw] * count)
    keys = packed.keys_S4.clone()
    keys[:, 1], keys[:, 2] = 7, torch.arange(count)
    given = logits_V.expand(count, -1), packed.factors_S6, keys, packed.history_N, packed.starts_S1
    tokens = OPERATOR.run(path, *given, -1)[0]
    expected_V = exact_distribution(logits_V, draw)
    assert chi_square(torch.bincount(tokens, minlength=12).double(), expected_V) < 6


def exact_distribution(logits_V: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Compute what is drawn from, token by token, with Python's own sort."""
    x = logits_V.double().tolist()
    for token in set(draw.history):
        x[token] = x[token] / draw.repetition if x[token] > 0 else x[token] * draw.repetition
        times = draw.history[len(draw.history) - draw.num_drawn :].count(token)
        x[token] -= times * draw.frequency + (times > 0) * draw.presence
    masses = [math.exp((each - max(x)) / draw.temperature) for each in x]
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))[: draw.top_k or len(x)]
    total, sum_before, head = sum(masses[token] for token in order), 0.0, []
    for token in order:
        if draw.top_p >= 1 or sum_before < draw.top_p * total or not head:
            head.append(token)
        sum_before += masses[token]
    head = [token for token in head if masses[token] >= draw.min_p * max(masses)]
    expected_V = torch.zeros(len(x), dtype=torch.float64)
    for token in head:
        expected_V[token] = masses[token]
    return expected_V / expected_V.sum()


@pytest.mark.parametrize("path", FAST)
@settings(max_examples=30, deadline=None)
@hypothesis.given(
    values=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
)
def test_of_equals_the_first_are_kept(path, values, top_k, top_p):
    """Many equal values: the drawn tokens are among the exact support, and it has the exact size."""
    logits_V, draw = torch.tensor(values, dtype=torch.float32), Draw(top_k=top_k, top_p=top_p)
    expected_V = exact_distribution(logits_V, draw)
    draws = [Draw(top_k=top_k, top_p=top_p, position=position) for position in range(30)]
    tokens, numbers, *_ = run(path, logits_V.expand(30, -1), draws)
    assert (expected_V[tokens] > 0).all()
    assert (numbers == numbers[0]).all()
    assert numbers[0] == (expected_V > 0).sum()


@pytest.mark.parametrize("path", PATHS)
def test_edges_of_filters(path):
    logits_V = torch.tensor([1.0, 3.0, 3.0, -INFINITY, 2.0])
    assert kept(path, logits_V, Draw(top_k=5)) == kept(path, logits_V, Draw(top_k=99)) == 5
    assert kept(path, logits_V, Draw(top_k=1)) == kept(path, logits_V, Draw(top_p=0.0)) == 1
    assert kept(path, logits_V, Draw(top_p=1.0)) == 5
    assert kept(path, logits_V, Draw(min_p=1.0)) == 2
    for draw in (Draw(top_k=1), Draw(top_p=0.0), Draw(temperature=0.0), Draw(temperature=0.0, top_k=3)):
        assert run(path, logits_V[None], [draw])[0].item() == 1  # the first of the largest


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_spoiled_rows_are_told_and_others_are_not_touched(path, temperature):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    logits[1, 7], logits[2], logits[3, 2] = math.nan, -INFINITY, INFINITY
    for draw in (Draw(temperature=temperature), Draw(temperature=temperature, top_k=4, top_p=0.9)):
        tokens, numbers, log_probs, top, top_log_probs = run(path, logits, [draw] * 5, 2)
        bad = torch.tensor([False, True, True, True, False])
        assert torch.equal(tokens == -1, bad) and torch.equal(numbers == 0, bad)
        assert torch.equal(log_probs.isnan(), bad) and torch.equal(top_log_probs.isnan().all(1), bad)
        assert torch.equal((top == -1).all(1), bad)


@pytest.mark.parametrize("path", PATHS)
def test_impossible_tokens_are_never_drawn(path):
    logits_V = torch.full((40,), -INFINITY)
    logits_V[[3, 39]] = 0.0
    count = 8 if path == "triton" else 500
    tokens = run(path, logits_V.expand(count, -1), [Draw(position=p) for p in range(count)])[0]
    assert set(tokens.tolist()) == {3, 39}


@pytest.mark.parametrize("path", PATHS)
def test_a_row_draws_the_same_alone_and_in_any_batch(path):
    rows = 4 if path == "triton" else 64
    logits = torch.randn(rows, 100, generator=torch.Generator().manual_seed(1)) * 2
    kinds = [Draw(), Draw(top_k=5), Draw(top_p=0.8, temperature=1.7), Draw(temperature=0.0)]
    draws = [
        Draw(
            k.temperature,
            k.top_k,
            k.top_p,
            seed=row,
            position=5 * row,
            history=(row,) * (row % 3),
            repetition=1.2,
        )
        for row, k in zip(range(rows), kinds * rows, strict=False)
    ]
    together = run(path, logits, draws, 3)
    for row in range(rows):
        alone = run(path, logits[row : row + 1], draws[row : row + 1], 3)
        assert all(torch.equal(a[row], b[0]) for a, b in zip(together, alone, strict=True))


def test_threads_change_nothing():
    logits, draws = torch.randn(9, 500), [Draw(top_p=0.9, seed=row) for row in range(9)]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(run("cpu", logits, draws, 3))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_bf16_logits_draw_what_their_fp32_values_draw(path):
    logits = (torch.randn(3, 150, generator=torch.Generator().manual_seed(4)) * 2).bfloat16()
    draws = [Draw(top_k=20, top_p=0.9), Draw(), Draw(0.5, min_p=0.1, repetition=1.3, history=(3, 4))]
    ours, theirs = run(path, logits, draws, 2), run(path, logits.float(), draws, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_penalties_are_those_of_vllm():
    """Repetition takes from all that was seen, presence and frequency from what was drawn."""
    logits_V = torch.tensor([2.0, -1.0, 0.5, 1.0])
    draw = Draw(repetition=2.0, presence=0.25, frequency=0.5, history=(0, 1, 2, 2, 2), num_drawn=2)
    penalised = torch.tensor([1.0, -2.0, 0.25 - 2 * 0.5 - 0.25, 1.0])
    count = 4000
    draws = [Draw(**{**_fields(draw), "position": p}) for p in range(count)]
    for path in FAST:
        ours = run(path, logits_V.expand(count, -1), draws)[0]
        theirs = run(path, penalised.expand(count, -1), [Draw(position=p) for p in range(count)])[0]
        assert torch.equal(ours, theirs)


def _fields(draw: Draw) -> dict[str, object]:
    return {name: getattr(draw, name) for name in Draw.__slots__}


def test_uniform_numbers_are_those_of_split_mix_64():
    """Written down once, so that a seed draws the same text in years."""

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    assert mix(0) == 0xE220A8397B1DCDAF  # the first number of the generator's published sequence for seed 0
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 12345, 2**64 - 1]
    packed = Draws.of([Draw(seed=seed, position=17 * i) for i, seed in enumerate(seeds)])
    ours = uniform(packed.keys_S4[:, 1], packed.keys_S4[:, 2])
    states = [mix(seed % 2**64) ^ (17 * i * 0x9E3779B97F4A7C15 % 2**64) for i, seed in enumerate(seeds)]
    assert ours.tolist() == [(mix(state) >> 11) * 2.0**-53 for state in states]


def test_uniform_numbers_are_even_and_unrelated():
    seeds, positions = torch.meshgrid(torch.arange(-5, 200), torch.arange(200), indexing="ij")
    values = uniform(seeds, positions)
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01  # 7 standard errors of 41,000 uniform numbers
    for a, b in ((values[:-1], values[1:]), (values[:, :-1], values[:, 1:])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 0.025  # 5 / sqrt(41,000)


def test_log_probabilities_are_those_of_the_plain_softmax():
    logits = torch.randn(3, 50)
    found = sample(logits, Draws.of([Draw(temperature=0.3, top_k=2)] * 3), num_top=4)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(found.log_probs_S, expected.gather(1, found.tokens_S[:, None])[:, 0])
    values, tokens = expected.topk(4)
    torch.testing.assert_close(found.top_log_probs_SR, values)
    assert torch.equal(found.top_tokens_SR, tokens)
    assert sample(logits, Draws.of([Draw()] * 3)).log_probs_S.shape == (0,)
    assert sample(logits, Draws.of([Draw()] * 3), num_top=99).top_tokens_SR.shape == (3, 50)


def test_views_and_no_rows_work():
    logits = torch.randn(40, 6).T
    draws = [Draw(top_k=7, seed=row) for row in range(6)]
    for path in PATHS:
        expected = run(path, logits.contiguous(), draws, 2)
        assert all(torch.equal(a, b) for a, b in zip(run(path, logits, draws, 2), expected, strict=True))
        assert run(path, logits[:0], [], 2)[0].shape == (0,)


@pytest.mark.skipif("triton" not in PATHS, reason="needs Triton or its interpreter")
def test_offsets_beyond_two_billion_elements_hit_their_tensors():
    rows = 2**20 + 1
    settings = meta(rows, 6), meta(rows, 4, dtype=torch.int64)
    history, starts = meta(0, dtype=torch.int64), meta(rows + 1, dtype=torch.int64)
    with phantom() as watch:  # what is read is 0: rows are greedy
        forward_triton(meta(rows, 4096), *settings, history, starts, 1)
    assert watch.launches == 2


@pytest.mark.slow
def test_torch_library_accepts_it():
    packed = Draws.of([Draw(top_k=5)] * 2)
    given = torch.randn(2, 30), packed.factors_S6, packed.keys_S4, packed.history_N, packed.starts_S1, 2
    torch.library.opcheck(torch.ops.marrow.sample.default, given)


@pytest.mark.parametrize("shape", [(3, 7), (1, 7), (7,), (1, 2, 7)])
def test_logits_that_are_not_a_row_for_each_draw_are_refused(shape):
    """C takes addresses: it would read behind the draws' end."""
    with pytest.raises(UsageError, match=r"logits \[.*7\] for 2 draws"):
        sample(torch.zeros(shape), Draws.of([Draw(), Draw()]))
