"""y = (base + s (x A^T) B^T) gain: low-rank adapters on a linear layer, many in one batch, each row its own.

`base` is what the layer below gives for x, whatever its weights are stored in (fp32, bf16, int4, ...), so
that one frozen matrix serves all adapters. A row takes adapter number `adapters_M[m]`, or none where that is
negative: then y is base, untouched. `gains_LN` is DoRA's: magnitude / |W + s B A| of an output's row
(`dora_gains`), 1 where None.

On a GPU rows are put in the order of their adapters by a stable sort on the device; then both products are
those of `grouped_linear`, the second with all the rest in its last lines. The host reads nothing. On a CPU, C
sorts the rows and multiplies each adapter's by AMX tiles or lanes. Gradients go to base, x, A, B and gains;
with one adapter and no `adapters_M`, which is training, they are four matrix products.

Axes: M rows, K inputs, N outputs, R rank, L adapters. Sources: Hu et al. 2021 (LoRA), Liu et al. 2024 (DoRA),
Chen et al. 2023 (Punica).
"""

import torch
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.arguments import WIDE, Expects
from marrow.kernels.dispatch import Example, Gradient, Operator
from marrow.kernels.matmul.grouped_linear import multiply_groups
from marrow.kernels.tile import tl

MOST_RANK, ROWS = 512, 32  # of the C version: its largest rank, rows that a thread takes at once


def lora_linear(
    base_MN: Tensor,
    x_MK: Tensor,
    a_LRK: Tensor,
    b_LNR: Tensor,
    scales_L: Tensor,
    adapters_M: Tensor | None = None,
    gains_LN: Tensor | None = None,
) -> Tensor:
    """Add each row's adapter to what the layer below gives.

    Args: base_MN, x_MK: rows of one dtype. a_LRK, b_LNR: of that dtype; an adapter of a smaller rank has
        zeros behind. scales_L: fp32, alpha / rank. adapters_M: int32, below L, negative for none; None: the
        first for all. gains_LN: fp32, or None.
    Returns: [M, N] of base's dtype. No gradient for scales.
    Cost: 2 M R (K + N) FLOPs; reads base, x and the adapters that have rows, writes M N numbers.
    """
    # The operator takes an empty tensor for no gains: what may have a gradient is always a tensor.
    gains_LN = scales_L.new_empty(0) if gains_LN is None else gains_LN
    result: Tensor = OPERATOR(base_MN, x_MK, a_LRK, b_LNR, scales_L, adapters_M, gains_LN)
    return result


def dora_gains(weight_NK: Tensor, a_RK: Tensor, b_NR: Tensor, scale: float, magnitude_N: Tensor) -> Tensor:
    """Return magnitude / |W + s B A| for each output [N], in fp32 or wider; only magnitude has a gradient.

    The norm is a constant in training, as DoRA's paper proposes (section 4.3). Cost: 2 N K R FLOPs; makes no
    N x K matrix: |W|^2 + 2 s sum(W A^T * B) + s^2 sum(B (A A^T) * B), row by row.
    """
    wide = torch.promote_types(weight_NK.dtype, torch.float32)
    with torch.no_grad():
        w_NK, a_RK, b_NR = weight_NK.to(wide), a_RK.to(wide), b_NR.to(wide)
        crossed_N = ((w_NK @ a_RK.T) * b_NR).sum(1)
        added_N = ((b_NR @ (a_RK @ a_RK.T)) * b_NR).sum(1)
        norm_N = (w_NK.square().sum(1) + 2 * scale * crossed_N + scale**2 * added_N).clamp(min=0).sqrt()
    return magnitude_N.to(wide) / norm_N


def lora_linear_reference(
    base_MN: Tensor,
    x_MK: Tensor,
    a_LRK: Tensor,
    b_LNR: Tensor,
    scales_L: Tensor,
    adapters_M: Tensor | None,
    gains_LN: Tensor,
) -> Tensor:
    """Compute `lora_linear` in plain torch: all adapters for all rows, then each row's own."""
    wide = torch.promote_types(base_MN.dtype, torch.float32)
    if adapters_M is None:
        adapters_M = torch.zeros(x_MK.shape[0], dtype=torch.int32, device=x_MK.device)
    numbers_L = torch.arange(a_LRK.shape[0], device=x_MK.device)
    chosen_ML = (adapters_M[:, None] == numbers_L).to(wide)
    low_MLR = torch.einsum("mk,lrk->mlr", x_MK, a_LRK).to(wide)
    low_MLR = low_MLR * (chosen_ML * scales_L.to(wide))[..., None]
    y_MN = base_MN.to(wide) + torch.einsum("mlr,lnr->mn", low_MLR, b_LNR.to(wide))
    if gains_LN.numel() == 0:
        return (y_MN + gains_LN.sum()).to(base_MN.dtype)  # 0, which keeps it in autograd's graph
    gain_MN = chosen_ML @ gains_LN.to(wide) + (1 - chosen_ML.sum(1, keepdim=True))
    return (y_MN * gain_MN).to(base_MN.dtype)


# Triton


@tile.jit
def _expand(  # type: ignore[no-untyped-def]
    base, low, b, scales, gains, adapters, order, y, rows, outputs, rank, count,
    HAS_ORDER: tl.constexpr, HAS_GAINS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Take one tile of sorted rows: adapter after adapter that has rows in it."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < rows
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < outputs
    r = tl.arange(0, BLOCK_R)
    target = row.to(tl.int64)
    number = tl.zeros([BLOCK_M], tl.int32)
    if HAS_ORDER:
        target = tl.load(order + row, mask=is_row, other=0).to(tl.int64)
        number = tl.load(adapters + row, mask=is_row, other=count)
    # Sorted: the tile's adapters lie between its least and its largest.
    least = tl.min(number, 0)
    most = tl.minimum(tl.max(tl.where(is_row, number, 0), 0), count - 1)
    places = target[:, None] * outputs + column[None, :]
    inside = is_row[:, None] & is_column[None, :]
    total = tl.load(base + places, mask=inside, other=0.0).to(tl.float32)
    gain = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + 1.0
    for adapter in range(least, most + 1):
        is_own = is_row & (number == adapter)
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, rank, BLOCK_R):
            is_rank = first + r < rank
            some = tl.load(
                low + row.to(tl.int64)[:, None] * rank + (first + r)[None, :],
                mask=is_own[:, None] & is_rank[None, :],
                other=0.0,
            )
            line = tl.zeros([BLOCK_N], tl.int64) + adapter
            up = tl.load(
                b + ((line * outputs + column) * rank)[None, :] + (first + r)[:, None],
                mask=is_rank[:, None] & is_column[None, :],
                other=0.0,
            )
            sums = tl.dot(some, up, sums, input_precision="ieee")
        scale = tl.load(scales + adapter)
        total += tl.where(is_own[:, None], sums * scale, 0.0)
        if HAS_GAINS:
            own = tl.load(gains + adapter * outputs + column, mask=is_column, other=1.0)
            gain = tl.where(is_own[:, None], own[None, :], gain)
    tl.store(y + places, (total * gain).to(y.dtype.element_ty), mask=inside)


def forward_triton(
    base_MN: Tensor,
    x_MK: Tensor,
    a_LRK: Tensor,
    b_LNR: Tensor,
    scales_L: Tensor,
    adapters_M: Tensor | None,
    gains_LN: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sort rows by adapter; shrink by the product of groups; expand with base, scale and gain."""
    base_MN, x_MK = base_MN.contiguous(), x_MK.contiguous()
    (rows, outputs), (count, rank, _) = base_MN.shape, a_LRK.shape
    y_MN = torch.empty_like(base_MN)
    order_M, sorted_M = None, None
    ends_L = torch.full((count,), rows, dtype=torch.int32, device=x_MK.device)
    if adapters_M is not None:
        behind_M = torch.where(adapters_M < 0, count, adapters_M).int()  # rows without one come last
        sorted_M, order_M = torch.sort(behind_M, stable=True)
        numbers_L = torch.arange(count, dtype=torch.int32, device=x_MK.device)
        ends_L = torch.searchsorted(sorted_M, numbers_L, right=True).int()
        order_M = order_M.int()
    low_MR = multiply_groups(x_MK, a_LRK.contiguous(), ends_L, order_M)
    few, is_wide = rows <= 64, x_MK.element_size() == 4
    default = {
        "BLOCK_M": 16 if few else 32 if is_wide else 64,
        "BLOCK_N": 64,
        "BLOCK_R": 16 if rank <= 16 else 32,
        "num_warps": 8 if is_wide and not few else 4,  # 4 spill registers in fp32
        "num_stages": 2,
    }
    wider = [{"BLOCK_N": n, "num_warps": w} for n in (128, 256) for w in (4, 8)]
    options = tile.config("lora_linear", ("few" if few else "many", str(x_MK.dtype)), default, wider)
    tensors = (base_MN, low_MR, b_LNR.contiguous(), scales_L.contiguous())
    tile.launch(
        _expand,
        (-(-rows // options["BLOCK_M"]), -(-outputs // options["BLOCK_N"])),
        *(*tensors, gains_LN.contiguous(), sorted_M, order_M, y_MN, rows, outputs, rank, count),
        HAS_ORDER=order_M is not None,
        HAS_GAINS=gains_LN.numel() > 0,
        **options,
    )
    return y_MN, _unsorted(low_MR, order_M)


def _unsorted(low_MR: Tensor, order_M: Tensor | None) -> Tensor:
    return low_MR if order_M is None else torch.empty_like(low_MR).index_copy_(0, order_M.long(), low_MR)


# CPU


def forward_cpu(
    base_MN: Tensor,
    x_MK: Tensor,
    a_LRK: Tensor,
    b_LNR: Tensor,
    scales_L: Tensor,
    adapters_M: Tensor | None,
    gains_LN: Tensor,
    use_tiles: bool = True,
) -> tuple[Tensor, Tensor]:
    """Multiply in C, rows, then outputs, shared among torch's threads. use_tiles: AMX, where there is one."""
    (rows, outputs), (count, rank, inputs) = base_MN.shape, a_LRK.shape
    # PERF: bf16, rank 16, 4096 x 4096, 1 to 64 rows: 1.2x to 1.4x of the best plain formulation with one
    # adapter, 1.6x to 2.8x with 4, 1.4x to 2.2x with 16. With one in fp32 torch's two products are faster.
    if rank > MOST_RANK or (count == 1 and base_MN.dtype == torch.float32):
        return forward_torch(base_MN, x_MK, a_LRK, b_LNR, scales_L, adapters_M, gains_LN)
    y_MN, low_MR = _empty(base_MN, x_MK, a_LRK, b_LNR, scales_L, adapters_M, gains_LN)
    if adapters_M is not None:
        adapters_M = adapters_M.int().contiguous()
    gains_LN, threads = gains_LN.float().contiguous(), torch.get_num_threads()
    given = (base_MN.contiguous(), x_MK.contiguous(), a_LRK.contiguous(), b_LNR.contiguous())
    numbers = torch.empty(rows + count, dtype=torch.int32)
    work = torch.empty(threads * ROWS * -(-inputs // 32) * 32)
    low = x_MK.new_empty(rows * rank + (rows + 16) * -(-rank // 32) * 32)
    native.function("lora_linear", "lora_linear", "ppppppppppppllllliii")(
        *native.pointers(*given, scales_L.float().contiguous()),
        *(native.pointers(adapters_M) if adapters_M is not None else (None,)),
        *(native.pointers(gains_LN) if gains_LN.numel() else (None,)),
        *native.pointers(y_MN, low_MR, numbers, work, low),
        *(rows, count, outputs, inputs, rank, use_tiles, threads, native.type_of(base_MN)),
    )
    return y_MN, low_MR


def forward_torch(
    base_MN: Tensor,
    x_MK: Tensor,
    a_LRK: Tensor,
    b_LNR: Tensor,
    scales_L: Tensor,
    adapters_M: Tensor | None,
    gains_LN: Tensor,
) -> tuple[Tensor, Tensor]:
    """Take two matrix products for each adapter that has rows."""
    if adapters_M is None or (a_LRK.shape[0] == 1 and not bool((adapters_M < 0).any())):
        low_MR = x_MK @ a_LRK[0].T
        if base_MN.device.type == "cpu" and base_MN.dtype == torch.float32:
            y_MN = torch.addmm(base_MN, low_MR, b_LNR[0].T, alpha=float(scales_L[0]))
        else:
            y_MN = _added(base_MN, low_MR, b_LNR[0], scales_L[0])
        return (y_MN * gains_LN[0] if gains_LN.numel() else y_MN).to(base_MN.dtype), low_MR
    y_MN, low_MR = base_MN.clone(), x_MK.new_zeros(x_MK.shape[0], a_LRK.shape[1])
    for adapter in sorted(set(adapters_M.tolist())):
        if adapter < 0:
            continue
        (rows,) = torch.nonzero(adapters_M == adapter, as_tuple=True)
        low = x_MK[rows] @ a_LRK[adapter].T
        y = _added(base_MN[rows], low, b_LNR[adapter], scales_L[adapter])
        y_MN[rows] = (y * gains_LN[adapter] if gains_LN.numel() else y).to(base_MN.dtype)
        low_MR[rows] = low
    return y_MN, low_MR


def _added(base_MN: Tensor, low_MR: Tensor, b_NR: Tensor, scale: Tensor) -> Tensor:
    """Return base + scale low B^T in fp32 or wider."""
    wide = torch.promote_types(base_MN.dtype, torch.float32)
    return base_MN.to(wide) + (low_MR @ b_NR.T).to(wide) * scale


# What all paths share


def backward(
    dy_MN: Tensor,
    base_MN: Tensor,
    x_MK: Tensor,
    a_LRK: Tensor,
    b_LNR: Tensor,
    scales_L: Tensor,
    adapters_M: Tensor | None,
    gains_LN: Tensor,
    low_MR: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Take four matrix products for each adapter, whose rows are chosen by a mask: the host reads nothing."""
    dtype, wide = base_MN.dtype, torch.promote_types(base_MN.dtype, torch.float32)
    grads = _empty_gradients(dy_MN, base_MN, x_MK, a_LRK, b_LNR, scales_L, adapters_M, gains_LN, low_MR)
    dbase_MN, dx_MK, da_LRK, db_LNR, dgains_LN = grads
    dbase_MN.copy_(dy_MN)
    dx_MK.zero_()
    for adapter in range(a_LRK.shape[0]):
        if adapters_M is None and adapter > 0:
            da_LRK[adapter], db_LNR[adapter] = 0, 0
            dgains_LN[adapter:] = 0
            continue
        own_M1 = None if adapters_M is None else (adapters_M == adapter)[:, None]
        dy = dy_MN if own_M1 is None else torch.where(own_M1, dy_MN, 0)
        low = low_MR if own_M1 is None else torch.where(own_M1, low_MR, 0)
        x = x_MK if own_M1 is None else torch.where(own_M1, x_MK, 0)
        grad = dy
        if gains_LN.numel():
            y = _added(base_MN, low, b_LNR[adapter], scales_L[adapter])
            y = y if own_M1 is None else torch.where(own_M1, y, 0)
            dgains_LN[adapter] = (dy.to(wide) * y).sum(0)
            # Not rounded: terms of these products cancel. They have R columns, a small part of all.
            grad = dy.to(wide) * gains_LN[adapter]
            dbase_MN = torch.where(own_M1, grad.to(dtype), dbase_MN) if own_M1 is not None else grad.to(dtype)
        scale = scales_L[adapter]
        db_LNR[adapter] = (grad.T @ low.to(grad.dtype)).to(wide) * scale
        dlow = ((grad @ b_LNR[adapter].to(grad.dtype)).to(wide) * scale).to(dtype)
        da_LRK[adapter] = dlow.T @ x
        dx_MK += dlow @ a_LRK[adapter]
    return dbase_MN, dx_MK, da_LRK, db_LNR, dgains_LN


def _empty(
    base_MN: Tensor,
    x_MK: Tensor,
    a_LRK: Tensor,
    b_LNR: Tensor,
    scales_L: Tensor,
    adapters_M: Tensor | None,
    gains_LN: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(base_MN, memory_format=torch.contiguous_format), x_MK.new_empty(
        x_MK.shape[0], a_LRK.shape[1]
    )


def _empty_gradients(
    dy_MN: Tensor,
    base_MN: Tensor,
    x_MK: Tensor,
    a_LRK: Tensor,
    b_LNR: Tensor,
    scales_L: Tensor,
    adapters_M: Tensor | None,
    gains_LN: Tensor,
    low_MR: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (base_MN, x_MK, a_LRK, b_LNR, gains_LN)
    made = [torch.empty_like(given, memory_format=torch.contiguous_format) for given in inputs]
    return made[0], made[1], made[2], made[3], made[4]


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Make a batch in which each row has its own adapter, and one adapter in training, with gains."""
    examples = []
    for rows, count, outputs, inputs, rank in (
        (8, 2, 128, 128, 8),
        (64, 16, 4096, 4096, 16),
        (4096, 1, 4096, 4096, 16),
    ):
        base_MN = torch.randn(rows, outputs, device=device, dtype=dtype)
        x_MK = torch.randn(rows, inputs, device=device, dtype=dtype)
        a_LRK = torch.randn(count, rank, inputs, device=device, dtype=dtype)
        b_LNR = torch.randn(count, outputs, rank, device=device, dtype=dtype)
        adapters_M = torch.arange(rows, device=device, dtype=torch.int32) % count if count > 1 else None
        gains_LN = torch.rand(count if count == 1 else 0, outputs, device=device)
        cost = (
            2 * base_MN.nbytes + x_MK.nbytes + a_LRK.nbytes + b_LNR.nbytes,
            2 * rows * rank * (inputs + outputs),
        )
        given = (base_MN, x_MK, a_LRK, b_LNR, torch.ones(count, device=device), adapters_M, gains_LN)
        examples.append(Example(f"{rows}x{count}x{outputs}x{inputs}x{rank}", given, *cost))
    return examples


OPERATOR = Operator(
    "lora_linear",
    lora_linear_reference,
    fake=_empty,
    gradient=Gradient(
        inputs=(0, 1, 2, 3, 6),
        saves=lambda inputs, outputs: (*inputs, outputs[1]),
        fake=_empty_gradients,
    ),
    examples=_examples,
    expects=Expects(
        dtypes={"scales_L": WIDE, "adapters_M": torch.int32, "gains_LN": WIDE},
        axes={"gains_LN": ""},  # empty for none
    ),
)
OPERATOR.add("cpu", forward_cpu, backward, **native.path("lora_linear"))
OPERATOR.add("torch", forward_torch, backward)
OPERATOR.add("triton", forward_triton, backward, **tile.path())
