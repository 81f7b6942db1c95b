"""The vectorised n-gram model against Chen & Goodman's formulas written down with dictionaries."""

import time
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError
from marrow.train.ngram import FALLBACK_DISCOUNTS, NgramModel

BOS, EOS = 0, 1


class SlowKneserNey:
    """Interpolated modified Kneser-Ney, one formula a method, one dictionary a count."""

    def __init__(self, documents: Sequence[Sequence[int]], order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        raw: dict[int, Counter[tuple[int, ...]]] = {k: Counter() for k in range(1, order + 1)}
        for document in documents:
            for k in range(1, order + 1):
                for i in range(len(document) - k + 1):
                    raw[k][tuple(document[i : i + k])] += 1
        self.counts = {order: raw[order]}
        for k in range(1, order):
            before = defaultdict(set)
            for gram in raw[k + 1]:
                before[gram[1:]].add(gram[0])
            self.counts[k] = Counter(
                {gram: n if gram[0] == BOS else len(before[gram]) for gram, n in raw[k].items()}
            )
        self.counts[1][(BOS,)] = 0

    def discount(self, k: int, count: int) -> float:
        seen = Counter(self.counts[k].values())
        n1, n2, n3, n4 = (seen[i] for i in (1, 2, 3, 4))
        estimate = FALLBACK_DISCOUNTS
        if n1 and n2 and n3:
            y = n1 / (n1 + 2 * n2)
            exact = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
            if all(0 < d <= i for i, d in enumerate(exact, 1)):
                estimate = exact
        return 0.0 if count == 0 else estimate[min(count, 3) - 1]

    def p(self, word: int, history: tuple[int, ...], k: int | None = None) -> float:
        """p(word | history) in the model of order k."""
        k = min(self.order, len(history) + 1) if k is None else k
        if k == 0:
            return 1 / self.vocab_size
        context = history[len(history) - (k - 1) :]
        following = {g[-1]: n for g, n in self.counts[k].items() if g[:-1] == context and n}
        lower = self.p(word, history, k - 1)
        total = sum(following.values())
        if not total:
            return lower
        count = following.get(word, 0)
        left = sum(self.discount(k, n) for n in following.values())
        return (count - self.discount(k, count)) / total + left / total * lower


def flat(documents: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array([token for document in documents for token in document], np.uint16)


def words(vocab_size: int):
    inner = st.lists(st.integers(2, vocab_size - 1), max_size=25)
    return st.lists(inner.map(lambda ids: [BOS, *ids, EOS]), min_size=1, max_size=6)


@given(words(6), words(8), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_every_probability_equals_the_formulas(learned, asked, order):
    vocab_size = 8  # two of the tokens asked for never occur in training
    model = NgramModel.train(flat(learned), order=order, vocab_size=vocab_size, bos_id=BOS)
    slow = SlowKneserNey(learned, order, vocab_size)
    expected = [
        0.0 if i == 0 else np.log(slow.p(document[i], tuple(document[:i])))
        for document in asked
        for i in range(len(document))
    ]
    # 1e-12: about five orders of double-precision products and sums
    np.testing.assert_allclose(model.log_probabilities(flat(asked)), expected, rtol=1e-12, atol=1e-12)


def test_estimated_discounts_are_used_and_agree_with_the_formulas():
    """A text long enough that no order falls back, so that the estimate itself is compared."""
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, 59)
    documents = [
        [BOS, *rng.choice(np.arange(2, 60), 70, p=weights / weights.sum()).tolist(), EOS] for _ in range(9)
    ]
    model = NgramModel.train(flat(documents), order=3, vocab_size=60, bos_id=BOS)
    assert FALLBACK_DISCOUNTS not in model.discounts[1:]
    slow = SlowKneserNey(documents, 3, 60)
    for k, discounts in enumerate(model.discounts, 1):
        assert discounts == pytest.approx([slow.discount(k, count) for count in (1, 2, 3)])
    document = documents[0]
    expected = [np.log(slow.p(document[i], tuple(document[:i]))) for i in range(1, len(document))]
    np.testing.assert_allclose(model.log_probabilities(flat([document]))[1:], expected, rtol=1e-12)


@given(words(7), st.integers(1, 5), st.lists(st.integers(1, 8), max_size=7))
@settings(max_examples=60, deadline=None)
def test_probabilities_sum_to_one_after_any_history(learned, order, history):
    model = NgramModel.train(flat(learned), order=order, vocab_size=9, bos_id=BOS)
    p_V = model.distribution(np.array([BOS, *history]))
    assert p_V.min() > 0
    assert p_V.sum() == pytest.approx(1, abs=1e-12)


@given(words(7), st.integers(1, 5), words(7))
@settings(max_examples=40, deadline=None)
def test_distribution_and_log_probabilities_are_the_same_model(learned, order, asked):
    model = NgramModel.train(flat(learned), order=order, vocab_size=9, bos_id=BOS)
    for document in asked:
        nats_N = model.log_probabilities(flat([document]))
        for i in range(1, len(document)):
            p_V = model.distribution(np.array(document[:i]))
            assert np.exp(nats_N[i]) == pytest.approx(p_V[document[i]], rel=1e-12)


@given(words(7), words(7), words(7), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_no_ngram_crosses_a_document(learned, first, second, order):
    """A document costs the same wherever it stands, and training does not see the order of documents."""
    model = NgramModel.train(flat(learned), order=order, vocab_size=7, bos_id=BOS)
    together = model.log_probabilities(flat(first + second))
    apart = [model.log_probabilities(flat([document])) for document in first + second]
    np.testing.assert_array_equal(together, np.concatenate(apart))
    shuffled = NgramModel.train(flat(learned[::-1]), order=order, vocab_size=7, bos_id=BOS)
    np.testing.assert_allclose(
        shuffled.log_probabilities(flat(first)), together[: len(flat(first))], rtol=1e-12
    )


def test_the_unigram_of_a_known_text():
    """By hand: tokens 2 2 2 2 3 and one eos; no counts of counts, so D = 0.5 for 1 and 1.5 for 3+."""
    model = NgramModel.train(flat([[BOS, 2, 2, 2, 2, 3, EOS]]), order=1, vocab_size=5, bos_id=BOS)
    left = (1.5 + 0.5 + 0.5) / 6
    expected = [left / 5, 0.5 / 6 + left / 5, 2.5 / 6 + left / 5, 0.5 / 6 + left / 5, left / 5]
    np.testing.assert_allclose(model.distribution(np.array([BOS])), expected, rtol=1e-14)


def test_bos_is_given_and_costs_nothing():
    model = NgramModel.train(flat([[BOS, 2, 3, EOS]]), order=3, vocab_size=5, bos_id=BOS)
    nats_N = model.log_probabilities(flat([[BOS, 2, EOS], [BOS], [BOS, 3]]))
    assert nats_N[[0, 3, 4]].tolist() == [0, 0, 0]
    assert (nats_N[[1, 2, 5]] < 0).all()


def test_a_higher_order_predicts_a_repeating_text_better():
    document = [BOS, *([2, 3, 4, 2, 5, 6] * 40), EOS]
    nats = [
        -NgramModel.train(flat([document]), order=order, vocab_size=7, bos_id=BOS)
        .log_probabilities(flat([document]))
        .sum()
        for order in (1, 2, 3)
    ]
    assert nats[0] > 1.5 * nats[1] > 1.5 * nats[2]


def test_frequencies_of_samples_follow_the_distribution():
    document = [BOS, *([2, 3, 2, 4, 5] * 30), EOS]
    model = NgramModel.train(flat([document]), order=2, vocab_size=6, bos_id=BOS)
    drawn = [model.sample(np.array([BOS, 2]), 1, seed=seed)[0] for seed in range(3000)]
    p_V = model.distribution(np.array([BOS, 2]))
    p_V[BOS] = 0
    share_V = np.bincount(drawn, minlength=6) / len(drawn)
    # 4 standard deviations of a binomial share of 3000 draws
    assert (np.abs(share_V - p_V / p_V.sum()) < 4 * np.sqrt(0.25 / len(drawn))).all()


def test_samples_repeat_with_the_seed_and_do_not_depend_on_where_the_prompt_was_cut():
    document = [BOS, *np.random.default_rng(0).integers(2, 9, 400).tolist(), EOS]
    model = NgramModel.train(flat([document]), order=3, vocab_size=9, bos_id=BOS)
    prompt = np.array([BOS, 2, 5])
    whole = model.sample(prompt, 20, seed=7)
    assert whole.tolist() == model.sample(prompt, 20, seed=7).tolist()
    assert whole.tolist() != model.sample(prompt, 20, seed=8).tolist()
    later = model.sample(np.concatenate([prompt, whole[:6]]), 14, seed=7)
    assert later.tolist() == whole[6:].tolist()


def test_temperature_zero_takes_the_most_probable_and_stops_at_the_stop_token():
    model = NgramModel.train(flat([[BOS, 2, 3, 4, EOS]] * 5), order=3, vocab_size=6, bos_id=BOS)
    assert model.sample(np.array([BOS]), 9, seed=0, temperature=0, stop_id=EOS).tolist() == [2, 3, 4]
    assert model.sample(np.array([BOS]), 2, seed=0, temperature=0).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([], "begin with bos"),
        ([3, BOS], "begin with bos"),
        ([BOS, 9], "outside the vocabulary"),
        ([BOS, -1], "outside the vocabulary"),
        ([BOS, BOS], "no token to predict"),
    ],
)
def test_a_text_that_cannot_be_counted_is_refused(tokens, says):
    with pytest.raises(DataError, match=says):
        NgramModel.train(np.array(tokens, np.int64), order=3, vocab_size=9, bos_id=BOS)


def test_a_quarter_of_a_million_tokens_take_a_fraction_of_a_second_and_bounded_memory():
    """The quickstart has about 3 M tokens and 25 CPU-seconds; this is a twelfth with slack."""
    rng = np.random.default_rng(0)
    tokens_N = (2 + rng.zipf(1.3, 250_000) % 8190).astype(np.uint16)
    tokens_N[::1000] = BOS
    tracemalloc.start()
    start_s = time.process_time()
    model = NgramModel.train(tokens_N, order=5, vocab_size=8192, bos_id=BOS)
    cpu_s = time.process_time() - start_s
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert model.num_ngrams > 500_000
    assert cpu_s < 2.0  # measured 0.3
    assert peak_bytes < 375 * len(tokens_N)  # 1.5 GB for 4 M tokens
