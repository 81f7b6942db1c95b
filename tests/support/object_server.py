"""A real S3 server (moto's) as a child process, and a proxy that breaks what passes through it."""

import contextlib
import http.client
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
# obstore and boto3 go by a proxy where the environment names one, except to these.
DIRECT = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}


class S3Server:
    """moto's S3 in a process of its own, on a free port; it ends with its stdin."""

    def __init__(self) -> None:
        code = (
            "import sys, os, threading\n"
            "from moto.server import ThreadedMotoServer\n"
            "server = ThreadedMotoServer('127.0.0.1', 0, verbose=False)\n"
            "server.start()\n"
            "print(server.get_host_and_port()[1], flush=True)\n"
            "sys.stdin.read()\n"
            "os._exit(0)\n"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **CREDENTIALS},
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "moto's server did not start"
        self.port = int(line)
        self.url = f"http://127.0.0.1:{self.port}"

    def make_bucket(self, name: str) -> str:
        """Make an empty bucket and return its s3:// address."""
        # moto tells by the signature which service is meant, but does not check it.
        signature = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, Signature=0"
        headers = {"Authorization": signature}
        request = urllib.request.Request(f"{self.url}/{name}", method="PUT", headers=headers)
        urllib.request.urlopen(request, timeout=30).close()
        return f"s3://{name}"

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


@dataclass(frozen=True)
class Fault:
    """What happens to one request.

    status: answered instead of passing it on. wait_s: before anything else. cut_after: bytes of
    the body after which the connection is reset. short_by: bytes left out of the end, the
    announced length agreeing. flip: one byte of the body changed. bytes_per_s: how slowly the
    body comes. swallow: the request takes effect, but its answer is lost.
    """

    status: int | None = None
    wait_s: float = 0.0
    cut_after: int | None = None
    short_by: int = 0
    flip: int | None = None
    bytes_per_s: float | None = None
    swallow: bool = False


@dataclass
class Seen:
    """A request that came by."""

    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def span(self) -> tuple[int, int] | None:
        """The range asked for as [start, end), if there is one with an end."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        return None if found is None else (int(found[1]), int(found[2]) + 1)


class FaultProxy:
    """Passes requests on to a server, but for those that `fault` says something about.

    `fault(request, n)` is asked with the request and its number, from 0; `down` refuses everyone.
    """

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream.removeprefix("http://")
        self.fault: Callable[[Seen, int], Fault | None] = lambda request, n: None
        self.seen: list[Seen] = []
        self.down = False
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else head and body of an answer come 40 ms apart

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def log_message(self, *arguments: object) -> None:
                pass

            def do_any(self) -> None:
                proxy._handle(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any

        class Server(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "FaultProxy":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def count(self, method: str = "GET", path: str = "") -> int:
        """How many such requests came by."""
        with self._lock:
            return sum(seen.method == method and path in seen.path for seen in self.seen)

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        seen = Seen(handler.command, handler.path, {k.lower(): v for k, v in handler.headers.items()})
        with self._lock:
            number = len(self.seen)
            self.seen.append(seen)
        body = _request_body(handler)
        fault = self.fault(seen, number) or Fault()
        if fault.wait_s:
            time.sleep(fault.wait_s)
        if self.down:
            return _reset(handler)
        if fault.status is not None:
            return _answer(handler, fault.status, {}, b"<Error><Code>Injected</Code></Error>")
        upstream = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            hop = ("connection", "transfer-encoding", "content-length")
            headers = {k: v for k, v in handler.headers.items() if k.lower() not in hop}
            upstream.request(handler.command, handler.path, body, headers)
            response = upstream.getresponse()
            answer = response.read()
            told = {k: v for k, v in response.getheaders() if k.lower() not in hop}
            length = response.getheader("Content-Length")
        finally:
            upstream.close()
        if fault.swallow:
            return _reset(handler)
        if handler.command == "HEAD":
            return _answer(handler, response.status, told, b"", length)
        if fault.flip is not None and answer:
            at = fault.flip % len(answer)
            answer = answer[:at] + bytes([answer[at] ^ 1]) + answer[at + 1 :]
        if fault.short_by:
            answer = answer[: max(0, len(answer) - fault.short_by)]
        return _answer(handler, response.status, told, answer, None, fault)


def _request_body(handler: BaseHTTPRequestHandler) -> bytes | None:
    if handler.headers.get("Transfer-Encoding", "").lower() == "chunked":
        parts = []
        while size := int(handler.rfile.readline().split(b";")[0], 16):
            parts.append(handler.rfile.read(size))
            handler.rfile.readline()
        handler.rfile.readline()
        return b"".join(parts)
    length = int(handler.headers.get("Content-Length") or 0)
    return handler.rfile.read(length) if length else None


def _answer(
    handler: BaseHTTPRequestHandler,
    status: int,
    headers: dict[str, str],
    body: bytes,
    length: str | None = None,
    fault: Fault | None = None,
) -> None:
    handler.send_response_only(status)
    for key, value in headers.items():
        handler.send_header(key, value)
    handler.send_header("Content-Length", length or str(len(body)))
    handler.end_headers()
    if handler.command == "HEAD":
        return
    if fault is not None and fault.cut_after is not None and fault.cut_after < len(body):
        handler.wfile.write(body[: fault.cut_after])
        handler.wfile.flush()
        time.sleep(0.01)  # a reset throws away what the client has not read yet
        _reset(handler)
        return
    if fault is not None and fault.bytes_per_s is not None:
        step = max(1, int(fault.bytes_per_s / 50))
        for start in range(0, len(body), step):
            handler.wfile.write(body[start : start + step])
            handler.wfile.flush()
            time.sleep(step / fault.bytes_per_s)
        return
    handler.wfile.write(body)


def _reset(handler: BaseHTTPRequestHandler) -> None:
    """Close so that the client sees a reset, not an end."""
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        handler.connection.shutdown(socket.SHUT_WR)
    handler.connection.close()
