"""Numbers in few bits and back: one step for each block of a matrix, chosen from the block itself.

    format    stored as        step of a block           number
    int8      int8             amax / 127                q step
    fp8       float8_e4m3fn    amax / 448                q step
    int4      uint8, 0 to 15   amax / 7, in fp16         (q - 8) step
    int4z     uint8, 0 to 15   (max - min) / 15, fp16    (q - zero) step, min and max taken with 0

Blocks are `block_rows` x `block_columns`, 0 for all there are: (1, 0) gives a token or an output channel its
own step, (1, 128) a group, (128, 128) what block-scaled fp8 weights have. To the nearest, ties to even. A
block that is not finite becomes zeros and a step of NaN. All paths give the same bits; steps of fp16 are kept
in fp32.

Bound by memory: a block is read once from memory, its second reading comes from cache or registers.
Axes: N rows, K columns, P x G blocks.
"""

import torch
from torch import Tensor

from marrow.core.errors import UsageError
from marrow.kernels import native, tile
from marrow.kernels.dispatch import Example, Operator
from marrow.kernels.tile import tl

FORMATS = ("int8", "fp8", "int4", "int4z")
_STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8, "int4z": torch.uint8}
_MOST = {"int8": 127.0, "fp8": 448.0}


def quantise(
    x_NK: Tensor, form: str, block_rows: int = 1, block_columns: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Round a matrix block by block.

    Args: x_NK: [N, K], any float dtype. form: one of FORMATS. block_rows, block_columns: 0 for all.
    Returns: [N, K] as the table says; steps fp32 and zeros uint8, both [P, G], one a block.
    Raises: UsageError for another format.
    Cost: reads N K numbers and writes N K bytes; bound by memory. No gradient: see `fake_quantise`.
    """
    if form not in FORMATS:
        raise UsageError(f"format {form!r} is unknown", hint=f"allowed: {', '.join(FORMATS)}")
    q_NK, steps_PG, zeros_PG = OPERATOR(x_NK, form, block_rows, block_columns)
    return q_NK, steps_PG, zeros_PG


def quantise_reference(
    x_NK: Tensor, form: str, block_rows: int = 1, block_columns: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `quantise` in plain torch."""
    (rows, columns), (high, wide) = x_NK.shape, block_size(x_NK, block_rows, block_columns)
    down, along = -(-rows // high), -(-columns // wide)
    padded = torch.nn.functional.pad(x_NK.float(), (0, along * wide - columns, 0, down * high - rows))
    x_PGb = padded.view(down, high, along, wide).permute(0, 2, 1, 3).flatten(2)
    low, top = x_PGb.amin(-1).clamp(max=0), x_PGb.amax(-1).clamp(min=0)
    bad = (x_PGb - x_PGb).sum(-1)  # 0, or NaN
    amax, zeros = torch.maximum(-low, top), torch.zeros_like(low)
    x_PGb = torch.where(bad.isnan()[..., None], 0.0, x_PGb)
    if form in _MOST:
        # Divided as C divides: torch makes a number over a tensor a product with the reciprocal.
        most = torch.full_like(amax, _MOST[form])
        steps, inverse = amax / most, torch.where(amax > 0, most / amax, 0.0)
        q_PGb = x_PGb * inverse[..., None]
        q_PGb = q_PGb.round() if form == "int8" else q_PGb.clamp(-448, 448)
    else:
        span = torch.full_like(amax, 7.0 if form == "int4" else 15.0)
        steps = ((amax if form == "int4" else top - low) / span).half().float()
        whole = steps > 0
        own = torch.where(whole, (-low / steps).round().clamp(max=15), 0.0)
        zeros = zeros + 8 if form == "int4" else own
        ratio = torch.where(whole[..., None], (x_PGb / steps[..., None]).clamp(-32, 32), 0.0)
        q_PGb = (ratio.round() + zeros[..., None]).clamp(0, 15)
    zeros = torch.where(bad.isnan(), 0.0, zeros)
    q_PGb = torch.where(bad.isnan()[..., None], 0.0, q_PGb)
    q_NK = q_PGb.view(down, along, high, wide).permute(0, 2, 1, 3).reshape(down * high, along * wide)
    q_NK = q_NK[:rows, :columns].to(_STORED[form]).contiguous()
    return q_NK, steps + bad, zeros.to(torch.uint8)


# Triton


@tile.jit
def to_fp8(x):  # type: ignore[no-untyped-def]
    """Return the bits of the nearest e4m3 number, |x| <= 448; by integers, which every GPU has."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    # 2^14 has the smallest e4m3 number as its unit in the last place.
    tiny = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    return tl.where(size < 0x3C800000, tiny, normal) | ((bits >> 24) & 0x80)


@tile.jit
def _round(x):  # type: ignore[no-untyped-def]
    """Round to whole numbers, ties to even, |x| < 2^22: 1.5 x 2^23 has no digits behind the point."""
    return (x + 12582912.0) - 12582912.0


@tile.jit
def _quantise(  # type: ignore[no-untyped-def]
    x, q, steps, zeros, rows, columns, high, wide, blocks,
    FORM: tl.constexpr, IS_FAKE: tl.constexpr, IS_FLAT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One block; if IS_FLAT, BLOCK_R blocks, each part of a row.

    FORM: 0 int8, 1 fp8, 2 int4, 3 int4z. IS_FAKE: q takes what the bits stand for.
    """
    r, c = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_C)[None, :]
    if IS_FLAT:
        place = tl.program_id(0).to(tl.int64) * BLOCK_R + r
        row = place // blocks
        is_row = row < rows
        first = (place % blocks).to(tl.int32) * wide
    else:
        place = tl.zeros([1, 1], tl.int64) + tl.program_id(0) * blocks + tl.program_id(1)
        row = (tl.program_id(0) * high + r).to(tl.int64)
        is_row = (r < high) & (row < rows)
        first = tl.program_id(1) * wide
    last = tl.minimum(first + wide, columns)
    x, q = x + row * columns, q + row * columns
    low = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    top = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    odd = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, wide, BLOCK_C):
        column = first + start + c
        some = tl.load(x + column, mask=is_row & (column < last), other=0.0).to(tl.float32)
        low, top, odd = tl.minimum(low, some), tl.maximum(top, some), odd + (some - some)
    least, most, bad = tl.min(low, 1)[:, None], tl.max(top, 1)[:, None], tl.sum(odd, 1)[:, None]
    if not IS_FLAT:
        least, most = tl.min(least, 0)[:, None], tl.max(most, 0)[:, None]
        bad = tl.sum(bad, 0)[:, None]
    amax = tl.maximum(-least, most)
    safe = tl.where(amax > 0, amax, 1.0)
    zero = 0.0
    inverse = 0.0
    if FORM < 2:
        limit: tl.constexpr = 127.0 if FORM == 0 else 448.0
        step = tl.div_rn(amax, limit)
        inverse = tl.where(amax > 0, tl.div_rn(limit, safe), 0.0)
    elif FORM == 2:
        step = tl.div_rn(amax, 7.0).to(tl.float16).to(tl.float32)
        zero = 8.0
    else:
        step = tl.div_rn(most - least, 15.0).to(tl.float16).to(tl.float32)
        zero = tl.minimum(_round(tl.div_rn(-least, tl.where(step > 0, step, 1.0))), 15.0)  # type: ignore[no-untyped-call]
        zero = tl.where(step > 0, zero, 0.0)
    is_good = bad == bad
    zero = tl.where(is_good, zero, 0.0)
    step = step + bad
    if not IS_FAKE:
        is_block = place // blocks < tl.cdiv(rows, high)
        tl.store(steps + place, step, mask=is_block)
        tl.store(zeros + place, zero.to(tl.uint8), mask=is_block)
    for start in range(0, wide, BLOCK_C):
        column = first + start + c
        inside = is_row & (column < last)
        some = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        some = tl.where(is_good, some, 0.0)
        if FORM == 0:
            number = _round(some * inverse)  # type: ignore[no-untyped-call]
            stored = number.to(tl.int32)
        elif FORM == 1:
            bits = to_fp8(tl.minimum(tl.maximum(some * inverse, -448.0), 448.0))  # type: ignore[no-untyped-call]
            stored = bits.to(tl.int32)
            size = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
            number = tl.where((bits & 0x80) != 0, -size, size)
        else:
            ratio = tl.div_rn(some, tl.where(step > 0, step, 1.0) + tl.zeros([BLOCK_R, BLOCK_C], tl.float32))
            ratio = tl.where(step > 0, tl.minimum(tl.maximum(ratio, -32.0), 32.0), 0.0)
            number = tl.minimum(tl.maximum(_round(ratio), -zero), 15.0 - zero)  # type: ignore[no-untyped-call]
            number = tl.where(is_good, number, 0.0)
            stored = (number + zero).to(tl.int32)
        if IS_FAKE:
            tl.store(q + column, (number * step).to(q.dtype.element_ty), mask=inside)
        else:
            tl.store(q + column, stored.to(tl.int8), mask=inside)


def launch_quantise(
    x_NK: Tensor,
    out_NK: Tensor,
    steps_PG: Tensor | None,
    zeros_PG: Tensor | None,
    form: str,
    block: tuple[int, int],
) -> None:
    """Start one program a block, or for some blocks of rows; without steps, write what the bits stand for."""
    (rows, columns), (high, wide) = x_NK.shape, block
    down, blocks, is_flat = -(-rows // high), -(-columns // wide), high == 1
    tall, broad = (1 << (size - 1).bit_length() for size in block)
    # Numbers of a tile, and of a thread: with 32 it spills registers.
    default, others = {"TILE": 4096, "EACH": 16}, ({"TILE": 2048}, {"TILE": 8192}, {"EACH": 8})
    shape_class = (form, min(tall, 128), min(broad, 8192), str(x_NK.dtype))
    options = tile.config("quantise", shape_class, default, others)
    broad = min(broad, max(16, options["TILE"] // tall))
    if is_flat:
        tall = min(max(1, options["TILE"] // broad), 1 << max(0, down * blocks - 1).bit_length())
    is_fake = steps_PG is None
    tile.launch(
        _quantise,
        (-(-down * blocks // tall), 1) if is_flat else (down, blocks),
        *(x_NK, out_NK if is_fake else out_NK.view(torch.int8), steps_PG, zeros_PG),
        *(rows, columns, high, wide, blocks),
        FORM=FORMATS.index(form),
        IS_FAKE=is_fake,
        IS_FLAT=is_flat,
        BLOCK_R=tall,
        BLOCK_C=broad,
        num_warps=max(1, min(16, tall * broad // (32 * options["EACH"]))),
    )


def forward_triton(
    x_NK: Tensor, form: str, block_rows: int = 1, block_columns: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """One program a block."""
    q_NK, steps_PG, zeros_PG = empty(x_NK, form, block_rows, block_columns)
    launch_quantise(
        x_NK.contiguous(), q_NK, steps_PG, zeros_PG, form, block_size(x_NK, block_rows, block_columns)
    )
    return q_NK, steps_PG, zeros_PG


# CPU


def forward_cpu(
    x_NK: Tensor, form: str, block_rows: int = 1, block_columns: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks in C, shared among torch's threads."""
    x_NK = x_NK.contiguous()
    q_NK, steps_PG, zeros_PG = empty(x_NK, form, block_rows, block_columns)
    native.function("quantise", "quantise", "ppppplllliii")(
        *native.pointers(x_NK, q_NK, steps_PG, zeros_PG),
        *(None, *x_NK.shape, *block_size(x_NK, block_rows, block_columns)),
        *(FORMATS.index(form), torch.get_num_threads(), native.type_of(x_NK)),
    )
    return q_NK, steps_PG, zeros_PG


# What all paths share


def block_size(x_NK: Tensor, block_rows: int, block_columns: int) -> tuple[int, int]:
    """Return the size of a block; at least 1 x 1."""
    return max(1, block_rows or x_NK.shape[0]), max(1, block_columns or x_NK.shape[1])


def empty(
    x_NK: Tensor, form: str, block_rows: int = 1, block_columns: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Make room for numbers, steps and zeros."""
    high, wide = block_size(x_NK, block_rows, block_columns)
    blocks = (-(-x_NK.shape[0] // high), -(-x_NK.shape[1] // wide))
    q_NK = x_NK.new_empty(x_NK.shape, dtype=_STORED[form])
    return q_NK, x_NK.new_empty(blocks, dtype=torch.float32), x_NK.new_empty(blocks, dtype=torch.uint8)


SHAPES = (("int8", 1, 0), ("fp8", 1, 128), ("fp8", 128, 128), ("int4z", 1, 128))


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Make activations of a 7B model and a weight, in each format."""
    examples = []
    for form, high, wide in SHAPES:
        x_NK = torch.randn(4096, 4096, device=device, dtype=dtype)
        cost = (x_NK.nbytes + x_NK.numel(), 4 * x_NK.numel())
        examples.append(Example(f"4096x4096 {form} {high}x{wide or 'row'}", (x_NK, form, high, wide), *cost))
    return examples


OPERATOR = Operator("quantise", quantise_reference, fake=empty, results=3, examples=_examples)
OPERATOR.add("cpu", forward_cpu, **native.path("quantise"))
OPERATOR.add("triton", forward_triton, **tile.path())
