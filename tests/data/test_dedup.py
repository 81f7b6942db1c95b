import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.data.dedup import Signer, band_rows, components, find_near_duplicates, near_pairs, text_hash

WORDS = [f"word{i}" for i in range(5000)]


def edited(words: list[str], changes: int, rng: random.Random) -> list[str]:
    """Replace words at places far enough apart that each costs five shingles."""
    result = list(words)
    for place in rng.sample(range(0, len(words), 7), changes):
        result[place] = f"new{rng.random()}"
    return result


def jaccard(signer: Signer, one: str, other: str) -> float:
    a, b = set(signer.shingles(one).tolist()), set(signer.shingles(other).tolist())
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def sample() -> tuple[list[str], list[tuple[int, int, float]]]:
    """Texts in families of edited copies, and all pairs with their true similarity by brute force."""
    rng = random.Random(0)
    texts = []
    for _ in range(60):
        base = rng.choices(WORDS, k=rng.randrange(60, 400))
        texts.append(" ".join(base))
        texts += [" ".join(edited(base, rng.randrange(0, 1 + len(base) // 24), rng)) for _ in range(4)]
    signer = Signer()
    sets = [set(signer.shingles(text).tolist()) for text in texts]
    pairs = [
        (i, j, len(sets[i] & sets[j]) / len(sets[i] | sets[j]))
        for i, j in itertools.combinations(range(len(texts)), 2)
    ]
    return texts, pairs


@pytest.mark.parametrize("similarity", [0.6, 0.7, 0.8, 0.9])
def test_pairs_at_the_asked_similarity_are_found_and_far_ones_are_not(sample, similarity):
    texts, truth = sample
    signer = Signer()
    found = set(map(tuple, near_pairs(np.stack([signer.sign(t) for t in texts]), similarity).tolist()))
    # At the similarity itself, within 0.05 above it, where finding is hardest.
    near = {(i, j) for i, j, s in truth if similarity <= s <= similarity + 0.05}
    assert len(near) >= 20
    assert len(found & near) / len(near) >= 0.95
    everything = {(i, j) for i, j, s in truth if s >= similarity}
    assert len(found & everything) / len(everything) >= 0.95
    # 4.5 standard deviations below: chance 1e-5 a pair
    deviation = (similarity * (1 - similarity) / 128) ** 0.5
    far = {(i, j) for i, j, s in truth if s < similarity - 2 * deviation - 4.5 * 0.044}
    assert not found & far


def test_a_chain_is_one_cluster_but_only_its_middle_goes():
    base = random.Random(1).choices(WORDS, k=300)
    rng = random.Random(2)
    middle = edited(base, 6, rng)
    end = edited(middle, 6, rng)
    texts = [" ".join(base), " ".join(middle), " ".join(end)]
    signer = Signer()
    assert jaccard(signer, texts[0], texts[1]) > 0.8
    assert jaccard(signer, texts[0], texts[2]) < 0.7
    near = find_near_duplicates(np.stack([signer.sign(t) for t in texts]), 0.8)
    assert near.clusters.tolist() == [0, 0, 0]
    assert near.duplicate_of.tolist() == [-1, 0, -1]


@given(st.lists(st.text(max_size=60), min_size=1, max_size=12))
def test_signatures_depend_on_the_text_alone(texts):
    together, alone = Signer(), [Signer().sign(text) for text in texts]
    assert all((together.sign(text) == own).all() for text, own in zip(texts, alone, strict=True))


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29))))
def test_components_equal_a_walk_over_the_graph(count, edges):
    pairs = [(min(a, b), max(a, b)) for a, b in edges if a < count and b < count and a != b]
    reached = np.eye(count, dtype=bool)
    for a, b in pairs:
        reached[a, b] = reached[b, a] = True
    for _ in range(count):  # transitive closure, the slow way
        reached = reached @ reached
    expected = [int(np.argmax(row)) for row in reached]
    assert components(count, np.array(pairs, np.int64).reshape(-1, 2)).tolist() == expected


def test_every_duplicate_names_a_text_that_stays():
    rng = random.Random(3)
    base = [rng.choices(WORDS, k=200) for _ in range(10)]
    texts = [" ".join(edited(rng.choice(base), rng.randrange(3), rng)) for _ in range(200)]
    signer = Signer()
    near = find_near_duplicates(np.stack([signer.sign(t) for t in texts]), 0.8)
    dropped = near.duplicate_of >= 0
    assert dropped.sum() > 100
    assert (near.duplicate_of[near.duplicate_of[dropped]] == -1).all()
    assert (near.clusters[near.duplicate_of[dropped]] == near.clusters[dropped]).all()
    assert (near.duplicate_of[near.clusters] == -1).all()


def test_many_equal_texts_do_not_cost_the_square():
    signatures = np.repeat(Signer().sign(" ".join(WORDS[:50]))[None], 5_000, axis=0)
    near = find_near_duplicates(signatures, 0.9)
    assert (near.clusters == 0).all()
    assert near.num_pairs <= 5_000 * 16


def test_similarity_decides_the_bands():
    for similarity in (0.5, 0.6, 0.8, 0.9, 0.95):
        rows = band_rows(similarity)
        assert 128 % rows == 0
        assert 1 - (1 - similarity**rows) ** (128 // rows) >= 0.995
    assert text_hash(" a\n") == text_hash("a") != text_hash("b")
