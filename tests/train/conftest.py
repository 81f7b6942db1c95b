"""Fixtures of the training tests: a tiny corpus as shards, a tiny model, a tiny recipe."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marrow.data.shards import train_tokenizer, write_shards
from marrow.data.shards_config import ShardsRecipe
from marrow.kernels import device
from marrow.models.config import ModelConfig
from marrow.text.config import TokenizerRecipe
from marrow.train.config import TrainRecipe


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `split`, `tokenizer` and `shards`: short and long documents, T = 32, real files."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"def add_{n}(left, right):\n    return left + right + {n}\n" * (1 + n % 5) for n in range(60)]
    table = pa.table(
        {
            "document_id": pa.array(range(len(texts)), pa.int64()),
            "text": texts,
            "num_bytes": pa.array([len(text) for text in texts], pa.int64()),
        }
    )
    for name in ("split", "tokenizer", "shards"):
        (folder / name).mkdir()
    pq.write_table(table, folder / "split" / "train.parquet")
    train_tokenizer(TokenizerRecipe(vocab_size=352), folder / "split", folder / "tokenizer")
    write_shards(ShardsRecipe(context=32), folder / "split", folder / "tokenizer", folder / "shards")
    return folder


@pytest.fixture(scope="session")
def measured_once() -> Callable[[], device.DtypeChoice]:
    return functools.cache(device.choose_dtype)


@pytest.fixture(scope="module", autouse=True)
def one_measurement(measured_once: Callable[[], device.DtypeChoice]) -> Iterator[None]:
    """Measure this machine's matrix products once, not for half a second at the start of each run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "choose_dtype", measured_once)
        yield


@pytest.fixture
def tiny_model() -> ModelConfig:
    """Two layers with grouped queries, tied embeddings, qk_norm."""
    return ModelConfig(
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=8,
        max_positions=32,
    )


@pytest.fixture
def tiny_recipe() -> Callable[..., TrainRecipe]:
    """A recipe of 12 steps in fp32 on one thread, never checkpointing by time; arguments change it."""
    base = TrainRecipe(
        steps=12,
        batch_rows=4,
        warmup_steps=2,
        dtype="float32",
        threads=1,
        compile="off",
        log_every=4,
        checkpoint_every=1e9,
    )

    def make(**changes: Any) -> TrainRecipe:
        return replace(base, **changes)

    return make
