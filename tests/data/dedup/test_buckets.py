import itertools
from collections import defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.data.dedup.buckets import LEADERS, PREDECESSORS, Pairs, equal_keys, pairs_of

MIX = np.uint64(0x9E3779B97F4A7C15)


def groups_of(keys, folder, memory_bytes, wanted=None):
    found = []
    for members, begins in equal_keys(keys, folder, memory_bytes, wanted):
        found += [members[a:b].tolist() for a, b in itertools.pairwise(begins.tolist())]
    assert list(folder.iterdir()) == []
    return sorted(found)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1)), max_size=60),
    st.sampled_from([48, 200, 1000, 1 << 20]),
    st.data(),
)
def test_groups_are_those_of_a_dictionary_whatever_the_memory(tmp_path_factory, rows, memory_bytes, data):
    folder = tmp_path_factory.mktemp("ranges")
    first, second = (np.array([row[i] for row in rows], np.uint64) * MIX for i in (0, 1))
    wanted = np.array(data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))), bool)
    by_first, by_both = defaultdict(list), defaultdict(list)
    for i, row in enumerate(rows):
        if wanted[i]:
            by_first[row[0]].append(i)
        by_both[row].append(i)
    assert groups_of([first], folder, memory_bytes, wanted) == sorted(
        g for g in by_first.values() if len(g) > 1
    )
    assert groups_of([first, second], folder, memory_bytes) == sorted(
        g for g in by_both.values() if len(g) > 1
    )


def test_each_file_of_keys_holds_its_share_of_the_texts(tmp_path):
    """A tenth of the memory: no range holds more, and all together hold all groups."""
    keys = np.random.Generator(np.random.PCG64(0)).integers(0, 1 << 62, 50_000, np.uint64) * MIX
    keys[25_000:] = keys[:25_000]
    sizes = [len(members) for members, _ in equal_keys([keys], tmp_path, 48 * 5_000)]
    assert sum(sizes) == 50_000
    assert len(sizes) == 16 and max(sizes) < 5_000


@given(st.lists(st.integers(2, 40), max_size=5))
def test_pairs_tie_each_group_together_and_lead_to_its_first_members(sizes):
    begins = np.cumsum([0, *sizes])
    members = np.concatenate(
        [np.empty(0, np.int64), *(np.arange(a, b) * 3 for a, b in itertools.pairwise(begins))]
    )
    earlier, later = pairs_of(members.astype(np.int64), begins)
    pairs = list(zip(earlier.tolist(), later.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)  # none twice
    assert all(a < b for a, b in pairs)
    expected = set()
    for a, b in itertools.pairwise(begins.tolist()):
        for place in range(b - a):
            near = {place - d for d in range(1, PREDECESSORS + 1)} | set(range(LEADERS))
            expected |= {(3 * (a + p), 3 * (a + place)) for p in near if 0 <= p < place}
    assert set(pairs) == expected


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 30), st.integers(31, 60)), max_size=40), max_size=8),
    st.sampled_from([0, 1 << 20]),
)
def test_pairs_come_out_once_in_order(tmp_path_factory, batches, memory_bytes):
    pairs = Pairs(tmp_path_factory.mktemp("pairs"), 61, memory_bytes)
    for batch in batches:
        pairs.add(np.array([a for a, _ in batch], np.int64), np.array([b for _, b in batch], np.int64))
    found = [pair for a, b in pairs for pair in zip(b.tolist(), a.tolist(), strict=True)]
    assert found == sorted({(b, a) for batch in batches for a, b in batch})


def test_pairs_beyond_the_memory_go_to_disk_and_come_back_in_small_pieces(tmp_path):
    generator = np.random.Generator(np.random.PCG64(1))
    pairs, everything = Pairs(tmp_path, 1_000_000, memory_bytes=32 * 4096), set()
    for _ in range(40):
        earlier, later = generator.integers(0, 300_000, 1000), generator.integers(300_000, 1_000_000, 1000)
        pairs.add(earlier, later)
        pairs.add(earlier[:100], later[:100])
        everything |= set(zip(later.tolist(), earlier.tolist(), strict=True))
    pieces = list(pairs)
    assert len(list(tmp_path.iterdir())) >= 5
    assert max(len(earlier) for earlier, _ in pieces) <= 4096
    found = [pair for a, b in pieces for pair in zip(b.tolist(), a.tolist(), strict=True)]
    assert found == sorted(everything)
