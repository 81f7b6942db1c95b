"""Ray: several raylets on this machine, one of them killed, and the same bytes in the end.

One cluster for the module, since starting one takes ten seconds.
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pieces
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marrow.core.errors import DataError, RequestError, ResourceError, UsageError
from marrow.data.engine import ATTEMPTS, INLINE
from marrow.data.ray_engine import RayEngine
from marrow.data.shards import train_tokenizer, write_shards
from marrow.data.shards_config import ShardsRecipe
from marrow.text.config import TokenizerRecipe

pytestmark = [
    pytest.mark.slow,
    # Looked for, not imported: every call of pytest reads this file.
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed"),
]

MEMORY = 100 << 20


@dataclass
class Raylets:
    """A cluster of three nodes with a CPU each, all on this machine."""

    cluster: Any
    nodes: list[Any]

    def kill_one(self) -> None:
        """Kill a raylet as the system would; its workers and its part of the object store go with it."""
        node = self.nodes.pop()
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)


def process_ids(folder: str) -> list[int]:
    """Find every process that was started for the cluster: its folder stands in their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if folder.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def raylets() -> Iterator[Raylets]:
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets lie in it: their paths must be short
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's, about itself
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_health_check_period_ms", "500")  # a dead node is noticed in two seconds
        patch.setenv("RAY_health_check_failure_threshold", "2")
        from ray.cluster_utils import Cluster

        options = {"num_cpus": 1, "object_store_memory": MEMORY, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=options)
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=MEMORY) for _ in range(2)]
        try:
            yield Raylets(cluster, nodes)
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
    end_s = time.monotonic() + 15
    while left := process_ids(folder):
        assert time.monotonic() < end_s, f"processes of Ray live on: {left}"
        time.sleep(0.1)


@pytest.fixture
def engine(raylets: Raylets) -> Iterator[RayEngine]:
    with RayEngine(raylets.cluster.address) as made:
        yield made


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty row groups of training documents.

    Encoded, each has more than the 100 kB up to which Ray sends a result along: it lies in the object
    store of the node that made it, dies with it, and has to be made again.
    """
    folder = tmp_path_factory.mktemp("split")
    texts = [f"document {i}: " + "naïve words and others, 12345 " * (200 + i % 40) for i in range(600)]
    sizes = [len(text.encode()) for text in texts]
    table = pa.table({"document_id": range(600), "text": texts, "num_bytes": sizes})
    pq.write_table(table, folder / "train.parquet", row_group_size=20)
    return folder


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_results_come_in_order_from_several_nodes(engine: RayEngine) -> None:
    assert engine.workers == 3
    assert list(engine.map(pieces.square, range(20))) == [number**2 for number in range(20)]
    ids = set(engine.map(pieces.process_id, range(30)))
    assert len(ids) >= 2 and os.getpid() not in ids


def test_errors_keep_what_they_carry(engine: RayEngine) -> None:
    results = engine.map(pieces.fail_at_three, range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError) as error:
        next(results)
    assert (error.value.message, error.value.hint) == ("piece 3 is broken", "mend it")
    with pytest.raises(RequestError) as refused:
        list(engine.map(pieces.refuse, [1]))
    assert (refused.value.status, refused.value.param) == (429, "n")
    with pytest.raises(UsageError, match="cannot be sent"):
        list(engine.map(threading.Lock().__class__, [threading.Lock()]))


def test_a_piece_that_kills_its_workers_is_named(engine: RayEngine) -> None:
    with pytest.raises(ResourceError, match=f"lost the piece 2, {ATTEMPTS} times") as error:
        list(engine.map(pieces.die, range(4)))
    assert "ray status" in str(error.value.hint)
    assert list(engine.map(pieces.square, [3])) == [9]


def test_shards_are_the_same_bit_for_bit_with_a_raylet_killed_in_the_midst(
    engine: RayEngine, raylets: Raylets, split: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer", "inline", "ray"):
        (tmp_path / name).mkdir()
    train_tokenizer(TokenizerRecipe(vocab_size=400), split, tmp_path / "tokenizer")
    recipe = ShardsRecipe(context=64, shard_bytes=1 << 20)
    write_shards(recipe, split, tmp_path / "tokenizer", tmp_path / "inline", engine=INLINE)
    done: list[float] = []

    def progress(now: float, total: float | None, unit: str, figures: object = None) -> None:
        done.append(now)
        if len(done) == 5:
            raylets.kill_one()

    write_shards(recipe, split, tmp_path / "tokenizer", tmp_path / "ray", progress, engine=engine)
    assert len(done) == 30 and len(raylets.nodes) == 1
    expected = written(tmp_path / "inline")
    assert len(expected) > 3
    assert written(tmp_path / "ray") == expected


def test_no_cluster_at_an_address_is_a_clear_error() -> None:
    program = (
        "from marrow.data.ray_engine import RayEngine\n"
        "from marrow.core.errors import ResourceError\n"
        "try:\n    RayEngine('127.0.0.1:no-port')\n"
        "except ResourceError as error:\n    print(error)"
    )
    done = run_quietly(program)
    assert "no Ray cluster at 127.0.0.1:no-port" in done and "--engine ray:" in done


def test_a_cluster_of_its_own_is_started_and_ended(tmp_path: Path) -> None:
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    program = (
        f"import os, sys; sys.path.insert(0, {str(Path(pieces.__file__).parent)!r})\n"
        f"os.environ['RAY_TMPDIR'] = {folder!r}\n"
        "import pieces\n"
        "from marrow.data.ray_engine import RayEngine\n"
        "with RayEngine(workers=1) as engine:\n"
        "    print(engine.workers, list(engine.map(pieces.square, range(5))))\n"
        "engine.close()"
    )
    try:
        assert run_quietly(program) == "1 [0, 1, 4, 9, 16]\n"
        assert process_ids(folder) == []
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_quietly(program: str) -> str:
    """Run a program in which a warning is an error, as our own tests are run."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
