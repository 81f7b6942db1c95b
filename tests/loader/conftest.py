import random
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_server import FaultProxy
from range_server import RangeServer
from shard_origin import Origin

from marrow.data.shards import train_tokenizer, write_shards
from marrow.data.shards_config import ShardsRecipe
from marrow.text.config import TokenizerRecipe

CONTEXT = 24
MakeShards = Callable[..., Path]


def some_texts(count: int) -> list[str]:
    """Documents of every size: empty, a few tokens, some rows long."""
    rng = random.Random(0)
    words = [
        "def f(x):\n",
        "    return x\n",
        "import os\n",
        "naïve ",
        "中文 ",
        "self.",
        "x = 1\n",
        "# note\n",
    ]
    return ["".join(rng.choices(words, k=rng.choice([0, 1, 3, 8, 30, 90]))) for _ in range(count)]


@pytest.fixture(scope="session")
def make_shards(tmp_path_factory: pytest.TempPathFactory) -> MakeShards:
    """Write shards of a few documents through the real steps."""

    def make(num_documents: int = 80, context: int = CONTEXT, shard_bytes: int = 2000) -> Path:
        split, tokenizer, out = (tmp_path_factory.mktemp(name) for name in ("split", "tokenizer", "shards"))
        texts = some_texts(num_documents)
        table = pa.table(
            {
                "document_id": pa.array(range(num_documents), pa.int64()),
                "text": pa.array(texts, pa.string()),
                "num_bytes": pa.array([len(text.encode()) for text in texts], pa.int64()),
            }
        )
        pq.write_table(table, split / "train.parquet")
        train_tokenizer(TokenizerRecipe(vocab_size=340), split, tokenizer)
        write_shards(ShardsRecipe(context=context, shard_bytes=shard_bytes), split, tokenizer, out)
        return out

    return make


@pytest.fixture(scope="session")
def shards(make_shards: MakeShards) -> Path:
    """Several shards of about 40 rows each; nobody writes to them."""
    return make_shards()


@pytest.fixture(scope="session")
def file_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RangeServer, Path]]:
    """Give a server of files and the folder that it serves."""
    folder = tmp_path_factory.mktemp("served")
    with RangeServer(folder) as server:
        yield server, folder


@pytest.fixture
def origin(file_server: tuple[RangeServer, Path]) -> Iterator[Origin]:
    """Give an empty place for shards at a URL whose server can be made to fail."""
    server, folder = file_server
    with FaultProxy(server.url) as proxy:
        origin = Origin(folder / uuid.uuid4().hex, server, proxy)
        try:
            yield origin
        finally:
            for reading in origin.readings:
                reading.kill()
    shutil.rmtree(origin.folder, ignore_errors=True)
