"""The bytes of a source file as one stream: local or remote, unpacked, as UTF-8.

    with open_bytes(file) as stream:        # text formats: unpacked, recoded, its range alone
        for line, is_whole in lines_of(stream, MAX_LINE_BYTES): ...
    with open_seekable(file) as stream:     # Parquet and Arrow files

Memory is a few blocks, whatever the size of the file. Text in another encoding is recoded on the
way; bytes that it has no character for become bytes that are no UTF-8, so that the row they stand in
is found to be broken, and only that one.
"""

import codecs
import gzip
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

import pyarrow as pa

from marrow.core.errors import SourceError, explain_os_errors
from marrow.data.sources.file import HUB, SourceFile
from marrow.data.sources.hub import local_path
from marrow.data.sources.remote import open_remote

BLOCK_BYTES = 1 << 20
_MARKS = (  # the longer first: UTF-32 begins as UTF-16 does
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_UTF8 = ("utf-8", "ascii")


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that could not be read: where, why, and how it begins."""

    file: str
    line: int
    reason: str
    text: str


@contextmanager
def open_bytes(file: SourceFile) -> Iterator[IO[bytes]]:
    """Open a text-like file as UTF-8 bytes: unpacked, a byte order mark removed, recoded.

    Raises: SourceError if the packed file is damaged or cut short; NotPermitted; Unreachable.
    """
    with explain_os_errors("read the source", file.where), _explain_packed(file), _open(file) as raw:
        stream = _unpacked(file, raw)
        if not file.is_whole:  # a range is of a plain file in UTF-8
            start = file.start or mark_bytes(file)
            stream.seek(start)
            yield stream if file.end == -1 else cast(IO[bytes], _Range(stream, file.end - start))
            return
        head = stream.read(4)
        mark, encoding = _encoding(file, head)
        if encoding in _UTF8:
            yield cast(IO[bytes], _Joined(head[len(mark) :], stream))
        else:
            yield cast(IO[bytes], _Recoded(head[len(mark) :], stream, encoding))


def is_plain(file: SourceFile) -> bool:
    """Tell whether a text file's bytes are those of its text, so that it can be cut into ranges."""
    if file.compression or file.root:
        return False
    with explain_os_errors("read the source", file.where), _open(file) as stream:
        return _encoding(file, stream.read(4))[1] in _UTF8


def mark_bytes(file: SourceFile) -> int:
    """Return the length of the byte order mark that a plain text file begins with."""
    with explain_os_errors("read the source", file.where), _open(file) as stream:
        return len(codecs.BOM_UTF8) if stream.read(3) == codecs.BOM_UTF8 else 0


def _encoding(file: SourceFile, head: bytes) -> tuple[bytes, str]:
    """Return the byte order mark that a file begins with, and its encoding."""
    mark, encoding = next((pair for pair in _MARKS if head.startswith(pair[0])), (b"", "utf-8"))
    if file.encoding == "auto":
        return mark, encoding
    given = codecs.lookup(file.encoding).name.removesuffix("-sig")
    return (mark, encoding) if mark and encoding.startswith(given) else (b"", given)


@contextmanager
def open_seekable(file: SourceFile) -> Iterator[pa.NativeFile]:
    """Open a file for Arrow's readers. Raises: SourceError; NotPermitted; Unreachable."""
    if file.compression:
        raise SourceError(
            f"{file.where}: a {file.format} file is not read through {file.compression}",
            hint="unpack it; these formats compress their own columns",
        )
    with explain_os_errors("read the source", file.where):
        if not file.root:
            with pa.OSFile(file.path) as local:
                yield local
            return
        with _open(file) as stream, pa.PythonFile(stream, mode="r") as native:
            yield native


def encoding_of(stream: IO[bytes]) -> str:
    """Return the encoding of the file behind a stream of `open_bytes`, as reasons name it."""
    return stream.encoding.upper() if isinstance(stream, _Recoded) else "UTF-8"


def lines_of(stream: IO[bytes], max_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """Yield (line with its end, whether it is whole); of a line above `max_bytes` only the beginning.

    Cost: at most `max_bytes` and a block of memory.
    """
    rest = b""
    is_overlong = False
    while block := stream.read(BLOCK_BYTES):
        lines = (rest + block).split(b"\n")
        rest = lines.pop()
        for line in lines:
            yield line[:max_bytes] + b"\n", not is_overlong and len(line) <= max_bytes
            is_overlong = False
        if len(rest) > max_bytes:
            rest, is_overlong = rest[:max_bytes], True
    if rest:
        yield rest, not is_overlong


def peek(value: Any) -> str:
    """Show the beginning of a broken row's bytes or text."""
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    return text[:1000]


@contextmanager
def _open(file: SourceFile) -> Iterator[IO[bytes]]:
    if file.root.startswith(HUB):
        with open(local_path(file), "rb") as stream:
            yield stream
    elif file.root:
        with open_remote(file) as remote:
            yield remote
    else:
        with open(file.path, "rb") as stream:
            yield stream


def _unpacked(file: SourceFile, raw: IO[bytes]) -> IO[bytes]:
    if file.compression == "gzip":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if file.compression == "zstd":
        # Several frames, as `zstd -T0` and `cat` make them, are read as one.
        return cast(IO[bytes], pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"))
    return raw


@contextmanager
def _explain_packed(file: SourceFile) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        # OSError without an errno is how pyarrow passes on what is wrong with the bytes.
        is_damage = (
            isinstance(error, gzip.BadGzipFile) or not isinstance(error, OSError) or error.errno is None
        )
        if not is_damage or not file.compression:
            raise
        raise SourceError(
            f"{file.where} is no whole {file.compression} file: {error}",
            hint="copy or download the file again",
        ) from error


class _Range(io.RawIOBase):
    """So many bytes of a stream, from where it stands."""

    def __init__(self, stream: IO[bytes], num_bytes: int) -> None:
        super().__init__()
        self._stream, self._left = stream, num_bytes

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes."""
        block = self._stream.read(min(size, self._left) if size >= 0 else self._left)
        self._left -= len(block)
        return block


class _Joined(io.RawIOBase):
    """Some bytes, and then a stream."""

    def __init__(self, start: bytes, stream: IO[bytes]) -> None:
        super().__init__()
        self._start, self._stream = start, stream

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes."""
        if self._start:
            start, self._start = self._start, b""
            return start + self._stream.read(max(0, size - len(start)) if size >= 0 else -1)
        return self._stream.read(size)


class _Recoded(io.RawIOBase):
    """A stream in another encoding as UTF-8."""

    def __init__(self, start: bytes, stream: IO[bytes], encoding: str) -> None:
        super().__init__()
        self.encoding = encoding.removesuffix("-le").removesuffix("-be")
        self._stream = _Joined(start, stream)
        self._decoder = codecs.getincrementaldecoder(encoding)("marrow.undecodable")
        self._rest = b""
        self._is_over = False

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes."""
        while not self._is_over and (size < 0 or len(self._rest) < size):
            block = self._stream.read(BLOCK_BYTES)
            self._is_over = not block
            self._rest += self._decoder.decode(block, self._is_over).encode("utf-8", "surrogateescape")
        if size < 0:
            size = len(self._rest)
        block, self._rest = self._rest[:size], self._rest[size:]
        return block


def _undecodable(error: UnicodeError) -> tuple[str, int]:
    """Stand for bytes without a character: as the byte FF, which is in no UTF-8."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error("marrow.undecodable", _undecodable)
