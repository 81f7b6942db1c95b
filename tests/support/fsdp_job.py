"""One of two processes that train a decoder layer under FSDP2; run by tests/kernels/test_dispatch.py.

python fsdp_job.py RANK WORLD STORE_FILE RESULT_FILE
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from marrow.kernels.attention.attention import attention, pack
from marrow.models.config import ModelConfig
from marrow.models.decoder import Decoder

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
)


def loss_of(decoder: Decoder) -> torch.Tensor:
    """Run the decoder on fixed tokens."""
    tokens_N = torch.arange(24) % 64
    packing = pack(torch.zeros(24, dtype=torch.int64), 24)
    hidden_NC = decoder(tokens_N, torch.arange(24), lambda layer, q, k, v: attention(q, k, v, packing))
    return hidden_NC.square().mean() + hidden_NC[:, 0].sum()


def main() -> None:
    """Compare the gradients of a sharded decoder with those of a whole one; rank 0 writes the worst."""
    rank, world, store, result = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(store, world))
    whole, sharded = Decoder(CONFIG, seed=1), Decoder(CONFIG, seed=1)
    mesh = dist.init_device_mesh("cpu", (world,))
    for layer in sharded.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    loss_of(whole).backward()
    loss_of(sharded).backward()
    worst = 0.0
    for (name, a), (_, b) in zip(whole.named_parameters(), sharded.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        worst = max(worst, float((b.grad.full_tensor() - a.grad).abs().max() / a.grad.abs().max()))
    if rank == 0:
        with open(result, "w", encoding="utf-8") as file:
            file.write(f"{worst}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
