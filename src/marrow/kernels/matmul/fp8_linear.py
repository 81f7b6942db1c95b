"""y = x W^T with weights in fp8 (e4m3), one scale a block of 128 x 128; x in fp8 too, a scale for 128 inputs.

Products of 128 inputs are summed before scales are applied, in fp32: on Hopper a tensor core keeps some 14
bits of an fp8 sum, so that each block is added to an fp32 register. x may also keep its dtype (`rounds_rows`
False). Weights lie row by row; a last block of outputs or inputs may be smaller. The Triton version needs a
GPU with fp8 (sm_89 and later).

The CPU multiplies a few rows by weights that it widens in registers, more of bf16 by AMX tiles of scaled
weights; else it unpacks all weights.

Error of 8-bit rows: each number of x is off by at most 1/16 of itself, or by 2^-10 of a step; for normal x
and w of 4096 inputs 2.6 % of y's standard deviation.

Axes: M rows, N outputs, K inputs. Source: DeepSeek-AI 2024 (DeepSeek-V3, section 3.3).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.arguments import Expects
from marrow.kernels.dispatch import Example, Operator
from marrow.kernels.matmul import dequantise, quantise
from marrow.kernels.matmul.int4_weights import in_large_pages
from marrow.kernels.matmul.tiles import has_tiles, room_for_tiles
from marrow.kernels.tile import tl

BLOCK = 128
FEW, FEWER = 8, 2  # rows for which lanes beat torch, and tiles


def fp8_linear(x_MK: Tensor, weight_NK: Tensor, scales_PG: Tensor, rounds_rows: bool = True) -> Tensor:
    """Multiply rows by a matrix of fp8 weights in scaled blocks.

    Args: x_MK: [..., K], fp32, bf16 or fp16. weight_NK: float8_e4m3fn, no NaN. scales_PG: fp32
        [ceil(N / 128), ceil(K / 128)]. rounds_rows: whether x goes to fp8, a scale for each 128 inputs.
    Returns: [..., N] of x's dtype.
    Cost: reads N K bytes; 2 M N K FLOPs. No gradient.
    """
    result: Tensor = OPERATOR(x_MK, weight_NK, scales_PG, rounds_rows)
    return result


def fp8_linear_reference(
    x_MK: Tensor, weight_NK: Tensor, scales_PG: Tensor, rounds_rows: bool = True
) -> Tensor:
    """Compute `fp8_linear` in plain torch: unpack everything into x's dtype, multiply."""
    if rounds_rows:
        flat_MK = x_MK.reshape(-1, x_MK.shape[-1])
        rounded = quantise.quantise_reference(flat_MK, "fp8", 1, BLOCK)
        x_MK = _unpacked(rounded[0], rounded[1], x_MK.dtype, 1).view(x_MK.shape)
    return F.linear(x_MK, _unpacked(weight_NK, scales_PG, x_MK.dtype, BLOCK))


def quantise_to_fp8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Round a float matrix to fp8 in blocks of 128 x 128: float8_e4m3fn [N, K] and fp32 [P, G]."""
    q_NK, steps_PG, _ = quantise.quantise(weight_NK, "fp8", BLOCK, BLOCK)
    return in_large_pages(q_NK), steps_PG


# Triton


@tile.jit
def _multiply(  # type: ignore[no-untyped-def]
    x, steps, weight, scales, y, rows, outputs, inputs, blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_ROUNDED: tl.constexpr,
):  # fmt: skip
    """One tile of y; its outputs, and BLOCK_K inputs, lie in one block of 128. Neighbours share weights."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    is_row, is_column = row < rows, column < outputs
    x_places = x + row[:, None] * inputs + k[None, :]
    w_places = weight + column[None, :] * inputs + k[:, None]
    line = tl.program_id(1).to(tl.int64) * BLOCK_N // 128 * blocks
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        is_inside = start + k < inputs
        some = tl.load(x_places, mask=is_row[:, None] & is_inside[None, :], other=0.0)
        w = tl.load(w_places, mask=is_inside[:, None] & is_column[None, :], other=0.0)
        scale = tl.load(scales + line + start // 128)
        if IS_ROUNDED:
            sums = tl.dot(some, w)
            step = tl.load(steps + row * blocks + start // 128, mask=is_row, other=0.0)
            total += sums * (step * scale)[:, None]
        else:
            total += tl.dot(some, w.to(some.dtype), input_precision="ieee") * scale
        x_places += BLOCK_K
        w_places += BLOCK_K
    places = y + row[:, None] * outputs + column[None, :]
    tl.store(places, total.to(y.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def forward_triton(x_MK: Tensor, weight_NK: Tensor, scales_PG: Tensor, rounds_rows: bool = True) -> Tensor:
    """Round rows by one kernel, where that is wanted; tiles of y by another."""
    y_MN, (outputs, inputs) = _empty(x_MK, weight_NK, scales_PG, rounds_rows), weight_NK.shape
    x_MK = x_MK.reshape(-1, inputs).contiguous()
    rows, is_wide, steps_MG = x_MK.shape[0], x_MK.element_size() == 4, scales_PG
    if rounds_rows:
        x_MK, steps_MG, _ = quantise.forward_triton(x_MK, "fp8", 1, BLOCK)
    few, is_wide = rows <= 64, is_wide and not rounds_rows
    default = {
        "BLOCK_M": 16 if rows <= 16 else 32 if rows <= 32 or is_wide else 64 if few else 128,
        "BLOCK_N": 32 if is_wide else 64 if few else 128,
        "BLOCK_K": 32 if is_wide else 128,
        "num_warps": 4 if few else 8,
        "num_stages": 2 if is_wide else 4,
    }
    wider = [
        {"BLOCK_N": n, "num_warps": w, "num_stages": s} for n in (64, 128) for w in (4, 8) for s in (3, 5)
    ]
    options = tile.config("fp8_linear", ("few" if few else "many", str(x_MK.dtype)), default, wider)
    grid = (-(-rows // options["BLOCK_M"]), -(-outputs // options["BLOCK_N"]))
    tensors = (x_MK, steps_MG, weight_NK.contiguous(), scales_PG.contiguous(), y_MN)
    sizes = (rows, outputs, inputs, -(-inputs // BLOCK))
    tile.launch(_multiply, grid, *tensors, *sizes, IS_ROUNDED=rounds_rows, **options)
    return y_MN


# CPU


def forward_cpu(
    x_MK: Tensor, weight_NK: Tensor, scales_PG: Tensor, rounds_rows: bool = True, use_tiles: bool = True
) -> Tensor:
    """Multiply in C, outputs shared among torch's threads. use_tiles: AMX, where there is one."""
    y_MN, (outputs, inputs) = _empty(x_MK, weight_NK, scales_PG, rounds_rows), weight_NK.shape
    if y_MN.numel() == 0:
        return y_MN
    flat_MK, threads = x_MK.reshape(-1, inputs), torch.get_num_threads()
    rows = flat_MK.shape[0]
    is_tiled = use_tiles and x_MK.dtype == torch.bfloat16 and has_tiles()
    is_few = rows <= (FEWER if is_tiled else FEW)
    if rounds_rows:
        rounded = quantise.forward_cpu(flat_MK, "fp8", 1, BLOCK)
        wanted = torch.float32 if is_few else x_MK.dtype
        flat_MK = dequantise.forward_cpu(*rounded, wanted, 1, BLOCK)
    tensors = (weight_NK.contiguous(), scales_PG.contiguous(), y_MN)
    if is_few:
        native.function("fp8_linear", "fp8_linear", "pppplllii")(
            *native.pointers(flat_MK.float().contiguous(), *tensors),
            *(rows, outputs, inputs, threads, native.type_of(y_MN)),
        )
    elif is_tiled:
        native.function("fp8_linear", "fp8_linear_tiles", "pppppllli")(
            *native.pointers(flat_MK.contiguous(), *tensors, room_for_tiles(rows, inputs)),
            *(rows, outputs, inputs, threads),
        )
    else:
        no_zeros = scales_PG.new_empty(scales_PG.shape, dtype=torch.uint8)
        unpacked_NK = dequantise.forward_cpu(weight_NK, scales_PG, no_zeros, x_MK.dtype, BLOCK, BLOCK)
        return F.linear(flat_MK, unpacked_NK).view(y_MN.shape)
    return y_MN


# What all paths share


def _unpacked(q_NK: Tensor, steps_PG: Tensor, dtype: torch.dtype, block_rows: int) -> Tensor:
    """Return q * step; in fp32, in fp64 for fp64."""
    wide = torch.promote_types(dtype, torch.float32)
    rows, columns = q_NK.shape
    spread = steps_PG.to(wide).repeat_interleave(block_rows, 0)[:rows].repeat_interleave(BLOCK, 1)
    return (q_NK.to(wide) * spread[:, :columns]).to(dtype)


def _empty(x_MK: Tensor, weight_NK: Tensor, scales_PG: Tensor, rounds_rows: bool = True) -> Tensor:
    return x_MK.new_empty(*x_MK.shape[:-1], weight_NK.shape[0])


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Make a small matrix, a square one with few rows and with many; rows rounded and not."""
    examples = []
    for rows, outputs, inputs in ((1, 256, 256), (16, 4096, 4096), (4096, 4096, 4096)):
        x_MK = torch.randn(rows, inputs, device=device, dtype=dtype)
        weight_NK = torch.randn(outputs, inputs, device=device).to(torch.float8_e4m3fn)
        scales_PG = torch.rand(-(-outputs // BLOCK), -(-inputs // BLOCK), device=device)
        cost = (weight_NK.nbytes + x_MK.nbytes, 2 * rows * outputs * inputs)
        for rounds_rows in (True, False):
            label = f"{rows}x{outputs}x{inputs} rows {'fp8' if rounds_rows else 'as they are'}"
            examples.append(Example(label, (x_MK, weight_NK, scales_PG, rounds_rows), *cost))
    return examples


def _misfit(x_MK: Tensor, weight_NK: Tensor, scales_PG: Tensor, *more: Any) -> tuple[str, str] | None:
    """Say what does not fit, beyond what the names of the inputs say."""
    wanted = [-(-size // BLOCK) for size in weight_NK.shape]
    if list(scales_PG.shape) != wanted:
        return f"scales {list(scales_PG.shape)} for weights {list(weight_NK.shape)}", f"one a block: {wanted}"
    return None


OPERATOR = Operator(
    "fp8_linear",
    fp8_linear_reference,
    fake=_empty,
    examples=_examples,
    expects=Expects(
        dtypes={"weight_NK": torch.float8_e4m3fn, "scales_PG": torch.float32}, leading=True, also=_misfit
    ),
)
OPERATOR.add("cpu", forward_cpu, **native.path("fp8_linear"))
OPERATOR.add("triton", forward_triton, **tile.path())
