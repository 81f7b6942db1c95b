"""y = x W^T with weights of 4 bits in groups (`int4_weights` draws the layout), as AWQ and GPTQ make them.

Few rows of x are bound by the memory that the weights are read from. The GPU keeps x in its own dtype
(W4A16): a dword of 8 nibbles becomes the operands of 8 tensor-core products in registers, and a group's
scale is applied to their sum. The CPU rounds x to 8 bits, with a scale for each row and group (W4A8): then
sums of a group are exact integers, by VNNI for a few rows and by AMX tiles for more, and scales are applied
in fp32. `int4_linear_integer_reference` is that arithmetic in plain torch.

Error of the 8-bit rows: |y - exact| <= sum over groups of amax(x_g) / 254 * sum |w_g|; for normal x and w of
4096 inputs, 0.6 % of y's standard deviation, next to some 10 % that 4-bit weights cost.
`MARROW_KERNELS=torch` keeps x as it is on a CPU too, at the price of unpacking all weights at each call.

Axes: M rows, N outputs, K inputs, G groups. Sources: Frantar et al. 2022 (GPTQ), Lin et al. 2023 (AWQ),
Frantar et al. 2024 (Marlin) for the order in which a tensor core takes nibbles.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.arguments import Expects
from marrow.kernels.dispatch import Case, Example, Operator
from marrow.kernels.matmul.int4_weights import PANEL, by_row, dequantise_int4, in_large_pages, unpack_int4
from marrow.kernels.tile import tl

FEW, SOME = 16, 128  # rows: shape classes
OCTETS = 16  # what a tensor core takes at once of 16-bit numbers: 16 dwords, blocks of 128 inputs


def int4_linear(
    x_MK: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, order_K: Tensor | None = None
) -> Tensor:
    """Multiply rows by a matrix of 4-bit weights: x W^T, W = (q - zero) * scale.

    Args: x_MK: [..., K], fp32, bf16 or fp16. weight: uint8 [N/16, K/8, 64]. scales: fp16 [N/16, G, 16].
        zeros: uint8 [N/16, G, 16]. order_K: int32 [K] or None, the input of x that each packed input is.
    Returns: [..., N] of x's dtype. On a CPU x is rounded to 8 bits a group (see above).
    Cost: reads N K / 2 + 3 N G bytes; 2 M N K FLOPs. No gradient.
    """
    result: Tensor = OPERATOR(x_MK, weight, scales, zeros, order_K)
    return result


def int4_linear_reference(
    x_MK: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, order_K: Tensor | None = None
) -> Tensor:
    """Compute `int4_linear` in plain torch: unpack all weights, multiply."""
    x_MK = _ordered(x_MK, order_K)
    return F.linear(x_MK, dequantise_int4(weight, scales, zeros, x_MK.dtype))


def int4_linear_integer_reference(
    x_MK: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, order_K: Tensor | None = None
) -> Tensor:
    """Compute what the CPU path computes, in fp64 but for the rounding of x: sums of integers are exact."""
    wide_MK = _ordered(x_MK, order_K).float()
    q_NK, groups = unpack_int4(weight), scales.shape[1]
    x_MGk = wide_MK.reshape(-1, groups, wide_MK.shape[-1] // groups)
    amax_MG1 = x_MGk.abs().amax(-1, keepdim=True)
    # Divided as C divides: torch makes `127.0 / x` a product with the reciprocal.
    inverse_MG1 = torch.where(amax_MG1 > 0, torch.full_like(amax_MG1, 127.0) / amax_MG1, 0.0)
    rounded_MGk = (x_MGk * inverse_MG1).round().double()
    w_NGk = q_NK.view(q_NK.shape[0], groups, -1).double() - by_row(zeros)[..., None].double()
    sums_GMN = torch.einsum("mgk,ngk->gmn", rounded_MGk, w_NGk)  # integers below 2^53
    scales_GMN = (amax_MG1 / 127.0).double().permute(1, 0, 2) * by_row(scales).double().T[:, None]
    return (sums_GMN * scales_GMN).sum(0).view(*x_MK.shape[:-1], -1)


# Triton


@tile.jit
def _multiply(  # type: ignore[no-untyped-def]
    x, weight, scales, zeros, y, rows, outputs, inputs, group, blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OCTETS: tl.constexpr, IS_LATE: tl.constexpr,
):  # fmt: skip
    """One tile of y, or its share of `blocks` blocks of inputs. IS_LATE: a block lies within a group."""
    row = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    octet = tl.arange(0, OCTETS)
    is_row, is_column = row < rows, column < outputs
    panel, lane = (column // 16).to(tl.int64), column % 16
    groups = inputs // group
    first = tl.program_id(2) * blocks
    x_places = x + row[:, None] * inputs + (octet // 4 * 32 + octet % 4)[None, :]
    w_places = weight + (panel * (inputs // 8) * 16 + lane)[None, :] + octet[:, None] * 16
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(first, tl.minimum(first + blocks, tl.cdiv(inputs, OCTETS * 8))):
        is_octet = block * OCTETS + octet < inputs // 8
        is_weight = is_octet[:, None] & is_column[None, :]
        packed = tl.load(w_places + block * OCTETS * 16, mask=is_weight, other=0)
        if IS_LATE:
            g_places = panel * groups * 16 + (block * OCTETS * 8 // group) * 16 + lane
            scale = tl.load(scales + g_places, mask=is_column, other=0.0).to(tl.float32)[None, :]
            zero = tl.load(zeros + g_places, mask=is_column, other=0).to(tl.int32)[None, :]
            sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        else:
            g_octet = (block * OCTETS + octet) * 8 // group * 16
            g_places = (panel * groups * 16 + lane)[None, :] + g_octet[:, None]
            scale = tl.load(scales + g_places, mask=is_weight, other=0.0).to(tl.float32)
            zero = tl.load(zeros + g_places, mask=is_weight, other=0).to(tl.int32)
            sums = total
        for nibble in tl.static_range(8):
            places = x_places + (block * OCTETS * 8 + 4 * nibble)
            some = tl.load(places, mask=is_row[:, None] & is_octet[None, :], other=0.0)
            q = (packed >> (4 * nibble)) & 15
            if IS_LATE and x.dtype.element_ty == tl.bfloat16:
                # The bits of 128 + q and of 128 + zero: no conversion, and an exact difference.
                w = (q | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True) - (zero | 0x4300).to(tl.int16).to(
                    tl.bfloat16, bitcast=True
                )
            elif IS_LATE and x.dtype.element_ty == tl.float16:
                w = (q | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - (zero | 0x6400).to(tl.int16).to(
                    tl.float16, bitcast=True
                )
            elif IS_LATE:
                w = (q - zero).to(tl.float32)
            else:
                w = ((q - zero).to(tl.float32) * scale).to(x.dtype.element_ty)
            sums = tl.dot(some, w, sums, input_precision="ieee")
        if IS_LATE:
            total += sums * scale
        else:
            total = sums
    y_places = y + (tl.program_id(2).to(tl.int64) * rows + row[:, None]) * outputs + column[None, :]
    tl.store(y_places, total.to(y.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def forward_triton(
    x_MK: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, order_K: Tensor | None = None
) -> Tensor:
    """Tiles of y; where they are too few for the GPU, inputs are split and the parts added by torch."""
    y_MN = _empty(x_MK, weight, scales, zeros, order_K)
    x_MK = _ordered(x_MK, order_K).contiguous().view(-1, weight.shape[1] * 8)
    (rows, inputs), outputs = x_MK.shape, y_MN.shape[-1]
    group = inputs // scales.shape[1]
    default = {
        "BLOCK_M": 16 if rows <= 16 else 32 if rows <= 32 or x_MK.dtype == torch.float32 else 64,
        "BLOCK_N": 64 if outputs >= 64 else 16,
        "num_warps": 4,
        "num_stages": 4,
    }
    wider = [
        {"BLOCK_N": n, "num_warps": w, "num_stages": s} for n in (32, 128) for w in (4, 8) for s in (3, 5)
    ]
    options = tile.config("int4_linear", (_shape_class(x_MK), str(x_MK.dtype)), default, wider)
    columns, lines = -(-outputs // options["BLOCK_N"]), -(-rows // options["BLOCK_M"])
    all_blocks = -(-inputs // (8 * OCTETS))
    wanted = 2 * tile.multiprocessors(x_MK.device) // max(1, columns * lines)
    blocks = -(-all_blocks // min(all_blocks, max(1, wanted)))
    parts = -(-all_blocks // blocks)
    out = y_MN if parts == 1 else x_MK.new_empty(parts, rows, outputs, dtype=torch.float32)
    packed = (weight.contiguous().view(torch.int32), scales.contiguous(), zeros.contiguous())
    sizes = (rows, outputs, inputs, group, blocks)
    is_late = group % (8 * OCTETS) == 0
    tile.launch(
        _multiply,
        (columns, lines, parts),
        x_MK,
        *packed,
        out,
        *sizes,
        OCTETS=OCTETS,
        IS_LATE=is_late,
        **options,
    )
    return y_MN if parts == 1 else out.sum(0).to(x_MK.dtype).view(y_MN.shape)


# CPU


def forward_cpu(
    x_MK: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    order_K: Tensor | None = None,
    use_tiles: bool = True,
) -> Tensor:
    """Panels of outputs in C, shared among torch's threads. use_tiles: AMX, where there is one."""
    y_MN = _empty(x_MK, weight, scales, zeros, order_K)
    inputs, groups = weight.shape[1] * 8, scales.shape[1]
    rows = x_MK.numel() // inputs
    if rows == 0:
        return y_MN
    x_MK, weight = _ordered(x_MK, order_K).contiguous(), weight.contiguous()
    padded = -(-rows // 16) * 16
    work = torch.empty(padded * (inputs + 8 * groups), dtype=torch.int8)
    native.function("int4_linear", "int4_linear", "pppppplllliii")(
        *native.pointers(x_MK, weight, scales.contiguous(), zeros.contiguous(), y_MN, work),
        *(rows, y_MN.shape[-1], inputs, inputs // groups),
        *(use_tiles, torch.get_num_threads(), native.type_of(x_MK)),
    )
    return y_MN


# What all paths share


def _ordered(x_MK: Tensor, order_K: Tensor | None) -> Tensor:
    return x_MK if order_K is None else x_MK.index_select(-1, order_K)


def _empty(
    x_MK: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, order_K: Tensor | None = None
) -> Tensor:
    return x_MK.new_empty(*x_MK.shape[:-1], weight.shape[0] * PANEL)


def _shape_class(x_MK: Tensor, *_: Tensor | None) -> str:
    rows = x_MK.numel() // max(1, x_MK.shape[-1])
    return "few" if rows <= FEW else "some" if rows <= SOME else "many"


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Make a small matrix, and the largest ones of a 7B model for one row and for batches."""
    examples = []
    for rows, outputs, inputs in ((1, 256, 256), (1, 11008, 4096), (16, 11008, 4096), (64, 4096, 11008)):
        x_MK = torch.randn(rows, inputs, device=device, dtype=dtype)
        panels, groups = outputs // PANEL, inputs // 128
        weight = torch.randint(0, 256, (panels, inputs // 8, 64), device=device, dtype=torch.uint8)
        scales = torch.rand(panels, groups, PANEL, device=device).half() / 100
        zeros = torch.randint(0, 16, (panels, groups, PANEL), device=device, dtype=torch.uint8)
        cost = (weight.nbytes + 3 * zeros.numel() + x_MK.nbytes, 2 * rows * outputs * inputs)
        packed = (in_large_pages(weight), scales, zeros, None)
        examples.append(Example(f"{rows}x{outputs}x{inputs}", (x_MK, *packed), *cost))
    return examples


def _is_unpacking_cheap(case: Case) -> str | None:
    if case.device == "cuda" and case.shape == "many":
        return "for more than 128 rows it pays to unpack the weights and multiply by cuBLAS"
    return None


def _misfit(
    x_MK: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, order_K: Tensor | None
) -> tuple[str, str] | None:
    """Say what does not fit: the packed tensors have shapes of their own."""
    if weight.ndim != 3 or weight.shape[1] * 8 != x_MK.shape[-1] or weight.shape[2] != 64:
        return f"weight {list(weight.shape)} for {x_MK.shape[-1]} inputs", "pack it with int4_weights"
    if scales.shape != zeros.shape or scales.ndim != 3 or scales.shape[::2] != (weight.shape[0], 16):
        shapes = f"scales {list(scales.shape)} and zeros {list(zeros.shape)} for weight {list(weight.shape)}"
        return shapes, "pack them with int4_weights"
    return None


OPERATOR = Operator(
    "int4_linear",
    int4_linear_reference,
    fake=_empty,
    examples=_examples,
    shape_class=_shape_class,
    expects=Expects(
        dtypes={
            "weight": torch.uint8,
            "scales": torch.float16,
            "zeros": torch.uint8,
            "order_K": torch.int32,
        },
        leading=True,
        also=_misfit,
    ),
)
OPERATOR.add("torch", int4_linear_reference)
OPERATOR.add("cpu", forward_cpu, **native.path("int4_linear"))
OPERATOR.add("triton", forward_triton, **tile.path(), loses=_is_unpacking_cheap)
