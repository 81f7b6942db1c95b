"""A folder of files to a URL, so that what arrives looks whole only when it is.

The manifest goes last, and one that says something else is taken away first: a reader of the URL
finds the old dataset, none, or the new one. What is there already with the same bytes is not
sent again, so an upload that was cut short goes on where it was.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from marrow.core.errors import SourceError
from marrow.core.progress import Progress, silent
from marrow.store.remote.backend import MULTIPART_BYTES
from marrow.store.remote.client import Remote

LAST = ("manifest.json", "index.json")
THREADS = 4


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What was sent, and what was there already."""

    num_files: int
    num_bytes: int
    num_equal: int


def upload(
    folder: Path, remote: Remote, progress: Progress = silent, *, last: Sequence[str] = LAST
) -> Uploaded:
    """Write all files of a folder to a remote, those named in `last` when the others are there.

    Raises: as `Remote.write`. Cost: one reading of what has the same size there already.
    """
    paths = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    total = sum(path.stat().st_size for path in paths.values())
    final = [name for name in paths if name in last]
    equal = [name for name in final if _is_equal(remote, name, paths[name])]
    for name in final:
        if name not in equal:
            remote.delete(name)
    sent: list[int] = []

    def send(name: str) -> None:
        path = paths[name]
        if not _is_equal(remote, name, path):
            remote.write(name, path.resolve())
            sent.append(path.stat().st_size)

    done = 0
    with ThreadPoolExecutor(THREADS, "marrow-upload") as pool:
        rest = [name for name in paths if name not in last]
        for name, _ in zip(rest, pool.map(send, rest), strict=True):
            done += paths[name].stat().st_size
            progress(done, total, "B")
    for name in final:
        if name not in equal:
            send(name)
    progress(total, total, "B")
    return Uploaded(len(sent), sum(sent), len(paths) - len(sent))


def _is_equal(remote: Remote, name: str, path: Path) -> bool:
    """Tell whether the remote surely has these bytes: by size, then by S3's etag where it is a hash."""
    try:
        there = remote.head(name)
    except SourceError:
        return False
    return there.num_bytes == path.stat().st_size and there.etag.strip('"') == _etag(path)


def _etag(path: Path) -> str:
    """Return the etag that S3 gives a file: its MD5, or that of its parts' MD5s and their number."""
    parts = []
    with path.open("rb") as file:
        while data := file.read(MULTIPART_BYTES):
            parts.append(hashlib.md5(data, usedforsecurity=False))
    if path.stat().st_size <= MULTIPART_BYTES:
        return (parts[0] if parts else hashlib.md5(b"", usedforsecurity=False)).hexdigest()
    whole = hashlib.md5(b"".join(part.digest() for part in parts), usedforsecurity=False)
    return f"{whole.hexdigest()}-{len(parts)}"
