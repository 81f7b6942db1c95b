"""Blocks of KV cache: who uses which, and which may be shared.

A block holds the keys and values of `block_size` consecutive tokens in all layers. Each is in
exactly one of three states:

    free      holds nothing
    in use    counted references of running sequences
    cached    full, referenced by nobody, kept for a later sequence with the same beginning;
              the one left alone longest is evicted when a free one is needed

What a full block holds is named by a chain of SHA-256: digest = H(digest of the block before,
its tokens), the first one from the model's id. Equal digests mean equal beginnings under equal
weights, so a hit can never show one model's (or one prompt's) state to another. Block 0 is never
given out: the health probe writes there.

Source: PagedAttention (Kwon et al. 2023), here as bookkeeping only; the tensors are the runner's.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

SCRATCH = 0


class BlockManager:
    """Gives out, shares and takes back blocks. Knows no tensors and no clock.

    Args: num_blocks: including the scratch block. model_id: names the weights.
    """

    def __init__(self, num_blocks: int, block_size: int, model_id: str, *, cache: bool = True) -> None:
        assert num_blocks >= 2, "a scratch block and one to use"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.cache = cache
        self.num_evicted = 0
        self._root = hashlib.sha256(model_id.encode()).digest()
        self._free = list(range(num_blocks - 1, SCRATCH, -1))  # the lowest on top: neighbours stay near
        self._references = [0] * num_blocks
        self._digest: dict[int, bytes] = {}
        self._by_digest: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # longest left alone first

    @property
    def num_usable(self) -> int:
        """Blocks that sequences can have in all."""
        return self.num_blocks - 1

    @property
    def num_available(self) -> int:
        """Blocks that can be had now, by eviction if need be."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks kept for sharing that nobody uses now."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that sequences use now."""
        return self.num_usable - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def extend_chain(self, chain: list[bytes], tokens: Sequence[int]) -> None:
        """Append the digests of those full blocks of `tokens` that `chain` lacks. O(new tokens)."""
        size = self.block_size
        for start in range(len(chain) * size, len(tokens) - size + 1, size):
            before = chain[-1] if chain else self._root
            chain.append(hashlib.sha256(before + array("q", tokens[start : start + size]).tobytes()).digest())

    def match(self, chain: Sequence[bytes], num_tokens: int) -> list[int]:
        """Return the shared blocks of the longest known beginning, not yet acquired.

        At least the last of `num_tokens` tokens stays to compute: its logits are wanted.
        """
        found: list[int] = []
        for digest in chain[: max(num_tokens - 1, 0) // self.block_size]:
            block = self._by_digest.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add one reference to each; cached ones come back into use."""
        for block in blocks:
            self._cached.pop(block, None)
            self._references[block] += 1

    def allocate(self) -> int | None:
        """Give out an empty block, evicting the cached one left alone longest; None if all are used."""
        if self._free:
            block = self._free.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            del self._by_digest[self._digest.pop(block)]
            self.num_evicted += 1
        else:
            return None
        self._references[block] = 1
        return block

    def publish(self, block: int, digest: bytes) -> None:
        """Name a block that is full now, so that others can share it.

        If another block already holds the same tokens, that one keeps the name and this one
        stays private.
        """
        if self.cache and digest not in self._by_digest and block not in self._digest:
            self._digest[block] = digest
            self._by_digest[digest] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Take one reference from each. The last of a chain is left first, so it is evicted first."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released too often"
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._digest:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def withdraw(self, blocks: Sequence[int]) -> None:
        """Take the names from blocks that hold something bad, so that nobody finds them."""
        for block in blocks:
            if digest := self._digest.pop(block, None):
                del self._by_digest[digest]

    def forget(self, model_id: str) -> None:
        """Drop all that is shared: the weights are others now. No sequence may hold blocks."""
        assert self.num_used == 0, "blocks in use while the weights change"
        self._root = hashlib.sha256(model_id.encode()).digest()
        self._free.extend(self._cached)
        self._cached.clear()
        self._digest.clear()
        self._by_digest.clear()

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the books agree with the block lists that sequences hold."""
        counted = Counter(block for blocks in held for block in blocks)
        assert SCRATCH not in counted, "the scratch block was given out"
        for block in range(1, self.num_blocks):
            assert self._references[block] == counted[block], (
                f"block {block}: {self._references[block]} references, {counted[block]} users"
            )
        states = Counter(self._free) + Counter([*self._cached]) + Counter({*counted})
        assert states == Counter(range(1, self.num_blocks)), "a block is in no state, or in two"
        assert {digest: block for block, digest in self._digest.items()} == self._by_digest
        assert all(block in self._digest for block in self._cached), "a cached block has no name"
        assert not any(block in self._digest for block in self._free), "a free block has a name"
