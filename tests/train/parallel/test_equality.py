"""However a run is spread, it trains the same model: five steps of SGD against one process."""

import dataclasses
import itertools
import math

import pytest
import torch
from ranks import run_ranks
from spread_jobs import train_steps
from torch import Tensor

from marrow.models.config import ModelConfig
from marrow.train.config import TrainRecipe
from marrow.train.parallel.config import ParallelRecipe

MODEL = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    max_positions=16,
    initial_std=0.2,
)


def joined(results) -> dict[str, Tensor]:
    """Put the ranks' regions together; where several hold the same, they must agree to the bit."""
    whole: dict[str, Tensor] = {}
    for found, _ in results:
        for name, shape, box, tensor in found:
            place = whole.setdefault(name, torch.full(shape, torch.nan))[box]
            known = ~place.isnan()
            assert torch.equal(place[known], tensor[known]), name
            place.copy_(tensor)
    return whole


AXES = ("dp", "fsdp", "tp", "pp")
ALONE = ParallelRecipe()
SPREADS = [
    ParallelRecipe(**dict(zip(AXES, sizes, strict=True)))
    for sizes in itertools.product((1, 2), repeat=4)
    if 1 < math.prod(sizes) <= 8
]
OTHERS = [
    ParallelRecipe(fsdp=2, reshard=False),
    ParallelRecipe(dp=4, zero=1),
    ParallelRecipe(dp=2, fsdp=2, zero=1),
    ParallelRecipe(pp=2, schedule="interleaved", stages_per_rank=2),
    ParallelRecipe(pp=4),
    ParallelRecipe(fsdp=2, dp=2, pp=2, schedule="interleaved", stages_per_rank=2),
]
EXPERTS, UNTIED = dataclasses.replace(MODEL, num_experts=4), dataclasses.replace(MODEL, tie_embeddings=False)
SGD = TrainRecipe(optimiser="sgd", lr=0.1, seed=3, micro_batches=4, batch_rows=16, balance=0.01)
MUON = dataclasses.replace(SGD, optimiser="muon", lr=0.01, adamw_lr=0.001)
ADAMW = dataclasses.replace(MUON, optimiser="adamw")
JOBS = [
    *((MODEL, SGD, parallel) for parallel in (*SPREADS, *OTHERS)),
    *((UNTIED, SGD, parallel) for parallel in OTHERS),
    *((EXPERTS, SGD, parallel) for parallel in SPREADS if parallel.world == 4),
    *((MODEL, recipe, parallel) for parallel in SPREADS if parallel.world == 8 for recipe in (MUON, ADAMW)),
    *((MODEL, recipe, ParallelRecipe(dp=2, tp=2, zero=1)) for recipe in (MUON, ADAMW)),
]


def shown(job):
    model, recipe, parallel = job
    kind = "experts " if model is EXPERTS else "untied " if model is UNTIED else ""
    changed = (f"{name}={value}" for name, value in dataclasses.asdict(parallel).items())
    plain = {f"{name}={value}" for name, value in dataclasses.asdict(ALONE).items()}
    return f"{kind}{recipe.optimiser} {' '.join(one for one in changed if one not in plain)}"


@pytest.fixture(scope="module")
def reached(tmp_path_factory):
    """What all jobs reach: those of equally many ranks share their processes."""
    alone = [(model, recipe, ALONE) for model, recipe in dict.fromkeys(job[:2] for job in JOBS)]
    found = {}
    for world in (1, 2, 4, 8):
        jobs = [job for job in (*alone, *JOBS) if job[2].world == world]
        ranks = run_ranks(world, train_steps, jobs, folder=tmp_path_factory.mktemp("ranks"), timeout_s=300)
        found |= {job: [results[number] for results in ranks] for number, job in enumerate(jobs)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS, ids=shown)
def test_five_steps_reach_the_weights_of_one_process(job, reached):
    model, recipe, _ = job
    ((weights, figures),) = reached[model, recipe, ALONE]
    # SGD hides nothing: 1e-6 of weights around 0.2. Muon and AdamW divide by the size of a gradient, which is
    # rounding itself where it should be 0: in a few numbers a step's whole size, 1e-3 (AdamW), may differ;
    # Newton-Schulz multiplies rounding by 3.4^5 = 500.
    tolerance = 1e-6 if recipe.optimiser == "sgd" else 2e-4
    whole = joined(reached[job])
    assert whole.keys() == {name for name, *_ in weights}
    for name, _, _, expected in weights:
        torch.testing.assert_close(whole[name], expected, rtol=0, atol=tolerance, msg=name)
    for _, found in reached[job]:
        assert found == reached[job][0][1]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(figures), rtol=1e-5, atol=0)
