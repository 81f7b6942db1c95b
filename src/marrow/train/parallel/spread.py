"""A decoder spread over a mesh: this rank's stage, share and shard, and where each lies in the whole.

    whole decoder --pp--> some layers --tp--> shares of their matrices --fsdp--> rows of those

Parallelism is applied here, from outside: `models` knows one device. What a rank holds of each parameter is a
`Held`: its rows of its share, as plain local memory, and where those lie in the logical tensors. Checkpoints,
fresh weights, optimisers and exports all read that one description.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from marrow.models.config import ModelConfig
from marrow.models.decoder import Decoder, fresh
from marrow.models.parts import Region, num_rows, parts, regions
from marrow.train.parallel.mesh import Mesh
from marrow.train.parallel.tensor import LayerShare


@dataclass(frozen=True, slots=True)
class Held:
    """What a rank holds of a parameter.

    name: the decoder's. regions: where it lies in the logical tensors. is_cut: whether tensor parallelism
    divides the parameter; where not, all its ranks hold the same.
    """

    name: str
    parameter: nn.Parameter
    regions: tuple[Region, ...]
    is_cut: bool

    @property
    def local(self) -> Tensor:
        """The memory itself, without gradient."""
        return local(self.parameter.detach())


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a tensor that FSDP shards, or the tensor itself."""
    whole: Any = tensor
    here: Tensor = whole.to_local() if is_sharded(tensor) else tensor
    return here


def is_sharded(tensor: Tensor) -> bool:
    """Whether FSDP shards a tensor: a DTensor, told by what it can; its class takes half a second to load."""
    return hasattr(tensor, "to_local")


def stage_layers(config: ModelConfig, stage: int, num_stages: int) -> range:
    """Return the layers of a pipeline stage: as even as can be, the earlier stages larger.

    The last stage has the head too, so what is left over goes to the first ones.
    """
    size, more = divmod(config.num_layers, num_stages)
    start = stage * size + min(stage, more)
    return range(start, start + size + (stage < more))


def spread(
    config: ModelConfig,
    mesh: Mesh,
    *,
    stage: int = 0,
    num_stages: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    reshard: bool = True,
) -> Decoder:
    """Make this rank's piece of a decoder, with fresh weights.

    Args: dtype: that is computed in. Without fsdp it is that of the weights; with it, weights are kept in
        fp32 and gathered in `dtype`. reshard: see `ParallelRecipe`.
    Cost: the memory of the piece, and of one logical tensor.
    """
    layers = stage_layers(config, stage, num_stages)
    shards = mesh.size("fsdp") > 1
    decoder = Decoder(config, dtype=torch.float32 if shards else dtype, device="meta", layers=layers)
    shares = mesh.group("tp")
    if shares is not None:
        with torch.device("meta"):
            for index in layers:
                decoder.layers[str(index)] = LayerShare(config, index, shares).to(decoder.dtype)
    if shards:
        _shard(decoder, mesh, dtype, device, reshard)
        decoder.to_empty(device=device)
    else:
        decoder.allocate(device)
    fill(decoder, mesh, seed)
    return decoder


def _shard(decoder: Decoder, mesh: Mesh, dtype: torch.dtype, device: str, reshard: bool) -> None:
    """Let FSDP own every layer, and what is left as one more group."""
    # Half a second to load, and sympy with it: only who shards pays.
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    device_mesh = mesh.device_mesh(device)
    for layer in decoder.layers.values():
        fully_shard(layer, mesh=device_mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(decoder, mesh=device_mesh, mp_policy=policy)
    for module in decoder.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by the step's targets, so gradients are summed, not averaged; without the
            # second line FSDP asks for an operation that gloo does not have.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def held(decoder: Decoder, mesh: Mesh) -> list[Held]:
    """Describe what this rank holds, in the order of the parameters."""
    found = []
    shards, shard, tp = mesh.size("fsdp"), mesh.rank("fsdp"), mesh.size("tp")
    config = decoder.config
    for name, parameter in decoder.named_parameters():
        first_row, rows = 0, num_rows(name, config, tp)
        if is_sharded(parameter):
            # FSDP shards the first axis as torch.chunk does; for experts an entry of it is several rows.
            length = parameter.shape[0]
            each, size = rows // length, -(-length // shards)
            first_row = min(size * shard, length) * each
            rows = min(size, length - first_row // each) * each
        boxes = regions(name, config, tp_rank=mesh.rank("tp"), tp=tp, first_row=first_row, rows=rows)
        is_cut = any(part.cut is not None for part in parts(name, config))
        found.append(Held(name, parameter, tuple(boxes), is_cut))
    return found


@torch.no_grad()
def fill(decoder: Decoder, mesh: Mesh, seed: int) -> None:
    """Draw fresh weights: each piece is that of the whole decoder's with this seed."""
    for piece in held(decoder, mesh):
        for region in piece.regions:
            whole = fresh(region.name, region.shape, decoder.config, seed)
            region.of(piece.local).copy_(whole[region.box])
