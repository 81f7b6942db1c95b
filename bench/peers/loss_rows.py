"""What bench/kernels.py measures of the losses: loss and gradients, beside torch with all logits at once.

`torch in chunks` is our own way with torch's operators alone: what fusing and the C step add to it. Peak
memory is what torch's allocator hands out in one call; the loss's error is relative, to fp64.
"""

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from peers.kernel_rows import Row, Work, normal

Loss = Callable[[], Tensor]
CHUNK_LOGITS = 1 << 22
NEVER_SLOWER = 1.0


def with_gradients(loss: Loss, leaves: tuple[Tensor, ...]) -> Work:
    """Return a call that makes the loss and its gradients."""

    def work() -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.enable_grad():
            made = loss()
            return made.detach(), *torch.autograd.grad(made, leaves)

    return work


def peak_bytes(work: Work) -> int:
    """Return the most bytes that torch's allocator had handed out at once during a call."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes), default=0)


def notes_of(works: Mapping[str, Work], exact: float) -> dict[str, str]:
    """Tell peak memory and error of each side."""
    notes = {}
    for name, work in works.items():
        error = abs(float(work()[0].double()) - exact) / abs(exact)
        notes[name] = f"{peak_bytes(work) / 2**20:.0f} MiB, loss error {error:.0e}"
    return notes


def made_row(losses: Mapping[str, Loss], leaves: tuple[Tensor, ...], exact: float) -> Row:
    """Make a row of the first of these losses against the others."""
    works = {name: with_gradients(loss, leaves) for name, loss in losses.items()}
    ours, *peers = works
    goals = dict.fromkeys(peers, NEVER_SLOWER)
    return Row(works[ours], {name: works[name] for name in peers}, goals, notes_of(works, exact))


class Chunked(torch.autograd.Function):
    """The mean loss, its gradients made in forward, chunk by chunk, by torch."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return the loss."""
        loss, parts, weight_grad = torch.zeros(()), [], torch.zeros(weight.shape)
        rows = max(1, CHUNK_LOGITS // len(weight))
        for some, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
            scores = torch.log_softmax(F.linear(some, weight), -1, dtype=torch.float32)
            loss = loss - scores.gather(1, wanted[:, None]).sum()
            scores.exp_().scatter_add_(1, wanted[:, None], torch.full((len(wanted), 1), -1.0))
            gradient = scores.to(hidden.dtype)
            parts.append(gradient @ weight)
            weight_grad += gradient.T @ some
        context.gradients = torch.cat(parts), weight_grad.to(weight.dtype)
        return loss / len(hidden)

    @staticmethod
    def backward(context: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what forward made."""
        hidden_grad, weight_grad = context.gradients
        scale = scale / len(hidden_grad)
        return hidden_grad * scale.to(hidden_grad.dtype), weight_grad * scale.to(weight_grad.dtype), None


def head(rows: int, channels: int, vocab: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return hidden states, a head, targets, and the mean loss in fp64."""
    hidden, weight = normal(rows, channels), normal(vocab, channels, scale=channels**-0.5)
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(rows))
    wide, exact = weight.double(), 0.0
    for some, wanted in zip(hidden.split(256), targets.split(256), strict=True):
        exact += float(F.cross_entropy(some.double() @ wide.T, wanted, reduction="sum"))
    return hidden.requires_grad_(), weight.requires_grad_(), targets, exact / rows


def linear_cross_entropy_row(rows: int, channels: int, vocab: int) -> Row:
    """Head and loss in one."""
    from marrow.kernels.losses.linear_cross_entropy import linear_cross_entropy

    hidden, weight, targets, exact = head(rows, channels, vocab)

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    compiled = torch.compile(plain, dynamic=False)
    losses: dict[str, Loss] = {
        "ours": lambda: linear_cross_entropy(hidden, weight, targets)[0] / rows,
        "torch.compile": lambda: compiled(hidden, weight, targets),
        "eager, all logits": lambda: plain(hidden, weight, targets),
        "torch in chunks": lambda: Chunked.apply(hidden, weight, targets),
    }
    return made_row(losses, (hidden, weight), exact)


def linear_log_probs_row(rows: int, channels: int, vocab: int) -> Row:
    """Log probabilities of the targets, as DPO and GRPO want them; their mean stands for a loss."""
    from marrow.kernels.losses.linear_log_probs import linear_log_probs

    hidden, weight, targets, exact = head(rows, channels, vocab)

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -F.linear(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None]).mean()

    compiled = torch.compile(plain, dynamic=False)
    losses: dict[str, Loss] = {
        "ours": lambda: -linear_log_probs(hidden, weight, targets)[0].mean(),
        "torch.compile": lambda: compiled(hidden, weight, targets),
        "eager, all logits": lambda: plain(hidden, weight, targets),
    }
    return made_row(losses, (hidden, weight), exact)


def cross_entropy_row(rows: int, vocab: int) -> Row:
    """Compare the loss alone, of logits that are there."""
    from marrow.kernels.losses.cross_entropy import cross_entropy

    logits = normal(rows, vocab, scale=2.0).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(rows))

    def plain(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets)

    compiled = torch.compile(plain, dynamic=False)
    losses: dict[str, Loss] = {
        "ours": lambda: cross_entropy(logits, targets)[0].mean(),
        "torch.compile": lambda: compiled(logits, targets),
        "eager": lambda: plain(logits, targets),
    }
    return made_row(losses, (logits,), float(F.cross_entropy(logits.detach().double(), targets)))


ROWS: dict[str, Callable[[], Row]] = {
    **{
        f"linear cross-entropy bf16 {n}x{c}x{v}": lambda shape=(n, c, v): linear_cross_entropy_row(*shape)
        for n, c, v in ((2048, 192, 2048), (8192, 256, 4096), (1024, 512, 32768))
    },
    "linear log-probabilities bf16 8192x256x4096": lambda: linear_log_probs_row(8192, 256, 4096),
    "cross-entropy bf16 1024x32768": lambda: cross_entropy_row(1024, 32768),
}
