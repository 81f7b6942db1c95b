"""Blocks are given out once, shared by equal beginnings only, and evicted oldest first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.serve.blocks import SCRATCH, BlockManager


def chain_of(blocks: BlockManager, tokens: list[int]) -> list[bytes]:
    chain: list[bytes] = []
    blocks.extend_chain(chain, tokens)
    return chain


def fill(blocks: BlockManager, tokens: list[int]) -> list[int]:
    """Do what a sequence does that computes all its tokens and ends."""
    chain = chain_of(blocks, tokens)
    held = blocks.match(chain, len(tokens))
    blocks.acquire(held)
    while len(held) < blocks.blocks_for(len(tokens)):
        block = blocks.allocate()
        assert block is not None
        held.append(block)
    for block, digest in zip(held, chain, strict=False):
        blocks.publish(block, digest)
    return held


def test_the_scratch_block_is_never_given_out() -> None:
    blocks = BlockManager(9, 4, "m")
    given_out = [blocks.allocate() for _ in range(8)]
    assert sorted(b for b in given_out if b is not None) == list(range(1, 9))
    assert blocks.allocate() is None
    assert SCRATCH not in given_out


def test_equal_beginnings_share_whole_blocks_only() -> None:
    blocks = BlockManager(20, 4, "m")
    held = fill(blocks, list(range(11)))
    assert blocks.match(chain_of(blocks, list(range(11))), 11) == held[:2]
    assert blocks.match(chain_of(blocks, [*range(6), 99, 98, 97]), 9) == held[:1]
    assert blocks.match(chain_of(blocks, [1, *range(1, 9)]), 9) == []


def test_the_last_token_is_always_left_to_compute() -> None:
    blocks = BlockManager(20, 4, "m")
    held = fill(blocks, list(range(8)))
    assert blocks.match(chain_of(blocks, list(range(8))), 8) == held[:1]
    assert blocks.match(chain_of(blocks, list(range(9))), 9) == held[:2]


def test_equal_blocks_after_different_beginnings_are_not_shared() -> None:
    blocks = BlockManager(20, 2, "m")
    fill(blocks, [1, 2, 3, 4])
    assert blocks.match(chain_of(blocks, [9, 9, 3, 4, 5]), 5) == []


def test_another_model_shares_nothing() -> None:
    blocks = BlockManager(20, 2, "m")
    blocks.release(fill(blocks, [1, 2, 3, 4]))
    assert blocks.num_cached == 2
    blocks.forget("other")
    assert blocks.num_cached == 0
    assert blocks.match(chain_of(blocks, [1, 2, 3, 4, 5]), 5) == []
    blocks.check([])
    assert chain_of(BlockManager(4, 2, "a"), [1, 2]) != chain_of(BlockManager(4, 2, "b"), [1, 2])


def test_the_one_left_alone_longest_is_evicted_and_tails_before_heads() -> None:
    blocks = BlockManager(6, 2, "m")
    old, new = fill(blocks, [1, 2, 3, 4]), fill(blocks, [5, 6, 7, 8])
    blocks.release(old)
    blocks.release(new)
    assert blocks.allocate() is not None  # the free one
    assert [blocks.allocate() for _ in range(4)] == [old[1], old[0], new[1], new[0]]
    assert blocks.num_evicted == 4


def test_a_shared_block_survives_until_its_last_user_leaves() -> None:
    blocks = BlockManager(6, 2, "m")
    first = fill(blocks, [1, 2, 3])
    second = fill(blocks, [1, 2, 4])
    assert first[0] == second[0]
    blocks.check([first, second])
    blocks.release(first)
    blocks.check([second])
    assert blocks.num_used == 2
    blocks.release(second)
    assert blocks.num_available == blocks.num_usable


def test_without_a_cache_nothing_is_kept() -> None:
    blocks = BlockManager(6, 2, "m", cache=False)
    blocks.release(fill(blocks, [1, 2, 3, 4]))
    assert (blocks.num_cached, blocks.num_available) == (0, 5)


def test_withdrawn_blocks_are_free_and_nameless() -> None:
    blocks = BlockManager(6, 2, "m")
    held = fill(blocks, [1, 2, 3, 4])
    blocks.withdraw(held)
    blocks.release(held)
    assert blocks.match(chain_of(blocks, [1, 2, 3, 4, 5]), 5) == []
    blocks.check([])


def test_check_sees_a_leak_and_a_double_release() -> None:
    blocks = BlockManager(6, 2, "m")
    held = fill(blocks, [1, 2, 3])
    with pytest.raises(AssertionError, match="references"):
        blocks.check([])
    blocks.release(held)
    with pytest.raises(AssertionError, match="released too often"):
        blocks.release(held)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 14), st.booleans()), max_size=40))
def test_books_agree_after_any_traffic(traffic: list[tuple[int, int, bool]]) -> None:
    blocks = BlockManager(12, 2, "m")
    live: list[list[int]] = []
    for prefix, length, leave in traffic:
        tokens = [prefix * (i > 3) for i in range(length)]
        if blocks.blocks_for(length) <= blocks.num_available:
            live.append(fill(blocks, tokens))
        if leave and live:
            blocks.release(live.pop(0))
        blocks.check(live)
    for held in live:
        blocks.release(held)
    blocks.check([])
    assert blocks.num_available == blocks.num_usable
