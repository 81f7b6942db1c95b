"""What a place of named bytes must be able to do, and how it says that it could not.

`objects.py` does it for S3 and http(s), `local.py` for a folder; `remote.py` adds retries,
counters and errors that a user can act on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

Buffer: TypeAlias = bytes | memoryview

MULTIPART_BYTES = 16 << 20
"""Larger files are written in parts of this size; their etag depends on it."""


TRANSIENT = {"408", "425", "429", "500", "502", "503", "504", "509", "520", "522", "524"}
"""Statuses of http after which the same request may succeed."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file. name: relative to the opened URL, with "/" between folders. etag: "" if unknown."""

    name: str
    num_bytes: int
    etag: str
    modified_s: float


@dataclass(frozen=True, slots=True)
class Condition:
    """When a write may happen. absent: only if there is no such file; etag: only over this one."""

    absent: bool = False
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Opened:
    """A file being read: what it is as a whole, and the bytes asked for, in order."""

    file: RemoteFile
    chunks: Iterator[Buffer]


class Failure(Exception):
    """One request failed.

    kind: what the counters call it: "404", "503", "timeout", "connect", "cut", ... transient: the
    same request may succeed later.
    """

    def __init__(self, kind: str, text: str, *, transient: bool) -> None:
        super().__init__(text)
        self.kind = kind
        self.text = text
        self.transient = transient


class Backend(Protocol):
    """Named bytes. Every method raises Failure, or OSError of this machine's own disk."""

    @property
    def parallel(self) -> bool:
        """Tell whether parts of one file side by side come sooner than the file as a whole."""

    def list(self, prefix: str) -> Iterator[RemoteFile]:
        """Yield the files whose name begins with `prefix`, sorted by name."""

    def head(self, name: str) -> RemoteFile:
        """Describe a file."""

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
        """Read bytes [start, end), of exactly the version `etag` if that is not empty.

        careful: in small pieces, since a transfer of this file has broken off before. scratch: memory
        that the pieces may lie in, each only until the next is asked for.
        """

    def write(self, name: str, data: bytes | Path, condition: Condition) -> str:
        """Write a whole file at once and return its etag; Failure "changed" if the condition fails."""

    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is fine."""

    def close(self) -> None:
        """Let go of what is not in use. Closing twice is fine, and so is going on."""
