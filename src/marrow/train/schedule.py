r"""The learning rate over the steps: a pure factor in 0..1 of (recipe, step).

1 |  /-----------\            wsd: warmup, stable, decay
| /             \
    0 |/_______________\__ step
"""

import math

from marrow.train.config import TrainRecipe


def lr_factor(recipe: TrainRecipe, step: int) -> float:
    """Return what the learning rates are multiplied with at a step.

    Args: step: 0 .. recipe.steps - 1. The first step already moves; the last is above 0, since an
        update with 0 would be computed for nothing: both ends of a ramp lie outside the run.
    """
    assert 0 <= step < recipe.steps
    warmup, steps = recipe.warmup_steps, recipe.steps
    rise = min(1.0, (step + 1) / (warmup + 1))
    to_go = (steps - step) / (steps - warmup) if steps > warmup else 1.0  # 1 at the end of the warmup
    if recipe.schedule == "linear":
        fall = min(1.0, to_go)
    elif recipe.schedule == "cosine":
        fall = 0.5 - 0.5 * math.cos(math.pi * min(1.0, to_go))
    else:
        decay_steps = max(1.0, recipe.decay_share * steps)
        fall = min(1.0, (steps - step) / decay_steps)
    return rise * fall
