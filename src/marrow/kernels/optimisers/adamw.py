"""AdamW in one pass over parameter, gradient and both moments, for many tensors in one call.

    mean   += (1 - beta1) (g - mean)         m = mean / (1 - beta1^t)
    square += (1 - beta2) (g^2 - square)     v = square / (1 - beta2^t)
    parameter = (1 - lr weight_decay) parameter - lr m / (sqrt(v) + eps)

with g = scale * gradient: clipping costs no pass of its own, and neither does the bf16 copy of fp32 masters
that a model computes with. Moments are fp32, whatever the parameters are; arithmetic is fp32 (fp64 in the
reference, for fp64). Bound by memory. Source: Loshchilov and Hutter 2019.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from marrow.kernels import native, tile
from marrow.kernels.dispatch import Example, Operator
from marrow.kernels.tile import tl

_NARROW = (torch.float32, torch.bfloat16)


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    *,
    lr: float,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    copies: Sequence[Tensor] = (),
) -> None:
    """Make one step of AdamW, in place on `params`, `means` and `squares`.

    Args: params: contiguous, all of one dtype and device, one at least. grads: as params, their dtypes may
        differ. means, squares: fp32 moments, zeros before the first step. step: 1 at the first step.
        weight_decay: decoupled, times lr. scale: multiplies the gradients (clipping).
        copies: of the parameters after the step, in another dtype; written, never read; none if empty.
    Raises: ValueError for lists of unequal lengths or shapes, wrong dtypes, or a parameter, moment or copy
        that is not contiguous; nothing has been written then.
    Cost: reads and writes parameters and moments, reads gradients; 15 FLOPs an element; bound by memory.
    """
    if not params:
        return
    if step < 1:
        raise ValueError(f"step = {step}: the first is 1")
    lists = (params, grads, means, squares, *([copies] if copies else []))
    if any(len(one) != len(params) for one in lists):
        raise ValueError(f"lists of {', '.join(str(len(one)) for one in lists)} tensors: must be equal")
    for number, param in enumerate(params):
        _check(param, grads[number], means[number], squares[number], params[0].dtype)
    for param, copy in zip(params, copies, strict=False):
        if copy.shape != param.shape or copy.device != param.device or not copy.is_contiguous():
            raise ValueError(
                f"a copy of shape {list(copy.shape)} on {copy.device}: not contiguous, or not "
                f"{list(param.shape)} on {param.device}"
            )
    OPERATOR(params, grads, means, squares, list(copies), lr, *betas, eps, weight_decay, step, scale)
    # Autograd must see the change: a backward through the old values is then refused, not wrong.
    torch.autograd.graph.increment_version([*params, *means, *squares, *copies])


def _check(param: Tensor, grad: Tensor, mean: Tensor, square: Tensor, dtype: torch.dtype) -> None:
    """Refuse what C would read or write wrongly. Written out: it runs for every tensor of every step."""
    shape, place = param.shape, param.device
    if grad.device != place or mean.device != place or square.device != place:
        raise ValueError(f"a gradient or moment is not on {place}, where its parameter is")
    if grad.shape != shape or mean.shape != shape or square.shape != shape:
        shapes = ", ".join(str(list(one.shape)) for one in (param, grad, mean, square))
        raise ValueError(f"shapes {shapes}: must be equal")
    if not (param.is_contiguous() and mean.is_contiguous() and square.is_contiguous()):
        raise ValueError("a parameter or moment is not contiguous: it is written in place")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if param.dtype != dtype or mean.dtype != wide or square.dtype != wide:
        raise ValueError(f"a parameter's dtype is not {dtype}, or a moment's not {wide}")


@torch.no_grad()
def adamw_reference(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    copies: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    scale: float,
) -> None:
    """Compute `adamw` in plain torch."""
    unbias1, unbias2 = 1 - beta1**step, 1 - beta2**step
    for number, (param, mean, square) in enumerate(zip(params, means, squares, strict=True)):
        grad = grads[number].to(mean.dtype) * scale
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        wide = param.to(mean.dtype) * (1 - lr * weight_decay)
        param.copy_(wide.addcdiv_(mean, (square / unbias2).sqrt_().add_(eps), value=-lr / unbias1))
        if copies:
            copies[number].copy_(wide)


# Triton


@tile.jit
def _step(  # type: ignore[no-untyped-def]
    param,
    grad,
    mean,
    square,
    copy,
    count,
    keep,
    pace,
    unbias,
    weight1,
    weight2,
    eps,
    scale,
    BLOCK: tl.constexpr,
):
    """One block of one tensor. keep = 1 - lr weight_decay, pace = lr / (1 - beta1^t), weight = 1 - beta."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * scale
    m = tl.load(mean + at, mask=inside, other=0.0)
    v = tl.load(square + at, mask=inside, other=0.0)
    p = tl.load(param + at, mask=inside, other=0.0).to(tl.float32)
    m += weight1 * (g - m)
    v += weight2 * (g * g - v)
    p = p * keep - pace * m / (tl.sqrt(v * unbias) + eps)
    tl.store(mean + at, m, mask=inside)
    tl.store(square + at, v, mask=inside)
    tl.store(param + at, p.to(param.dtype.element_ty), mask=inside)
    if copy is not None:
        tl.store(copy + at, p.to(copy.dtype.element_ty), mask=inside)


def forward_triton(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    copies: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    scale: float,
) -> None:
    """One launch a tensor: the device is busy with one while the host starts the next."""
    factors = (*_factors(lr, beta1, beta2, weight_decay, step), eps, scale)
    cuts = {dtype: _options(dtype, bool(copies)) for dtype in {param.dtype for param in params}}
    for number, param in enumerate(params):
        copy = copies[number] if copies else None
        arguments = (param, grads[number].contiguous(), means[number], squares[number], copy)
        size, options = param.numel(), cuts[param.dtype]
        tile.launch(_step, (-(-size // options["BLOCK"]),), *arguments, size, *factors, **options)


def _options(dtype: torch.dtype, has_copies: bool) -> dict[str, int]:
    others = ({"BLOCK": 512}, {"BLOCK": 2048, "num_warps": 8}, {"BLOCK": 512, "num_warps": 2})
    return tile.config("adamw", (str(dtype), has_copies), {"BLOCK": 1024, "num_warps": 4}, others)


# CPU


def forward_cpu(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    copies: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    scale: float,
) -> None:
    """All tensors in one call; gradients and copies that are neither fp32 nor bf16 take the reference."""
    grads = [grad.contiguous() for grad in grads]
    kinds = {one.dtype for one in (*grads, *copies)} | {params[0].dtype}
    if not kinds.issubset(_NARROW):
        adamw_reference(
            params, grads, means, squares, copies, lr, beta1, beta2, eps, weight_decay, step, scale
        )
        return
    count = len(params)
    pointers = [one.data_ptr() for tensors in (params, grads, means, squares, copies) for one in tensors]
    types = [native.type_of(one) for tensors in (params, grads, copies) for one in tensors]
    sizes = [one.numel() for one in params]
    native.function("adamw", "adamw", "ppplifffffffi")(
        (ctypes.c_void_p * len(pointers))(*pointers),
        (ctypes.c_int * len(types))(*types),
        (ctypes.c_long * count)(*sizes),
        *(count, bool(copies)),
        *(*_factors(lr, beta1, beta2, weight_decay, step), eps, scale, torch.get_num_threads()),
    )


# What all paths share


def _factors(
    lr: float, beta1: float, beta2: float, weight_decay: float, step: int
) -> tuple[float, float, float, float, float]:
    """Return keep, pace, unbias and the two weights of the new gradient, from Python's floats."""
    return 1 - lr * weight_decay, lr / (1 - beta1**step), 1 / (1 - beta2**step), 1 - beta1, 1 - beta2


def _fake(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    copies: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    scale: float,
) -> None:
    return None


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Return the tensors of a small layer, and a large matrix."""
    examples = []
    for label, shapes in (
        ("small layer", [(768,), (768, 768), (768, 3072), (3072, 768), (768,)]),
        ("4096x4096", [(4096, 4096)]),
    ):
        params = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        grads = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        moments = [[torch.rand(shape, device=device) for shape in shapes] for _ in range(2)]
        elements = sum(one.numel() for one in params)
        given = (params, grads, *moments, [], 1e-3, 0.9, 0.999, 1e-8, 0.1, 3, 1.0)
        examples.append(Example(label, given, elements * (3 * dtype.itemsize + 16), 15 * elements))
    return examples


OPERATOR = Operator(
    "adamw",
    adamw_reference,
    fake=_fake,
    examples=_examples,
    mutates=("params", "means", "squares", "copies"),
)
OPERATOR.add("cpu", forward_cpu, **native.path("adamw"))
OPERATOR.add("triton", forward_triton, **tile.path())
