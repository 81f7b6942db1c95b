"""Folders whose shards are elsewhere: a manifest, and origin.json that says where the rest is.

    folder = far_folder("s3://corpus/code", Cache(folder, max_bytes))
    ShardReader([folder, Path("books")])            # reads the one through the cache, the other in place

So whatever takes folders of shards, such as a mixture, takes those at a URL, several of them too. Each
needs a cache of its own, since those of one batch would wait for each other's room.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from marrow.core.errors import DataError, explain_os_errors
from marrow.core.files import atomic_file
from marrow.data.manifest import Manifest
from marrow.loader.source import Files

if TYPE_CHECKING:
    from marrow.loader.streaming.cache import Cache
    from marrow.loader.streaming.shards import CachedShards

ORIGIN = "origin.json"


def far_folder(url: str, cache: "Cache") -> Path:
    """Fetch the manifest of the shards at a URL; return the folder, in the cache's, that stands for them.

    Raises: SourceError if there is none, or the endpoint does not answer; DataError if it is damaged.
    """
    from marrow.loader.streaming.shards import CachedShards  # an object-store client: local data needs none

    with CachedShards.open(url, cache) as shards:
        folder = shards.folder
    assert folder is not None
    origin = {"url": url, "cache": str(cache.folder), "max_bytes": cache.max_bytes}
    with explain_os_errors("use the cache", folder), atomic_file(folder / ORIGIN, "w") as file:
        file.write(json.dumps(origin, indent=1) + "\n")
    return folder


def far_files(folder: Path, manifest: Manifest) -> "CachedShards | None":
    """Open the shards that a folder of `far_folder` stands for; None for a folder that has its own.

    Raises: DataError if it does not say where they are.
    """
    if not (folder / ORIGIN).is_file():
        return None
    from marrow.loader.streaming.cache import Cache
    from marrow.loader.streaming.shards import CachedShards, ShardFile

    with explain_os_errors("use the cache", folder / ORIGIN):
        text = (folder / ORIGIN).read_bytes()
    try:
        origin = json.loads(text)
        max_bytes = int(origin["max_bytes"])
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}")
        url, cache = str(origin["url"]), Cache(Path(origin["cache"]), max_bytes)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{folder / ORIGIN} is damaged: {error!r}", hint="delete that folder") from error
    shards = [ShardFile(shard.name, shard.num_bytes, shard.xxh3) for shard in manifest.shards]
    return CachedShards(url, shards, cache, folder=folder)


class JoinedFiles:
    """The shards of several `Files`, one after the other, as one. Pickled if they can be.

    Args: parts: with how many shards each has.
    """

    def __init__(self, parts: Sequence[tuple[Files, int]]) -> None:
        self._parts = tuple(files for files, _ in parts)
        self._ends = list(accumulate(count for _, count in parts))
        limits = [files.max_open for files in self._parts if files.max_open is not None]
        self.max_open: int | None = min(limits, default=None)

    def path(self, index: int) -> Path:
        """Return where shard `index` is, waiting for it if need be."""
        files, own = self._find(index)
        return files.path(own)

    def is_verified(self, index: int) -> bool:
        """Tell whether it was checked when it was fetched."""
        files, own = self._find(index)
        return files.is_verified(own)

    def release(self, index: int) -> None:
        """Allow the shard to be evicted."""
        files, own = self._find(index)
        files.release(own)

    def ahead(self, indices: list[int]) -> None:
        """Tell each part which of its shards come soon; none of one that has none, which forgets its plan."""
        soon: list[list[int]] = [[] for _ in self._parts]
        for index in indices:
            part = bisect_right(self._ends, index)
            soon[part].append(index - self._start(part))
        for files, own in zip(self._parts, soon, strict=True):
            files.ahead(own)

    def counters(self) -> dict[str, float]:
        """Add up what happened in all parts."""
        found: Counter[str] = Counter()
        for files in self._parts:
            found.update(getattr(files, "counters", dict)())
        return dict(found)

    def close(self) -> None:
        """Close all of them."""
        for files in self._parts:
            files.close()

    def _find(self, index: int) -> tuple[Files, int]:
        part = bisect_right(self._ends, index)
        return self._parts[part], index - self._start(part)

    def _start(self, part: int) -> int:
        return self._ends[part - 1] if part else 0
