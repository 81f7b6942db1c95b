"""y = x W[e]^T where rows come sorted by expert e: the matrix product of a mixture of experts.

    rows of x    | expert 0 ........ | expert 1 .. | (expert 2: none) | expert 3 ... | rest: y is 0 |
    offsets_E                        ^ 0           ^ 1, 2                            ^ 3

Offsets stay on the device: no expert's number of rows is ever read by the host. On a GPU the grid has as many
tiles as there could be, and each finds its expert by counting the tiles before it; what is left over ends at
once. dx is the same product with W turned, dW sums over an expert's own rows.

A CPU multiplies rows of bf16 by AMX tiles, read from W as it lies, and a few rows by lanes; more rows of
fp32, very many rows, and gradients are matrix products of torch, one for each expert that has rows.

Axes: M rows, K inputs, N outputs, E experts. Source: Gale et al. 2022 (MegaBlocks).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.arguments import Expects
from marrow.kernels.dispatch import Example, Gradient, Operator
from marrow.kernels.matmul.tiles import has_tiles, room_for_tiles
from marrow.kernels.tile import tl

# Rows of an expert, on average, up to which C beats a product of torch for each: by lanes, by AMX tiles.
# PERF: 16 experts of 1408 x 2048, bf16: 1.6x at 1 row each, 1.5x at 4, 1.4x at 32; 8 of 768 x 2048 at 512
# rows 0.8x. fp32: 1.1x at 1 row, 1.6x at 4.
FEW, SOME = 4, 256


def grouped_linear(x_MK: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """Multiply each row by the matrix of its expert.

    Args: x_MK: rows sorted by expert, any float dtype. weight_ENK: [E, N, K] of x's dtype. offsets_E: int32,
        where each expert's rows end, ascending, the last at most M.
    Returns: [M, N]; rows behind the last offset are 0.
    Cost: 2 M N K FLOPs; reads the matrices of experts that have rows.
    """
    result: Tensor = OPERATOR(x_MK, weight_ENK, offsets_E)
    return result


def grouped_linear_reference(x_MK: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """Compute `grouped_linear` in plain torch, expert by expert."""
    parts, start = [], 0
    for expert, end in enumerate(offsets_E.tolist()):
        parts.append(F.linear(x_MK[start:end], weight_ENK[expert]))
        start = end
    rest_KN = weight_ENK.new_zeros(x_MK.shape[1], weight_ENK.shape[1])
    return torch.cat((*parts, x_MK[start:] @ rest_KN))


# Triton


@tile.jit
def _multiply(  # type: ignore[no-untyped-def]
    x, weight, offsets, order, y, rows, outputs, inputs, experts, stride_e, stride_n, stride_k,
    HAS_ORDER: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one expert. HAS_ORDER: row m of y comes of row order[m] of x."""
    number = tl.program_id(0)
    # The rest behind the last expert counts as one more, whose weights are 0.
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(offsets + e, mask=e < experts, other=rows)
    starts = tl.load(offsets + e - 1, mask=(e > 0) & (e <= experts), other=0)
    starts = tl.where(e > experts, rows, starts)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    before = tl.cumsum(tiles, 0)
    expert = tl.sum((before <= number).to(tl.int32), 0)
    is_mine = e == expert
    start = tl.sum(tl.where(is_mine, starts, 0), 0)
    end = tl.sum(tl.where(is_mine, ends, 0), 0)
    first = start + (number - tl.sum(tl.where(is_mine, before - tiles, 0), 0)) * BLOCK_M
    if first < end:
        row = first + tl.arange(0, BLOCK_M)
        is_row = row < end
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        is_column = column < outputs
        k = tl.arange(0, BLOCK_K)
        source = row.to(tl.int64)
        if HAS_ORDER:
            source = tl.load(order + row, mask=is_row, other=0).to(tl.int64)
        x_places = x + source[:, None] * inputs + k[None, :]
        w_first = weight + expert.to(tl.int64) * stride_e
        w_places = w_first + column.to(tl.int64)[None, :] * stride_n + k.to(tl.int64)[:, None] * stride_k
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        until = tl.where(expert < experts, inputs, 0)
        for at in range(0, until, BLOCK_K):
            is_inside = at + k < inputs
            some = tl.load(x_places, mask=is_row[:, None] & is_inside[None, :], other=0.0)
            w = tl.load(w_places, mask=is_inside[:, None] & is_column[None, :], other=0.0)
            sums = tl.dot(some, w, sums, input_precision="ieee")
            x_places += BLOCK_K
            w_places += BLOCK_K * stride_k
        places = y + row.to(tl.int64)[:, None] * outputs + column[None, :]
        tl.store(places, sums.to(y.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@tile.jit
def _weight_gradient(  # type: ignore[no-untyped-def]
    dy, x, offsets, dweight, outputs, inputs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's matrix: the sum over its rows."""
    expert = tl.program_id(2)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK_M)
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in range(start, end, BLOCK_M):
        row = (first + m).to(tl.int64)
        is_row = row < end
        grad = tl.load(
            dy + row[None, :] * outputs + n[:, None], mask=is_row[None, :] & (n < outputs)[:, None], other=0.0
        )
        some = tl.load(
            x + row[:, None] * inputs + k[None, :], mask=is_row[:, None] & (k < inputs)[None, :], other=0.0
        )
        sums = tl.dot(grad, some, sums, input_precision="ieee")
    places = dweight + (expert.to(tl.int64) * outputs + n[:, None]) * inputs + k[None, :]
    inside = (n < outputs)[:, None] & (k < inputs)[None, :]
    tl.store(places, sums.to(dweight.dtype.element_ty), mask=inside)


def multiply_groups(
    x_MK: Tensor, weight_ENK: Tensor, offsets_E: Tensor, order_M: Tensor | None = None
) -> Tensor:
    """Launch the product; x, offsets and order contiguous, the weight in any layout.

    order_M: int32, the row of x that each row of y comes of.
    """
    rows, (experts, outputs, inputs) = x_MK.shape[0], weight_ENK.shape
    y_MN = x_MK.new_empty(rows, outputs)
    is_wide, few = x_MK.element_size() == 4, rows <= 16 * experts
    default = {
        "BLOCK_M": 16 if few else 64 if is_wide else 128,
        "BLOCK_N": 16 if outputs <= 16 else 64 if is_wide or few else 128,
        "BLOCK_K": 32 if is_wide else 64,
        "num_warps": 4 if few or is_wide else 8,
        "num_stages": 3,
    }
    wider = [
        {"BLOCK_N": n, "num_warps": w, "num_stages": s} for n in (64, 256) for w in (4, 8) for s in (3, 4)
    ]
    shape_class = ("few" if few else "many", "narrow" if outputs <= 16 else "broad", str(x_MK.dtype))
    options = tile.config("grouped_linear", shape_class, default, wider)
    tiles = -(-rows // options["BLOCK_M"]) + experts if rows else 0
    tile.launch(
        _multiply,
        (tiles, -(-outputs // options["BLOCK_N"])),
        *(x_MK, weight_ENK, offsets_E, order_M, y_MN, rows, outputs, inputs, experts, *weight_ENK.stride()),
        HAS_ORDER=order_M is not None,
        BLOCK_E=1 << experts.bit_length(),  # one more than there are experts
        **options,
    )
    return y_MN


def forward_triton(x_MK: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """Tiles of each expert's rows."""
    return multiply_groups(x_MK.contiguous(), weight_ENK.contiguous(), offsets_E.contiguous())


def backward_triton(
    dy_MN: Tensor, x_MK: Tensor, weight_ENK: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Take the same product with the matrices turned, and a sum over rows for each expert."""
    dy_MN, x_MK, offsets_E = dy_MN.contiguous(), x_MK.contiguous(), offsets_E.contiguous()
    experts, outputs, inputs = weight_ENK.shape
    dx_MK = multiply_groups(dy_MN, weight_ENK.contiguous().transpose(1, 2), offsets_E)
    dweight_ENK = torch.empty_like(weight_ENK, memory_format=torch.contiguous_format)
    is_wide = x_MK.element_size() == 4
    default = {"BLOCK_M": 32, "BLOCK_N": 64 if is_wide else 128, "BLOCK_K": 64 if is_wide else 128}
    default |= {"num_warps": 4 if is_wide else 8, "num_stages": 3}
    options = tile.config("grouped_linear_weight", x_MK.dtype, default, [{"BLOCK_M": 64}])
    grid = (-(-outputs // options["BLOCK_N"]), -(-inputs // options["BLOCK_K"]), experts)
    tile.launch(_weight_gradient, grid, dy_MN, x_MK, offsets_E, dweight_ENK, outputs, inputs, **options)
    return dx_MK, dweight_ENK


# CPU


def forward_cpu(x_MK: Tensor, weight_ENK: Tensor, offsets_E: Tensor, use_tiles: bool = True) -> Tensor:
    """Multiply in C, outputs shared among torch's threads. use_tiles: AMX, where there is one."""
    is_tiled = use_tiles and x_MK.dtype == torch.bfloat16 and has_tiles()
    if x_MK.shape[0] > (SOME if is_tiled else FEW) * weight_ENK.shape[0]:
        return forward_torch(x_MK, weight_ENK, offsets_E)
    return multiply_in_c(x_MK, weight_ENK, offsets_E, use_tiles=use_tiles)


def multiply_in_c(x_MK: Tensor, weight_ENK: Tensor, offsets_E: Tensor, *, use_tiles: bool) -> Tensor:
    """Call `grouped_linear.c`."""
    rows, (experts, outputs, inputs) = x_MK.shape[0], weight_ENK.shape
    y_MN = _empty(x_MK, weight_ENK, offsets_E)
    work = room_for_tiles(rows if use_tiles else 0, inputs, experts)
    tensors = (x_MK.contiguous(), weight_ENK.contiguous(), offsets_E.contiguous(), y_MN, work)
    native.function("grouped_linear", "grouped_linear", "ppppplllliii")(
        *native.pointers(*tensors),
        *(experts, rows, outputs, inputs, use_tiles, torch.get_num_threads(), native.type_of(x_MK)),
    )
    return y_MN


def forward_torch(x_MK: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """Take a matrix product for each expert that has rows, written in place."""
    y_MN, start = _empty(x_MK, weight_ENK, offsets_E), 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            torch.mm(x_MK[start:end], weight_ENK[expert].T, out=y_MN[start:end])
            start = end
    y_MN[start:] = 0
    return y_MN


def backward_torch(
    dy_MN: Tensor, x_MK: Tensor, weight_ENK: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    """Take two matrix products for each expert that has rows."""
    dx_MK, dweight_ENK = _empty_gradients(dy_MN, x_MK, weight_ENK, offsets_E)
    start = 0
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            torch.mm(dy_MN[start:end], weight_ENK[expert], out=dx_MK[start:end])
            torch.mm(dy_MN[start:end].T, x_MK[start:end], out=dweight_ENK[expert])
            start = end
        else:
            dweight_ENK[expert] = 0
    dx_MK[start:] = 0
    return dx_MK, dweight_ENK


# What all paths share


def _empty(x_MK: Tensor, weight_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], weight_ENK.shape[1])


def _empty_gradients(
    dy_MN: Tensor, x_MK: Tensor, weight_ENK: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x_MK, memory_format=torch.contiguous_format),
        torch.empty_like(weight_ENK, memory_format=torch.contiguous_format),
    )


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Make a small layer, and one of 64 narrow experts in training and while decoding."""
    examples = []
    for rows, experts, outputs, inputs in ((64, 4, 128, 128), (8192, 64, 1408, 2048), (64, 64, 1408, 2048)):
        x_MK = torch.randn(rows, inputs, device=device, dtype=dtype)
        weight_ENK = torch.randn(experts, outputs, inputs, device=device, dtype=dtype)
        offsets_E = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * (rows // experts)
        cost = (x_MK.nbytes + weight_ENK.nbytes, 2 * rows * outputs * inputs)
        label = f"{rows}x{experts}x{outputs}x{inputs}"
        examples.append(Example(label, (x_MK, weight_ENK, offsets_E), *cost))
    return examples


OPERATOR = Operator(
    "grouped_linear",
    grouped_linear_reference,
    fake=_empty,
    gradient=Gradient(inputs=(0, 1), saves=lambda inputs, outputs: inputs, fake=_empty_gradients),
    examples=_examples,
    expects=Expects(dtypes={"offsets_E": torch.int32}),
)
OPERATOR.add("cpu", forward_cpu, backward_torch, **native.path("grouped_linear"))
OPERATOR.add("torch", forward_torch, backward_torch)
OPERATOR.add("triton", forward_triton, backward_triton, **tile.path())
