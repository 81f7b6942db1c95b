"""Experts against the plainest way to write them, and against transformers' load-balance loss."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from marrow.kernels.attention.attention import attention, pack
from marrow.models.config import ModelConfig
from marrow.models.decoder import Decoder
from marrow.models.experts import Experts, balance_loss, choose_experts

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=4,
    max_positions=32,
    num_experts=4,
    experts_per_token=2,
)


def experts_of(config, seed=0, dtype=torch.float64):
    """A mixture of fp64 weights of ordinary size."""
    decoder = Decoder(config, device="cpu", dtype=dtype)
    experts = decoder.layers["0"].experts
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=generator)
    return experts


def plainly(experts: Experts, normed, weights, chosen):
    """Token by token, expert by expert."""
    rows = []
    for token in range(len(normed)):
        total = torch.zeros(normed.shape[1], dtype=normed.dtype)
        for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
            gate, up = (experts.gate_up_EGC[expert] @ normed[token]).chunk(2)
            total = total + weight * (experts.down_ECF[expert] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@given(
    tokens=st.integers(1, 9),
    num_experts=st.integers(1, 6),
    taken=st.integers(1, 6),
    normalise=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_each_token_gets_the_weighted_sum_of_its_experts(tokens, num_experts, taken, normalise, seed):
    config = dataclasses.replace(
        CONFIG,
        num_experts=num_experts,
        experts_per_token=min(taken, num_experts),
        normalise_experts=normalise,
    )
    experts = experts_of(config, seed)
    generator = torch.Generator().manual_seed(seed)
    normed = torch.randn(tokens, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weights, chosen = choose_experts(config, F.linear(normed, experts.router_EC))
    ours, theirs = experts(normed), plainly(experts, normed, weights, chosen)
    # fp64, but weights are fp32 in both: sums of at most 12 products in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    leaves = [normed, *experts.parameters()]
    upstream = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(ours, leaves, upstream),
        torch.autograd.grad(theirs, leaves, upstream, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the router's softmax is fp32


def test_the_same_tokens_give_the_same_bits_in_both_directions():
    """No atomic additions: twice the same gradients, which a run that resumes needs."""
    experts = experts_of(CONFIG, dtype=torch.float32)
    normed = torch.randn(64, 8).requires_grad_()

    def gradients():
        return torch.autograd.grad(experts(normed).square().sum(), [normed, *experts.parameters()])

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_an_expert_that_nobody_takes_learns_nothing():
    experts = experts_of(CONFIG)
    normed = torch.randn(5, 8, dtype=torch.float64)

    def route(layer, logits):
        assert layer == 0
        return torch.full((5, 2), 0.5), torch.tensor([[1, 3]] * 5)

    experts(normed, route).sum().backward()
    for parameter in (experts.gate_up_EGC, experts.down_ECF):
        moved = [bool(grad.any()) for grad in parameter.grad]
        assert moved == [False, True, False, True]


def test_route_is_asked_once_a_layer():
    asked = []

    def route(layer, logits_NE):
        asked.append((layer, tuple(logits_NE.shape)))
        return choose_experts(CONFIG, logits_NE)

    packing = pack(torch.zeros(6, dtype=torch.int32), 6)
    decoder = Decoder(CONFIG)
    arguments = torch.arange(6), torch.arange(6), lambda _, q, k, v: attention(q, k, v, packing)
    assert torch.equal(decoder(*arguments, route), decoder(*arguments))
    assert asked == [(0, (6, 4)), (1, (6, 4))]


@pytest.mark.parametrize("taken", [1, 2, 4])
def test_the_balance_loss_of_a_row_is_that_of_transformers(taken):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    config = dataclasses.replace(CONFIG, experts_per_token=taken)
    logits = torch.randn(24, 4, generator=torch.Generator().manual_seed(taken))
    _, chosen = choose_experts(config, logits)
    theirs = load_balancing_loss_func((logits,), 4, taken)
    ours = balance_loss(logits.softmax(-1), chosen, 24) * taken
    torch.testing.assert_close(ours, theirs)


def test_balance_is_one_for_even_use_and_e_over_a_at_worst():
    probabilities = torch.full((8, 4), 0.25)
    even = torch.arange(8)[:, None] % 4
    assert balance_loss(probabilities, even, 8).item() == pytest.approx(1.0)
    one = torch.nn.functional.one_hot(torch.zeros(8, dtype=torch.int64), 4).float()
    assert balance_loss(one, torch.zeros(8, 1, dtype=torch.int64), 8).item() == pytest.approx(4.0)


@given(rows=st.integers(1, 5), cut=st.integers(0, 5), seed=st.integers(0, 2**31))
def test_the_balance_loss_is_the_same_however_rows_are_dealt(rows, cut, seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(rows * 6, 4, generator=generator, dtype=torch.float64).softmax(-1)
    chosen = probabilities.topk(2).indices
    cut = min(cut, rows) * 6
    parts = [
        balance_loss(probabilities[part], chosen[part], 6)
        for part in (slice(0, cut), slice(cut, None))
        if len(probabilities[part])
    ]
    whole = balance_loss(probabilities, chosen, 6)
    torch.testing.assert_close(sum(parts, start=torch.zeros((), dtype=torch.float64)), whole)


@pytest.mark.slow
def test_it_compiles_into_one_graph():
    decoder = Decoder(CONFIG)
    packing = pack(torch.zeros(6, dtype=torch.int32), 6)
    arguments = torch.arange(6), torch.arange(6), lambda _, q, k, v: attention(q, k, v, packing)
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), decoder(*arguments))
