"""Duplicates: exact ones by hash, near ones by MinHash and locality-sensitive hashing, out of core.

A text is the set of its 5-word shingles. Bands of its MinHash signature bring likely pairs into the
same bucket; then the two sets themselves are compared, so a pair counts if and only if its Jaccard
similarity is the asked one or more: no near-duplicate is an estimate (decision 0005).

Near-duplicates form clusters (connected components). Dropping is more careful than clustering:
a text goes only if a *kept* earlier text is its near-duplicate, so in a chain A~B~C only B goes,
while A and C stay in one cluster, hence on one side of the split.

Everything is a function of the texts in their order: no randomness, whatever the workers and the
memory. Signatures, sets and pairs lie in a work folder (`data/dedup/sketches.py`); memory holds a batch
of texts, `memory_bytes` for sorting, and about 80 bytes a text for the answer.
`check` measures the answer by brute force on a sample.
Source: Broder 1997 (MinHash), Leskovec et al., Mining of Massive Datasets, chapter 3 (LSH).
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from marrow.core.progress import Progress, silent
from marrow.core.span import span
from marrow.data.config import DedupRecipe
from marrow.data.dedup.buckets import Pairs, equal_keys, pairs_of
from marrow.data.dedup.clusters import Clusters
from marrow.data.dedup.sketches import Signing, Sketches, scratch, sign
from marrow.data.engine import INLINE, Engine
from marrow.kernels.search.minhash import MAX_QUERIES, NUM_HASHES, are_near, shared_counts

MEMORY_BYTES = 256 << 20
FOUND = 0.995  # share of pairs at the asked similarity that the bands must bring together
MAX_CHECKED_SHINGLES = 50_000
_SEED = 0x4D6172726F77
_PAIRS = 1 << 16
_FORCED = 1 << 17

U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Check:
    """What brute force says of a sample of texts, each compared with every text.

    pairs: those that are near-duplicates, within the sample or with any other text. recall: the
    share of them that came into one cluster; None without pairs. false_merges: texts of the sample
    that were dropped for one that is no near-duplicate.
    """

    texts: int
    pairs: int
    recall: float | None
    false_merges: int


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Which texts are duplicates; each int64 [N], by the order in which the texts came.

    exact_of: the first text that is equal, or -1. near_of: the kept earlier text that a text is a
    near-duplicate of, or -1 if it is kept or is an exact duplicate. clusters: the first member of
    each text's cluster, exact and near duplicates alike; it is always kept.
    """

    exact_of: I64
    near_of: I64
    clusters: I64
    num_candidates: int
    num_pairs: int
    check: Check

    def figures(self) -> dict[str, Any]:
        """Return what the facts of a step say."""
        sizes = np.bincount(self.clusters, minlength=1)
        return {
            "texts": len(self.clusters),
            "exact_duplicates": int((self.exact_of >= 0).sum()),
            "near_duplicates": int((self.near_of >= 0).sum()),
            "clusters_of_several": int((sizes > 1).sum()),
            "largest_cluster": int(sizes.max(initial=0)),
            "compared_pairs": self.num_candidates,
            "near_pairs": self.num_pairs,
            "check": asdict(self.check),
        }


def find_duplicates(
    texts: Iterable[pa.Array],
    recipe: DedupRecipe,
    work: Path,
    *,
    engine: Engine = INLINE,
    memory_bytes: int = MEMORY_BYTES,
    progress: Progress = silent,
) -> Duplicates:
    """Find exact and near duplicates among texts that are read once.

    The first text of a kind stays; so to find what an older version has already, put its texts
    first.

    Args: texts: string arrays, such as a column of record batches; a null counts as an empty text.
        work: a folder for the signatures; nothing stays in it. memory_bytes: for sorting.
    Raises: DiskFull if the work folder's disk cannot hold them.
    Cost: about 10 microseconds a text of 2 kB to sign and 2 for each comparison, one core; on disk,
        at similarity 0.8, 0.2 KiB a text and 4 bytes for each distinct shingle, about half of the text.
    """
    rows = band_rows(recipe.similarity) if recipe.near != "off" else 0
    signing = Signing(recipe.exact, rows)
    with scratch(work) as folder:
        with span("signatures"), Sketches(folder, signing) as sketches:
            for sketch in engine.map(partial(sign, signing), texts):
                sketches.append(sketch)
                progress(sketches.num_texts, None, "texts")
        with span("exact duplicates"):
            exact_of = _first_equal(sketches, ["digest-0", "digest-1"] if recipe.exact else [], memory_bytes)
        if not rows:
            count = sketches.num_texts
            clusters = np.where(exact_of < 0, np.arange(count), exact_of)
            return Duplicates(exact_of, np.full(count, -1, np.int64), clusters, 0, 0, Check(0, 0, None, 0))
        return _find_near(sketches, recipe.similarity, exact_of, memory_bytes, progress)


def band_rows(similarity: float) -> int:
    """Choose the hashes per band: the most that still bring 99.5 % of such pairs together."""
    for rows in range(NUM_HASHES // 2, 1, -1):
        if 1 - (1 - similarity**rows) ** (NUM_HASHES // rows) >= FOUND:
            return rows
    return 1


def _first_equal(sketches: Sketches, columns: list[str], memory_bytes: int) -> I64:
    """Return for each text the first one before it whose keys are equal, or -1."""
    first_of = np.full(sketches.num_texts, -1, np.int64)
    if columns and sketches.num_texts:
        keys = [sketches.column(name) for name in columns]
        for members, begins in equal_keys(keys, sketches.folder, memory_bytes):
            first_of[members] = members[np.repeat(begins[:-1], np.diff(begins))]
            first_of[members[begins[:-1]]] = -1
    return first_of


def _find_near(
    sketches: Sketches, similarity: float, exact_of: I64, memory_bytes: int, progress: Progress
) -> Duplicates:
    """Find near-duplicates; only the first text of each set is compared, the others go with it."""
    count = sketches.num_texts
    with span("duplicate candidates"):
        twin_of = _first_equal(sketches, ["set"], memory_bytes)
        alone = (twin_of < 0) & (exact_of < 0)
        pairs = Pairs(sketches.folder, count, memory_bytes)
        bands = [name for name in sketches.signing.columns() if name.startswith("band") and count]
        for done, name in enumerate(bands, 1):
            for members, begins in equal_keys([sketches.column(name)], sketches.folder, memory_bytes, alone):
                pairs.add(*pairs_of(members, begins))
            progress(done, len(bands), "bands")
    tree = Clusters(count)
    num_candidates = num_pairs = 0
    values, starts = sketches.sets()
    with span("compare duplicates"):
        for earlier, later in pairs:
            num_candidates += len(earlier)
            progress(num_candidates, None, "pairs")
            for start in range(0, len(earlier), _PAIRS):
                piece = slice(start, start + _PAIRS)
                near = are_near(values, starts, earlier[piece], later[piece], similarity)
                num_pairs += int(near.sum())
                tree.add(earlier[piece][near], later[piece][near])
    near_of, clusters = tree.near_of, tree.roots()
    # A twin's set is its first one's: what that is a duplicate of, it is too.
    _follow(near_of, clusters, twin_of, is_near=True)
    _follow(near_of, clusters, exact_of, is_near=False)
    with span("check duplicates"):
        checked = check(values, starts, similarity, exact_of, near_of, clusters)
    return Duplicates(exact_of, near_of, clusters, num_candidates, num_pairs, checked)


def check(values: U32, starts: I64, similarity: float, exact_of: I64, near_of: I64, clusters: I64) -> Check:
    """Compare a sample of texts with every text by brute force; see `Check`.

    Half of the sample is drawn from all texts, half from those found to have near-duplicates, by a
    fixed seed. Exact duplicates and texts of more than 50,000 shingles are not drawn.
    Cost: one pass over all sets.
    """
    usable = (exact_of < 0) & (np.diff(starts) <= MAX_CHECKED_SHINGLES)
    has_others = (np.bincount(clusters, minlength=len(clusters)) > 1)[clusters]
    generator = np.random.Generator(np.random.PCG64(_SEED))
    drawn = [
        generator.choice(texts, min(MAX_QUERIES // 2, len(texts)), replace=False)
        for texts in (np.flatnonzero(usable), np.flatnonzero(usable & has_others))
    ]
    sample = np.unique(np.concatenate(drawn))
    num_pairs = num_found = num_right = 0
    for queries, texts in _near_by_force(values, starts, sample, similarity):
        others = (texts != queries) & (exact_of[texts] < 0)
        num_pairs += int(others.sum())
        num_found += int((clusters[queries] == clusters[texts])[others].sum())
        num_right += int((near_of[queries] == texts).sum())
    num_dropped = int((near_of[sample] >= 0).sum())
    recall = num_found / num_pairs if num_pairs else None
    return Check(len(sample), num_pairs, recall, num_dropped - num_right)


def _near_by_force(values: U32, starts: I64, sample: I64, similarity: float) -> Iterable[tuple[I64, I64]]:
    """Yield every (query, text) of at least this similarity, for each text of a sample as the query.

    Looks each member of every set up among the queries' members: no signatures, no bands.
    """
    queries = [values[starts[text] : starts[text + 1]] for text in sample]
    sizes = np.diff(starts)
    least = np.floor(similarity * sizes[sample]).astype(np.uint16)  # the union is no smaller than the query
    for first in range(0, len(sizes) if queries else 0, _FORCED):
        shared_TQ = shared_counts(values, starts[first : first + _FORCED + 1], queries)
        text, query = np.nonzero(shared_TQ[:, : len(queries)] >= least)
        shared, text = shared_TQ[text, query].astype(np.int64), text + first
        near = shared / (sizes[text] + sizes[sample[query]] - shared) >= similarity
        yield sample[query[near]], text[near]


def _follow(near_of: I64, clusters: I64, first_of: I64, *, is_near: bool) -> None:
    """Give texts that are like an earlier one its cluster, and what it is a near-duplicate of."""
    like = np.flatnonzero(first_of >= 0)
    first = first_of[like]
    clusters[like] = clusters[first]
    near_of[like] = np.where(near_of[first] >= 0, near_of[first], first) if is_near else -1
