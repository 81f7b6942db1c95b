"""Clusters are connected components, named by their smallest member, whatever the order of the pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.data.dedup.clusters import Clusters, components

COUNT = 24
PAIRS = st.lists(
    st.tuples(st.integers(0, COUNT - 1), st.integers(0, COUNT - 1)).filter(lambda pair: pair[0] < pair[1]),
    max_size=40,
)


def array(pairs: list[tuple[int, int]]) -> np.ndarray:
    return np.array(pairs, np.int64).reshape(-1, 2)


def by_hand(count: int, pairs: list[tuple[int, int]]) -> list[int]:
    """Spread the smallest name along the pairs until nothing changes."""
    names = list(range(count))
    changed = True
    while changed:
        changed = False
        for one, other in pairs:
            least = min(names[one], names[other])
            changed |= names[one] != least or names[other] != least
            names[one] = names[other] = least
    return names


@given(PAIRS)
def test_components_are_those_found_by_hand(pairs: list[tuple[int, int]]) -> None:
    assert components(COUNT, array(pairs)).tolist() == by_hand(COUNT, pairs)


@given(PAIRS, st.randoms(use_true_random=False))
def test_neither_order_nor_direction_nor_repetition_of_the_pairs_counts(pairs, random) -> None:
    other = [pair[::-1] if random.random() < 0.5 else pair for pair in pairs + pairs[:3]]
    random.shuffle(other)
    assert components(COUNT, array(other)).tolist() == components(COUNT, array(pairs)).tolist()


@given(PAIRS, st.integers(0, 40))
def test_pairs_may_come_in_parts(pairs: list[tuple[int, int]], cut: int) -> None:
    clusters = Clusters(COUNT)
    for part in (array(pairs[:cut]), array(pairs[cut:])):
        clusters.add(part[:, 0], part[:, 1])
        clusters.roots()  # looking in between changes nothing
    assert clusters.roots().tolist() == by_hand(COUNT, pairs)


@given(PAIRS)
def test_of_each_cluster_the_smallest_stays_and_who_goes_names_one_that_was_there(pairs) -> None:
    """Pairs come by their later text; a text near one that itself goes is judged by one that stays."""
    pairs = sorted(set(pairs), key=lambda pair: (pair[1], pair[0]))
    clusters = Clusters(COUNT)
    ordered = array(pairs)
    clusters.add(ordered[:, 0], ordered[:, 1])
    near_of, roots = clusters.near_of, clusters.roots()
    for text in range(COUNT):
        kept_neighbours = [first for first, second in pairs if second == text and near_of[first] < 0]
        assert near_of[text] == (kept_neighbours[0] if kept_neighbours else -1)
        assert roots[text] <= text
        if near_of[text] >= 0:
            assert near_of[near_of[text]] == -1, "what a text is near to stays"
            assert roots[near_of[text]] == roots[text]
    assert all(near_of[root] == -1 for root in set(roots.tolist()))


def test_no_texts_and_no_pairs_are_no_clusters() -> None:
    assert components(0, array([])).tolist() == []
    assert components(3, array([])).tolist() == [0, 1, 2]


@pytest.mark.parametrize("backwards", [False, True])
def test_a_chain_of_a_hundred_thousand_takes_no_recursion_and_no_square(backwards: bool) -> None:
    count = 100_000
    chain = np.stack([np.arange(count - 1), np.arange(1, count)], axis=1)
    assert not components(count, chain[::-1] if backwards else chain).any()


def test_unequal_numbers_of_ends_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        Clusters(3).add(np.array([0, 1]), np.array([2]))
