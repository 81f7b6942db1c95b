"""Log probabilities of given tokens from hidden rows and the head, without all the logits: for DPO and GRPO.

    y = (hidden @ weight^T) / temperature,  log p = y[target] - log(sum(e^y)),  H = -sum(p log p)

Rows go through in chunks. A loss weighs each row's log probability by a factor that only backward knows, so
backward makes a chunk's logits again, turns them into their gradient in place, and two matrix products carry
it on: a third more FLOPs than with all logits kept, and N V numbers less memory.

Axes: N rows, M rows of a chunk, C channels, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from marrow.core.errors import UsageError
from marrow.kernels import native, tile
from marrow.kernels.arguments import Expects
from marrow.kernels.dispatch import Example, Gradient, Operator
from marrow.kernels.losses.chunks import WeightGradient, chunks
from marrow.kernels.losses.cross_entropy import IGNORE, check_targets, row_gradient, row_options, sum_row
from marrow.kernels.tile import tl

# A chunk's logits and targets, 1 / temperature, then outputs to fill, or their gradients and what was kept.
Step = Callable[..., None]


def linear_log_probs(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return each target's log probability, and each row's entropy where it is asked for.

    Args: hidden_NC: [N, C]. weight_VC: [V, C] of the same dtype. targets_N: int64 [N], in [0, V), or -100 for
        rows that have none: 0 and no gradient. temperature: > 0, divides the logits.
    Returns: (log_prob_N, entropy_N or None): fp32 in nats (fp64 for fp64), both differentiable.
    Raises: UsageError for a temperature that is not positive, or targets that do not fit the rows.
    Cost: 2 N C V FLOPs forward, 6 N C V backward; memory of one chunk of logits.
    """
    if not temperature > 0:
        raise UsageError(f"temperature = {temperature} is not allowed", hint="allowed: above 0")
    check_targets(hidden_NC, targets_N)
    learns = torch.is_grad_enabled()
    flags = (learns and hidden_NC.requires_grad, learns and weight_VC.requires_grad)
    log_probs_N, entropy_N = OPERATOR(hidden_NC, weight_VC, targets_N, 1.0 / temperature, entropy, *flags)
    return log_probs_N, (entropy_N if entropy else None)


def linear_log_probs_reference(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    scale: float,
    entropy: bool,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Compute `linear_log_probs` in plain torch, all logits at once."""
    wide = torch.promote_types(hidden_NC.dtype, torch.float32)
    log_NV = (F.linear(hidden_NC.to(wide), weight_VC.to(wide)) * scale).log_softmax(-1)
    is_none_N = targets_N == IGNORE
    log_probs_N = log_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0].masked_fill(is_none_N, 0.0)
    if not entropy:
        return log_probs_N, log_probs_N.new_empty(0)
    return log_probs_N, -(log_NV.exp() * log_NV).sum(-1).masked_fill(is_none_N, 0.0)


# Triton


@tile.jit
def _forward(  # type: ignore[no-untyped-def]
    logits,
    targets,
    log_probs,
    entropies,
    mosts,
    rests,
    columns,
    scale,
    BLOCK: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * columns
    target = tl.load(targets + row)
    most, rest, expected = sum_row(x, columns, scale, BLOCK, ENTROPY)
    is_inside = (target >= 0) & (target < columns)
    picked = tl.load(x + target, mask=is_inside, other=float("nan")).to(tl.float32)
    is_none = target == -100
    tl.store(log_probs + row, tl.where(is_none, 0.0, (picked - most) * scale - rest))
    tl.store(mosts + row, most)
    tl.store(rests + row, rest)
    if ENTROPY:
        entropy = tl.where(is_inside, rest - expected, float("nan"))
        tl.store(entropies + row, tl.where(is_none, 0.0, entropy))


@tile.jit
def _backward(  # type: ignore[no-untyped-def]
    grads,
    entropy_grads,
    logits,
    targets,
    entropies,
    mosts,
    rests,
    columns,
    scale,
    BLOCK: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Write d log p / dx = scale ([target] - p), dH / dx = -scale p (log p + H)."""
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * columns
    target, most, rest = tl.load(targets + row), tl.load(mosts + row), tl.load(rests + row)
    grad = tl.where((target >= 0) & (target < columns), tl.load(grads + row), float("nan"))
    grad = tl.where(target == -100, 0.0, grad)
    a, b = -grad * scale, 0.0
    if ENTROPY:
        b = tl.where(target == -100, 0.0, -tl.load(entropy_grads + row) * scale)
        a += b * tl.load(entropies + row)
    row_gradient(x, x, columns, scale, most, rest, a, b, 0.0, target, grad * scale, BLOCK, ENTROPY)


def forward_triton(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    scale: float,
    entropy: bool,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix products by torch, one program a row of each chunk."""

    def step(logits_MV: Tensor, targets_M: Tensor, *out: Tensor) -> None:
        columns = logits_MV.shape[1]
        arguments = (logits_MV, targets_M, *out, columns, scale)
        options = row_options("linear_log_probs", logits_MV)
        tile.launch(_forward, (len(logits_MV),), *arguments, ENTROPY=entropy, **options)

    return _forward_chunks(step, hidden_NC, weight_VC, targets_N, entropy)


def backward_triton(
    grad_N: Tensor,
    entropy_grad_N: Tensor,
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    entropy_N: Tensor,
    sums_2N: Tensor,
    scale: float,
    entropy: bool,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Each chunk's logits again, and their gradient in place by one kernel."""

    def step(logits_MV: Tensor, targets_M: Tensor, *kept: Tensor) -> None:
        columns = logits_MV.shape[1]
        arguments = (*kept[:2], logits_MV, targets_M, *kept[2:], columns, scale)
        options = row_options("linear_log_probs_backward", logits_MV)
        tile.launch(_backward, (len(logits_MV),), *arguments, ENTROPY=entropy, **options)

    kept = grad_N, entropy_grad_N, entropy_N, *sums_2N
    return _backward_chunks(step, hidden_NC, weight_VC, targets_N, kept, needs_hidden, needs_weight)


# CPU


def forward_cpu(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    scale: float,
    entropy: bool,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrix products by torch, rows in C."""
    run = native.function("linear_log_probs", "log_probs_forward", "ppppppllfii")

    def step(logits_MV: Tensor, targets_M: Tensor, *out: Tensor) -> None:
        log_probs, entropies, mosts, rests = native.pointers(*out)
        run(
            *native.pointers(logits_MV, targets_M),
            *(log_probs, mosts, rests, entropies if entropy else 0),
            *(*logits_MV.shape, scale, torch.get_num_threads(), native.type_of(logits_MV)),
        )

    return _forward_chunks(step, hidden_NC, weight_VC, targets_N, entropy)


def backward_cpu(
    grad_N: Tensor,
    entropy_grad_N: Tensor,
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    entropy_N: Tensor,
    sums_2N: Tensor,
    scale: float,
    entropy: bool,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Each chunk's logits again, and their gradient in place in C."""
    run = native.function("linear_log_probs", "log_probs_backward", "pppppppllfii")

    def step(logits_MV: Tensor, targets_M: Tensor, *kept: Tensor) -> None:
        grad, entropy_grad, entropies, mosts, rests = native.pointers(*kept)
        run(
            *(grad, entropy_grad, *native.pointers(logits_MV, targets_M)),
            *(mosts, rests, entropies if entropy else 0),
            *(*logits_MV.shape, scale, torch.get_num_threads(), native.type_of(logits_MV)),
        )

    kept = grad_N, entropy_grad_N, entropy_N, *sums_2N
    return _backward_chunks(step, hidden_NC, weight_VC, targets_N, kept, needs_hidden, needs_weight)


# What all paths share


def _forward_chunks(
    step: Step, hidden_NC: Tensor, weight_VC: Tensor, targets_N: Tensor, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Let `step` fill the outputs, chunk by chunk."""
    log_probs_N, entropy_N, sums_2N = _empty(hidden_NC, weight_VC, targets_N, 1.0, entropy, False, False)
    targets_N = targets_N.contiguous()
    for part, logits_MV in _logits(hidden_NC, weight_VC):
        step(logits_MV, targets_N[part], log_probs_N[part], entropy_N[part], *sums_2N[:, part])
    return log_probs_N, entropy_N, sums_2N


def _backward_chunks(
    step: Step,
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    kept: tuple[Tensor, ...],
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Let `step` make each chunk's gradient in place of its logits, and carry it on."""
    hidden_grad_NC = hidden_NC.new_empty(hidden_NC.shape if needs_hidden else (0,))
    weight_grad_VC = weight_VC.new_empty(weight_VC.shape if needs_weight else (0,))
    if not len(hidden_NC):
        return hidden_grad_NC, weight_grad_VC.zero_()
    targets_N, kept = targets_N.contiguous(), tuple(each.contiguous() for each in kept)
    weight_sum = WeightGradient(weight_grad_VC)
    for part, logits_MV in _logits(hidden_NC, weight_VC):
        step(logits_MV, targets_N[part], *(each[part] for each in kept))
        if needs_hidden:
            torch.mm(logits_MV, weight_VC, out=hidden_grad_NC[part])
        if needs_weight:
            weight_sum.add(logits_MV, hidden_NC[part], is_only=part.stop - part.start == len(hidden_NC))
    del logits_MV  # before the sum is rounded: the peak of memory is there
    weight_sum.finish()
    return hidden_grad_NC, weight_grad_VC


def _logits(hidden_NC: Tensor, weight_VC: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield each chunk's rows and logits, all in the same memory."""
    buffer_MV = None
    for part in chunks(len(hidden_NC), len(weight_VC), hidden_NC.device):
        if buffer_MV is None:
            buffer_MV = hidden_NC.new_empty(part.stop, len(weight_VC))
        yield part, torch.mm(hidden_NC[part], weight_VC.T, out=buffer_MV[: part.stop - part.start])


def _empty(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    scale: float,
    entropy: bool,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate a row's log probability, its entropy, and its lse in two parts, as `cross_entropy` does."""
    wide, rows = torch.promote_types(hidden_NC.dtype, torch.float32), hidden_NC.shape[0]
    log_probs_N, entropy_N = (hidden_NC.new_empty(size, dtype=wide) for size in (rows, rows * entropy))
    return log_probs_N, entropy_N, hidden_NC.new_empty(2, rows, dtype=wide)


def _empty_gradients(
    grad_N: Tensor,
    entropy_grad_N: Tensor,
    hidden_NC: Tensor,
    weight_VC: Tensor,
    targets_N: Tensor,
    entropy_N: Tensor,
    sums_2N: Tensor,
    scale: float,
    entropy: bool,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    return (
        hidden_NC.new_empty(hidden_NC.shape if needs_hidden else (0,)),
        weight_VC.new_empty(weight_VC.shape if needs_weight else (0,)),
    )


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    """Make the head of a small model, and that of an 8B model where there is a GPU for it."""
    shapes = [(2048, 192, 2048)] + [(4096, 4096, 128256)] * (device != "cpu")
    examples = []
    for rows, channels, vocab in shapes:
        hidden_NC = torch.randn(rows, channels, device=device, dtype=dtype)
        weight_VC = torch.randn(vocab, channels, device=device, dtype=dtype) * channels**-0.5
        targets_N = torch.randint(0, vocab, (rows,), device=device)
        moved = (hidden_NC.numel() + weight_VC.numel()) * dtype.itemsize
        inputs = (hidden_NC, weight_VC, targets_N, 1.0, True, True, True)
        flops = 2 * hidden_NC.numel() * vocab
        examples.append(Example(f"{rows}x{channels}x{vocab}", inputs, moved, flops))
    return examples


OPERATOR = Operator(
    "linear_log_probs",
    linear_log_probs_reference,
    fake=_empty,
    results=2,
    gradient=Gradient(
        inputs=(0, 1),
        saves=lambda inputs, outputs: (*inputs[:3], *outputs[1:], *inputs[3:]),
        fake=_empty_gradients,
    ),
    examples=_examples,
    expects=Expects(dtypes={"targets_N": torch.int64}),
)
OPERATOR.add("cpu", forward_cpu, backward_cpu, **native.path("linear_log_probs"))
OPERATOR.add("triton", forward_triton, backward_triton, **tile.path())
