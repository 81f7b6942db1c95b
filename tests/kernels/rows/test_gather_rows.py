import itertools
import math
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError
from marrow.kernels import native
from marrow.kernels.rows import gather_rows
from marrow.kernels.rows.gather_rows import Columns, RowTable, check_rows, permute, permute_reference

KEYS = [0x9E3779B97F4A7C15 * (i + 1) % (1 << 64) for i in range(8)]


@pytest.fixture(autouse=True)
def the_c_file_is_there() -> None:
    if native.load("gather_rows") is None:
        pytest.skip("no C compiler, or switched off: both sides would be numpy")


def make_columns(rng: np.random.Generator, rows: int, stored: int, kind: type) -> Columns:
    """A shard whose rows hold 1 to 4 documents and now and then padding."""
    starts: list[int] = []
    starts_of, num_tokens = [0], []
    for _ in range(rows):
        used = int(rng.integers(2, stored + 1))
        pieces = int(rng.integers(1, max(2, min(4, used // 2) + 1)))
        starts += (
            [0, *sorted(rng.choice(np.arange(1, used - 1), pieces - 1, replace=False).tolist())]
            if (used > pieces + 1)
            else [0]
        )
        starts_of.append(len(starts))
        num_tokens.append(used)
    columns = Columns(
        tokens=rng.integers(0, np.iinfo(kind).max, (rows, stored), dtype=kind, endpoint=True),
        starts=np.array(starts, dtype=np.int32),
        starts_of=np.array(starts_of, dtype=np.int32),
        num_tokens=np.array(num_tokens, dtype=np.int32),
    )
    return with_checks(columns) if rng.integers(2) else columns


def with_checks(columns: Columns) -> Columns:
    return replace(
        columns, checks=check_rows(columns), checked=np.zeros(len(columns.tokens), np.uint8), name="shard A"
    )


def no_shard(index: int) -> Columns:
    raise AssertionError(f"shard {index} was put into the table, and is opened all the same")


def two_tables(seed: int, sizes: list[int], stored: int) -> tuple[RowTable, RowTable]:
    """The same shards, alternately of two types, for C and for numpy."""
    rng = np.random.default_rng(seed)
    fast, plain = RowTable(sizes, stored, no_shard), RowTable(sizes, stored, no_shard, use_native=False)
    for index, rows in enumerate(sizes):
        columns = make_columns(rng, rows, stored, (np.uint16, np.uint32)[index % 2])
        fast.put(index, columns)
        plain.put(index, columns)
    return fast, plain


def laid(table: RowTable, rows: np.ndarray, each: int | None = None) -> tuple[list[list[int]], list[int]]:
    count = len(rows) * (table.stored - 1)
    # Filled, so that a cell that is not written is seen.
    outs = [np.full(count, -7, dtype=np.int64) for _ in range(3)] + [np.full(count, -7, dtype=np.int32)]
    num_targets = table.lay(rows, *outs, each)
    return [out.tolist() for out in outs], num_targets


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    stored=st.one_of(st.integers(2, 80), st.sampled_from([128, 129, 1025])),
    data=st.data(),
)
def test_c_equals_numpy(seed: int, sizes: list[int], stored: int, data: st.DataObject) -> None:
    fast, plain = two_tables(seed, sizes, stored)
    rows = np.array(
        data.draw(st.lists(st.integers(0, sum(sizes) - 1), min_size=0, max_size=12)), dtype=np.int64
    )
    out_fast, out_plain = (np.full((len(rows), stored), -7, dtype=np.int64) for _ in range(2))
    fast.stack(rows, out_fast)
    plain.stack(rows, out_plain)
    assert np.array_equal(out_fast, out_plain)
    assert np.array_equal(out_fast, fast.tokens(rows))
    if len(rows):
        each = data.draw(st.sampled_from([n for n in range(1, len(rows) + 1) if len(rows) % n == 0]))
        assert laid(fast, rows, each) == laid(plain, rows, each)


def test_nothing_is_written_beside_the_output() -> None:
    fast, _ = two_tables(0, [5, 7], 33)
    rows = np.array([0, 11, 4])
    memory = np.full(3 * 33 + 20, -7, dtype=np.int64)
    fast.stack(rows, memory[10:-10].reshape(3, 33))
    assert set(memory[:10]) == set(memory[-10:]) == {-7}


@pytest.mark.parametrize("use_native", [True, False])
def test_a_shard_is_opened_when_a_row_of_it_is_read(use_native: bool) -> None:
    rng = np.random.default_rng(0)
    shards = [make_columns(rng, rows, 9, np.uint16) for rows in (3, 1, 4)]
    opened: list[int] = []

    def open_shard(index: int) -> Columns:
        opened.append(index)
        return shards[index]

    table = RowTable([3, 1, 4], 9, open_shard, use_native=use_native)
    stack(table, [])
    assert opened == []
    assert stack(table, [3, 0, 3]) == [shards[i].tokens[j].tolist() for i, j in ((1, 0), (0, 0), (1, 0))]
    assert opened == [1, 0]
    assert [table.is_open(index) for index in range(3)] == [True, True, False]
    table.drop(1)
    assert not table.is_open(1)
    laid(table, np.array([3, 7]))
    assert opened == [1, 0, 1, 2]
    for row in (8, -1, 1 << 62):
        with pytest.raises(IndexError, match=f"no row {row} of 8"):
            stack(table, [0, row])


def stack(table: RowTable, rows: list[int]) -> list[list[int]]:
    out = np.full((len(rows), table.stored), -7, dtype=np.int64)
    table.stack(np.array(rows, dtype=np.int64), out)
    found: list[list[int]] = out.tolist()
    return found


@pytest.mark.parametrize("use_native", [True, False])
def test_a_copy_keeps_its_shards_when_the_original_closes_them(use_native: bool) -> None:
    rng = np.random.default_rng(0)
    table = RowTable([3, 2], 9, no_shard, use_native=use_native)
    columns = make_columns(rng, 3, 9, np.uint16)
    table.put(0, columns)
    copied = table.copy()
    table.drop(0)
    copied.put(1, make_columns(rng, 2, 9, np.uint16))
    assert [table.is_open(0), table.is_open(1)] == [False, False]
    assert [copied.is_open(0), copied.is_open(1)] == [True, True]
    assert stack(copied, [2, 0, 1]) == columns.tokens[[2, 0, 1]].tolist()


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 5),
    stored=st.one_of(st.integers(2, 80), st.sampled_from([128, 129, 1025])),
    kind=st.sampled_from([np.uint16, np.uint32]),
)
def test_checks_of_c_are_xxh64(seed: int, rows: int, stored: int, kind: type) -> None:
    """The library of its author is the oracle; every length modulo 32 comes."""
    columns = make_columns(np.random.default_rng(seed), rows, stored, kind)
    expected = []
    for row in range(rows):
        starts = columns.starts[columns.starts_of[row] : columns.starts_of[row + 1]]
        seed = xxhash.xxh64_intdigest(starts.tobytes(), int(columns.num_tokens[row]))
        expected.append(xxhash.xxh64_intdigest(columns.tokens[row].tobytes(), seed))
    assert check_rows(columns).tolist() == expected


@pytest.mark.parametrize("use_native", [True, False])
@pytest.mark.parametrize("how", ["stack", "lay"])
@pytest.mark.parametrize("part", ["tokens", "starts", "num_tokens", "checks"])
def test_a_row_that_is_not_what_was_written_is_found(use_native: bool, how: str, part: str) -> None:
    rng = np.random.default_rng(1)
    columns = with_checks(make_columns(rng, 6, 33, np.uint16))
    table = RowTable([6], 33, lambda _: columns, use_native=use_native)
    read = partial(stack, table) if how == "stack" else lambda rows: laid(table, np.array(rows))
    assert columns.checked is not None
    read([0, 1])
    assert columns.checked.tolist() == [1, 1, 0, 0, 0, 0]
    place = int(columns.starts_of[3]) if part == "starts" else 3
    array = getattr(columns, part)
    array[(place, 32) if part == "tokens" else place] ^= 1
    with pytest.raises(DataError, match=r"shard A is damaged: row 3: its XXH64 is \w{16}") as error:
        read([0, 2, 3, 4])
    assert "shards step" in error.value.hint
    assert columns.checked[3] == 0
    read([0, 2, 4])
    with pytest.raises(DataError, match="row 3"):  # not only the first time
        read([3])
    array[(place, 32) if part == "tokens" else place] ^= 1
    read([3, 5])
    assert columns.checked.tolist() == [1] * 6


@pytest.mark.parametrize("use_native", [True, False])
@pytest.mark.parametrize("lie", [-1, 10**6, 2**31 - 1, -(2**31)])
def test_offsets_that_lie_are_not_followed(use_native: bool, lie: int) -> None:
    columns = with_checks(make_columns(np.random.default_rng(2), 4, 17, np.uint32))
    columns.starts_of[2] = lie
    table = RowTable([4], 17, lambda _: columns, use_native=use_native)
    for row in (1, 2):
        with pytest.raises(DataError, match=f"row {row}: its documents are said to begin at"):
            stack(table, [row])
    stack(table, [0, 3])


def test_starts_that_lie_do_not_leave_their_row() -> None:
    """A file whose check is right can still be wrong: written by someone else."""
    table = RowTable([1], 6, no_shard)
    table.put(
        0,
        Columns(
            tokens=np.arange(6, dtype=np.uint16).reshape(1, 6),
            starts=np.array([0, 4, 2, 2_000_000_000, -5], dtype=np.int32),
            starts_of=np.array([0, 5], dtype=np.int32),
            num_tokens=np.array([2_000_000_000], dtype=np.int32),
        ),
    )
    (_, _, positions, documents), _ = laid(table, np.array([0]))
    assert len(positions) == 5
    assert all(-1 < position < 5 for position in positions)
    assert all(-1 < document < 5 for document in documents)


@settings(deadline=None, max_examples=200)
@given(
    size=st.one_of(st.integers(1, 300), st.integers(1, 1 << 62)),
    keys=st.lists(st.integers(0, (1 << 64) - 1), min_size=8, max_size=8),
    data=st.data(),
)
def test_the_permutation_in_c_equals_numpy(size: int, keys: list[int], data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=40)), dtype=np.int64)
    assert permute(index, size, keys).tolist() == permute_reference(index, size, keys).tolist()


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 255, 256, 257, 1000, 4096])
def test_it_is_a_permutation(size: int) -> None:
    assert sorted(permute(np.arange(size), size, KEYS).tolist()) == list(range(size))


def test_a_view_is_permuted_as_well() -> None:
    whole = np.arange(100)
    assert permute(whole[::3], 100, KEYS).tolist() == permute(whole, 100, KEYS)[::3].tolist()


def test_the_network_mixes_every_bit() -> None:
    """Flipping one bit of the index flips each bit of the result in about half of the cases."""
    size = 1 << 20
    index = np.arange(0, size, 7)
    flips = []
    for bit in range(20):
        changed = permute(index, size, KEYS) ^ permute(index ^ (1 << bit), size, KEYS)
        flips.append([float(((changed >> out) & 1).mean()) for out in range(20)])
    # 150,000 samples of a coin: standard error 0.0013; 400 pairs of bits, five of these.
    assert np.abs(np.array(flips) - 0.5).max() < 0.0065


def test_a_small_permutation_is_any_with_equal_chance() -> None:
    """All 24 orders of four, 6,000 keys drawn by chance."""
    rng = np.random.default_rng(1)
    trials = 6_000
    orders = Counter(
        tuple(permute(np.arange(4), 4, rng.integers(0, 1 << 63, 8).tolist()).tolist()) for _ in range(trials)
    )
    expected = trials / math.factorial(4)
    chi_square = sum((orders[order] - expected) ** 2 / expected for order in itertools.permutations(range(4)))
    assert chi_square < 23 + 5 * math.sqrt(2 * 23)


def test_switched_off_it_is_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = permute(np.arange(50), 50, KEYS).tolist()
    gather_rows._library.cache_clear()
    monkeypatch.setenv("MARROW_KERNELS", "reference")
    try:
        assert gather_rows._library() is None
        assert permute(np.arange(50), 50, KEYS).tolist() == fast
    finally:
        gather_rows._library.cache_clear()
