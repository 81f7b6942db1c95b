"""Bytes over plain http, straight into memory of the caller that is used again and again.

obstore gives every piece in memory of its own, which the kernel must clear first, and from which it
is copied once more. Here a socket fills one buffer, again and again: of 1 GiB in files of 8 MiB, each
written to a file and checked, that took half of the CPU time and a sixth of the thread switches.

It does one thing, GET without TLS, and says so (`Unfit`) where that is not enough: a proxy, an answer
of unknown length, a redirect, a refusal. obstore then asks again, and its words are the ones a user
reads. Requests to S3 are signed by obstore, in the address. With TLS nothing would be won: OpenSSL
gives 16 KiB at a time.
"""

import errno
import socket
import struct
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import SplitResult, urlsplit

from marrow.store.remote.backend import TRANSIENT, Buffer, Failure, Opened, RemoteFile

MOST_HEAD_BYTES = 64 << 10


class Unfit(Exception):
    """Raised for an answer, or an address, that is nothing for here."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """The head of an answer. low, high: where the first bytes of its body lie in the buffer."""

    status: int
    headers: dict[str, str]
    low: int
    high: int


class Direct:
    """Files of one server. Safe from many threads, not from a forked child.

    Args: address: name -> URL, signed if need be. timeout_s: how long the next bytes may take;
        most_s: a whole answer.
    """

    def __init__(self, address: Callable[[str], str], timeout_s: float, most_s: float) -> None:
        self._address = address
        self._timeout_s, self._most_s = timeout_s, most_s
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        # Whoever forgets to close leaves no open socket, and no warning of one.
        self._finalizer = weakref.finalize(self, _close_all, self._idle)

    def close(self) -> None:
        """Close the connections that nobody uses. Closing twice is fine."""
        with self._lock:
            _close_all(self._idle)

    def open(
        self, name: str, start: int, end: int | None, etag: str, scratch: memoryview, *, careful: bool = False
    ) -> Opened:
        """Read bytes [start, end) as pieces that lie in `scratch`, each until the next is asked for.

        Raises: Failure for what may go better next time, or if the file is not `etag` any more; Unfit.
        """
        url = urlsplit(self._address(name))
        if url.scheme != "http" or not url.hostname or "@" in url.netloc or _is_proxied(url.hostname):
            raise Unfit
        until_s = time.monotonic() + self._most_s
        lines = [f"GET {url.path or '/'}{'?' * bool(url.query)}{url.query} HTTP/1.1", f"Host: {url.netloc}"]
        lines += ["User-Agent: marrow", "Accept: */*"]
        partial = start > 0 or end is not None
        if partial:
            lines.append(f"Range: bytes={start}-{'' if end is None else end - 1}")
        if etag and not etag.startswith("W/"):
            lines.append(f"If-Match: {etag}")
        connection, answer = self._ask(url, "\r\n".join([*lines, "", ""]).encode(), scratch)
        try:
            file, length = _described(
                name, answer, start if partial else None, is_signed="Signature=" in url.query
            )
        except BaseException:
            connection.close()
            raise
        chunks = self._chunks(connection, answer, scratch, length, until_s, careful=careful)
        return Opened(file, chunks)

    def _ask(self, url: SplitResult, request: bytes, scratch: memoryview) -> tuple[socket.socket, _Answer]:
        """Send a request and return its connection and the head of the answer."""
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            is_new = connection is None
            try:
                connection = connection or self._connect(url)
            except OSError as error:
                raise Failure("connect", f"{type(error).__name__}: {error}", transient=True) from error
            try:
                connection.sendall(request)
                answer = _head(connection, scratch)
                if answer is not None:
                    return connection, answer
                problem = Failure("cut", "the connection ended without an answer", transient=True)
            except OSError as error:
                problem = _failure(error)
            except BaseException:
                connection.close()
                raise
            connection.close()
            # An idle connection that the server has closed meanwhile says nothing about the server.
            if is_new or problem.kind == "timeout":
                raise problem

    def _connect(self, url: SplitResult) -> socket.socket:
        assert url.hostname is not None
        connection = socket.create_connection((url.hostname, url.port or 80), min(10.0, self._timeout_s))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A timeout of the kernel: Python's would poll before each call, and return what is there.
        connection.settimeout(None)
        seconds, rest = divmod(self._timeout_s, 1.0)
        timeout = struct.pack("@ll", int(seconds), int(rest * 1e6) or int(not seconds))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        return connection

    def _chunks(
        self,
        connection: socket.socket,
        answer: _Answer,
        scratch: memoryview,
        left: int,
        until_s: float,
        *,
        careful: bool,
    ) -> Iterator[Buffer]:
        """Yield the body, also what came before a break.

        Each time the buffer full, or if `careful` whatever came.
        """
        low, high = answer.low, min(answer.high, answer.low + left)
        is_whole = False
        flags = 0 if careful else socket.MSG_WAITALL
        try:
            while left:
                problem: Failure | None = None
                if high - low < left and high < len(scratch):
                    most = min(len(scratch) - high, left - (high - low))
                    try:
                        got = connection.recv_into(scratch[high:], most, flags)
                        if not got or time.monotonic() > until_s:
                            problem = Failure("cut" if not got else "timeout", "it broke off", transient=True)
                    except OSError as error:
                        got, problem = 0, _failure(error)
                    high += got
                left -= high - low
                if high > low:
                    yield scratch[low:high]
                if problem is not None:
                    raise problem
                low = high = 0
            is_whole = answer.headers.get("connection", "").lower() != "close"
        finally:
            if is_whole:
                with self._lock:
                    self._idle.append(connection)
            else:
                connection.close()


def _head(connection: socket.socket, scratch: memoryview) -> _Answer | None:
    """Read the head of an answer, and what comes with it; None if the connection ends before it begins."""
    high = 0
    while True:
        got = connection.recv_into(scratch[high:])
        if not got:
            if high:
                raise ConnectionResetError(errno.ECONNRESET, "the connection ended in an answer's head")
            return None
        high += got
        text = bytes(scratch[: min(high, MOST_HEAD_BYTES)])
        end = text.find(b"\r\n\r\n")
        if end >= 0:
            break
        if len(text) == MOST_HEAD_BYTES:
            raise Unfit
    first, *lines = text[:end].decode("latin-1").split("\r\n")
    words = first.split(" ", 2)
    if words[0] != "HTTP/1.1" or len(words) < 2 or not words[1].isdigit():
        raise Unfit
    headers = {
        key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    return _Answer(int(words[1]), headers, end + 4, high)


def _described(name: str, answer: _Answer, start: int | None, *, is_signed: bool) -> tuple[RemoteFile, int]:
    """Return what the file is as a whole, and the bytes of this answer. start: of the part asked for."""
    headers, status = answer.headers, str(answer.status)
    if status in TRANSIENT:
        raise Failure(status, f"status code {status}", transient=True)
    if status == "412":
        raise Failure("changed", "status code 412", transient=False)
    # Of what a signature may be the reason, obstore asks again, with one in the head.
    if status == "404" or (status in ("401", "403", "410") and not is_signed):
        raise Failure(status, f"status code {status}", transient=False)
    length = headers.get("content-length", "")
    expected = "200" if start is None else "206"
    if status != expected or not length.isdigit() or {"transfer-encoding", "content-encoding"} & set(headers):
        raise Unfit
    num_bytes = int(length)
    if start is not None:
        span, _, whole = headers.get("content-range", "").removeprefix("bytes ").partition("/")
        if not whole.isdigit() or span != f"{start}-{start + num_bytes - 1}":
            raise Unfit
        num_bytes = int(whole)
    date = headers.get("last-modified")
    try:
        modified_s = parsedate_to_datetime(date).timestamp() if date else 0.0
    except ValueError as error:
        raise Unfit from error
    return RemoteFile(name, num_bytes, headers.get("etag", ""), modified_s), int(length)


def _failure(error: OSError) -> Failure:
    timed_out = isinstance(error, BlockingIOError | TimeoutError)
    return Failure("timeout" if timed_out else "cut", f"{type(error).__name__}: {error}", transient=True)


def _is_proxied(host: str) -> bool:
    """Tell whether the environment names a proxy for this host."""
    proxies = urllib.request.getproxies()
    return bool(proxies.get("http") or proxies.get("all")) and not urllib.request.proxy_bypass(host)


def _close_all(connections: list[socket.socket]) -> None:
    while connections:
        connections.pop().close()
