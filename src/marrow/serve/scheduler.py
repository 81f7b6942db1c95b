"""Who computes what in the next step: continuous batching under one budget of tokens.

    1. every decoding sequence gets its one token, oldest first
    2. running prefills get chunks of what is left of the budget, oldest first
    3. waiting sequences are admitted in order of arrival while budget, places and blocks last

When blocks run out, the youngest running sequence gives its own up and waits again, at the head
of the queue, to be recomputed (its full blocks may still be in the prefix cache by then). An
older sequence never yields to a younger one, and whatever fits the cache alone was let in, so the
oldest always gets on: nobody starves.

No clock, no randomness, no tensors: the same calls in the same order give the same plans, so a
bad day can be replayed. Source: Orca (Yu et al. 2022), Sarathi-Serve (Agrawal et al. 2024).
"""

from collections import deque
from dataclasses import dataclass

from marrow.core.records import FinishReason
from marrow.serve.blocks import BlockManager
from marrow.serve.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Compute `count` tokens of a sequence, beginning with its token `start`."""

    sequence: Sequence
    start: int
    count: int

    @property
    def draws(self) -> bool:
        """Whether the chunk reaches the sequence's end, so that its next token can be drawn."""
        return self.start + self.count == len(self.sequence.tokens)


class Scheduler:
    """Holds the waiting and the running; `plan` then `commit` make one step.

    Args: max_batch_tokens, max_sequences: bounds of one step.
    """

    def __init__(self, blocks: BlockManager, *, max_batch_tokens: int, max_sequences: int) -> None:
        self.blocks = blocks
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.waiting and not self.running

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence that grows to so many tokens can ever run here.

        The last token drawn is never computed, so it needs no place.
        """
        return self.blocks.blocks_for(num_tokens - 1) <= self.blocks.num_usable

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        assert sequence.status == "waiting" and not sequence.blocks
        self.waiting.append(sequence)

    def plan(self) -> list[Chunk]:
        """Choose the chunks of the next step and give each the blocks it writes to.

        Returns: chunks of distinct running sequences, at most `max_batch_tokens` tokens in all;
        empty only when idle.
        """
        chunks: list[Chunk] = []
        planned: set[int] = set()
        budget = self.max_batch_tokens
        for decoding in (True, False):
            for sequence in [s for s in self.running if s.is_decoding == decoding]:
                if sequence.status != "running" or budget == 0:
                    continue
                count = self._reserve(sequence, min(sequence.num_missing, budget), planned)
                if count:
                    chunks.append(Chunk(sequence, sequence.num_computed, count))
                    planned.add(sequence.id)
                    budget -= count
        while self.waiting and budget and len(self.running) < self.max_sequences:
            admitted = self._admit(self.waiting[0], budget)
            if admitted is None:
                break
            chunks.append(admitted)
            budget -= admitted.count
        assert chunks or self.is_idle, "there is work, but none can be planned"
        return chunks

    def commit(self, chunk: Chunk) -> None:
        """Note that a chunk was computed; blocks that it filled can be shared from now on."""
        sequence = chunk.sequence
        full_before = sequence.num_computed // self.blocks.block_size
        sequence.num_computed += chunk.count
        full = sequence.num_computed // self.blocks.block_size
        if self.blocks.cache and full > full_before:
            self.blocks.extend_chain(sequence.chain, sequence.tokens)
            for index in range(full_before, full):
                self.blocks.publish(sequence.blocks[index], sequence.chain[index])

    def finish(self, sequence: Sequence, reason: FinishReason, *, spoiled: bool = False) -> None:
        """End a sequence from any state and free its blocks at once; `spoiled` ones are shared no more."""
        if sequence.status == "running":
            self.running.remove(sequence)
        elif sequence.status == "waiting":
            self.waiting.remove(sequence)
        else:
            return
        sequence.status, sequence.finish_reason = "finished", reason
        if spoiled:
            self.blocks.withdraw(sequence.blocks)
        self._free(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the head of the queue, without its blocks."""
        self.running.remove(sequence)
        sequence.status = "waiting"
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._free(sequence)
        self.waiting.appendleft(sequence)

    def restart(self, model_id: str) -> None:
        """Compute everybody again, and share nothing of before: the weights are others now."""
        for sequence in reversed(list(self.running)):  # youngest first, so the oldest ends up ahead
            self.preempt(sequence)
        for sequence in self.waiting:
            sequence.chain.clear()
        self.blocks.forget(model_id)

    def check(self) -> None:
        """Raise AssertionError unless every block and every sequence is where it should be."""
        self.blocks.check(s.blocks for s in self.running)
        ids = [s.id for s in self.running] + [s.id for s in self.waiting]
        assert ids == sorted(ids), "somebody young overtook somebody old"
        assert len(self.running) <= self.max_sequences
        for sequence in self.running:
            assert sequence.status == "running"
            assert sequence.num_computed <= len(sequence.blocks) * self.blocks.block_size
            assert sequence.num_missing >= 1
        for sequence in self.waiting:
            assert sequence.status == "waiting" and not sequence.blocks and sequence.num_computed == 0

    def _free(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.blocks.clear()
        sequence.num_computed = 0

    def _reserve(self, sequence: Sequence, count: int, planned: set[int]) -> int:
        """Give a running sequence blocks for its next `count` tokens, or for fewer.

        Younger sequences not planned yet give up theirs for it. Returns the tokens that have a
        place; 0 sends a sequence that decodes back to the queue, and lets a prefill wait a step.
        """
        end = sequence.num_computed + count
        while len(sequence.blocks) * self.blocks.block_size < end:
            block = self.blocks.allocate()
            if block is not None:
                sequence.blocks.append(block)
                continue
            youngest = next((s for s in reversed(self.running) if s.id not in planned), sequence)
            if youngest.id > sequence.id:
                self.preempt(youngest)
                continue
            placed = len(sequence.blocks) * self.blocks.block_size - sequence.num_computed
            if placed == 0 and sequence.is_decoding:
                self.preempt(sequence)
            return placed
        return count

    def _admit(self, sequence: Sequence, budget: int) -> Chunk | None:
        """Start the first waiting sequence if all its tokens so far find a place, else None."""
        shared: list[int] = []
        if self.blocks.cache and not sequence.request.prompt_logprobs:
            self.blocks.extend_chain(sequence.chain, sequence.tokens)
            shared = self.blocks.match(sequence.chain, len(sequence.tokens))
        needed = self.blocks.blocks_for(len(sequence.tokens)) - len(shared)
        self.blocks.acquire(shared)  # first: what is shared must not count as available
        if needed > self.blocks.num_available:
            self.blocks.release(shared)
            return None
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.status = "running"
        sequence.blocks = shared
        sequence.num_computed = len(shared) * self.blocks.block_size
        if sequence.num_drawn == 0:
            sequence.num_shared = sequence.num_computed
        count = min(sequence.num_missing, budget)
        while len(sequence.blocks) * self.blocks.block_size < sequence.num_computed + count:
            block = self.blocks.allocate()
            assert block is not None, "counted as available above"
            sequence.blocks.append(block)
        return Chunk(sequence, sequence.num_computed, count)
