"""Bytes at a URL: s3://bucket/prefix, http(s)://host/path/, file:///path or a plain path.

    with Remote.open("s3://corpus/2026") as remote:
        for file in remote.list("shards/"):
            remote.download(file.name, folder / file.name)

What fails for a moment (a timeout, a 5xx, a cut connection) is tried again after a random wait
(`retry.py`), a transfer from where it broke off, and only while the file is still the same one.
What fails for good becomes one error with a hint. `counters` says what it took. Credentials come
from the standard AWS_* variables, never from a recipe.

One Remote serves many threads. It is opened anew in a child process: pickling keeps the address
only, and a child forked after the first request gets an error rather than a hang (`objects.py`).
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeAlias, TypeVar
from urllib.parse import unquote, urlsplit

from marrow.core.errors import (
    Conflict,
    MarrowError,
    NotPermitted,
    SourceError,
    Unreachable,
    UsageError,
    explain_os_errors,
)
from marrow.core.files import publish, temporary_beside
from marrow.store.remote.backend import Backend, Buffer, Condition, Failure
from marrow.store.remote.backend import RemoteFile as RemoteFile
from marrow.store.remote.local import LocalFolder
from marrow.store.remote.retry import Patience, Retry
from marrow.store.remote.unsized import UNKNOWN

SCHEMES = ("s3", "http", "https", "file")
# One connection to S3 gives some 80 MB/s: larger files are worth several. 16 parts in flight.
PART_BYTES = 8 << 20
IN_FLIGHT = 16
# An attempt that brings less than this has not moved on (a server that drips a byte now and then).
PROGRESS_BYTES = 64 << 10

T = TypeVar("T")
Files: TypeAlias = list[RemoteFile]  # inside the class, `list` is the method


class RemoteCounters:
    """What the requests of a Remote took. Safe from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests = 0
        self.retries = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self.errors: dict[str, int] = {}

    def as_dict(self) -> dict[str, int]:
        """Return all counters; errors as "error 503", "error timeout", ..."""
        with self._lock:
            errors = {f"error {kind}": count for kind, count in sorted(self.errors.items())}
            return {
                "requests": self.requests,
                "retries": self.retries,
                "bytes_read": self.bytes_read,
                "bytes_written": self.bytes_written,
                **errors,
            }

    def add(self, *, requests: int = 0, retries: int = 0, read: int = 0, written: int = 0) -> None:
        """Count."""
        with self._lock:
            self.requests += requests
            self.retries += retries
            self.bytes_read += read
            self.bytes_written += written

    def error(self, kind: str) -> None:
        """Count a failed request."""
        with self._lock:
            self.errors[kind] = self.errors.get(kind, 0) + 1


class Remote:
    """Files below a URL; names are relative to it. Closing twice is fine."""

    def __init__(self, url: str, retry: Retry | None = None) -> None:
        self._given = url
        self.retry = retry or Retry()
        self.counters = RemoteCounters()
        self._stop = threading.Event()
        self.url, self._backend = _open(url, self.retry)

    @classmethod
    def open(cls, url: str, retry: Retry | None = None) -> "Remote":
        """Open a URL or path; nothing is sent yet. Raises: UsageError for what is no such address."""
        return cls(url, retry)

    def __reduce__(self) -> tuple[type["Remote"], tuple[str, Retry]]:
        return Remote, (self._given, self.retry)

    def __enter__(self) -> "Remote":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the waits of other threads; their requests fail."""
        self._stop.set()
        self._backend.close()

    def list(self, prefix: str = "") -> Iterator[RemoteFile]:
        """Yield the files whose name begins with `prefix`. Raises: UsageError for http(s)."""
        seen: set[str] = set()
        patience = Patience(self.retry, self._stop)
        while True:
            self.counters.add(requests=1)
            try:
                for file in self._backend.list(prefix):
                    if file.name not in seen:  # a listing that broke off begins again
                        seen.add(file.name)
                        patience.progressed()
                        yield file
                return
            except (Failure, OSError) as error:
                self._failed("list", prefix, error, patience)

    def head(self, name: str) -> RemoteFile:
        """Describe a file. Raises: SourceError if it is not there."""
        return self._try("look at", name, lambda: self._backend.head(name))

    def exists(self, name: str) -> bool:
        """Tell whether there is such a file."""
        try:
            self.head(name)
        except SourceError:
            return False
        return True

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Return bytes [start, start + length) of a file, or fewer if it ends before."""
        return b"".join(self.stream(name, start, length))

    def stream(
        self,
        name: str,
        start: int = 0,
        length: int | None = None,
        *,
        etag: str = "",
        scratch: memoryview | None = None,
    ) -> Iterator[Buffer]:
        """Yield those bytes in order, in pieces of a few MiB at most.

        A transfer that breaks off goes on where it was, if the file is still the same one.
        scratch: memory that the pieces may lie in, each only until the next is asked for: it is the
        fastest where there is no TLS. A MiB is enough.
        Raises: SourceError, NotPermitted, Unreachable; SourceError too if the file has changed.
        """
        end = None if length is None else start + length
        return self._pieces(name, start, end, etag, [], scratch)

    def download(self, name: str, target: Path) -> int:
        """Copy a file to `target`, which appears whole or not at all; return its bytes.

        Large files are fetched in parts side by side. Raises: as `stream`; DiskFull.
        Cost: 16 x 2 MiB of memory at most.
        """
        with explain_os_errors("download", target):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_beside(target)
            try:
                with temporary.open("wb", buffering=0) as file:
                    num_bytes = self._fill(name, file.fileno())
                    os.fsync(file.fileno())
                publish(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        return num_bytes

    def write(self, name: str, data: bytes | Path, *, if_absent: bool = False, if_etag: str = "") -> str:
        """Write a whole file; it appears at once with all its bytes. Return its etag.

        Args: if_absent: only where there is no such file. if_etag: only over the file with this
            etag, as `head` gave it (a folder on a disk cannot promise that one against another
            writer in the very same moment; S3 does).
        Raises: Conflict if the condition does not hold; NotPermitted; Unreachable.
        """
        condition = Condition(if_absent, if_etag)
        num_bytes = data.stat().st_size if isinstance(data, Path) else len(data)
        tried = 0

        def write() -> str:
            nonlocal tried
            tried += 1
            try:
                return self._backend.write(name, data, condition)
            except Failure as failure:
                # An earlier try may have arrived although its answer did not.
                if failure.kind == "changed" and tried > 1 and self._holds(name, data):
                    return self._backend.head(name).etag
                raise

        etag = self._try("write", name, write)
        self.counters.add(written=num_bytes)
        return etag

    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is fine."""
        self._try("delete", name, lambda: self._backend.delete(name))

    def _pieces(
        self,
        name: str,
        start: int,
        end: int | None,
        etag: str,
        about: Files,
        scratch: memoryview | None = None,
    ) -> Iterator[Buffer]:
        """Yield bytes [start, end) through as many requests as it takes; tell `about` what the file is."""
        patience = Patience(self.retry, self._stop)
        broken = False
        while end is None or start < end:
            arrived = 0
            self.counters.add(requests=1)
            try:
                opened = self._backend.open(name, start, end, etag, careful=broken, scratch=scratch)
                etag = etag or opened.file.etag
                about.append(opened.file)
                for chunk in opened.chunks:
                    start += len(chunk)
                    arrived += len(chunk)
                    self.counters.add(read=len(chunk))
                    yield chunk
                return
            except (Failure, OSError) as error:
                if isinstance(error, Failure) and error.kind == "416":  # the file ends before
                    return
                broken = True
                if arrived >= PROGRESS_BYTES:
                    patience.progressed()
                self._failed("read", name, error, patience)

    def _fill(self, name: str, descriptor: int) -> int:
        """Write a remote file into an open one; return its size."""
        about: Files = []
        first = self._pieces(name, 0, PART_BYTES if self._backend.parallel else None, "", about)
        position = 0

        def part(start: int, end: int | None, pieces: Iterator[Buffer] | None = None) -> int:
            for chunk in pieces or self._pieces(name, start, end, about[0].etag, []):
                _write_all(descriptor, chunk, start)
                start += len(chunk)
            return start

        for chunk in first:  # with it comes the size of the whole
            _write_all(descriptor, chunk, position)
            position += len(chunk)
            break
        num_bytes = about[0].num_bytes if about else 0
        with ThreadPoolExecutor(IN_FLIGHT, "marrow-download") as pool:
            starts = range(PART_BYTES, num_bytes, PART_BYTES) if self._backend.parallel else ()
            ends = [pool.submit(part, start, min(start + PART_BYTES, num_bytes)) for start in starts]
            position = part(position, None, first)
            position = max([position, *(end.result() for end in ends)])
            if position < num_bytes and not ends:  # the server turned out to give no parts
                position = part(position, None)
        if position != num_bytes != UNKNOWN:
            raise SourceError(
                f"{self._where(name)} ended after {position} of {num_bytes} bytes",
                hint="it was written anew meanwhile, or a proxy cuts it; run the same command again",
            )
        return position

    def _holds(self, name: str, data: bytes | Path) -> bool:
        """Tell whether the remote file's bytes are these."""
        mine = data.read_bytes() if isinstance(data, Path) else data
        return b"".join(self._backend.open(name, 0, None, "").chunks) == mine

    def _try(self, doing: str, name: str, request: Callable[[], T]) -> T:
        patience = Patience(self.retry, self._stop)
        while True:
            self.counters.add(requests=1)
            try:
                return request()
            except (Failure, OSError) as error:
                self._failed(doing, name, error, patience)

    def _failed(self, doing: str, name: str, error: Exception, patience: Patience) -> None:
        """Wait if the request is worth another try, else raise what a user can act on."""
        if isinstance(error, OSError):
            with explain_os_errors(f"{doing} a file", self._where(name)):
                raise error
        assert isinstance(error, Failure)
        self.counters.error(error.kind)
        if not error.transient or not patience.wait(connected=error.kind != "connect"):
            raise self._explain(doing, name, error, patience) from error
        self.counters.add(retries=1)

    def _explain(self, doing: str, name: str, failure: Failure, patience: Patience) -> MarrowError:
        where = self._where(name)
        if failure.transient:
            if self._stop.is_set():
                return Unreachable(f"cannot {doing} {where}: it was closed", hint="keep it open while in use")
            problem, hint = _PASSING.get(failure.kind, (failure.text, _AGAIN))
            if failure.kind.isdigit():
                problem = f"the server answers {failure.kind}"
            return Unreachable(
                f"cannot {doing} {where}: {problem} ({patience.failures} tries without progress "
                f"in {patience.spent_s:.1f} s)",
                hint=hint,
            )
        problem, hint = _LASTING.get(failure.kind, (failure.text, "check the address and AWS_* variables"))
        kind = _KINDS.get(failure.kind, SourceError)
        return kind(f"cannot {doing} {where}: {problem}", hint=hint)

    def _where(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url


def is_url(text: str) -> bool:
    """Tell whether a source or target is a URL that `Remote.open` takes, rather than a path."""
    scheme, mark, _ = text.partition("://")
    return bool(mark) and scheme.lower() in SCHEMES


def split_url(url: str) -> tuple[str, str]:
    """Split the URL of one file into what to open and the name in it.

    A query stays with the first part, which is where `Remote` keeps it for every request.
    """
    address, mark, query = url.partition("?")
    base, _, name = address.rpartition("/")
    if not is_url(base + "/") or base.endswith("/"):
        raise UsageError(f"{url} names no file", hint="give scheme://place/name")
    return base + "/" + mark + query, name


_CREDENTIALS = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and the bucket's policy"
_AGAIN = "check the endpoint and the network, then run the same command again"
_PASSING = {
    "connect": (
        "nothing there takes a connection",
        "is the server running? check the address and its port (for s3:// AWS_ENDPOINT_URL), and the network",
    ),
    "cut": ("the connection broke off", _AGAIN),
    "timeout": ("no answer came in time", _AGAIN),
    "dns": ("the host's name cannot be looked up now", _AGAIN),
}
_LASTING = {
    "401": ("it asks for credentials", _CREDENTIALS),
    "403": ("access is denied (403)", _CREDENTIALS),
    "404": (
        "there is no such file or bucket (404)",
        "check the name, and that AWS_ENDPOINT_URL is the server that has it",
    ),
    "405": ("the server does not offer that (405)", "write to s3:// or to a folder"),
    "410": ("it is gone (410)", "check the address"),
    "501": ("the server does not offer that (501)", "write to s3:// or to a folder"),
    "changed": ("another writer was first, or it changed meanwhile", "read it again, then repeat"),
    "dns": ("no host has that name", "check the spelling of the host, AWS_ENDPOINT_URL and AWS_REGION"),
    "no listing": (
        "http(s) has no listing of files",
        "name each file, or use s3:// with AWS_ENDPOINT_URL",
    ),
}
_KINDS: dict[str, type[MarrowError]] = {
    "401": NotPermitted,
    "403": NotPermitted,
    "changed": Conflict,
    "dns": Unreachable,
    "no listing": UsageError,
}


def _open(url: str, retry: Retry) -> tuple[str, Backend]:
    """Return the address as it may be shown, without its last slash, and what reads it."""
    parts = urlsplit(url)
    if is_url(url) and parts.scheme != "file":
        if not parts.netloc:
            raise UsageError(f"{url} names no bucket or host", hint="give s3://bucket/prefix")
        # Imported here: who works with local files never pays for it.
        from marrow.store.remote.objects import ObjectStore, redact

        return redact(url).rstrip("/"), ObjectStore(url, retry)
    if "://" in url and parts.scheme != "file":
        raise UsageError(
            f"{parts.scheme}:// is no address that can be read here", hint=f"allowed: {', '.join(SCHEMES)}"
        )
    if parts.scheme == "file" and parts.netloc not in ("", "localhost"):
        raise UsageError(f"{url} names another host", hint="a file URL has three slashes: file:///path")
    path = Path(unquote(parts.path) if parts.scheme == "file" else url)
    return str(path), LocalFolder(path)


def _write_all(descriptor: int, chunk: Buffer, position: int) -> None:
    view = memoryview(chunk)
    while view:
        written = os.pwrite(descriptor, view, position)
        view = view[written:]
        position += written
