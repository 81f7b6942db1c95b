"""What a matrix would be after rounding to few bits and back, for training that expects it (QAT).

y is the nearest number that `quantise` can store, block by block, in x's dtype; steps follow x at every call.
The gradient goes straight through: dx = dy, for rounding is flat almost everywhere and steps are such that
nothing is cut off by more than their own rounding to fp16. One pass: no 8-bit numbers are written.

Formats and blocks are those of `quantise`. Source: Bengio et al. 2013 (straight-through), Jacob et al. 2018.
"""

import torch
from torch import Tensor

from marrow.core.errors import UsageError
from marrow.kernels import native, tile
from marrow.kernels.dispatch import Example, Gradient, Operator
from marrow.kernels.matmul.dequantise import dequantise_reference
from marrow.kernels.matmul.quantise import (
    FORMATS,
    block_size,
    launch_quantise,
    quantise_reference,
)


def fake_quantise(x_NK: Tensor, form: str, block_rows: int = 1, block_columns: int = 0) -> Tensor:
    """Round a matrix block by block, and return what the rounded numbers stand for.

    Args: x_NK: [..., K], any float dtype. form, block_rows, block_columns: as for `quantise`.
    Returns: as x_NK; its gradient is x's. A block that is not finite becomes NaN.
    Raises: UsageError for another format.
    Cost: reads and writes N K numbers; bound by memory.
    """
    if form not in FORMATS:
        raise UsageError(f"format {form!r} is unknown", hint=f"allowed: {', '.join(FORMATS)}")
    if x_NK.ndim == 2:
        result: Tensor = OPERATOR(x_NK, form, block_rows, block_columns)
        return result
    rows_NK = x_NK.reshape(-1, x_NK.shape[-1])
    return fake_quantise(rows_NK, form, block_rows, block_columns).view(x_NK.shape)


def fake_quantise_reference(x_NK: Tensor, form: str, block_rows: int = 1, block_columns: int = 0) -> Tensor:
    """Compute `fake_quantise` in plain torch; the rounding in fp32, whatever x is."""
    still_NK = x_NK.detach()
    found = quantise_reference(still_NK, form, block_rows, block_columns)
    y_NK = dequantise_reference(*found, x_NK.dtype, block_rows, block_columns)
    through_NK = torch.where(y_NK.isfinite(), x_NK - still_NK, x_NK)  # 0, with x's gradient
    return y_NK + through_NK


def forward_triton(x_NK: Tensor, form: str, block_rows: int = 1, block_columns: int = 0) -> Tensor:
    """One program a block: the kernel of `quantise`."""
    y_NK = _empty(x_NK, form, block_rows, block_columns)
    block = block_size(x_NK, block_rows, block_columns)
    launch_quantise(x_NK.contiguous(), y_NK, None, None, form, block)
    return y_NK


def forward_cpu(x_NK: Tensor, form: str, block_rows: int = 1, block_columns: int = 0) -> Tensor:
    """Blocks in C, shared among torch's threads: the function of `quantise`."""
    x_NK = x_NK.contiguous()
    y_NK = _empty(x_NK, form, block_rows, block_columns)
    native.function("quantise", "quantise", "ppppplllliii")(
        *(x_NK.data_ptr(), None, None, None, y_NK.data_ptr()),
        *(*x_NK.shape, *block_size(x_NK, block_rows, block_columns)),
        *(FORMATS.index(form), torch.get_num_threads(), native.type_of(x_NK)),
    )
    return y_NK


def backward(dy_NK: Tensor) -> Tensor:
    """Let the gradient through; a copy, for an operator's outputs are not its inputs."""
    return dy_NK.clone()


def _empty(x_NK: Tensor, form: str, block_rows: int = 1, block_columns: int = 0) -> Tensor:
    return torch.empty_like(x_NK, memory_format=torch.contiguous_format)


def _empty_gradient(dy_NK: Tensor) -> Tensor:
    return torch.empty_like(dy_NK)


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Make a weight of a 7B model, in groups of 128 and in fp8 blocks."""
    x_NK = torch.randn(4096, 4096, device=device, dtype=dtype)
    cost = (2 * x_NK.nbytes, 6 * x_NK.numel())
    shapes = (("int4", 1, 128), ("int8", 1, 0), ("fp8", 128, 128))
    return [Example(f"4096x4096 {s[0]} {s[1]}x{s[2] or 'row'}", (x_NK, *s), *cost) for s in shapes]


OPERATOR = Operator(
    "fake_quantise",
    fake_quantise_reference,
    fake=_empty,
    gradient=Gradient(inputs=(0,), saves=lambda inputs, outputs: (), fake=_empty_gradient),
    examples=_examples,
)
OPERATOR.add("cpu", forward_cpu, backward, **native.path("quantise"))
OPERATOR.add("triton", forward_triton, backward, **tile.path())
