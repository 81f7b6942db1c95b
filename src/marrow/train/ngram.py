"""N-gram language model over token ids: interpolated modified Kneser-Ney smoothing, exact.

The baseline that a trained decoder has to beat. Trained and asked on flat token arrays in which
`bos` begins every document, so that no n-gram crosses from one document into the next.

One idea: an n-gram of order k is the pair (number of its first k-1 tokens among the n-grams of
order k-1, its last token), packed in one 64-bit key. A sorted array of keys per order is then a
trie: one vectorised binary search per order walks all positions of a text at once, without
hashing and so without collisions.

    order 1:  key = token                      number_1 = rank of the key
    order k:  key = number_(k-1) of the context * V + token

Highest-order counts are raw; lower orders count the distinct tokens seen before the n-gram,
except where it begins with `bos`, which nothing precedes. Order 1 is interpolated with the
uniform distribution over all V tokens. Source: Chen & Goodman, An Empirical Study of Smoothing
Techniques for Language Modeling (1998), section 3; treatment of `bos` as in Heafield et al. 2013.

Axes: N tokens, G n-grams of one order, H contexts of one order, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from marrow.core.errors import DataError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Chen & Goodman's estimate needs n-grams seen once, twice, three and four times. Where some are
# missing or it leaves its range, these take its place (the usual fallback; text of toy size only).
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


@dataclass(frozen=True, slots=True)
class _Order:
    """The n-grams of one order, sorted by key.

    probability_G is the discounted part of p(token | context); backoff_H the weight that the
    context leaves to the next lower order. The lower order's numbers are the contexts.
    """

    keys_G: Ints
    probability_G: Floats
    backoff_H: Floats
    discounts: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class NgramModel:
    """A trained n-gram model. `orders[k-1]` holds order k."""

    vocab_size: int
    bos_id: int
    orders: tuple[_Order, ...]

    @property
    def num_ngrams(self) -> int:
        """Distinct n-grams of all orders."""
        return sum(len(order.keys_G) for order in self.orders)

    @property
    def discounts(self) -> tuple[tuple[float, float, float], ...]:
        """D1, D2, D3+ of each order."""
        return tuple(order.discounts for order in self.orders)

    @classmethod
    def train(
        cls, tokens_N: npt.NDArray[np.integer], *, order: int, vocab_size: int, bos_id: int
    ) -> "NgramModel":
        """Count and smooth the n-grams of a text.

        Args: tokens_N: documents one after another, each beginning with bos_id, which stands
            nowhere else; ids in [0, vocab_size). order: >= 1; 1 is a smoothed unigram.
        Raises: DataError without a token to predict, or if the array does not begin with bos.
        Cost: O(order * N log N) time, about 30 bytes of memory per token and order.
        """
        tokens_N = _check(tokens_N, vocab_size, bos_id)
        counted = _count(tokens_N, order, vocab_size, bos_id)
        return cls(vocab_size, bos_id, tuple(_smooth(counted, vocab_size, bos_id)))

    def log_probabilities(self, tokens_N: npt.NDArray[np.integer]) -> Floats:
        """Return ln p of every token given what stands before it in its document.

        Args: tokens_N: as for `train`.
        Returns: float64 [N], nats, <= 0; exactly 0 at each bos, which is given and not predicted.
        Cost: O(order * N log G).
        """
        tokens_N = _check(tokens_N, self.vocab_size, self.bos_id)
        given_N = tokens_N == self.bos_id
        p_N = np.full(len(tokens_N), 1.0 / self.vocab_size)
        context_N = np.zeros(len(tokens_N), np.int64)  # order 1: the one empty context
        for order in self.orders:
            known_N = context_N >= 0
            number_N = np.full(len(tokens_N), -1, np.int64)
            number_N[known_N] = _find(order.keys_G, context_N[known_N] * self.vocab_size + tokens_N[known_N])
            p_N[known_N] *= order.backoff_H[context_N[known_N]]
            hit_N = number_N >= 0
            p_N[hit_N] += order.probability_G[number_N[hit_N]]
            context_N = np.concatenate([[-1], number_N[:-1]])
        p_N[given_N] = 1.0
        nats_N: Floats = np.log(p_N)
        return nats_N

    def distribution(self, history_N: npt.NDArray[np.integer]) -> Floats:
        """Return p of every token after a history.

        Args: history_N: tokens so far, beginning with bos_id.
        Returns: float64 [V], sums to 1.
        """
        history = [int(token) for token in history_N[-len(self.orders) :]]
        p_V = np.full(self.vocab_size, 1.0 / self.vocab_size)
        for k, order in enumerate(self.orders, 1):
            context = self._number(history[len(history) - k + 1 :]) if k - 1 <= len(history) else -1
            if context < 0:
                break
            first = context * self.vocab_size
            low, high = np.searchsorted(order.keys_G, [first, first + self.vocab_size])
            p_V *= order.backoff_H[context]
            p_V[order.keys_G[low:high] - first] += order.probability_G[low:high]
        return p_V

    def sample(
        self,
        prompt_N: npt.NDArray[np.integer],
        max_tokens: int,
        *,
        seed: int,
        temperature: float = 1.0,
        stop_id: int | None = None,
    ) -> Ints:
        """Draw tokens after a prompt; the draw at each place depends on (seed, place) alone.

        Args: prompt_N: beginning with bos_id. temperature: 0 takes the most probable token.
            stop_id: ends the text; it is not part of the result.
        Returns: int64 [<= max_tokens], without the prompt.
        """
        tokens = [int(token) for token in prompt_N]
        for place in range(len(tokens), len(tokens) + max_tokens):
            p_V = self.distribution(np.array(tokens[-len(self.orders) :], np.int64))
            p_V[self.bos_id] = 0.0  # bos begins a document and stands nowhere else
            if temperature == 0:
                token = int(p_V.argmax())
            else:
                log_V = np.log(p_V, out=np.full_like(p_V, -np.inf), where=p_V > 0) / temperature
                cumulative_V = np.exp(log_V - log_V.max()).cumsum()
                drawn = np.random.default_rng((seed, place)).random() * cumulative_V[-1]
                token = int(np.searchsorted(cumulative_V, drawn, side="right"))
            if token == stop_id:
                break
            tokens.append(token)
        return np.array(tokens[len(prompt_N) :], np.int64)

    def _number(self, context: list[int]) -> int:
        """Return the number of an n-gram among those of its order, -1 if it was never seen."""
        number = 0
        for order, token in zip(self.orders, context, strict=False):
            number = int(_find(order.keys_G, np.array([number * self.vocab_size + token]))[0])
            if number < 0:
                break
        return number


def _check(tokens_N: npt.NDArray[np.integer], vocab_size: int, bos_id: int) -> Ints:
    if len(tokens_N) == 0 or tokens_N[0] != bos_id:
        raise DataError("an n-gram model reads documents that begin with bos; this text does not")
    if int(tokens_N.max()) >= vocab_size or int(tokens_N.min()) < 0:
        raise DataError(f"token id {int(tokens_N.max())} is outside the vocabulary of {vocab_size}")
    return tokens_N.astype(np.int64, copy=False)


def _find(keys_G: Ints, wanted_N: Ints) -> Ints:
    """Return the place of each wanted key, -1 where it is absent."""
    if len(keys_G) == 0:
        return np.full(len(wanted_N), -1, np.int64)
    place_N = np.searchsorted(keys_G, wanted_N)
    place_N[place_N == len(keys_G)] = 0
    place_N[keys_G[place_N] != wanted_N] = -1
    return place_N


@dataclass(slots=True)
class _Counted:
    """Raw counts of one order. suffix_G: number, in the order below, of all but the first token.

    from_start_G: the n-gram begins with bos.
    """

    keys_G: Ints
    count_G: Ints
    suffix_G: Ints
    from_start_G: npt.NDArray[np.bool_]


def _count(tokens_N: Ints, order: int, vocab_size: int, bos_id: int) -> list[_Counted]:
    given_N = tokens_N == bos_id
    if bool(given_N.all()):
        raise DataError("there is no token to predict: every document is empty")
    counted: list[_Counted] = []
    context_N = np.zeros(len(tokens_N), np.int64)
    lower_N = np.zeros(len(tokens_N), np.int64)  # number of the (k-1)-gram that ends here
    for k in range(1, order + 1):
        known_N = context_N >= 0
        if k > 1:
            known_N &= ~given_N
        keys_K = context_N[known_N] * vocab_size + tokens_N[known_N]
        keys_G, first_G, number_K, count_G = np.unique(
            keys_K, return_index=True, return_inverse=True, return_counts=True
        )
        from_start_G = keys_G == bos_id if k == 1 else counted[-1].from_start_G[keys_G // vocab_size]
        counted.append(_Counted(keys_G, count_G, lower_N[known_N][first_G], from_start_G))
        lower_N = np.full(len(tokens_N), -1, np.int64)
        lower_N[known_N] = number_K
        context_N = np.concatenate([[-1], lower_N[:-1]])
    return counted


def _smooth(counted: list[_Counted], vocab_size: int, bos_id: int) -> list[_Order]:
    orders: list[_Order] = []
    num_contexts = 1
    for k, grams in enumerate(counted):
        count_G = grams.count_G
        if k + 1 < len(counted):
            before_G = np.bincount(counted[k + 1].suffix_G, minlength=len(count_G))
            count_G = np.where(grams.from_start_G, count_G, before_G)
        if k == 0:  # bos is never predicted
            count_G = np.where(grams.keys_G == bos_id, 0, count_G)
        discounts = _discounts(count_G)
        discount_G = np.array([0.0, *discounts])[np.minimum(count_G, 3)]
        context_G = grams.keys_G // vocab_size
        total_H = np.bincount(context_G, count_G, minlength=num_contexts)
        left_H = np.bincount(context_G, discount_G, minlength=num_contexts)
        unseen_H = total_H == 0  # the last tokens of documents: nothing follows, all is left
        total_H[unseen_H] = 1.0
        left_H[unseen_H] = 1.0
        probability_G = (count_G - discount_G) / total_H[context_G]
        orders.append(_Order(grams.keys_G, probability_G, left_H / total_H, discounts))
        num_contexts = len(grams.keys_G)
    return orders


def _discounts(count_G: Ints) -> tuple[float, float, float]:
    """Estimate D1, D2, D3+ from how many n-grams were counted once to four times (Chen & Goodman)."""
    n1, n2, n3, n4 = (int(n) for n in np.bincount(np.minimum(count_G, 5), minlength=6)[1:5])
    if 0 in (n1, n2, n3):
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    estimate = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    if not all(0 < discount <= k for k, discount in enumerate(estimate, 1)):
        return FALLBACK_DISCOUNTS
    return estimate
