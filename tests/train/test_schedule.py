import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.train.config import TrainRecipe
from marrow.train.schedule import lr_factor


def factors(**values: object) -> list[float]:
    recipe = TrainRecipe(**values)  # type: ignore[arg-type]
    return [lr_factor(recipe, step) for step in range(recipe.steps)]


def test_linear_rises_over_the_warmup_and_falls_to_the_end() -> None:
    assert factors(schedule="linear", steps=8, warmup_steps=3) == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2]
    )


def test_wsd_stays_until_its_decay() -> None:
    assert factors(schedule="wsd", steps=10, warmup_steps=1, decay_share=0.4) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    )


def test_cosine_is_half_a_wave() -> None:
    assert factors(schedule="cosine", steps=4, warmup_steps=0) == pytest.approx(
        [0.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(4)]
    )


def test_without_warmup_the_first_step_is_full() -> None:
    for schedule in ("linear", "wsd", "cosine"):
        assert factors(schedule=schedule, steps=5, warmup_steps=0)[0] == 1.0


@given(
    schedule=st.sampled_from(["linear", "cosine", "wsd"]),
    steps=st.integers(1, 300),
    warmup_share=st.floats(0, 1),
    decay_share=st.floats(0, 1),
)
def test_every_step_moves_and_none_above_full(
    schedule: str, steps: int, warmup_share: float, decay_share: float
) -> None:
    warmup = int(warmup_share * steps)
    found = factors(schedule=schedule, steps=steps, warmup_steps=warmup, decay_share=decay_share)
    assert all(0 < factor <= 1 for factor in found)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
