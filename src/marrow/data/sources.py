"""Which files a source means, what format each has, and their bytes as one stream.

A source is a file, a folder (searched to its bottom, hidden names aside) or a glob. A file's format
is known by its name; `.gz` may follow. In a folder, files of no known format are skipped and counted;
a file that is named itself must be known or given a format. Nothing here reads rows.
"""

import codecs
import glob
import gzip
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import pyarrow as pa

from marrow.core.errors import SourceError, explain_os_errors
from marrow.core.hashes import hash_value
from marrow.data.config import PYTHON, DataRecipe
from marrow.data.stdlib import stdlib_files, stdlib_folder

Format = Literal["csv", "jsonl", "parquet", "arrow", "text"]
BLOCK_BYTES = 1 << 20
SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".markdown": "text",
    ".rst": "text",
}
KNOWN = ", ".join(SUFFIXES) + " (each also with .gz)"
_GZIP = ".gz"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read. `name` is its path below the source's folder, as provenance shows it."""

    path: Path
    name: str
    format: Format
    is_compressed: bool
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that could not be read: where, why, and how it begins."""

    file: str
    line: int
    reason: str
    text: str


@dataclass(frozen=True, slots=True)
class Found:
    """The files of a source, in the order of their names, and what was passed over by suffix."""

    files: tuple[SourceFile, ...]
    skipped: dict[str, int]


def find_files(source: str, format: str = "auto") -> Found:
    """List the files of a source.

    Raises: SourceError if there is none, or none with bytes in it; NotPermitted.
    """
    path = Path(source).expanduser()
    with explain_os_errors("read the source", path):
        if path.is_dir():
            base, names = path, sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p, path))
        elif path.exists():
            base, names = path.parent, [path]
        elif glob.has_magic(source):
            names = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
            base = _glob_base(path)
        else:
            raise SourceError(f"data.source: no file or folder at {source}", hint=_nearby(path))
    files: list[SourceFile] = []
    skipped: Counter[str] = Counter()
    for name in names:
        kind = format_of(name) if format == "auto" else cast(Format, format)
        if kind is None:
            skipped[name.suffix or "no suffix"] += 1
            continue
        with explain_os_errors("read the source", name):
            size = name.stat().st_size
        shown = name.relative_to(base).as_posix()
        files.append(SourceFile(name, shown, kind, name.suffix.lower() == _GZIP, size))
    if not files:
        raise _no_files(source, path, skipped)
    if not any(file.num_bytes for file in files):
        raise SourceError(
            f"data.source: {source} is empty: {len(files)} file{'s' * (len(files) > 1)} of 0 bytes",
            hint="check how the file was written",
        )
    return Found(tuple(files), dict(sorted(skipped.items())))


def fingerprint(recipe: DataRecipe) -> str:
    """Return a hash that changes when the files of the source do: the outside part of ingest's key.

    Names, sizes and times of change are hashed, not contents, so that it costs no reading.
    Raises: SourceError as `find_files`.
    """
    if recipe.source == PYTHON:
        root = stdlib_folder()
        stats = [(p.relative_to(root).as_posix(), p.stat()) for p in stdlib_files(root)]
        return hash_value([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
    found = find_files(recipe.source, recipe.format)
    return hash_value([[f.name, f.format, f.num_bytes, f.path.stat().st_mtime_ns] for f in found.files])


def format_of(path: Path) -> Format | None:
    """Tell a file's format by its name, None if unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == _GZIP:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


@contextmanager
def open_bytes(file: SourceFile) -> Iterator[IO[bytes]]:
    """Open a text-like file as UTF-8 bytes: unzipped, a byte order mark removed, UTF-16 translated.

    Raises: SourceError if the gzip or UTF-16 is damaged or cut short; NotPermitted.
    """
    with explain_os_errors("read the source", file.path), _explain_gzip(file), open(file.path, "rb") as raw:
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if file.is_compressed else raw
        mark = stream.read(3)
        stream.seek(0)
        if mark.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            translated = pa.transcoding_input_stream(pa.PythonFile(stream, mode="r"), "utf-16", "utf-8")
            with _explain_utf16(file), pa.BufferedInputStream(translated, BLOCK_BYTES) as recoded:
                yield cast(IO[bytes], recoded)
            return
        if mark == codecs.BOM_UTF8:
            stream.seek(3)
        yield stream


@contextmanager
def _explain_utf16(file: SourceFile) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{file.path} begins as UTF-16 but is not: {error}", hint="write the file again, as UTF-8"
        ) from error


@contextmanager
def _explain_gzip(file: SourceFile) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        # OSError without an errno is how pyarrow passes on what gzip raised inside of it.
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and error.errno is not None:
            raise
        raise SourceError(
            f"{file.path} is no whole gzip file: {error}", hint="copy or download the file again"
        ) from error


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


def _is_hidden(path: Path, base: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(base).parts)


def _glob_base(path: Path) -> Path:
    """Return the part of a glob before its first magic name."""
    plain: list[str] = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        plain.append(part)
    return Path(*plain) if plain else Path()


def _nearby(path: Path) -> str:
    import difflib  # only on the way to an error

    parent = path.parent
    looked = f"looked in {parent.resolve()}"
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {parent / close[0]}?"
    return f'{looked}; give "python", a file, a folder or a glob such as "data/*.csv"'


def _no_files(source: str, path: Path, skipped: Counter[str]) -> SourceError:
    if skipped:
        seen = ", ".join(f"{count} {suffix}" for suffix, count in sorted(skipped.items()))
        return SourceError(
            f"data.source: no file of a known format in {source} (there: {seen})",
            hint=f"known: {KNOWN}; or set data.format",
        )
    what = "is an empty folder" if path.is_dir() else "matches no file"
    return SourceError(f"data.source: {source} {what}", hint=f"looked for {KNOWN}")


def peek(value: Any) -> str:
    """Show the beginning of a broken row's bytes or text."""
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    return text[:1000]
