"""Runs the decoder over the chunks of one step, with keys and values in a paged cache.

All chunks lie flat behind each other: no padding, no batch axis. A token's keys and values go to
slot `block * block_size + offset` of its layer's cache; attention reads them back through the
sequence's list of blocks.

Axes: N tokens of the step, B chunks, P blocks of the cache, S tokens of a block, H heads, K kv
heads, D head size, C hidden size, V vocabulary.
"""

import time
from collections.abc import Sequence as Several
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from marrow.core.errors import ResourceError
from marrow.kernels.attention.paged_attention import paged_attention
from marrow.models import huggingface
from marrow.models.decoder import Decoder
from marrow.serve.blocks import SCRATCH
from marrow.serve.config import ServeRecipe
from marrow.serve.scheduler import Chunk

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Runner:
    """Owns the weights and the tensors of the cache. Only the engine's thread calls it."""

    def __init__(self, decoder: Decoder, recipe: ServeRecipe) -> None:
        self.dtype = measure_dtype(decoder) if recipe.dtype == "auto" else _DTYPES[recipe.dtype]
        self.decoder = decoder.to(self.dtype).eval().requires_grad_(False)
        self.device = decoder.embedding_VC.device
        self.block_size = recipe.block_size
        config = decoder.config
        block_bytes = recipe.block_size * config.kv_bytes_per_token(self.dtype.itemsize)
        self.num_blocks = recipe.kv_memory // block_bytes
        if self.num_blocks < 2:
            raise ResourceError(
                f"kv_memory = {recipe.kv_memory} bytes holds {self.num_blocks} blocks of {block_bytes} bytes",
                hint=f"set serve.kv_memory to at least {2 * block_bytes}, better 100 times that",
            )
        shape = (self.num_blocks, recipe.block_size, config.num_kv_heads, config.head_size)
        # Never cleared: what a block holds past its sequence's end is not seen.
        self._keys, self._values = (
            [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(config.num_layers)]
            for _ in range(2)
        )

    def forward(self, chunks: Several[Chunk]) -> Tensor:
        """Compute chunks and store their keys and values.

        Args: chunks: at least one; their sequences hold the blocks they write to.
        Returns: hidden_NC, the chunks' rows one after the other.
        """
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        size = self.block_size
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.count
            tokens += sequence.tokens[chunk.start : end]
            positions += range(chunk.start, end)
            slots += [sequence.blocks[at // size] * size + at % size for at in range(chunk.start, end)]
            starts.append(len(tokens))
        most = max(-(-(chunk.start + chunk.count) // size) for chunk in chunks)
        # Lists are padded with the scratch block, which no length reaches.
        lists = [(c.sequence.blocks + [SCRATCH] * most)[:most] for c in chunks]
        ends = [chunk.start + chunk.count for chunk in chunks]
        return self._forward(tokens, positions, slots, starts, lists, ends)

    def logits(self, hidden_NC: Tensor) -> Tensor:
        """Score the vocabulary in float32: [N, C] -> [N, V]."""
        return self.decoder.logits(hidden_NC).float()

    def probe(self) -> None:
        """Do a whole step of one token in the scratch block."""
        hidden_NC = self._forward([0], [0], [SCRATCH * self.block_size], [0, 1], [[SCRATCH]], [1])
        self.logits(hidden_NC)

    def load_weights(self, path: Path) -> None:
        """Take other weights of the same shape. Raises: ModelError; the old ones then stay."""
        before = [parameter.clone() for parameter in self.decoder.parameters()]
        try:
            huggingface.load_weights(self.decoder, path)
        except BaseException:
            for parameter, value in zip(self.decoder.parameters(), before, strict=True):
                parameter.copy_(value)
            raise

    def _forward(
        self,
        tokens: list[int],
        positions: list[int],
        slots: list[int],
        starts: list[int],
        lists: list[list[int]],
        ends: list[int],
    ) -> Tensor:
        def index(values: object, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        tokens_N, positions_N, slots_N = index(tokens), index(positions), index(slots)
        starts_B, ends_B, blocks_BM = (index(v, torch.int32) for v in (starts, ends, lists))

        max_queries, max_keys = max(b - a for a, b in pairwise(starts)), max(ends)

        def attend(layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            keys.flatten(0, 1).index_copy_(0, slots_N, k_NKD)
            values.flatten(0, 1).index_copy_(0, slots_N, v_NKD)
            return paged_attention(
                q_NHD,
                keys,
                values,
                blocks_BM,
                starts_B,
                ends_B,
                max_queries=max_queries,
                max_keys=max_keys,
                window=self.decoder.config.window(layer),
            )

        hidden_NC: Tensor = self.decoder(tokens_N, positions_N, attend)
        return hidden_NC


def measure_dtype(decoder: Decoder, *, num_tokens: int = 8, repeats: int = 20) -> torch.dtype:
    """Return bfloat16 if this machine multiplies it clearly faster than float32, else float32.

    Measures the largest matrix of the model at a small decode batch, the best of `repeats`,
    interleaved. Cost: a few milliseconds for a small model.
    """
    weight_OC = max((p for p in decoder.parameters() if p.ndim == 2), key=lambda p: p.numel()).detach()
    best = {}
    with torch.inference_mode():
        pairs = {}
        for dtype in (torch.float32, torch.bfloat16):
            rows_NC = torch.ones(num_tokens, weight_OC.shape[1], dtype=dtype, device=weight_OC.device)
            pairs[dtype] = rows_NC, weight_OC.to(dtype)
            best[dtype] = float("inf")
        for _ in range(repeats):
            for dtype, (rows_NC, matrix_OC) in pairs.items():
                start = time.perf_counter()
                float((rows_NC @ matrix_OC.T)[0, 0])  # reading a number waits for the device
                best[dtype] = min(best[dtype], time.perf_counter() - start)
    # A quarter faster, or the rounding is not worth it.
    return torch.bfloat16 if best[torch.bfloat16] * 1.25 < best[torch.float32] else torch.float32
