"""S3 and http(s) through obstore, one request at a time, without retries of its own.

obstore counts nothing and tells failures apart only in words, so the words are read here, once,
and `remote.py` decides what to try again. Two traps:

- Its threads live in the process that first used it. A forked child inherits a runtime without
  threads, in which every request waits for ever, whatever store is opened there. `check_process`
  makes that an error at once. (spawn and forkserver start without one and are fine.)
- Some servers answer a request for a part with the whole file (200 instead of 206). obstore
  refuses that; here the part is then cut out of the whole, which costs the bytes before it.
"""

import os
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import HTTPStore, S3Store

from marrow.core.errors import UsageError
from marrow.store.remote.backend import (
    MULTIPART_BYTES,
    TRANSIENT,
    Buffer,
    Condition,
    Failure,
    Opened,
    RemoteFile,
)
from marrow.store.remote.direct import Direct, Unfit
from marrow.store.remote.retry import Retry
from marrow.store.remote.unsized import open_unsized

# PERF: as they come, not joined to larger ones, whose memory is new each time: 0.6 of the CPU time of
# 2 MiB when 64 files of 8 MiB are written to a disk's cache, 16 at a time, by one process.
CHUNK_BYTES = 128 << 10
# After a break: bytes are lost from the last whole chunk on, so small ones get over a bad line.
CAREFUL_BYTES = 64 << 10

_STATUS = re.compile(r"status code: (\d{3})")
_KIND = re.compile(r"kind: (Connect|Request|Timeout|Interrupted|Decode|Unknown)\b")
_KINDS = {"Connect": "connect", "Timeout": "timeout", "Interrupted": "cut", "Decode": "cut", "Request": "cut"}
_ERRORS = (BaseError, OSError, ValueError)
_QUERY = re.compile(r"\?[^\s|)]*")

_SIGNED_FOR = timedelta(minutes=15)

_runtime_pid: int | None = None


class ObjectStore:
    """Files of a bucket (s3://) or below a web address (http://, https://)."""

    def __init__(self, url: str, retry: Retry) -> None:
        parts = urlsplit(url)
        most_s = max(600.0, 4 * retry.total_s)
        client: dict[str, Any] = {
            "connect_timeout": timedelta(seconds=min(10.0, retry.timeout_s)),
            "read_timeout": timedelta(seconds=retry.timeout_s),
            # The bound of a whole answer: only against bytes that drip for ever.
            "timeout": timedelta(seconds=most_s),
        }
        none: dict[str, Any] = {"max_retries": 0, "retry_timeout": timedelta(seconds=retry.total_s)}
        self._url, self._timeout_s = url, retry.timeout_s
        self._listable = parts.scheme == "s3"
        self._ranges = True
        self._direct: Direct | None = Direct(self._address, retry.timeout_s, most_s)
        try:
            if parts.scheme == "s3":
                client["allow_http"] = _may_use_http()
                self._store: Any = S3Store(
                    parts.netloc,
                    prefix=parts.path.strip("/") or None,
                    client_options=client,  # type: ignore[arg-type]
                    retry_config=none,  # type: ignore[arg-type]
                )
            else:
                client["allow_http"] = True  # the user wrote http://, and no secret is sent
                # A slash at the end would stand twice before each name.
                base = urlunsplit(parts._replace(path=parts.path.rstrip("/"), fragment=""))
                self._store = HTTPStore(base, client_options=client, retry_config=none)  # type: ignore[arg-type]
        except _ERRORS as error:
            raise UsageError(f"cannot open {redact(url)}: {_words(error)}", hint=_URL_HINT) from error

    @property
    def parallel(self) -> bool:
        """Tell whether the server gives parts of a file."""
        return self._ranges

    def list(self, prefix: str) -> Iterator[RemoteFile]:
        """Yield the files whose name begins with `prefix`, sorted by name."""
        check_process()
        if not self._listable:
            raise Failure("no listing", "http(s) has no listing of files", transient=False)
        # Object stores list whole path segments only; the rest of the prefix is compared here.
        folder, _, _ = prefix.rpartition("/")
        try:
            for batch in obstore.list(self._store, folder or None, chunk_size=1000):
                for meta in batch:
                    if meta["path"].startswith(prefix):
                        yield _described(meta)
        except _ERRORS as error:
            raise _failure(error) from error

    def head(self, name: str) -> RemoteFile:
        """Describe a file."""
        check_process()
        try:
            return _described(obstore.head(self._store, name))
        except _ERRORS as error:
            raise _failure(error) from error

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
        """Read bytes [start, end); the answer's head is there on return, its bytes come as they do."""
        check_process()
        direct = self._direct
        if scratch is not None and direct is not None and self._ranges:
            try:
                return direct.open(name, start, end, etag, scratch, careful=careful)
            except Unfit:
                opened = self.open(name, start, end, etag, careful=careful)
                # What was refused there and not here will be refused again.
                direct.close()
                self._direct = None
                return opened
        # A weak etag never matches in a condition (RFC 9110, 13.1.1).
        options: dict[str, Any] = {"if_match": etag} if etag and not etag.startswith("W/") else {}
        partial = start > 0 or end is not None
        if partial and self._ranges:
            options["range"] = {"offset": start} if end is None else (start, end)
        try:
            result = obstore.get(self._store, name, options=options)  # type: ignore[arg-type]
        except _ERRORS as error:
            failure = _failure(error)
            if failure.kind == "no ranges" and self._ranges:
                self._ranges = False
                return self.open(name, start, end, etag, careful=careful)
            if failure.kind == "no length" and not self._listable:
                self._ranges = False
                opened = open_unsized(self._address(name), name, self._timeout_s)
            else:
                raise failure from error
        else:
            opened = Opened(
                _described(result.meta), _chunks(result, CAREFUL_BYTES if careful else CHUNK_BYTES)
            )
        if partial and not self._ranges:
            return Opened(opened.file, _cut(opened.chunks, start, end))
        return opened

    def write(self, name: str, data: bytes | Path, condition: Condition) -> str:
        """Write a whole file at once; large ones in parts that only together become visible."""
        check_process()
        options: dict[str, Any] = {"chunk_size": MULTIPART_BYTES, "max_concurrency": 4}
        if condition.absent:
            options["mode"] = "create"
        elif condition.etag:
            options["mode"] = {"e_tag": condition.etag}
        try:
            return obstore.put(self._store, name, data, **options)["e_tag"] or ""
        except _ERRORS as error:
            raise _failure(error) from error

    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is fine."""
        check_process()
        try:
            obstore.delete(self._store, name)
        except FileNotFoundError:
            return
        except _ERRORS as error:
            raise _failure(error) from error

    def close(self) -> None:
        """Close the connections of `direct.py`; obstore keeps its own."""
        if self._direct is not None:
            self._direct.close()

    def _address(self, name: str) -> str:
        """Return the URL of a file, for S3 one that is signed and good for some minutes."""
        if self._listable:
            try:
                return obstore.sign(self._store, "GET", name, _SIGNED_FOR)
            except _ERRORS as error:  # such as no credentials, for a bucket that is open to all
                raise Unfit from error
        parts = urlsplit(self._url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}", fragment=""))


def check_process() -> None:
    """Note that this process uses obstore; refuse in a child forked from one that did.

    Raises: UsageError in such a child, where every request would wait for ever.
    """
    global _runtime_pid
    if _runtime_pid is None:
        _runtime_pid = os.getpid()
    elif _runtime_pid != os.getpid():
        raise UsageError(
            f"process {os.getpid()} was forked from one ({_runtime_pid}) that had already talked to "
            "an object store, whose threads a fork does not copy",
            hint="start workers with spawn or forkserver, for PyTorch's DataLoader "
            'multiprocessing_context="spawn"; or fork before the first request',
        )


def redact(url: str) -> str:
    """Return a URL without password and without its query, which may hold a signature."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


_URL_HINT = "give s3://bucket/prefix, https://host/path, file:///path or a path"
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def _may_use_http() -> bool:
    """Tell whether requests to S3 may go without TLS: to this host, or where the user says so."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    parts = urlsplit(endpoint)
    if parts.scheme != "http" or parts.hostname in _LOOPBACK:
        return True
    if os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes"):
        return True
    raise UsageError(
        f"the endpoint {redact(endpoint)} is not encrypted",
        hint="use https://, or set AWS_ALLOW_HTTP=true if the network between is yours",
    )


def _described(meta: Any) -> RemoteFile:
    return RemoteFile(meta["path"], meta["size"], meta["e_tag"] or "", meta["last_modified"].timestamp())


def _chunks(result: Any, chunk_bytes: int) -> Iterator[Buffer]:
    try:
        yield from result.stream(min_chunk_size=chunk_bytes)
    except _ERRORS as error:
        raise _failure(error) from error


def _cut(chunks: Iterator[Buffer], start: int, end: int | None) -> Iterator[Buffer]:
    """Yield bytes [start, end) of the whole."""
    position = 0
    for chunk in chunks:
        low, high = max(start - position, 0), len(chunk)
        if end is not None:
            high = min(high, end - position)
        if low < high:
            yield memoryview(chunk)[low:high]
        position += len(chunk)
        if end is not None and position >= end:
            return


def _words(error: BaseException) -> str:
    """Return the part of an obstore message that is meant to be read, without secrets."""
    first = str(error).partition("\n\nDebug source")[0]
    return _QUERY.sub("?...", " ".join(first.split()))[:400]


def _failure(error: BaseException) -> Failure:
    """Tell what an obstore error means."""
    text, words = str(error), _words(error)
    if isinstance(error, AlreadyExistsError | PreconditionError):
        return Failure("changed", words, transient=False)
    status = _STATUS.search(text)
    if status is not None:
        return Failure(status[1], words, transient=status[1] in TRANSIENT)
    if isinstance(error, FileNotFoundError):
        return Failure("404", words, transient=False)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return Failure("403", words, transient=False)
    if "NotPartial" in text or "Range request not supported" in text:
        return Failure("no ranges", words, transient=False)
    if "Content-Length Header missing" in text:
        return Failure("no length", words, transient=False)
    if "dns error" in text:
        temporary = "Temporary failure" in text or "try again" in text.lower()
        return Failure("dns", words, transient=temporary)
    kind = _KIND.search(text)
    if "TimedOut" in text:
        return Failure("timeout", words, transient=True)
    if kind is not None and kind[1] in _KINDS:
        return Failure(_KINDS[kind[1]], words, transient=True)
    return Failure("other", words, transient=False)
