"""The optimisers against torch's AdamW and a textbook Muon, one matrix at a time."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from marrow.kernels.optimisers.newton_schulz import newton_schulz
from marrow.models.config import ModelConfig
from marrow.models.decoder import Decoder
from marrow.train.config import TrainRecipe
from marrow.train.optimiser import Optimiser

MODEL = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
)


def set_gradients(decoder: Decoder, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    gradients = {}
    for name, weight in decoder.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator) * scale
        weight.grad = drawn.to(weight.dtype)
        gradients[name] = weight.grad.clone()
    return gradients


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs_adamw(weight_decay: float) -> None:
    recipe = TrainRecipe(optimiser="adamw", adamw_lr=1e-2, weight_decay=weight_decay, max_grad_norm=0.0)
    ours, theirs = Decoder(MODEL, seed=1), Decoder(MODEL, seed=1)
    optimiser = Optimiser(ours, recipe=recipe)
    weights = list(theirs.parameters())
    torchs = torch.optim.AdamW(
        [
            {"params": [w for w in weights if w.ndim == 2], "weight_decay": weight_decay},
            {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(recipe.beta1, recipe.beta2),
        eps=1e-8,
    )
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimiser.collect()
        optimiser.step(1.0)
        torchs.step()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # The same formula in another order of fp32 operations: five steps of size 1e-2, a few ulp each.
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-7, msg=name)


def textbook_newton_schulz(gradient: Tensor) -> Tensor:
    """Jordan's iteration for one matrix, as in the paper's listing."""
    x = gradient / gradient.norm()
    if gradient.shape[0] > gradient.shape[1]:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if gradient.shape[0] > gradient.shape[1] else x


def test_muon_is_the_textbooks() -> None:
    recipe = TrainRecipe(lr=0.05, adamw_lr=0.0, momentum=0.9, weight_decay=0.1, max_grad_norm=0.0)
    decoder = Decoder(MODEL, seed=1)
    start = {name: weight.detach().clone() for name, weight in decoder.named_parameters()}
    optimiser = Optimiser(decoder, recipe=recipe)
    history = []
    for step in range(3):
        history.append(set_gradients(decoder, step))
        optimiser.collect()
        optimiser.step(0.5)
    after = dict(decoder.named_parameters())
    queries, keys, hidden = 16, 8, 24
    pieces = {
        "qkv_YC": [queries, keys, keys],
        "gate_up_GC": [hidden, hidden],
        "out_CX": [16],
        "down_CF": [16],
    }
    for name in start:
        if name.split(".")[-1] not in pieces:
            continue
        sizes = pieces[name.split(".")[-1]]
        parts = zip(start[name].split(sizes), after[name].split(sizes), strict=True)
        for index, (weight, found) in enumerate(parts):
            momentum = torch.zeros_like(weight)
            for gradients in history:
                gradient = gradients[name].split(sizes)[index]
                momentum = 0.9 * momentum + gradient
                direction = textbook_newton_schulz(gradient + 0.9 * momentum)
                rate = 0.05 * 0.5
                weight = weight * (1 - rate * 0.1)
                weight = weight - rate * max(1, weight.shape[0] / weight.shape[1]) ** 0.5 * direction
            # fp32 both; the iteration multiplies rounding by up to 3.4^5 = 500, on steps of 0.025.
            torch.testing.assert_close(found, weight, rtol=1e-4, atol=2e-5, msg=f"{name}[{index}]")


def test_newton_schulz_keeps_the_vectors_and_evens_the_values() -> None:
    matrices = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0))
    found = newton_schulz(matrices)
    for matrix, direction in zip(matrices, found, strict=True):
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        assert values.max() / values.min() > 2
        inside = u.T @ direction @ vh.T
        # Jordan's coefficients stop between 0.68 and 1.13 for values above 0.02 of the norm.
        assert inside.diagonal().min() > 0.6 and inside.diagonal().max() < 1.2
        torch.testing.assert_close(inside, inside.diagonal().diag(), rtol=0, atol=1e-4)


def test_fused_weights_are_taken_apart() -> None:
    decoder = Decoder(MODEL, seed=0)
    matrices = [m for group in Optimiser(decoder, recipe=TrainRecipe()).groups.values() for m in group]
    rows = [(m.name.split(".")[-1], m.part.shape[0]) for m in matrices if ".0." in m.name]
    assert sorted(rows, reverse=True) == [
        ("qkv_YC", 16),
        ("qkv_YC", 8),
        ("qkv_YC", 8),
        ("out_CX", 16),
        ("gate_up_GC", 24),
        ("gate_up_GC", 24),
        ("down_CF", 16),
    ]


def test_embeddings_and_norms_take_adamw_under_muon() -> None:
    decoder = Decoder(MODEL, seed=0)
    optimiser = Optimiser(decoder, recipe=TrainRecipe())
    left = set(optimiser.mean)
    assert {"embedding_VC", "norm_C", "layers.0.q_norm_D", "layers.1.mlp_norm_C"} <= left
    assert not any(name.endswith(("qkv_YC", "out_CX", "gate_up_GC", "down_CF")) for name in left)


@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
def test_clipping_is_as_if_the_gradients_had_been_smaller(optimiser: str) -> None:
    clipped, scaled = Decoder(MODEL, seed=1), Decoder(MODEL, seed=1)
    first = Optimiser(clipped, recipe=TrainRecipe(optimiser=optimiser, max_grad_norm=0.5))  # type: ignore[arg-type]
    second = Optimiser(scaled, recipe=TrainRecipe(optimiser=optimiser, max_grad_norm=0.0))  # type: ignore[arg-type]
    for step in range(3):
        norm = math.sqrt(sum(float(g.square().sum()) for g in set_gradients(clipped, step).values()))
        set_gradients(scaled, step, scale=0.5 / norm)
        first.collect()
        second.collect()
        assert first.step(1.0) == pytest.approx(norm, rel=1e-5)
        second.step(1.0)
    for mine, other in zip(clipped.parameters(), scaled.parameters(), strict=True):
        # One rounding of the scale apart, grown by Newton-Schulz as above.
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-5)


def test_bf16_weights_follow_fp32_masters() -> None:
    """Steps far below bf16's resolution add up: 200 times 1e-5 on weights near 1."""
    decoder = Decoder(MODEL, seed=0, dtype=torch.bfloat16)
    optimiser = Optimiser(decoder, recipe=TrainRecipe(optimiser="adamw", adamw_lr=1e-5, max_grad_norm=0.0))
    assert decoder.norm_C.dtype == torch.bfloat16
    for _ in range(200):
        for weight in decoder.parameters():
            weight.grad = torch.ones_like(weight)
        optimiser.collect()
        optimiser.step(1.0)
    # Adam moves by lr a step while gradients are equal; 1 - 0.002 rounds to a neighbour of bf16.
    torch.testing.assert_close(optimiser.masters["norm_C"], torch.full((16,), 1 - 200e-5), rtol=0, atol=1e-5)
    assert torch.equal(decoder.norm_C, torch.full((16,), 0.998, dtype=torch.bfloat16))


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    decoder = Decoder(MODEL, seed=0)
    optimiser = Optimiser(decoder, recipe=TrainRecipe())
    before = [weight.detach().clone() for weight in decoder.parameters()]
    set_gradients(decoder, 0)
    assert decoder.norm_C.grad is not None
    decoder.norm_C.grad[3] = float("inf")
    optimiser.collect()
    assert optimiser.step(1.0) == math.inf
    assert all(torch.equal(a, b) for a, b in zip(before, decoder.parameters(), strict=True))


@pytest.mark.parametrize("optimiser", ["muon", "adamw"])
def test_a_loaded_state_goes_on_bit_by_bit(optimiser: str) -> None:
    recipe = TrainRecipe(optimiser=optimiser)  # type: ignore[arg-type]
    decoder = Decoder(MODEL, seed=1, dtype=torch.bfloat16)
    whole = Optimiser(decoder, recipe=recipe)

    def run(target: Decoder, stepper: Optimiser, steps: range) -> None:
        for step in steps:
            set_gradients(target, step)
            stepper.collect()
            stepper.step(1.0)

    run(decoder, whole, range(3))
    other = Decoder(MODEL, seed=2, dtype=torch.bfloat16)
    resumed = Optimiser(other, recipe=recipe)
    resumed.load_state({name: tensor.clone() for name, tensor in whole.state().items()}, 3)
    run(decoder, whole, range(3, 6))
    run(other, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), other.parameters(), strict=True))
    mine, theirs = whole.state(), resumed.state()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_micro_batches_add_up_in_fp32(tiny_recipe: Callable[..., TrainRecipe]) -> None:
    decoder = Decoder(MODEL, seed=0, dtype=torch.bfloat16)
    optimiser = Optimiser(decoder, recipe=tiny_recipe())
    total = {name: torch.zeros(weight.shape) for name, weight in decoder.named_parameters()}
    for seed in range(3):
        for name, gradient in set_gradients(decoder, seed).items():
            total[name] += gradient.float()
        optimiser.collect()
    assert all(torch.equal(optimiser.gradients[name], total[name]) for name in total)
