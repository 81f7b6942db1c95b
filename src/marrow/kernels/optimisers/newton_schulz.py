"""Newton-Schulz: set the singular values of matrices to about 1, for Muon.

Five times x <- a x + (b G + c G^2) x with G = x x^T: an odd polynomial that acts on the singular values
alone. Jordan's coefficients climb fast from small values, to 0.7..1.2, not to 1. Bound by matrix products; G
and G^2 are symmetric, so the GPU kernel computes the tiles on and below the diagonal and writes each twice:
4 of 6 parts of the work for square matrices. torch multiplies the rest, and everything on the CPU.

There is no C: in bf16 oneDNN multiplies 4 matrices of 768 x 768 in 0.53x of the time that the AMX tiles of
`csrc/linear.h` take, so that half the work wins nothing. In fp32 large symmetric products are taken by blocks
below the diagonal; in bf16 blocks take longer than the whole.

Axes: M matrices, R rows <= C columns. Source: Jordan et al. 2024 (Muon); the symmetry: flash-muon.
"""

import torch
from torch import Tensor

from marrow.kernels import tile
from marrow.kernels.dispatch import Example, Operator
from marrow.kernels.tile import tl

A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5
_LEAST_NORM = 1e-7
_LARGE = 512  # rows from which blocks pay


def newton_schulz(matrices_MRC: Tensor, steps: int = STEPS) -> Tensor:
    """Orthogonalise each matrix roughly: singular values to between 0.7 and 1.2, singular vectors kept.

    Args: matrices_MRC: [..., R, C], in the dtype to compute in; tall ones are turned. steps: >= 0.
    Returns: as matrices_MRC.
    Cost: steps (4 R^2 C + 2 R^3) M FLOPs, R the short side; bound by matrix products.
    """
    is_tall = matrices_MRC.shape[-2] > matrices_MRC.shape[-1]
    wide = matrices_MRC.mT if is_tall else matrices_MRC
    result: Tensor = OPERATOR(wide.reshape(-1, *wide.shape[-2:]), steps)
    result = result.view(wide.shape)
    return result.mT if is_tall else result


def newton_schulz_reference(matrices_MRC: Tensor, steps: int) -> Tensor:
    """Compute `newton_schulz` in plain torch, of wide matrices."""
    x_MRC = _normed(matrices_MRC)
    for _ in range(steps):
        gram_MRR = x_MRC @ x_MRC.mT
        poly_MRR = torch.baddbmm(gram_MRR, gram_MRR, gram_MRR, beta=B, alpha=C)
        x_MRC = torch.baddbmm(x_MRC, poly_MRR, x_MRC, beta=A)
    return x_MRC


# Triton


@tile.jit
def _square(  # type: ignore[no-untyped-def]
    x, add, y, rows, columns, alpha, beta, PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr
):
    """Compute alpha x x^T + beta add: one tile on or below the diagonal, and its mirror image."""
    high, low, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if low > high:
        return
    upper, lower = high * BLOCK + tl.arange(0, BLOCK), low * BLOCK + tl.arange(0, BLOCK)
    depth = tl.arange(0, DEPTH)
    x += matrix * rows * columns
    left = x + upper[:, None].to(tl.int64) * columns + depth[None, :]
    right = x + lower[:, None].to(tl.int64) * columns + depth[None, :]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, columns, DEPTH):
        inside = depth[None, :] < columns - start
        some = tl.load(left, mask=(upper[:, None] < rows) & inside, other=0.0)
        other = tl.load(right, mask=(lower[:, None] < rows) & inside, other=0.0)
        total = tl.dot(some, tl.trans(other), total, input_precision=PRECISION)
        left += DEPTH
        right += DEPTH
    total *= alpha
    inside = (upper[:, None] < rows) & (lower[None, :] < rows)
    place = matrix * rows * rows + upper[:, None].to(tl.int64) * rows + lower[None, :]
    if add is not None:
        total += beta * tl.load(add + place, mask=inside, other=0.0).to(tl.float32)
    result = total.to(y.dtype.element_ty)
    tl.store(y + place, result, mask=inside)
    if low < high:
        mirror = matrix * rows * rows + lower[:, None].to(tl.int64) * rows + upper[None, :]
        tl.store(y + mirror, tl.trans(result), mask=(lower[:, None] < rows) & (upper[None, :] < rows))


def forward_triton(matrices_MRC: Tensor, steps: int) -> Tensor:
    """Symmetric products by the kernel, the last of each step by torch."""
    x_MRC = _normed(matrices_MRC).contiguous()
    for _ in range(steps):
        gram_MRR = _symmetric(x_MRC, None, 1.0, 0.0)
        poly_MRR = _symmetric(gram_MRR, gram_MRR, C, B)
        x_MRC = torch.baddbmm(x_MRC, poly_MRR, x_MRC, beta=A)
    return x_MRC


def _symmetric(x_MRC: Tensor, add_MRR: Tensor | None, alpha: float, beta: float) -> Tensor:
    """Return alpha x x^T + beta add."""
    matrices, rows, columns = x_MRC.shape
    y_MRR = x_MRC.new_empty(matrices, rows, rows)
    is_large, is_wide = rows >= 1024, x_MRC.element_size() == 4
    default = {
        "BLOCK": 128 if is_large else 64,
        "DEPTH": 32 if is_wide else 64,
        "num_warps": 8 if is_large else 4,
        "num_stages": 3,
    }
    others = ({"num_stages": 4}, {"DEPTH": 32, "num_stages": 4}, {"BLOCK": 64, "num_warps": 4})
    shape_class = ("large" if is_large else "small", str(x_MRC.dtype))
    options = tile.config("newton_schulz", shape_class, default, others)
    tiles = -(-rows // options["BLOCK"])
    tile.launch(
        _square,
        (tiles, tiles, matrices),
        *(x_MRC, add_MRR, y_MRR, rows, columns, alpha, beta),
        **options,
        PRECISION="ieee",
    )
    return y_MRR


# CPU


def forward_torch(matrices_MRC: Tensor, steps: int) -> Tensor:
    """Take symmetric products of large matrices in fp32 by blocks of rows, each with those above."""
    if matrices_MRC.dtype != torch.float32 or matrices_MRC.shape[1] < _LARGE or matrices_MRC.is_cuda:
        return newton_schulz_reference(matrices_MRC, steps)
    x_MRC = _normed(matrices_MRC)
    for _ in range(steps):
        gram_MRR = _by_blocks(x_MRC)
        poly_MRR = _by_blocks(gram_MRR).mul_(C).add_(gram_MRR, alpha=B)
        x_MRC = torch.baddbmm(x_MRC, poly_MRR, x_MRC, beta=A)
    return x_MRC


def _by_blocks(x_MRC: Tensor) -> Tensor:
    """Return x x^T: 10 of 16 blocks, and the mirror images of those below the diagonal."""
    # PERF: 0.85 of the time of the whole for 768 x 768, 0.75 for 768 x 3072, 0.69 for 2048 x 2048; a step of
    # Newton-Schulz is 1.09x, 1.15x and 1.22x as fast.
    matrices, rows, _ = x_MRC.shape
    y_MRR, size = x_MRC.new_empty(matrices, rows, rows), -(-rows // 4)
    for first in range(0, rows, size):
        last = min(rows, first + size)
        block = x_MRC[:, first:last] @ x_MRC[:, :last].mT
        y_MRR[:, first:last, :last] = block
        y_MRR[:, :first, first:last] = block[:, :, :first].mT
    return y_MRR


# What all paths share


def _normed(matrices_MRC: Tensor) -> Tensor:
    """Scale each matrix to Frobenius norm 1, which bounds its singular values by 1."""
    wide = torch.promote_types(matrices_MRC.dtype, torch.float32)
    norm_M11: Tensor = torch.linalg.vector_norm(matrices_MRC, dim=(1, 2), keepdim=True, dtype=wide)
    return matrices_MRC / (norm_M11 + _LEAST_NORM).to(matrices_MRC.dtype)


def _fake(matrices_MRC: Tensor, steps: int) -> Tensor:
    return torch.empty_like(matrices_MRC, memory_format=torch.contiguous_format)


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Return the projections of a small model, and one large matrix."""
    examples = []
    for matrices, rows, columns in ((8, 768, 768), (4, 768, 3072), (1, 4096, 4096)):
        x_MRC = torch.randn(matrices, rows, columns, device=device, dtype=dtype)
        flops = STEPS * matrices * (4 * rows * rows * columns + 2 * rows**3)
        moved = STEPS * matrices * (4 * rows * columns + 5 * rows * rows) * dtype.itemsize
        examples.append(Example(f"{matrices}x{rows}x{columns}", (x_MRC, STEPS), moved, flops))
    return examples


OPERATOR = Operator("newton_schulz", newton_schulz_reference, fake=_fake, examples=_examples)
OPERATOR.add("torch", forward_torch)
OPERATOR.add("triton", forward_triton, **tile.path())
