"""Duplicates: exact ones by hash, near ones by MinHash and locality-sensitive hashing.

A text is the set of its 5-word shingles. 128 min-wise hashes estimate the Jaccard similarity of
two sets as the share of hashes that agree (standard deviation 0.035 at 0.8). Bands of hashes put
likely pairs into the same bucket; the estimate then decides. Pairs count as near-duplicates from
two standard deviations below the asked similarity, so that nearly all pairs at that similarity are
found (the test measures it against brute force); pairs well below it are not.

Near-duplicates form clusters (connected components). Dropping is more careful than clustering:
a text goes only if a *kept* earlier text is its near-duplicate, so in a chain A~B~C only B goes,
while A and C stay in one cluster, hence on one side of the split.

Everything is a function of the texts in their order: no randomness, no workers.
Source: Broder 1997 (MinHash), Leskovec et al., Mining of Massive Datasets, chapter 3 (LSH).
"""

import re
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

NUM_HASHES = 128
SHINGLE_WORDS = 5
MAX_BUCKET_PAIRS = 16
_CACHE_WORDS = 1 << 20
_CHUNK = 1024
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\u0e00-\u0eff"
_WORD = re.compile(rf"[^\W{_CJK}]+|[{_CJK}]")

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]


def text_hash(text: str) -> bytes:
    """Return the xxh3-128 of a text, white space at its ends aside: equal texts, equal hash."""
    return xxhash.xxh3_128_digest(text.strip().encode("utf-8", "surrogatepass"))


class Signer:
    """Makes MinHash signatures; keeps the hashes of words it has seen."""

    def __init__(self) -> None:
        numbers = np.random.Generator(np.random.PCG64(0x4D6172726F77)).integers(
            0, 1 << 63, size=(2, NUM_HASHES), dtype=np.uint64
        )
        self._multiply_K1: U64 = (numbers[0] * np.uint64(2) + np.uint64(1))[:, None]
        self._add_K1: U64 = numbers[1][:, None]
        self._words: dict[str, int] = {}

    def shingles(self, text: str) -> U64:
        """Return the hashes of a text's shingles, in order, repeats included; at least one."""
        words = _WORD.findall(text)
        if not words:
            return np.array([xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))], np.uint64)
        known = self._words
        if len(known) > _CACHE_WORDS:
            known.clear()
        for word in set(words).difference(known):
            known[word] = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        hashes = np.fromiter(map(known.__getitem__, words), np.uint64, len(words))
        count = max(1, len(words) - SHINGLE_WORDS + 1)
        mixed = np.zeros(count, np.uint64)
        for offset in range(min(SHINGLE_WORDS, len(words))):
            mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + count]
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        return mixed ^ (mixed >> np.uint64(32))

    def sign(self, text: str) -> U32:
        """Return the MinHash signature of a text. Cost: about 0.2 ms per 1000 words."""
        hashes = self.shingles(text)
        lowest = np.full(NUM_HASHES, 0xFFFFFFFFFFFFFFFF, np.uint64)
        for start in range(0, len(hashes), _CHUNK):
            values_KN = hashes[None, start : start + _CHUNK] * self._multiply_K1
            values_KN += self._add_K1
            np.minimum(lowest, values_KN.min(axis=1), out=lowest)
        return (lowest >> np.uint64(32)).astype(np.uint32)


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """Which texts are near-duplicates.

    clusters: int64 [N], the first member of each text's cluster. duplicate_of: int64 [N], the kept
    earlier text that a text is a near-duplicate of, or -1 if it is kept.
    """

    clusters: I64
    duplicate_of: I64
    num_pairs: int


def find_near_duplicates(signatures_NK: U32, similarity: float) -> NearDuplicates:
    """Find near-duplicates among signatures.

    Args: signatures_NK: uint32 [N, 128]. similarity: Jaccard similarity, 0.5 to 0.99.
    Cost: O(N log N) time per band, about 0.5 KiB per text in memory.
    """
    pairs = near_pairs(signatures_NK, similarity)
    count = len(signatures_NK)
    cluster_N = components(count, pairs)
    duplicate_of_N = np.full(count, -1, np.int64)
    for first, second in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist():
        if duplicate_of_N[second] < 0 and duplicate_of_N[first] < 0:
            duplicate_of_N[second] = first
    return NearDuplicates(cluster_N, duplicate_of_N, len(pairs))


def near_pairs(signatures_NK: U32, similarity: float) -> I64:
    """Return the pairs [M, 2] (first < second) whose estimated similarity is high enough."""
    rows, count = band_rows(similarity), len(signatures_NK)
    coded: I64 = np.empty(0, np.int64)  # a pair as first * N + second
    for start in range(0, NUM_HASHES, rows):
        first, second = _bucket_pairs(signatures_NK[:, start : start + rows])
        coded = np.union1d(coded, first * count + second)
    pairs: I64 = np.stack([coded // max(1, count), coded % max(1, count)], axis=1)
    deviation = (similarity * (1 - similarity) / NUM_HASHES) ** 0.5
    needed = (similarity - 2 * deviation) * NUM_HASHES
    near = [
        (signatures_NK[chunk[:, 0]] == signatures_NK[chunk[:, 1]]).sum(axis=1) >= needed
        for chunk in np.array_split(pairs, max(1, len(pairs) // 65536))
    ]
    kept: I64 = pairs[np.concatenate(near)]
    return kept


def band_rows(similarity: float) -> int:
    """Choose the hashes per band: the most that still bring 99.5 % of such pairs together."""
    for rows in (16, 8, 4, 2):
        if 1 - (1 - similarity**rows) ** (NUM_HASHES // rows) >= 0.995:
            return rows
    return 1


def components(count: int, pairs: I64) -> I64:
    """Return for each of `count` nodes the smallest node of its connected component."""
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for first, second in pairs.tolist():
        one, other = root(first), root(second)
        if one != other:
            parent[max(one, other)] = min(one, other)
    return np.fromiter((root(node) for node in range(count)), np.int64, count)


def _bucket_pairs(band_NR: U32) -> tuple[I64, I64]:
    """Return pairs of texts that agree in a whole band, the earlier ones and the later ones.

    In a bucket of many texts each is paired with the 16 before it only: those are copies of each
    other, and the chain still ties all of them into one cluster.
    """
    key_N = np.zeros(len(band_NR), np.uint64)  # two bands that collide cost one comparison more
    for column in band_NR.T:
        key_N = (key_N ^ column) * np.uint64(0x9E3779B97F4A7C15)
        key_N ^= key_N >> np.uint64(32)
    order = np.argsort(key_N, kind="stable")
    ordered = key_N[order]
    first, second = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for distance in range(1, MAX_BUCKET_PAIRS + 1):
        same = np.flatnonzero(ordered[distance:] == ordered[:-distance])
        if not len(same):
            break
        first.append(order[same])
        second.append(order[same + distance])
    return np.concatenate(first), np.concatenate(second)
