from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError, SourceError, UsageError
from marrow.loader.batch import IGNORED, Batch, lay_samples
from marrow.loader.budget import BatchPlan, PlannedReader, plan_batches
from marrow.loader.loader import Loader, LoaderState

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=300)


class Samples:
    """A reader of samples in memory: sample n is n, n, ... as often as it is long."""

    check = "samples"

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.num_rows = len(lengths)
        self.told: list[int] = []

    def take(self, rows_B: np.ndarray) -> list[np.ndarray]:
        return [np.full(self.lengths[row], row, dtype=np.uint16) for row in rows_B.tolist()]

    def ahead(self, rows_N: np.ndarray) -> None:
        self.told += rows_N.tolist()

    def close(self) -> None:
        pass


@settings(deadline=None, max_examples=100)
@given(
    lengths=LENGTHS,
    budget=st.integers(60, 500),
    seed=st.integers(0, 9),
    padded=st.booleans(),
    pool=st.integers(1, 400),
)
def test_every_sample_is_in_one_batch_within_the_budget(
    lengths: list[int], budget: int, seed: int, padded: bool, pool: int
) -> None:
    plan = plan_batches(np.array(lengths), budget, seed, padded=padded, pool=pool)
    batches = [plan.batch(index).tolist() for index in range(plan.num_batches)]
    assert sorted(sample for batch in batches for sample in batch) == list(range(len(lengths)))
    paid = 0
    for batch in batches:
        own = [lengths[sample] for sample in batch]
        cost = max(own) * len(own) if padded else sum(own)
        assert 0 < cost <= budget
        paid += cost
    assert plan.num_tokens == sum(lengths)
    assert plan.padding_share == pytest.approx(1 - sum(lengths) / paid, abs=1e-6)
    assert plan.budget_use == pytest.approx(sum(lengths) / (len(batches) * budget))


def test_like_goes_with_like_so_padding_is_small() -> None:
    """Lognormal lengths, as of chats: batches drawn by chance alone would be padding by half."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 1, 20_000).astype(np.int64), 1, 4096)
    plan = plan_batches(lengths, 16_384, 0)
    assert plan.padding_share < 0.03  # 0.024 here
    by_chance = plan_batches(lengths, 16_384, 0, pool=1)
    assert by_chance.num_batches == len(lengths)
    flat = plan_batches(lengths, 16_384, 0, padded=False)
    assert flat.padding_share == 0 and flat.budget_use > 0.99


def test_other_seeds_make_other_batches() -> None:
    lengths = np.full(1000, 7)
    plans = [plan_batches(lengths, 70, seed, pool=100) for seed in (0, 0, 1)]
    assert plans[0].check == plans[1].check != plans[2].check
    assert len({plan.num_batches for plan in plans}) == 1


@pytest.mark.parametrize("padded", [True, False])
def test_the_plan_is_an_artifact(tmp_path: Path, padded: bool) -> None:
    plan = plan_batches(np.arange(1, 60), 120, 3, padded=padded)
    plan.write(tmp_path / "plan.arrow")
    read = BatchPlan.read(tmp_path / "plan.arrow")
    assert read.check == plan.check
    assert replace(read, rows=plan.rows, rows_of=plan.rows_of) == plan
    again = tmp_path / "again.arrow"
    read.write(again)
    assert again.read_bytes() == (tmp_path / "plan.arrow").read_bytes()
    # Anyone can read it.
    with pa.ipc.open_file(tmp_path / "plan.arrow") as file:
        assert file.read_all().column("samples").to_pylist()[0] == plan.batch(0).tolist()


def content(batch: Batch) -> tuple[list[int], list[int], list[int]]:
    return batch.tokens_N.tolist(), batch.targets_N.tolist(), batch.document_N.tolist()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_sees_each_sample_once_on_any_number_of_ranks(world: int) -> None:
    lengths = [1 + n * 7 % 50 for n in range(200)]
    plan = plan_batches(np.array(lengths), 150, 0, padded=False)
    seen: list[int] = []
    for rank in range(world):
        reader = PlannedReader(Samples(lengths), plan)
        with Loader(
            reader, world, 5, rank, world, collate=lay_samples, stop=plan.num_batches, prefetch=0
        ) as loader:
            for batch in loader:
                assert len(batch.tokens_N) <= 150
                starts = batch.tokens_N[batch.positions_N == 0].tolist()
                seen += starts
                assert batch.num_targets == int((batch.targets_N != IGNORED).sum())
    left = plan.num_batches % world  # batches that could not be shared evenly
    missing = set(range(200)) - set(seen)
    assert len(seen) == len(set(seen))
    assert bool(missing) == bool(left)


def test_resuming_a_plan_goes_on_with_the_next_batch() -> None:
    lengths = [1 + n * 7 % 50 for n in range(200)]
    plan = plan_batches(np.array(lengths), 150, 0)
    with Loader(PlannedReader(Samples(lengths), plan), 1, 5, collate=lay_samples) as loader:
        every = [content(next(loader)) for _ in range(2 * plan.num_batches)]
    assert sorted(every[: plan.num_batches]) == sorted(every[plan.num_batches :]) != every[plan.num_batches :]
    with Loader(PlannedReader(Samples(lengths), plan), 1, 5, collate=lay_samples) as loader:
        for _ in range(17):
            next(loader)
        state = LoaderState.from_json(loader.state().to_json())
    with Loader.resume(PlannedReader(Samples(lengths), plan), 1, state, collate=lay_samples) as loader:
        assert [content(next(loader)) for _ in range(20)] == every[17:37]
    other = plan_batches(np.array(lengths), 151, 0)
    with pytest.raises(DataError, match="not the data"):
        Loader.resume(PlannedReader(Samples(lengths), other), 1, state, collate=lay_samples)


def test_the_samples_of_coming_batches_are_told_ahead() -> None:
    samples = Samples([3] * 40)
    reader = PlannedReader(samples, plan_batches(np.full(40, 3), 12, 0))
    reader.ahead(np.array([1, 0]))
    assert samples.told == [*reader.plan.batch(1).tolist(), *reader.plan.batch(0).tolist()]


@pytest.mark.parametrize("lengths", [[], [0], [5, -1], [5, 101]])
def test_samples_that_do_not_fit_are_named(lengths: list[int]) -> None:
    with pytest.raises(UsageError, match=r"no samples|sample \d has") as error:
        plan_batches(np.array(lengths), 100, 0)
    assert error.value.hint


def test_a_plan_of_other_data_is_refused() -> None:
    plan = plan_batches(np.full(10, 3), 12, 0)
    with pytest.raises(DataError, match="plan is for 10 samples, the data has 9"):
        PlannedReader(Samples([3] * 9), plan)


def test_a_damaged_plan_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "plan.arrow"
    with pytest.raises(SourceError):
        BatchPlan.read(path)
    plan = plan_batches(np.full(10, 3), 12, 0)
    plan.write(path)
    whole = path.read_bytes()
    for data in (b"", b"ARROW1", whole[:-20], whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(DataError, match="no plan of batches"):
            BatchPlan.read(path)
    replace(plan, rows=np.zeros(10, dtype=np.int64)).write(path)
    with pytest.raises(DataError, match="two batches"):
        BatchPlan.read(path)
    schema = pa.schema({"samples": pa.large_list(pa.int64())}, metadata={"marrow.batch_plan": "99"})
    with pa.ipc.new_file(path, schema) as file:
        file.write_batch(pa.record_batch({"samples": pa.array([[1]], pa.large_list(pa.int64()))}, schema))
    with pytest.raises(DataError, match="version 99"):
        BatchPlan.read(path)
