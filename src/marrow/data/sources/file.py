"""One file of a source: where it is, its format by its name, and millions of them in little memory."""

import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, overload

Format = Literal["csv", "jsonl", "parquet", "arrow", "text"]
Compression = Literal["", "gzip", "zstd"]
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
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
KNOWN = ", ".join(SUFFIXES) + " (each also with .gz or .zst)"
HUB = "hf://"
_FORMATS = tuple(dict.fromkeys(SUFFIXES.values()))


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read, or a range of it.

    path: of a file of this machine; of another, its name below `root`. name: its path below the
    source's folder, as provenance shows it. root: the URL that `path` is below; empty here. version:
    changes with the contents. encoding: of text. start, end: the range, in bytes (CSV, JSON lines)
    or row groups (Parquet); an end of -1 is that of the file. line: at which the range begins.
    """

    path: str
    name: str
    format: Format
    compression: Compression
    num_bytes: int
    version: str = ""
    root: str = ""
    encoding: str = "auto"
    start: int = 0
    end: int = -1
    line: int = 1

    @property
    def where(self) -> str:
        """The file as messages name it."""
        return f"{self.root.partition('?')[0].rstrip('/')}/{self.path}" if self.root else self.path

    @property
    def is_whole(self) -> bool:
        """Whether the range is all of the file."""
        return self.start == 0 and self.end == -1


class FileList(Sequence[SourceFile]):
    """The files of a source, in the order of their names: about 120 bytes each, for there may be millions."""

    def __init__(
        self,
        found: Iterable[tuple[str, int, str]],
        *,
        base: str = "",
        root: str = "",
        format: str = "auto",
        encoding: str = "auto",
    ) -> None:
        """Take (name, bytes, version) of each file.

        Args: base: what stands before a name to make it a path. format: of those that do not tell.
        """
        self.skipped: Counter[str] = Counter()
        self._base, self._root, self._encoding = base, root, encoding
        self._names: list[str] = []
        self._sizes, self._formats, self._versions = array("q"), bytearray(), []
        for name, num_bytes, version in found:
            kind = format_of(name) if format == "auto" else cast(Format, format)
            if kind is None:
                self.skipped[os.path.splitext(name)[1] or "no suffix"] += 1
                continue
            self._names.append(name)
            self._sizes.append(num_bytes)
            self._formats.append(_FORMATS.index(kind))
            self._versions.append(version)

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> SourceFile: ...
    @overload
    def __getitem__(self, index: slice) -> list[SourceFile]: ...
    def __getitem__(self, index: int | slice) -> SourceFile | list[SourceFile]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name = self._names[index]
        return SourceFile(
            self._base + name,
            name,
            _FORMATS[self._formats[index]],
            compression_of(name),
            self._sizes[index],
            self._versions[index],
            self._root,
            self._encoding,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self._sizes)


def format_of(name: str | Path) -> Format | None:
    """Tell a file's format by its name, None if unknown."""
    stem, suffix = os.path.splitext(str(name).lower())
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
    return SUFFIXES.get(suffix)


def compression_of(name: str) -> Compression:
    """Tell by its name how a file is compressed."""
    return COMPRESSIONS.get(os.path.splitext(name)[1].lower(), "")
