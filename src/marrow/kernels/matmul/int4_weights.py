"""Weights in 4 bits, packed as `int4_linear` reads them: plain tensors, made from AWQ, GPTQ or floats.

    weight [N/16, K/8, 64] uint8   panels of 16 outputs; 64 bytes hold 8 inputs of each of the 16
    scales [N/16, K/group, 16] float16
    zeros  [N/16, K/group, 16] uint8          w = (q - zero) * scale
    order  [K] int32, or None                 input k of the packed weights is input order[k] of x

    64 bytes are 16 dwords, one an output. Dwords 4c, 4c+1, 4c+2, 4c+3 of an output hold its inputs
    32c .. 32c+31: nibble i of dword 4c+o is input 32c + 4i + o.

                    nibble   7  6  5  4  3  2  1  0
        dword 4c   inputs   28 24 20 16 12  8  4  0      (+ 32c)
        dword 4c+1          29 25 21 17 13  9  5  1      ...

    On a CPU a vector of 64 bytes, masked by 15 or shifted by 4, multiplies four bytes of x for 16 outputs at
    once (VNNI), and 16 such vectors are an AMX tile; a panel is one stream through memory. On a GPU nibble i
    of 16 dwords is the operand of one tensor-core product whose x comes in runs of 4.

Slices of whole panels along the first axis split outputs, slices of whole groups along the second split
inputs: tensors can be saved in safetensors and sharded as they are. Axes: N outputs, K inputs, G groups.
"""

import ctypes
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from marrow.core.errors import UsageError

PANEL, BLOCK = 16, 32
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a dword of AWQ holds this column of 8
_LARGE_PAGE_BYTES, _MADV_COLLAPSE = 2 << 20, 25


class Int4Weight(NamedTuple):
    """A packed matrix, in the order of `int4_linear`'s arguments."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.weight.shape[0] * PANEL, self.weight.shape[1] * 8


def pack_int4(q_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor, order_K: Tensor | None = None) -> Int4Weight:
    """Pack 4-bit numbers.

    Args: q_NK: integers 0 to 15. scales_NG: any float dtype; kept in fp16. zeros_NG: integers 0 to 16.
    Raises: UsageError unless N % 16 == 0, and groups of equal length, a multiple of 32, fill K.
    Cost: one pass; the result takes N K / 2 bytes and 3 bytes a group.
    """
    (outputs, inputs), groups = q_NK.shape, scales_NG.shape[1]
    if outputs % PANEL or inputs % groups or inputs // groups % BLOCK:
        raise UsageError(
            f"4-bit weights of {outputs} x {inputs} in {groups} groups cannot be packed",
            hint="outputs must be a multiple of 16, a group's inputs of 32",
        )
    nibbles = q_NK.to(torch.uint8).view(outputs // PANEL, PANEL, inputs // BLOCK, 4, 2, 4)
    both = nibbles[..., 0, :] | nibbles[..., 1, :] << 4  # [panel, output, block, byte, dword]
    weight = both.permute(0, 2, 4, 1, 3).reshape(outputs // PANEL, inputs // 8, 4 * PANEL)
    return Int4Weight(
        in_large_pages(weight),
        _by_panel(scales_NG.to(torch.float16)),
        _by_panel(zeros_NG.to(torch.uint8)),
        order_K,
    )


def unpack_int4(weight: Tensor) -> Tensor:
    """Return the 4-bit numbers [N, K] uint8 of a packed weight."""
    panels, octets, _ = weight.shape
    both = weight.view(panels, octets // 4, 4, PANEL, 4)
    nibbles = torch.stack((both & 15, both >> 4), -1)  # [panel, block, dword, output, byte, half]
    return nibbles.permute(0, 3, 1, 4, 5, 2).reshape(panels * PANEL, octets * 8)


def dequantise_int4(weight: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (q - zero) * scale [N, K] of packed tensors; computed in fp32, in fp64 for fp64."""
    wide = torch.promote_types(dtype, torch.float32)
    q_NK = unpack_int4(weight)
    groups = scales.shape[1]
    q_NGk = q_NK.view(q_NK.shape[0], groups, -1).to(wide)
    w_NGk = (q_NGk - by_row(zeros)[..., None].to(wide)) * by_row(scales)[..., None].to(wide)
    return w_NGk.view(q_NK.shape).to(dtype)


def quantise_to_int4(weight_NK: Tensor, *, group: int = 128, symmetric: bool = False) -> Int4Weight:
    """Round a float matrix to 4 bits, group by group of inputs, to the nearest of 16 steps.

    Args: group: inputs that share a scale, a multiple of 32. symmetric: zero is 8 everywhere.
    """
    w_NGk = weight_NK.float().view(weight_NK.shape[0], -1, group)
    if symmetric:
        scales_NG = (w_NGk.abs().amax(-1) / 7).to(torch.float16)
        zeros_NG = torch.full_like(scales_NG, 8)
    else:
        low, high = w_NGk.amin(-1).clamp(max=0), w_NGk.amax(-1).clamp(min=0)
        scales_NG = ((high - low) / 15).to(torch.float16)
        zeros_NG = (-low / scales_NG.float().clamp(min=1e-30)).round().clamp(0, 15)
    steps = scales_NG.float().clamp(min=1e-30)[..., None]
    q_NGk = ((w_NGk / steps).round() + zeros_NG[..., None]).clamp(0, 15)
    return pack_int4(q_NGk.view(weight_NK.shape), scales_NG, zeros_NG)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Int4Weight:
    """Repack AWQ's tensors.

    Args: qweight: int32 [K, N/8]. qzeros: int32 [G, N/8]. scales: fp16 [G, N].
    Source: AutoAWQ's "gemm" version; nibbles of a dword are columns 0, 2, 4, 6, 1, 3, 5, 7.
    """
    places = [_AWQ_COLUMNS.index(column) for column in range(8)]
    q_KN = _nibbles(qweight)[..., places].flatten(-2)
    zeros_GN = _nibbles(qzeros)[..., places].flatten(-2)
    return pack_int4(q_KN.T, scales.T, zeros_GN.T)


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None, *, version: int = 1
) -> Int4Weight:
    """Repack GPTQ's tensors.

    Args: qweight: int32 [K/8, N]. qzeros: int32 [G, N/8]. scales: fp16 [G, N]. g_idx: int32 [K], the group of
        each input, where quantisation went by activation order. version: 1 stores zeros less one.
    Raises: UsageError if the groups of g_idx differ in length.
    """
    q_KN = _nibbles(qweight).permute(0, 2, 1).flatten(0, 1)
    zeros_GN = _nibbles(qzeros).flatten(-2) + (1 if version == 1 else 0)
    order, groups = None, scales.shape[0]
    if g_idx is not None:
        sizes = torch.bincount(g_idx.long(), minlength=groups)
        if sizes.numel() != groups or bool((sizes != sizes[0]).any()):
            raise UsageError("g_idx has groups of unequal length", hint="export the model with whole groups")
        order_K = torch.argsort(g_idx.long(), stable=True)
        if not torch.equal(order_K, torch.arange(order_K.numel(), device=order_K.device)):
            q_KN, order = q_KN[order_K], order_K.int()
    return pack_int4(q_KN.T, scales.T, zeros_GN.T, order)


def by_row(panels: Tensor) -> Tensor:
    """Turn [N/16, G, 16] into [N, G]."""
    return panels.transpose(1, 2).flatten(0, 1)


def in_large_pages(tensor: Tensor) -> Tensor:
    """Ask Linux to back a CPU tensor with large pages, and return it; where it cannot, nothing changes."""
    # PERF: a core that reads 176 MB from memory gets 12.6 GB/s with pages of 4 KiB, whatever it prefetches,
    # and 17.5 GB/s with large ones.
    if sys.platform == "linux" and tensor.device.type == "cpu" and tensor.is_contiguous():
        page = _LARGE_PAGE_BYTES
        first = (tensor.data_ptr() + page - 1) // page * page
        size = (tensor.data_ptr() + tensor.nbytes) // page * page - first
        if size > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_COLLAPSE)
    return tensor


def _by_panel(rows_NG: Tensor) -> Tensor:
    """Turn [N, G] into [N/16, G, 16]."""
    return rows_NG.reshape(-1, PANEL, rows_NG.shape[1]).transpose(1, 2).contiguous()


def _nibbles(dwords: Tensor) -> Tensor:
    """Return the eight nibbles of each int32, the lowest first, in a new last axis; uint8."""
    shifts = torch.arange(0, 32, 4, device=dwords.device)
    return (dwords.long()[..., None] >> shifts & 15).to(torch.uint8)
