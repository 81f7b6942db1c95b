"""The numbers that quantised blocks stand for: (q - zero) step, whatever `quantise` stored them as.

Axes: N rows, K columns, P = N / block rows, G = K / block columns. Bound by memory.
"""

import torch
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.arguments import Expects
from marrow.kernels.dispatch import Example, Operator
from marrow.kernels.matmul.quantise import SHAPES, block_size, quantise
from marrow.kernels.matmul.quantise import empty as quantised
from marrow.kernels.tile import tl


def dequantise(
    q_NK: Tensor,
    steps_PG: Tensor,
    zeros_PG: Tensor,
    dtype: torch.dtype,
    block_rows: int = 1,
    block_columns: int = 0,
) -> Tensor:
    """Return what `quantise` rounded to, (q - zero) step, [N, K] of `dtype`; computed in fp32.

    Cost: reads N K bytes, writes N K numbers.
    """
    result: Tensor = OPERATOR(q_NK, steps_PG, zeros_PG, dtype, block_rows, block_columns)
    return result


def dequantise_reference(
    q_NK: Tensor,
    steps_PG: Tensor,
    zeros_PG: Tensor,
    dtype: torch.dtype,
    block_rows: int = 1,
    block_columns: int = 0,
) -> Tensor:
    """Compute `dequantise` in plain torch."""
    (rows, columns), (high, wide) = q_NK.shape, block_size(q_NK, block_rows, block_columns)

    def spread(blocks_PG: Tensor) -> Tensor:
        return blocks_PG.float().repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]

    number = q_NK.float()
    if q_NK.dtype == torch.uint8:
        number = number - spread(zeros_PG)
    return (number * spread(steps_PG)).to(dtype)


# Triton


@tile.jit
def _dequantise(  # type: ignore[no-untyped-def]
    q, steps, zeros, y, columns, high, wide, blocks, parts,
    FORM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_G blocks of a row, or one of the parts of a block."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) // parts * BLOCK_G + tl.arange(0, BLOCK_G)[:, None]
    c = tl.program_id(1) % parts * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    column = block * wide + c
    inside = (c < wide) & (column < columns)
    index, is_block = row // high * blocks + block, block < blocks
    stored = tl.load(q + row * columns + column, mask=inside, other=0).to(tl.int32)
    if FORM == 0:
        number = stored.to(tl.float32)
    elif FORM == 1:
        size = ((stored & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
        size = tl.where((stored & 0x7F) == 0x7F, float("nan"), size)
        number = tl.where((stored & 0x80) != 0, -size, size)
    else:
        number = stored.to(tl.float32) - tl.load(zeros + index, mask=is_block, other=0).to(tl.float32)
    number = number * tl.load(steps + index, mask=is_block, other=0.0)
    tl.store(y + row * columns + column, number.to(y.dtype.element_ty), mask=inside)


def forward_triton(
    q_NK: Tensor,
    steps_PG: Tensor,
    zeros_PG: Tensor,
    dtype: torch.dtype,
    block_rows: int = 1,
    block_columns: int = 0,
) -> Tensor:
    """Take some thousand numbers of a row a program."""
    y_NK = _empty(q_NK, steps_PG, zeros_PG, dtype, block_rows, block_columns)
    (rows, columns), (high, wide) = q_NK.shape, block_size(q_NK, block_rows, block_columns)
    # Numbers of a tile, and of a thread: 16 bytes of q.
    default, others = {"TILE": 4096, "EACH": 16}, ({"TILE": 2048}, {"TILE": 8192}, {"EACH": 8})
    broad, blocks = 1 << (wide - 1).bit_length(), steps_PG.shape[1]
    options = tile.config("dequantise", (str(q_NK.dtype), min(broad, 8192), str(dtype)), default, others)
    broad = min(broad, options["TILE"])
    some, parts = min(options["TILE"] // broad, 1 << max(0, blocks - 1).bit_length()), -(-wide // broad)
    form = {torch.int8: 0, torch.float8_e4m3fn: 1, torch.uint8: 2}[q_NK.dtype]
    bits = q_NK.contiguous().view(torch.uint8) if form else q_NK.contiguous()
    tensors = (bits, steps_PG.contiguous(), zeros_PG.contiguous(), y_NK)
    sizes = (columns, high, wide, blocks, parts)
    tile.launch(
        _dequantise,
        (rows, -(-blocks // some) * parts),
        *tensors,
        *sizes,
        FORM=form,
        BLOCK_G=some,
        BLOCK_C=broad,
        num_warps=max(1, min(16, some * broad // (32 * options["EACH"]))),
    )
    return y_NK


# CPU


def forward_cpu(
    q_NK: Tensor,
    steps_PG: Tensor,
    zeros_PG: Tensor,
    dtype: torch.dtype,
    block_rows: int = 1,
    block_columns: int = 0,
) -> Tensor:
    """Rows in C, shared among torch's threads; fp16 and fp64 by torch."""
    if dtype not in (torch.float32, torch.bfloat16):
        return dequantise_reference(q_NK, steps_PG, zeros_PG, dtype, block_rows, block_columns)
    q_NK, steps_PG, zeros_PG = q_NK.contiguous(), steps_PG.contiguous(), zeros_PG.contiguous()
    y_NK = _empty(q_NK, steps_PG, zeros_PG, dtype, block_rows, block_columns)
    form = {torch.int8: 0, torch.float8_e4m3fn: 1, torch.uint8: 2}[q_NK.dtype]
    native.function("quantise", "dequantise", "pppplllliii")(
        *native.pointers(q_NK, steps_PG, zeros_PG, y_NK),
        *(*q_NK.shape, *block_size(q_NK, block_rows, block_columns)),
        *(form, torch.get_num_threads(), native.type_of(y_NK)),
    )
    return y_NK


# What all paths share


def _empty(
    q_NK: Tensor,
    steps_PG: Tensor,
    zeros_PG: Tensor,
    dtype: torch.dtype,
    block_rows: int = 1,
    block_columns: int = 0,
) -> Tensor:
    return q_NK.new_empty(q_NK.shape, dtype=dtype)


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Make what `quantise` returns for a weight."""
    examples = []
    for form, high, wide in SHAPES:
        x_NK = torch.randn(4096, 4096, device=device)
        found = quantised(x_NK, form, high, wide) if device == "meta" else quantise(x_NK, form, high, wide)
        cost = (x_NK.numel() * (1 + dtype.itemsize), 2 * x_NK.numel())
        label = f"4096x4096 {form} {high}x{wide or 'row'}"
        examples.append(Example(label, (*found, dtype, high, wide), *cost))
    return examples


OPERATOR = Operator(
    "dequantise",
    dequantise_reference,
    fake=_empty,
    examples=_examples,
    expects=Expects(dtypes={"steps_PG": torch.float32, "zeros_PG": torch.uint8}),
)
OPERATOR.add("cpu", forward_cpu, **(native.path("quantise") | {"dtypes": None}))
OPERATOR.add("triton", forward_triton, **(tile.path() | {"dtypes": None}))
