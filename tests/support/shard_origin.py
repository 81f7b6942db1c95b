"""Shards behind a server that can be made to fail, and a process that reads them through a cache.

    python tests/support/shard_origin.py '{"url": ..., "cache": ..., ...}'

reads shards at random on some threads, checks every byte, and prints its counters as JSON.
"""

import hashlib
import json
import random
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from object_server import DIRECT, FaultProxy
from range_server import RangeServer

from marrow.loader.streaming.cache import Cache
from marrow.loader.streaming.shards import CachedShards, ShardFile
from marrow.store.remote.retry import Retry

QUICK = Retry(attempts=30, first_delay_s=0.002, max_delay_s=0.05, total_s=20.0, timeout_s=5.0)


def content(index: int, num_bytes: int) -> bytes:
    """The bytes of a shard: the same wherever they are made, no two shards alike."""
    return hashlib.shake_128(b"%d" % index).digest(num_bytes)


@dataclass
class Origin:
    """Some shards that a server gives out, through a proxy that can break them."""

    folder: Path
    server: RangeServer
    proxy: FaultProxy
    files: list[ShardFile] = field(default_factory=list)
    readings: list["Reading"] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{self.proxy.url}/{self.folder.name}"

    def add(self, count: int, num_bytes: int) -> list[ShardFile]:
        """Make shards of these sizes; the last is shorter."""
        self.folder.mkdir(exist_ok=True)
        for index in range(count):
            data = content(index, num_bytes if index < count - 1 else num_bytes // 2 + 1)
            name = f"train-{index:05d}.arrow"
            (self.folder / name).write_bytes(data)
            self.files.append(ShardFile(name, len(data), xxhash.xxh3_128_hexdigest(data)))
        return self.files

    def open(self, cache: Cache, **options: Any) -> CachedShards:
        """Open them through a cache."""
        return CachedShards(self.url, self.files, cache, **{"retry": QUICK, **options})

    def is_whole(self, index: int, path: Path) -> bool:
        """Tell whether a local copy has the right bytes."""
        return path.read_bytes() == (self.folder / self.files[index].name).read_bytes()

    def start(self, cache: Cache, **options: Any) -> "Reading":
        """Start a process that reads shards at random. Options: as `read`."""
        files = [asdict(file) for file in self.files]
        settings = {"url": self.url, "files": files, "cache": str(cache.folder)}
        self.readings.append(Reading({**settings, "max_bytes": cache.max_bytes, **options}))
        return self.readings[-1]


class Reading:
    """The reading process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", __file__, json.dumps(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**DIRECT, "PYTHONPATH": ":".join(sys.path)},
        )

    def wait(self, timeout_s: float = 60.0) -> dict[str, float]:
        """Wait for its end; return its counters."""
        out, errors = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 0, errors
        counters: dict[str, float] = json.loads(out)
        return counters

    def wait_for_start(self) -> None:
        """Wait until it has its imports behind it."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "\n"

    def kill(self) -> None:
        """End it at this very instruction."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def read(
    url: str,
    files: list[dict[str, Any]],
    cache: str,
    max_bytes: int,
    *,
    seed: int = 0,
    reads: int = 20,
    threads: int = 1,
    say: bool = False,
    in_flight: int = 4,
) -> dict[str, float]:
    """Read shards at random; every byte must be right."""
    shards = [ShardFile(**file) for file in files]
    if say:
        print(flush=True)
    problems: list[BaseException] = []
    with CachedShards(
        url, shards, Cache(Path(cache), max_bytes), retry=QUICK, in_flight=in_flight
    ) as open_shards:

        def work(number: int) -> None:
            try:
                rng = random.Random(f"{seed} {number}")
                for _ in range(reads):
                    index = rng.randrange(len(shards))
                    if rng.random() < 0.3:
                        open_shards.ahead(rng.sample(range(len(shards)), min(3, len(shards))))
                    data = open_shards.path(index).read_bytes()
                    assert xxhash.xxh3_128_hexdigest(data) == shards[index].xxh3, index
                    open_shards.release(index)
            except BaseException as problem:
                problems.append(problem)
                raise

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if problems:
            raise problems[0]
        return open_shards.counters()


if __name__ == "__main__":
    print(json.dumps(read(**json.loads(sys.argv[1]))))
