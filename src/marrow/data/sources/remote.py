"""Sources elsewhere: files at s3:// and http(s)://, listed and streamed through `store/remote/client.py`.

`s3://bucket/prefix/` means the files below it, `s3://bucket/a*.csv` those that match, as folders and
globs of this machine do; http(s) has no listing, so that it names one file. Files are streamed in
parts of 8 MiB and never stored; what is read is the version that was listed, or an error.
"""

import glob
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, cast

from marrow.core.errors import SourceError, UsageError
from marrow.data.sources.file import FileList, SourceFile
from marrow.store.remote.client import Remote, is_url, split_url
from marrow.store.remote.retry import Retry

READ_AHEAD_BYTES = 8 << 20  # of one request
# Nothing is lost yet when files are listed: a server that is not there is told soon.
_LISTING = Retry(connect_attempts=3)


def find_remote(source: str, format: str, encoding: str) -> FileList:
    """List the files at a URL.

    Raises: SourceError if there is none; UsageError for what is no such address, or a folder or glob
        of http(s); NotPermitted; Unreachable.
    """
    if not is_url(source):
        raise UsageError(
            f"data.source: {source.partition('://')[0]}:// is no address that rows can be read from",
            hint="write s3://, http://, https://, file:// or hf://datasets/, or a path of this machine",
        )
    if not source.startswith("s3://"):
        if glob.has_magic(source.partition("?")[0]):
            raise UsageError(
                f"data.source: {source} is a pattern, and http(s) has no listing of files",
                hint="name one file; folders and patterns are for this machine and s3://",
            )
        root, name = split_url(source)
        with Remote.open(root, _LISTING) as remote:
            file = remote.head(name)
            version = file.etag or f"{file.modified_s}"
            return FileList([(name, file.num_bytes, version)], root=root, format=format, encoding=encoding)
    base, pattern = _split_glob(source)
    with Remote.open(base, _LISTING) as remote:
        names = [(f.name, f.num_bytes, f.etag or f"{f.modified_s}") for f in remote.list()]
        if not pattern and not names:  # one object, rather than what is below it
            root, name = split_url(source)
            with Remote.open(root, _LISTING) as parent:
                file = parent.head(name)
            return FileList(
                [(name, file.num_bytes, file.etag or f"{file.modified_s}")],
                root=root,
                format=format,
                encoding=encoding,
            )
    matches = name_matcher(pattern or "**")
    kept = sorted(
        (entry for entry in names if matches(entry[0]) and not _is_hidden(entry[0])),
        key=lambda entry: entry[0].replace("/", "\0"),
    )
    return FileList(kept, root=base, format=format, encoding=encoding)


@contextmanager
def open_remote(file: SourceFile) -> Iterator[IO[bytes]]:
    """Open a remote file for reading at any place, in order without asking twice."""
    with Remote.open(file.root) as remote:
        raw = _RemoteBytes(remote, file)
        try:
            yield cast(IO[bytes], raw)
        finally:
            raw.close()


class _RemoteBytes(io.RawIOBase):
    """A remote file as a stream: one request for as long as it is read in order."""

    def __init__(self, remote: Remote, file: SourceFile) -> None:
        super().__init__()
        self._remote, self._file = remote, file
        self._position = 0
        self._rest = memoryview(b"")
        self._pieces: Iterator[bytes | memoryview] | None = None

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be read at any place."""
        return True

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.num_bytes}[whence]
        )
        if position != self._position:
            ahead = position - self._position
            if 0 < ahead <= len(self._rest):
                self._rest = self._rest[ahead:]
            else:
                self._rest, self._pieces = memoryview(b""), None
            self._position = position
        return position

    def read(self, size: int = -1) -> bytes:
        """Read `size` bytes, fewer only at the end."""
        if size < 0:
            size = max(0, self._file.num_bytes - self._position)
        taken: list[bytes | memoryview] = []
        left = size
        while left:
            if not self._rest and not self._fill(left):
                break
            piece, self._rest = self._rest[:left], self._rest[left:]
            taken.append(piece)
            left -= len(piece)
            self._position += len(piece)
        return b"".join(taken)

    def _fill(self, wanted: int) -> bool:
        """Have some bytes ready; False at the end."""
        while True:
            if self._pieces is None:
                length = min(max(wanted, READ_AHEAD_BYTES), self._file.num_bytes - self._position)
                if length <= 0:
                    return False
                version = self._file.version if '"' in self._file.version else ""
                self._pieces = self._remote.stream(self._file.path, self._position, length, etag=version)
                is_fresh = True
            else:
                is_fresh = False
            piece = next(self._pieces, None)
            if piece:
                self._rest = memoryview(piece)
                return True
            if piece is None:
                self._pieces = None
                if is_fresh:
                    raise SourceError(
                        f"{self._file.where} ended after {self._position} of {self._file.num_bytes} bytes",
                        hint="it was written anew meanwhile; run the same command again",
                    )


def _split_glob(source: str) -> tuple[str, str]:
    """Split s3://bucket/a/b*.csv into what to list and the pattern of the names below it."""
    parts = source.split("/")
    for index, part in enumerate(parts[3:], 3):
        if glob.has_magic(part):
            return "/".join(parts[:index]) + "/", "/".join(parts[index:])
    return source, ""


def name_matcher(pattern: str) -> Callable[[str], bool]:
    """Return a test of names against a glob, as of files: * stays in its folder, ** goes below."""
    expression = re.escape(pattern)
    for written, meant in ((r"\*\*/", "(?:.*/)?"), (r"\*\*", ".*"), (r"\*", "[^/]*"), (r"\?", "[^/]")):
        expression = expression.replace(written, meant)
    # Of a set of characters, only its brackets and dashes are meant.
    expression = re.sub(r"\\\[(.+?)\\\]", lambda m: f"[{m[1].replace(chr(92) + '-', '-')}]", expression)
    compiled = re.compile(expression.replace("[!", "[^"))
    return lambda name: compiled.fullmatch(name) is not None


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
