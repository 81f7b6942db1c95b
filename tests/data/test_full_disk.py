"""A disk that fills up while a step of this layer writes: one clear error, nothing that looks whole."""

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marrow.core.errors import DiskFull
from marrow.data.clean import clean
from marrow.data.config import DataRecipe
from marrow.data.ingest import ingest
from marrow.data.shards import train_tokenizer, write_shards
from marrow.data.shards_config import ShardsRecipe
from marrow.text.config import TokenizerRecipe

RECIPE = {"row_group_bytes": 1 << 16}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """1 MB of texts that do not compress, all different."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(20_000)]
    return [" ".join(rng.choices(words, k=60)) for _ in range(2000)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("source") / "a.csv"
    path.write_text("text\n" + "\n".join(texts) + "\n")
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    out = tmp_path_factory.mktemp("rows")
    ingest(DataRecipe(source=str(source), **RECIPE), out)
    return out


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> tuple[Path, Path]:
    """A split and a tokenizer of it."""
    folder = tmp_path_factory.mktemp("split")
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    columns = {"document_id": range(len(texts)), "text": texts, "num_bytes": [len(text) for text in texts]}
    pq.write_table(pa.table(columns), folder / "train.parquet")
    small = tmp_path_factory.mktemp("small")
    pq.write_table(pa.table(columns).slice(0, 20), small / "train.parquet")
    train_tokenizer(TokenizerRecipe(vocab_size=330), small, tokenizer)
    return folder, tokenizer


Step = Callable[[Path], object]


@pytest.fixture(params=["ingest", "clean", "shards"])
def step(request: pytest.FixtureRequest) -> Step:
    if request.param == "ingest":
        path = request.getfixturevalue("source")
        return lambda out: ingest(DataRecipe(source=str(path), **RECIPE), out)
    if request.param == "clean":
        folder = request.getfixturevalue("rows")
        return lambda out: clean(DataRecipe(source="x", **RECIPE), folder, out)
    documents, tokenizer = request.getfixturevalue("split")
    return lambda out: write_shards(ShardsRecipe(context=64, shard_bytes=1 << 17), documents, tokenizer, out)


def test_a_disk_that_fills_up_is_one_clear_error_and_room_makes_it_go(small_disk, tmp_path, step):
    disk = small_disk("256k")
    with pytest.raises(DiskFull) as caught:
        step(disk)
    assert "no space left" in caught.value.message
    assert "free some space" in str(caught.value.hint)
    assert not (disk / "manifest.json").exists()
    assert not list(disk.glob(".tmp-*")), "no half file is left under a temporary name"
    for path in disk.iterdir():
        path.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    (tmp_path / "whole").mkdir()
    assert step(disk) == step(tmp_path / "whole"), "the same facts as on a disk with room"
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (disk / path.name).read_bytes()


def test_a_quarantine_that_fills_the_disk_is_said_as_well(small_disk, tmp_path, texts):
    disk = small_disk("256k")
    path = tmp_path / "b.csv"
    broken = "".join(f"{text[:450]},too,wide\n" for text in texts[:1000])
    path.write_text("text\n" + "".join(f"ok {i}\n" for i in range(1100)) + broken)
    with pytest.raises(DiskFull) as caught:
        ingest(DataRecipe(source=str(path)), disk)
    assert caught.value.hint
