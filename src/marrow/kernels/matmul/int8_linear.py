"""y = x W^T with weights of 8 bits, one scale an output; x as it is (W8A16) or in 8 bits too (W8A8).

W8A8 is arithmetic of integers: each row of x is rounded to the nearest of amax / 127 steps, products are
summed in 32 bits, which is exact up to 2^16 inputs, and the sum is scaled in fp32. The reference does the
very same, so all paths agree but for the last rounding. Weights lie row by row as any matrix: nothing to
pack, shards are slices. The CPU takes VNNI for up to four rows and AMX tiles for more. W8A16 is arithmetic in
x's dtype, sums in fp32: the integers are exact in bf16, and scales are applied to the sums.

Error of W8A8 against W8A16: at most amax(x) / 254 * sum |w| for a row and an output; for normal x and w of
4096 inputs 1 % of y's standard deviation. A large outlier in a row costs all of it: `int4_linear` has finer
scales.

Axes: M rows, N outputs, K inputs. Source: Dettmers et al. 2022 (LLM.int8).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.arguments import Expects
from marrow.kernels.dispatch import Example, Operator
from marrow.kernels.matmul import dequantise
from marrow.kernels.matmul.int4_weights import in_large_pages
from marrow.kernels.matmul.tiles import has_tiles, room_for_tiles
from marrow.kernels.tile import tl

FEW, SOME = 16, 128  # rows: shape classes
LANE_ROWS = 4  # unrounded rows for which lanes beat tiles

MOST_INPUTS = 1 << 16  # 255 x 128 x so many stay within 32 bits, as the C code's sums must


def int8_linear(x_MK: Tensor, weight_NK: Tensor, scales_N: Tensor, rounds_rows: bool = True) -> Tensor:
    """Multiply rows by a matrix of 8-bit weights: x W^T, W = q * scale.

    Args: x_MK: [..., K], fp32, bf16 or fp16. weight_NK: int8. scales_N: fp32. rounds_rows: whether x goes to
        8 bits, a scale for each row; False keeps its dtype.
    Returns: [..., N] of x's dtype. A row that is not finite gives NaN where rows are rounded.
    Cost: reads N K bytes; 2 M N K operations. No gradient.
    """
    result: Tensor = OPERATOR(x_MK, weight_NK, scales_N, rounds_rows)
    return result


def int8_linear_reference(
    x_MK: Tensor, weight_NK: Tensor, scales_N: Tensor, rounds_rows: bool = True
) -> Tensor:
    """Compute `int8_linear` in plain torch; sums of integers in fp64, which holds them exactly."""
    wide = torch.promote_types(x_MK.dtype, torch.float32)
    if not rounds_rows:
        return F.linear(x_MK, (weight_NK.to(wide) * scales_N[:, None].to(wide)).to(x_MK.dtype))
    q_MK, steps_M = round_rows(x_MK)
    sums_MN = F.linear(q_MK.double(), weight_NK.double())
    return (sums_MN.to(wide) * (scales_N.to(wide) * steps_M[..., None].to(wide))).to(x_MK.dtype)


def round_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 [..., K] and fp32 [...]: each row in steps of amax / 127, to the nearest, ties to even.

    A row that is not finite becomes zeros and a step of NaN. A row of zeros has a step of 0.
    """
    wide_MK = x_MK.float()
    amax_M1 = wide_MK.abs().amax(-1, keepdim=True)
    bad_M1 = (wide_MK - wide_MK).sum(-1, keepdim=True)  # 0, or NaN
    # Divided as C divides: torch makes `127.0 / x` a product with the reciprocal.
    inverse_M1 = torch.where(amax_M1 > 0, torch.full_like(amax_M1, 127.0) / amax_M1, 0.0)
    q_MK = (wide_MK * inverse_M1).round()
    steps_M1 = amax_M1 / torch.full_like(amax_M1, 127.0) + bad_M1
    return torch.where(bad_M1.isnan(), 0.0, q_MK).to(torch.int8), steps_M1[..., 0]


def quantise_to_int8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Round a float matrix to 8 bits, one scale an output: int8 [N, K] and fp32 [N]."""
    q_NK, steps_N = round_rows(weight_NK)
    return in_large_pages(q_NK.contiguous()), steps_N.contiguous()


# Triton


@tile.jit
def _round_rows(x, q, steps, inputs, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.float32)
    odd = tl.zeros([BLOCK], tl.float32)
    for start in range(0, inputs, BLOCK):
        some = tl.load(x + row * inputs + start + at, mask=start + at < inputs, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(some))
        odd += some - some
    amax, bad = tl.max(most, 0), tl.sum(odd, 0)
    inverse = tl.where(amax > 0, tl.div_rn(127.0, tl.where(amax > 0, amax, 1.0)), 0.0)
    tl.store(steps + row, tl.div_rn(amax, 127.0) + bad)
    for start in range(0, inputs, BLOCK):
        is_inside = start + at < inputs
        some = tl.load(x + row * inputs + start + at, mask=is_inside, other=0.0).to(tl.float32)
        scaled = tl.where(bad == bad, some * inverse, 0.0)
        # To the nearest, ties to even: 1.5 x 2^23 has no digits behind the point.
        rounded = (scaled + 12582912.0) - 12582912.0
        tl.store(q + row * inputs + start + at, rounded.to(tl.int8), mask=is_inside)


@tile.jit
def _multiply(  # type: ignore[no-untyped-def]
    x, weight, scales, steps, y, rows, outputs, inputs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_ROUNDED: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    is_row, is_column = row < rows, column < outputs
    x_places = x + row[:, None] * inputs + k[None, :]
    w_places = weight + column[None, :] * inputs + k[:, None]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if IS_ROUNDED else tl.float32)
    for start in range(0, inputs, BLOCK_K):
        is_inside = start + k < inputs
        some = tl.load(x_places + start, mask=is_row[:, None] & is_inside[None, :], other=0)
        w = tl.load(w_places + start, mask=is_inside[:, None] & is_column[None, :], other=0)
        if IS_ROUNDED:
            sums = tl.dot(some, w, sums, out_dtype=tl.int32)
        else:
            sums = tl.dot(some, w.to(some.dtype), sums, input_precision="ieee")
    scale = tl.load(scales + column, mask=is_column, other=0.0)[None, :]
    if IS_ROUNDED:
        scale = scale * tl.load(steps + row, mask=is_row, other=0.0)[:, None]
    total = sums.to(tl.float32) * scale
    places = y + row[:, None] * outputs + column[None, :]
    tl.store(places, total.to(y.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def forward_triton(x_MK: Tensor, weight_NK: Tensor, scales_N: Tensor, rounds_rows: bool = True) -> Tensor:
    """Round rows by one kernel, where that is wanted; tiles of y by another."""
    y_MN, (outputs, inputs) = _empty(x_MK, weight_NK, scales_N, rounds_rows), weight_NK.shape
    x_MK, weight_NK = x_MK.reshape(-1, inputs).contiguous(), weight_NK.contiguous()
    rows = x_MK.shape[0]
    steps_M = x_MK.new_empty(rows, dtype=torch.float32)
    if rounds_rows:
        q_MK = torch.empty_like(x_MK, dtype=torch.int8)
        block = min(4096, tile.row_options(inputs, x_MK.dtype)["BLOCK"])
        warps = max(1, min(4, block * x_MK.element_size() // 512))  # 16 bytes a thread
        tile.launch(_round_rows, (rows,), x_MK, q_MK, steps_M, inputs, BLOCK=block, num_warps=warps)
        x_MK = q_MK
    is_few = rows <= 64
    default = {
        "BLOCK_M": 16 if rows <= 16 else 32 if rows <= 32 else 64 if is_few else 128,
        "BLOCK_N": 64 if is_few or x_MK.dtype == torch.float32 else 128,
        "BLOCK_K": 64 if x_MK.dtype == torch.float32 else 128,
        "num_warps": 4 if is_few else 8,
        "num_stages": 3,
    }
    if x_MK.dtype == torch.float32:
        default |= {"BLOCK_M": min(32, default["BLOCK_M"]), "BLOCK_K": 32}
    wider = [
        {"BLOCK_N": n, "num_warps": w, "num_stages": s} for n in (64, 256) for w in (4, 8) for s in (3, 4)
    ]
    options = tile.config("int8_linear", (_shape_class(x_MK), str(x_MK.dtype)), default, wider)
    grid = (-(-outputs // options["BLOCK_N"]), -(-rows // options["BLOCK_M"]))
    tensors = (x_MK, weight_NK, scales_N.contiguous(), steps_M, y_MN)
    tile.launch(_multiply, grid, *tensors, rows, outputs, inputs, IS_ROUNDED=rounds_rows, **options)
    return y_MN


# CPU


def forward_cpu(
    x_MK: Tensor, weight_NK: Tensor, scales_N: Tensor, rounds_rows: bool = True, use_tiles: bool = True
) -> Tensor:
    """Multiply in C, outputs shared among torch's threads. use_tiles: AMX, where there is one."""
    y_MN, (outputs, inputs) = _empty(x_MK, weight_NK, scales_N, rounds_rows), weight_NK.shape
    if y_MN.numel() == 0:
        return y_MN
    rows = y_MN.numel() // outputs
    if not rounds_rows:
        return _multiply_unrounded(x_MK.contiguous(), weight_NK.contiguous(), scales_N, y_MN, rows, use_tiles)
    x_MK, weight_NK = x_MK.contiguous(), weight_NK.contiguous()
    work = torch.empty(-(-rows // 16) * 16 * (inputs + 8), dtype=torch.int8)
    native.function("int8_linear", "int8_linear", "pppppllliii")(
        *native.pointers(x_MK, weight_NK, scales_N.contiguous(), y_MN, work),
        *(rows, outputs, inputs),
        *(use_tiles, torch.get_num_threads(), native.type_of(x_MK)),
    )
    return y_MN


def _multiply_unrounded(
    x_MK: Tensor, weight_NK: Tensor, scales_N: Tensor, y_MN: Tensor, rows: int, use_tiles: bool
) -> Tensor:
    """Take lanes for a few rows, tiles for more; without tiles unpack all weights and multiply by torch."""
    is_tiled = use_tiles and x_MK.dtype == torch.bfloat16 and has_tiles()
    tensors, sizes = (x_MK, weight_NK, scales_N.contiguous(), y_MN), (rows, *weight_NK.shape)
    threads = torch.get_num_threads()
    if rows <= (LANE_ROWS if is_tiled else FEW):
        native.function("int8_linear", "int8_linear_lanes", "pppplllii")(
            *native.pointers(*tensors), *sizes, threads, native.type_of(x_MK)
        )
    elif is_tiled:
        native.function("int8_linear", "int8_linear_tiles", "pppppllli")(
            *native.pointers(*tensors, room_for_tiles(rows, weight_NK.shape[1])), *sizes, threads
        )
    else:
        steps_N1 = scales_N[:, None].contiguous()
        no_zeros = steps_N1.new_empty(steps_N1.shape, dtype=torch.uint8)
        unpacked_NK = dequantise.forward_cpu(weight_NK, steps_N1, no_zeros, x_MK.dtype, 1, 0)
        torch.mm(x_MK.view(rows, -1), unpacked_NK.T, out=y_MN.view(rows, -1))
    return y_MN


# What all paths share


def _empty(x_MK: Tensor, weight_NK: Tensor, scales_N: Tensor, rounds_rows: bool = True) -> Tensor:
    return x_MK.new_empty(*x_MK.shape[:-1], weight_NK.shape[0])


def _shape_class(x_MK: Tensor, *_: object) -> str:
    rows = x_MK.numel() // max(1, x_MK.shape[-1])
    return "few" if rows <= FEW else "some" if rows <= SOME else "many"


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Make a small matrix, and the largest one of a 7B model; rows rounded and not."""
    examples = []
    for rows, outputs, inputs in ((1, 256, 256), (1, 11008, 4096), (64, 11008, 4096)):
        x_MK = torch.randn(rows, inputs, device=device, dtype=dtype)
        weight_NK = torch.randint(-127, 128, (outputs, inputs), device=device, dtype=torch.int8)
        scales_N = torch.rand(outputs, device=device) / 100
        cost = (weight_NK.nbytes + x_MK.nbytes, 2 * rows * outputs * inputs)
        for rounds_rows in (True, False):
            label = f"{rows}x{outputs}x{inputs} W8A{8 if rounds_rows else 16}"
            inputs_ = (x_MK, in_large_pages(weight_NK), scales_N, rounds_rows)
            examples.append(Example(label, inputs_, *cost))
    return examples


def _misfit(x_MK: Tensor, weight_NK: Tensor, *more: Any) -> tuple[str, str] | None:
    """Say what does not fit, beyond what the names of the inputs say."""
    if weight_NK.shape[1] > MOST_INPUTS:
        return f"{weight_NK.shape[1]} inputs overflow 32-bit sums", f"at most {MOST_INPUTS}: split the matrix"
    return None


OPERATOR = Operator(
    "int8_linear",
    int8_linear_reference,
    fake=_empty,
    examples=_examples,
    shape_class=_shape_class,
    expects=Expects(dtypes={"weight_NK": torch.int8, "scales_N": torch.float32}, leading=True, also=_misfit),
)
OPERATOR.add("cpu", forward_cpu, **native.path("int8_linear"))
OPERATOR.add("triton", forward_triton, **tile.path())
