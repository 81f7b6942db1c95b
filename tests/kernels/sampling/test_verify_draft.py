"""verify_draft: every path against the sort in fp64; what comes out is drawn from the target."""

import math
import random

import pytest
import torch
from operator_checks import filled_with_nan, usable

from marrow.core.errors import UsageError
from marrow.kernels.sampling.draws import Draw, Draws
from marrow.kernels.sampling.sample import sample
from marrow.kernels.sampling.verify_draft import OPERATOR, draft_seed, match, verify_draft

PATHS = usable(OPERATOR)
FAST = [path for path in PATHS if path != "triton"]


def run(path, logits, drafts, begins, probs, draws):
    with filled_with_nan():
        packed = draws.factors_S6, draws.keys_S4, draws.history_N, draws.starts_S1
        return OPERATOR.run(path, logits, drafts, begins, probs, *packed)


def random_case(seed: int, largest: int = 1000):
    pick, make = random.Random(seed), torch.Generator().manual_seed(seed)
    vocab = pick.choice([v for v in (1, 2, 5, 17, 100, 1000) if v <= largest])
    lengths = [pick.randint(1, 5) for _ in range(pick.randint(1, 4))]
    rows, begins = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    logits = torch.randn(rows, vocab, generator=make) * 3
    probs = (logits * 0.7 + torch.randn(rows, vocab, generator=make)).softmax(-1)
    drafts = torch.multinomial(probs, 1, generator=make)[:, 0]
    if seed % 5 == 0:
        logits[pick.randrange(rows), 0] = math.nan
    if seed % 7 == 0:
        drafts[pick.randrange(rows)] = pick.choice([-1, vocab, 2**40])
    settings = pick.choice([0, 0.7, 1]), pick.choice([0, 5]), pick.choice([1, 0.9]), pick.choice([0, 0.1])
    draws = [
        Draw(*settings, seed=77 * s + seed, position=i, repetition=1.2, history=(0,) * pick.choice([0, 2]))
        for s, length in enumerate(lengths)
        for i in range(length)
    ]
    return logits, drafts, begins, probs, Draws.of(draws)


@pytest.mark.parametrize("seed", range(80))
def test_all_paths_accept_and_draw_the_same(seed):
    case = random_case(seed)
    expected = run("reference", *case)
    for path in FAST[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run(path, *case), expected, strict=True))


@pytest.mark.skipif("triton" not in PATHS, reason="needs Triton or its interpreter")
@pytest.mark.parametrize("seed", range(5))
def test_the_triton_path_accepts_and_draws_the_same(seed):
    case = random_case(seed, largest=17)
    for a, b in zip(run("triton", *case), run("reference", *case), strict=True):
        assert torch.equal(a, b)


def distance(counts_V: torch.Tensor, expected_V: torch.Tensor) -> float:
    """Return Pearson's statistic in standard deviations from its mean."""
    share = counts_V.sum() * expected_V
    possible = share > 0
    assert (counts_V[~possible] == 0).all()
    freedom = max(1, int(possible.sum()) - 1)
    statistic = ((counts_V - share)[possible].square() / share[possible]).sum()
    return float((statistic - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("draw", [Draw(), Draw(temperature=0.6), Draw(top_k=4), Draw(top_p=0.8, min_p=0.05)])
def test_the_first_token_is_drawn_from_the_target_whatever_the_draft(path, draw):
    """Right: fails one of these 8 fixed runs with probability below 1e-4 (chi-square beyond 6 sigma)."""
    make, count, vocab = torch.Generator().manual_seed(2), 10_000, 8
    logits_V = torch.randn(vocab, generator=make) * 1.5
    draft_V = torch.randn(vocab, generator=make).softmax(-1)
    base = Draws.of([draw] * (2 * count))
    keys = base.keys_S4.clone()
    keys[:, 1], keys[:, 2] = 11, torch.arange(2 * count)
    draws = Draws(base.factors_S6, keys, base.history_N, base.starts_S1)
    guess = Draws.of([Draw(seed=draft_seed(11), position=row) for row in range(2 * count)])
    drafts = sample(draft_V.log().expand(2 * count, -1), guess).tokens_S
    begins = torch.arange(0, 2 * count + 1, 2)
    accepted, tokens = run(
        path,
        logits_V.expand(2 * count, -1),
        drafts,
        begins,
        draft_V.expand(2 * count, -1).contiguous(),
        draws,
    )
    first = torch.where(accepted > 0, drafts[begins[:-1]], tokens)
    expected_V = target_of(logits_V, draw)
    assert distance(torch.bincount(first, minlength=vocab).double(), expected_V) < 6
    # And the second, where the first stood: independent of it.
    second = tokens[accepted > 0]
    assert distance(torch.bincount(second, minlength=vocab).double(), expected_V) < 6
    # As many stand as can: the mass that both have.
    share = torch.minimum(expected_V, draft_V.double()).sum()
    deviation = math.sqrt(share * (1 - share) / count)
    assert abs(accepted.double().mean() - share) < 5 * deviation


def target_of(logits_V: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Return the exact distribution that `sample` draws from."""
    p_V = (logits_V.double() / draw.temperature).softmax(-1)
    order = p_V.argsort(descending=True)
    rank = torch.empty_like(order).index_put((order,), torch.arange(len(order)))
    p_V = p_V * (rank < (draw.top_k or len(p_V)))
    p_V = p_V / p_V.sum()
    before_V = torch.empty_like(p_V).index_put((order,), p_V[order].cumsum(0) - p_V[order])
    keep_V = ((before_V < draw.top_p) | (draw.top_p >= 1)) & (p_V >= draw.min_p * p_V.max())
    return p_V * keep_V / (p_V * keep_V).sum()


@pytest.mark.skipif("cpu" not in PATHS, reason="no C compiler")
@pytest.mark.parametrize("draw", [Draw(), Draw(temperature=0.6, top_k=5), Draw(top_p=0.8, min_p=0.05)])
def test_thousands_of_rows_are_accepted_and_drawn_as_by_the_reference(draw):
    """Token by token: a threshold or a remainder off by a hundredth shows in some of them."""
    sequences, vocab, make = 10_000, 8, torch.Generator().manual_seed(5)
    rows = 2 * sequences
    logits = torch.randn(rows, vocab, generator=make) * 1.5
    probs = (logits * 0.5 + torch.randn(rows, vocab, generator=make)).softmax(-1)
    drafts = torch.multinomial(probs, 1, generator=make)[:, 0]
    base = Draws.of([draw] * rows)
    keys = base.keys_S4.clone()
    keys[:, 1], keys[:, 2] = 23, torch.arange(rows)
    given = logits, drafts, torch.arange(0, rows + 1, 2), probs
    draws = Draws(base.factors_S6, keys, base.history_N, base.starts_S1)
    found, expected = run("cpu", *given, draws), run("reference", *given, draws)
    share = expected[0].double().mean()
    assert 0.3 < share < 0.9  # both ways are gone
    differs = (found[0] != expected[0]) | (found[1] != expected[1])
    # C's numbers are of fp32: a random number within 2^-22 of one of 8 edges may fall on its other side,
    # in some 0.02 of 10,000 sequences.
    assert differs.sum() <= 1


@pytest.mark.parametrize("path", PATHS)
def test_a_draft_from_the_target_itself_always_stands(path):
    logits = torch.randn(4, 30)
    probs = logits.softmax(-1)
    drafts = torch.multinomial(probs, 1)[:, 0]
    # fp32 probabilities exceed the fp64 ones by rounding: a hair less makes sure.
    accepted, tokens = run(path, logits, drafts, torch.tensor([0, 4]), probs * 0.9999, Draws.of([Draw()] * 4))
    assert accepted.tolist() == [3] and 0 <= tokens.item() < 30


@pytest.mark.parametrize("path", PATHS)
def test_greedy_accepts_the_largest_alone(path):
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(1))
    best = logits.argmax(-1)
    probs, begins = torch.full((6, 30), 1 / 30), torch.tensor([0, 3, 6])
    drafts = best.clone()
    drafts[4] = (drafts[4] + 1) % 30
    draws = Draws.of([Draw(temperature=0.0)] * 6)
    accepted, tokens = run(path, logits, drafts, begins, probs, draws)
    assert accepted.tolist() == [2, 1]
    assert tokens.tolist() == [best[2], best[4]]
    guessed = verify_draft(logits, drafts, begins, draws)
    assert torch.equal(guessed[0], accepted) and torch.equal(guessed[1], tokens)


def test_guesses_give_the_text_that_comes_without_drafts():
    """Whatever is guessed, a sequence's accepted drafts and next token are what `sample` draws."""
    make = torch.Generator().manual_seed(3)
    logits = torch.randn(20, 6, generator=make)
    draws = Draws.of([Draw(top_p=0.9, seed=row // 5, position=row % 5) for row in range(20)])
    drawn, begins = sample(logits, draws).tokens_S, torch.arange(0, 21, 5)
    for _ in range(20):
        drafts = torch.where(
            torch.rand(20, generator=make) < 0.7, drawn, torch.randint(0, 6, (20,), generator=make)
        )
        accepted, tokens = verify_draft(logits, drafts, begins, draws)
        for sequence in range(4):
            first, number = 5 * sequence, int(accepted[sequence])
            text = [*drafts[first : first + number].tolist(), int(tokens[sequence])]
            assert text == drawn[first : first + number + 1].tolist()
            assert number == 4 or drafts[first + number] != drawn[first + number]


def test_match_counts_what_agrees_from_the_left():
    drawn = torch.tensor([1, 2, 3, 4, 5, 6, 7, -1, 9])
    drafts = torch.tensor([1, 2, 9, 4, 0, 0, 7, 8, 9])
    accepted, tokens = match(drawn, drafts, torch.tensor([0, 4, 5, 9]))
    assert accepted.tolist() == [2, 0, 0]
    assert tokens.tolist() == [3, 5, 6]


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_is_not_finite_ends_its_sequence(path):
    logits, probs = torch.zeros(4, 5), torch.full((4, 5), 0.2)
    logits[1, 2] = math.nan
    draws = Draws.of([Draw(seed=row) for row in range(4)])
    accepted, tokens = run(
        path, logits, torch.zeros(4, dtype=torch.int64), torch.tensor([0, 3, 4]), probs, draws
    )
    assert accepted[0] == 1 and tokens[0] == -1 and tokens[1] >= 0


@pytest.mark.slow
def test_torch_library_accepts_it():
    logits, drafts, begins, probs, draws = random_case(1)
    given = logits, drafts, begins, probs, draws.factors_S6, draws.keys_S4, draws.history_N, draws.starts_S1
    torch.library.opcheck(torch.ops.marrow.verify_draft.default, given)


@pytest.mark.parametrize(
    ("drafts", "probs", "rows", "said"),
    [
        (torch.zeros(1, dtype=torch.int64), None, 2, r"drafts \[1\]"),
        (torch.zeros(2, dtype=torch.int32), None, 2, "torch.int32"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 6), 2, r"probabilities \[2, 6\]"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 7).double(), 2, "torch.float64"),
        (torch.zeros(3, dtype=torch.int64), None, 3, "for 2 draws"),
    ],
)
def test_what_is_not_one_for_each_row_is_refused(drafts, probs, rows, said):
    """C takes addresses: it would read behind their end."""
    with pytest.raises(UsageError, match=said):
        verify_draft(torch.zeros(rows, 7), drafts, torch.tensor([0, rows]), Draws.of([Draw(), Draw()]), probs)
