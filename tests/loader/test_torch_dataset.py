"""The door to PyTorch: one order in every loop that takes an IterableDataset, and exact resume in each."""

import json
import pickle
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import loader_jobs as jobs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ordinary import ordinary_user
from range_server import RangeServer
from torch.utils.data import DataLoader

from marrow.core.errors import DataError, NotPermitted, UsageError
from marrow.loader.loader import Loader
from marrow.loader.streaming.cache import Cache
from marrow.loader.torch_dataset import LoaderDataset

ROWS = 203
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parquet")
    table = pa.table({"id": np.arange(ROWS), "text": [f"row {row}" for row in range(ROWS)]})
    pq.write_table(table.slice(0, 120), folder / "a.parquet", row_group_size=25)
    pq.write_table(table.slice(120), folder / "b.parquet", row_group_size=30)
    return folder


def dataset(parquet: Path, batch_rows: int = 16, **options: Any) -> LoaderDataset:
    return LoaderDataset(str(parquet), batch_rows, transform=jobs.double, **options)


def ids(batches: Any) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def quiet(data: LoaderDataset, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more workers than this machine has cores
        return DataLoader(data, **options)


def test_an_epoch_holds_each_row_once_and_the_next_another_order(parquet: Path) -> None:
    data = dataset(parquet)
    first, second = ids(data), ids(data)
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(ROWS))
    assert first != second
    assert len(first) == len(data) == 13
    assert data.epoch == 2
    data.set_epoch(0)
    assert ids(data) == first


def test_it_is_the_loaders_own_order(parquet: Path) -> None:
    data = dataset(parquet, seed=3)
    with Loader(data.reader, 16, 3, collate=data._collate, stop=ROWS, prefetch=0) as loader:
        expected = ids(loader)
    assert ids(dataset(parquet, seed=3)) == expected


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("workers", [0, 1, pytest.param(3, marks=pytest.mark.slow)])
def test_pytorchs_workers_change_nothing(parquet: Path, workers: int, samples: bool) -> None:
    data = dataset(parquet, samples=samples)
    assert len(data) == (ROWS if samples else 13)
    loader = quiet(data, batch_size=16 if samples else None, num_workers=workers)
    assert ids(loader) == ids(dataset(parquet))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_each_batch(parquet: Path, world: int) -> None:
    whole = ids(dataset(parquet))
    parts = [ids(dataset(parquet, rank=rank, world=world)) for rank in range(world)]
    assert all(len(part) == len(dataset(parquet, rank=0, world=world)) for part in parts)
    joined = [sum((part[number] for part in parts), []) for number in range(len(parts[0]))]  # noqa: RUF017
    assert joined[:-1] == whole[:-1]
    assert joined[-1] == whole[-1][: len(whole[-1]) // world * world]


def test_iterating_twice_and_breaking_off_begin_the_epoch_anew(parquet: Path) -> None:
    data = dataset(parquet)
    expected = ids(dataset(parquet))
    for _ in data:
        break
    assert ids(data) == expected


@pytest.mark.parametrize("taken", [0, 1, 7, 12, 13])
@pytest.mark.parametrize("batch_rows", [16, 7])
def test_a_state_goes_on_with_the_next_row(parquet: Path, taken: int, batch_rows: int) -> None:
    """Also with batches of another size."""
    data = dataset(parquet)
    before, iterator = [], iter(data)
    before += [next(iterator)["id"].tolist() for _ in range(taken)]
    if taken == 13:
        assert next(iterator, None) is None
    state = json.loads(json.dumps(data.state_dict()))
    iterator.close()
    resumed = dataset(parquet, batch_rows)
    resumed.load_state_dict(state)
    after = ids(resumed)
    expected = flat(ids(dataset(parquet)))
    if taken == 13:  # the epoch is over: what follows is the next one
        assert flat(after) != expected
        assert sorted(flat(after)) == sorted(expected)
    else:
        assert flat(before) + flat(after) == expected


def test_a_state_in_the_midst_of_a_batch_of_samples(parquet: Path) -> None:
    expected = [sample["id"] for sample in dataset(parquet, samples=True)]
    for taken in (5, 16, 17):
        data = dataset(parquet, samples=True)
        iterator = iter(data)
        head = [next(iterator)["id"] for _ in range(taken)]
        resumed = dataset(parquet, samples=True)
        resumed.load_state_dict(data.state_dict())
        assert head + [sample["id"] for sample in resumed] == expected
        iterator.close()


@pytest.mark.parametrize("skip", [(), ((20, 40), (50, 51))])
def test_the_state_after_some_batches_is_arithmetic(parquet: Path, skip: Any) -> None:
    data = dataset(parquet, skip=skip)
    states = [data.state_dict() for _ in data]
    fresh = dataset(parquet, skip=skip)
    for number, state in enumerate(states[:-1], 1):
        assert fresh.state_after(number) == state
    assert len(dataset(parquet, skip=skip)) == len(states)


def test_a_state_of_something_else_is_refused(parquet: Path) -> None:
    state = dataset(parquet).state_dict()
    for other, words in (
        (state | {"check": "0"}, "other data"),
        (state | {"seed": 9}, "other seed"),
        (state | {"order": "window of 3 shards"}, "other order"),
        ({"position": 3}, "no state"),
        (state | {"position": "x"}, "no state"),
        (state | {"position": -4}, "no state"),
    ):
        with pytest.raises(DataError, match=words):
            dataset(parquet).load_state_dict(other)
    with pytest.raises(UsageError, match="batches of 16 rows"):
        dataset(parquet, 8).load_state_dict(state | {"lead": 1})


@pytest.mark.parametrize("numbers", [(0, 0, 1), (4, 0, 0), (5, 0, 2), (4, 2, 2), (4, -1, 2)])
def test_shares_that_do_not_fit_are_refused(parquet: Path, numbers: tuple[int, int, int]) -> None:
    batch_rows, rank, world = numbers
    with pytest.raises(UsageError, match="cannot be shared"):
        dataset(parquet, batch_rows, rank=rank, world=world)


def test_without_shuffling_rows_come_in_the_order_of_the_files(parquet: Path) -> None:
    assert flat(ids(dataset(parquet, shuffle=False))) == list(range(ROWS))
    with pytest.raises(UsageError, match="window without shuffle"):
        dataset(parquet, shuffle=False, window=2)


def test_a_window_of_row_groups(parquet: Path) -> None:
    data = dataset(parquet, window=2)
    assert sorted(flat(ids(data))) == list(range(ROWS))
    assert data.reader.decoded_groups <= 12  # of 8


@pytest.mark.parametrize("name", ["mds-plain", "litdata-plain"])
def test_other_formats_are_known_by_their_index(name: str) -> None:
    data = LoaderDataset(GOLDEN / name, 4, transform=keep_number)
    assert sorted(flat([batch["number"].tolist() for batch in data])) == list(range(-5, 18))


def keep_number(sample: dict[str, Any], position: int) -> dict[str, Any]:
    return {"number": sample["number"]}


def test_shards_become_what_a_hugging_face_model_takes(shards: Path) -> None:
    data = LoaderDataset(shards, 4)
    batch = next(iter(data))
    assert {name: column.shape for name, column in batch.items()} == dict.fromkeys(batch, (4, 24))
    with Loader(shards, 4, 0, prefetch=0) as loader:
        own = next(loader)
    assert torch.equal(batch["input_ids"].reshape(-1), own.tokens_N)
    assert torch.equal(batch["shift_labels"].reshape(-1), own.targets_N)
    row = next(iter(LoaderDataset(shards, 4, samples=True)))
    assert all(torch.equal(row[name], batch[name][0]) for name in batch)


@pytest.mark.slow
def test_our_own_workers_under_the_door(parquet: Path) -> None:
    data = dataset(parquet, workers=1)
    assert ids(data) == ids(dataset(parquet))
    assert data.counters()["batches"] == 13


def test_it_travels_to_spawned_workers(parquet: Path) -> None:
    data = dataset(parquet)
    iterator = iter(data)
    next(iterator)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.state_dict() == data.state_dict()
    iterator.close()


def test_an_error_in_the_consumer_leaves_no_thread(parquet: Path) -> None:
    import threading

    def consume() -> None:
        for _ in dataset(parquet):
            raise RuntimeError("of the consumer")

    with pytest.raises(RuntimeError, match="of the consumer"):
        consume()
    assert not [thread for thread in threading.enumerate() if thread.name == "marrow-loader"]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated", "ignore:This DataLoader will create")
@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_torchdatas_stateful_loader_resumes_exactly(parquet: Path, workers: int, samples: bool) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        data = dataset(parquet, samples=samples)
        return stateful.StatefulDataLoader(data, batch_size=16 if samples else None, num_workers=workers)

    first = loader()
    iterator = iter(first)
    head = [next(iterator)["id"].tolist() for _ in range(5)]
    state = first.state_dict()
    del iterator
    second = loader()
    second.load_state_dict(state)
    assert head + ids(second) == ids(dataset(parquet))


@pytest.mark.slow
def test_the_trainer_of_hugging_face_trains_and_resumes_exactly(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    seen: list[list[int]] = []

    def trainer(name: str, steps: int, data: LoaderDataset, **options: Any) -> Any:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
            )
        )  # fmt: skip
        arguments = transformers.TrainingArguments(
            str(tmp_path / name), per_device_train_batch_size=4, max_steps=steps, save_steps=4, report_to=[],
            use_cpu=True, learning_rate=1e-2, lr_scheduler_type="constant", disable_tqdm=True,
            logging_strategy="no", dataloader_pin_memory=False, **options,
        )  # fmt: skip
        collator = transformers.default_data_collator

        def noting(rows: Any) -> Any:
            seen.append([int(row["input_ids"].sum()) for row in rows])
            return collator(rows)

        return transformers.Trainer(model, arguments, data_collator=noting, train_dataset=data)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = trainer("whole", 8, LoaderDataset(shards, 4, samples=True))
        whole.train()
        expected = list(seen[:8])
        seen.clear()
        # The Trainer's own way: it reads what was trained on, and throws it away.
        resumed = trainer("resumed", 8, LoaderDataset(shards, 4, samples=True))
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
        assert seen[4:8] == expected[4:]
        seen.clear()
        # By arithmetic: nothing is read again.
        data = LoaderDataset(shards, 4, samples=True)
        data.load_state_dict(data.state_after(4 * 4))
        sought = trainer("sought", 8, data, ignore_data_skip=True)
        sought.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
        assert seen[:4] == expected[4:]
    for other in (resumed, sought):
        pairs = zip(whole.model.parameters(), other.model.parameters(), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.slow
def test_a_hugging_face_model_keeps_documents_apart_and_agrees_on_the_loss(shards: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    batch = next(iter(LoaderDataset(shards, 4)))
    with torch.no_grad():
        together = model(**batch)
        losses, count = 0.0, 0
        for row in range(4):
            starts = [*torch.nonzero(batch["position_ids"][row] == 0).flatten().tolist(), 24]
            for low, high in pairwise(starts):
                alone = model(batch["input_ids"][row : row + 1, low:high]).logits[0]
                targets = batch["labels"][row, low:high]
                losses += float(torch.nn.functional.cross_entropy(alone, targets, reduction="sum"))
                count += int((targets != -100).sum())
    # Sums of float32 in another order.
    assert float(together.loss) == pytest.approx(losses / count, rel=1e-4)


@pytest.mark.slow
def test_lightning_trains_and_resumes_exactly(parquet: Path, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    seen: list[list[int]] = []

    class Model(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch: dict[str, Any], number: int) -> Any:
            seen.append(batch["id"].tolist())
            return (self.weight - batch["id"].float().mean()).square().sum() * 1e-6

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def trainer(steps: int) -> Any:
        return lightning.Trainer(
            accelerator="cpu", max_steps=steps, max_epochs=9, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(tmp_path),
        )  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = trainer(5)
        first.fit(Model(), dataset(parquet, prefetch=0))
        first.save_checkpoint(str(tmp_path / "five.ckpt"))
        trainer(11).fit(Model(), dataset(parquet, prefetch=0), ckpt_path=str(tmp_path / "five.ckpt"))
    assert seen == ids(dataset(parquet))[:11]


def test_shards_at_a_url_come_through_a_cache(shards: Path, tmp_path: Path) -> None:
    here = [batch["input_ids"] for batch in LoaderDataset(shards, 4, seed=3)]
    with RangeServer(shards.parent) as server:
        url = f"{server.url}/{shards.name}"
        with pytest.raises(UsageError, match="no cache"):
            LoaderDataset(url, 4, seed=3)
        data = LoaderDataset(url, 4, seed=3, cache=Cache(tmp_path / "cache", 1 << 20))
        there = [batch["input_ids"] for batch in data]
        counted = data.counters()["shards"]
        data.reader.close()
    assert len(there) == len(here)
    assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))
    assert counted["misses"] == len(list(shards.glob("*.arrow"))) and counted["retries"] == 0


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match=r"rows\.csv is no Parquet file") as caught:
        LoaderDataset(tmp_path / "rows.csv", 4)
    assert "marrow run" in str(caught.value.hint)
    (tmp_path / "locked").mkdir(mode=0)
    with ordinary_user(), pytest.raises(NotPermitted, match="locked"):
        LoaderDataset(tmp_path / "locked", 4)
