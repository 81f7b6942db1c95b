"""What the model tests share: tiny configs of each family, and plain causal attention to inject."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from marrow.kernels.attention.attention import attention, pack
from marrow.models.config import ModelConfig
from marrow.models.decoder import Decoder

TINY = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    max_positions=64,
)


@pytest.fixture
def tiny() -> ModelConfig:
    return TINY


@pytest.fixture
def logits_of() -> Callable[[Decoder, Tensor], Tensor]:
    """Logits of rows of tokens [B, T], each a text of its own."""

    def run(decoder: Decoder, tokens_BT: Tensor) -> Tensor:
        rows, length = tokens_BT.shape
        packing = pack(torch.arange(rows).repeat_interleave(length), length)
        positions = torch.arange(length).repeat(rows)
        window = decoder.config.window
        hidden = decoder(
            tokens_BT.flatten(),
            positions,
            lambda layer, q, k, v: attention(q, k, v, packing, window=window(layer)),
        )
        return decoder.logits(hidden).view(rows, length, -1)

    return run
