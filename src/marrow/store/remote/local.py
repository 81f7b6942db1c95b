"""A folder behind the same door as a bucket, so that whatever speaks to S3 also speaks to a disk."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from marrow.core.files import TEMPORARY, fsync, temporary_beside
from marrow.store.remote.backend import Buffer, Condition, Failure, Opened, RemoteFile

CHUNK_BYTES = 1 << 20


class LocalFolder:
    """Files below a folder. The etag is made of size, time and inode."""

    parallel = False

    def __init__(self, root: Path) -> None:
        self.root = root

    def list(self, prefix: str) -> Iterator[RemoteFile]:
        """Yield the files whose name begins with `prefix`, sorted by name."""
        found = []
        for folder, folders, files in os.walk(self.root):
            folders[:] = [f for f in folders if not f.startswith(TEMPORARY)]
            relative = Path(folder).relative_to(self.root)
            names = ((relative / f).as_posix() for f in files if not f.startswith(TEMPORARY))
            found += [name for name in names if name.startswith(prefix)]
        for name in sorted(found):
            yield self.head(name)

    def head(self, name: str) -> RemoteFile:
        """Describe a file."""
        return _describe(name, os.stat(self._path(name)))

    def open(
        self,
        name: str,
        start: int,
        end: int | None,
        etag: str,
        *,
        careful: bool = False,
        scratch: memoryview | None = None,
    ) -> Opened:
        """Read bytes [start, end)."""
        del careful
        descriptor = os.open(self._path(name), os.O_RDONLY)
        file = _describe(name, os.fstat(descriptor))
        if etag and file.etag != etag:
            os.close(descriptor)
            raise Failure("changed", f"{name} changed meanwhile", transient=False)
        return Opened(file, _chunks(descriptor, start, end, scratch))

    def write(self, name: str, data: bytes | Path, condition: Condition) -> str:
        """Write a file so that its name appears with all of its bytes, on the disk."""
        target = self._path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(target)
        try:
            if isinstance(data, Path):
                shutil.copyfile(data, temporary)
            else:
                temporary.write_bytes(data)
            fsync(temporary)
            self._publish(temporary, target, condition)
            fsync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
        return self.head(name).etag

    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is fine."""
        self._path(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Do nothing."""

    def _publish(self, temporary: Path, target: Path, condition: Condition) -> None:
        if condition.absent:
            try:
                os.link(temporary, target)  # unlike rename, it never replaces
            except FileExistsError as error:
                raise Failure("changed", f"{target} exists", transient=False) from error
            return
        if condition.etag:
            # Between this look and the rename another writer may come: a disk has no such
            # instruction. Whoever needs it holds a FileLock.
            found = _describe("", os.stat(target)).etag if target.exists() else ""
            if found != condition.etag:
                raise Failure("changed", f"{target} changed meanwhile", transient=False)
        temporary.rename(target)

    def _path(self, name: str) -> Path:
        return self.root / name


def _describe(name: str, stat: os.stat_result) -> RemoteFile:
    identity = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
    etag = hashlib.sha256(identity.encode()).hexdigest()[:32]
    return RemoteFile(name, stat.st_size, etag, stat.st_mtime)


def _chunks(descriptor: int, start: int, end: int | None, scratch: memoryview | None) -> Iterator[Buffer]:
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        file.seek(start)
        left = None if end is None else max(0, end - start)
        while left is None or left > 0:
            most = CHUNK_BYTES if left is None else min(left, CHUNK_BYTES)
            chunk = file.read(most) if scratch is None else scratch[: file.readinto(scratch[:most])]
            if not chunk:
                return
            yield chunk
            if left is not None:
                left -= len(chunk)
