"""Operators in compiled graphs whose numbers of rows change: one graph serves all."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from marrow.kernels.activations.rope import rope
from marrow.kernels.activations.swiglu import swiglu
from marrow.kernels.losses.cross_entropy import cross_entropy
from marrow.kernels.losses.linear_cross_entropy import linear_cross_entropy
from marrow.kernels.losses.linear_log_probs import linear_log_probs
from marrow.kernels.norms.rms_norm import rms_norm
from marrow.kernels.search.top_k import top_k


def targets_of(x: Tensor) -> Tensor:
    return torch.arange(len(x)) % 7


# Of x: [rows, 16]. Others are made of its number of rows, or are the same whatever that is.
OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda x, weight: cross_entropy(x, targets_of(x))[0],
    "linear_cross_entropy": lambda x, weight: linear_cross_entropy(x, weight, targets_of(x))[0],
    "linear_log_probs": lambda x, weight: linear_log_probs(x, weight, targets_of(x))[0],
    "rms_norm": lambda x, weight: rms_norm(x, weight[0], 1e-5),
    "rope": lambda x, weight: rope(x.view(-1, 2, 8), x.detach()[:, :4].cos(), x.detach()[:, :4].sin()),
    "swiglu": lambda x, weight: swiglu(x),
    "top_k": lambda x, weight: top_k(weight, x, 2).scores_QK,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_a_graph_takes_other_numbers_of_rows_without_being_made_anew(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(OPERATORS[name], fullgraph=True, dynamic=True, backend=counter)
    weight, graphs = torch.randn(9, 16), []
    for rows in (5, 12, 31):
        x = torch.randn(rows, 16, requires_grad=name != "top_k")
        results = compiled(x, weight), OPERATORS[name](x, weight)
        torch.testing.assert_close(*results, rtol=0, atol=0)
        if x.requires_grad:
            grads = [torch.autograd.grad(each.sum(), x)[0] for each in results]
            torch.testing.assert_close(*grads, rtol=0, atol=0)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3
