"""A small fast server of a folder's files: S3's GET, HEAD and LIST, ranges, a wait before each answer.

    python tests/support/range_server.py FOLDER --latency-ms 20

It sends files with sendfile, so that a benchmark measures its client, and it is the same for all
of them. Buckets are the folders of FOLDER. Its first line on stdout is its port; it ends with
its stdin, so that no server outlives who started it.
"""

import argparse
import asyncio
import contextlib
import email.utils
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class RangeServer:
    """The server as a child process; `url` is its address."""

    def __init__(self, folder: Path, latency_s: float = 0.0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", __file__, str(folder), "--latency-ms", str(latency_s * 1000)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "RangeServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cpu_s(self) -> float:
        """CPU seconds that the server took so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


async def serve(folder: Path, latency_s: float) -> None:
    """Answer until stdin ends."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                await asyncio.sleep(latency_s)
                await answer(folder, head.decode("latin-1"), writer)
        writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, sys.stdin.read)
    os._exit(0)


async def answer(folder: Path, head: str, writer: asyncio.StreamWriter) -> None:
    """Answer one request."""
    lines = head.split("\r\n")
    method, target, _ = lines[0].split(" ")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    address = urlsplit(target)
    path = folder / unquote(address.path).strip("/")
    query = parse_qs(address.query, keep_blank_values=True)
    if method == "GET" and ("list-type" in query or "prefix" in query):
        return _send(writer, 200, _listing(path, query.get("prefix", [""])[0]))
    if method not in ("GET", "HEAD"):
        return _send(writer, 501, b"")
    if not path.is_file():
        return _send(writer, 404, b"" if method == "HEAD" else b"<Error><Code>NoSuchKey</Code></Error>")
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        first, last, status = 0, stat.st_size - 1, 200
        if wanted := headers.get("range", ""):
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            first = int(low) if low else max(0, stat.st_size - int(high))
            last = min(last, int(high)) if low and high else last
            status = 206
            if first > last:
                return _send(writer, 416, b"")
        extra = [f"Content-Range: bytes {first}-{last}/{stat.st_size}"] if status == 206 else []
        etag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
        if headers.get("if-match", etag) != etag:
            return _send(writer, 412, b"")
        extra += [f"ETag: {etag}", f"Last-Modified: {email.utils.formatdate(stat.st_mtime, usegmt=True)}"]
        _send(writer, status, None, last - first + 1, extra)
        if method == "GET" and last >= first:
            await writer.drain()
            await asyncio.get_running_loop().sendfile(writer.transport, file, first, last - first + 1)
    return None


def _listing(bucket: Path, prefix: str) -> bytes:
    """Return all files of a bucket as S3 lists them; one page."""
    rows = []
    for path in sorted(p for p in bucket.rglob("*") if p.is_file()):
        key, stat = path.relative_to(bucket).as_posix(), path.stat()
        if key.startswith(prefix):
            modified = email.utils.datetime.datetime.fromtimestamp(stat.st_mtime).strftime(
                "%Y-%m-%dT%H:%M:%S.000Z"
            )
            rows.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{modified}</LastModified>"
                f'<ETag>"{stat.st_mtime_ns:x}"</ETag><Size>{stat.st_size}</Size></Contents>'
            )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{bucket.name}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(rows)}</KeyCount>"
        f"<MaxKeys>{len(rows) + 1}</MaxKeys><IsTruncated>false</IsTruncated>"
        f"{''.join(rows)}</ListBucketResult>"
    ).encode()


def _send(
    writer: asyncio.StreamWriter,
    status: int,
    body: bytes | None,
    size: int = 0,
    extra: list[str] | None = None,
) -> None:
    length = size if body is None else len(body)
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {length}", "Accept-Ranges: bytes", *(extra or [])]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + (body or b""))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    options = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(options.folder.resolve(), options.latency_ms / 1000))
