"""Which dataset versions hold a file, whatever its bytes were then and whatever it was called later.

    found = find_occurrences(store, "ds/a.csv")
    found.versions                      # oldest first, each with the files that matched, and by what

A version's names are relative to the folder that was committed, so the name of a path is first made
relative: to the folder that the store knows as a dataset's, or, if it knows none, to each folder above
it. Then every version of every dataset is searched for files of that name, and for any file with bytes
that one of them ever had, or that the path has now: a renamed file is found under its new name, and
the file before its last edit too. What is found too much by that is seen in the answer; what is
found too little would not be.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from marrow.core.hashes import hash_file
from marrow.core.records import Artifact
from marrow.store.datasets.manifests import Entry, decode
from marrow.store.datasets.refs import DATASET
from marrow.store.store import Store
from marrow.store.versions.folder_index import FolderIndex

Reason = Literal["name", "bytes"]
_ALL = 1 << 31


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One version, and why each of its files counts: it has the name, or only the bytes."""

    artifact: Artifact
    files: dict[str, Reason]


@dataclass(frozen=True, slots=True)
class Occurrences:
    """What was looked for, and the versions that have it.

    names: relative to a dataset's folder; the first also at the end of a longer name. folder: the
    dataset's folder that the path is in, None if the store knows none. contents: how many different
    bytes, none of them empty, files of that name had.
    """

    names: tuple[str, ...]
    folder: Path | None
    contents: int
    versions: tuple[Occurrence, ...]


def find_occurrences(store: Store, wanted: str) -> Occurrences:
    """Find a file in all dataset versions.

    Args: wanted: a path, also of a file that is gone, or a name in a dataset, or its last parts.
    Raises: DamagedBlob if a manifest is damaged.
    Cost: reads each range of the manifests twice, however many versions share it.
    """
    versions = list(reversed(store.catalog.latest(kind=DATASET, limit=_ALL)))
    ranges = list(dict.fromkeys(file.sha256 for version in versions for file in version.files))
    folder, names = _names(store, wanted)
    ending = f"/{names[0]}"

    def is_named(entry: Entry) -> bool:
        return entry.name in names or entry.name.endswith(ending)

    def entries(digest: str) -> list[Entry]:
        return decode(store.contents.read(digest))

    path = Path(wanted)
    contents = {hash_file(path)} if path.is_file() and path.stat().st_size else set()
    for digest in ranges:
        contents |= {entry.sha256 for entry in entries(digest) if entry.num_bytes and is_named(entry)}
    matched: dict[str, dict[str, Reason]] = {}
    for digest in ranges:
        matched[digest] = {
            entry.name: "name" if is_named(entry) else "bytes"
            for entry in entries(digest)
            if entry.sha256 in contents or is_named(entry)
        }
    found = []
    for version in versions:
        files: dict[str, Reason] = {}
        for file in version.files:
            files |= matched[file.sha256]
        if files:
            found.append(Occurrence(version, files))
    return Occurrences(tuple(names), folder, len(contents), tuple(found))


def _names(store: Store, wanted: str) -> tuple[Path | None, list[str]]:
    """Return the dataset's folder that a path is in, if one is known, and the names it may have there."""
    for path in dict.fromkeys([Path(os.path.abspath(wanted)), Path(os.path.realpath(wanted))]):
        for folder in path.parents:
            if FolderIndex.open(store.home, folder).bases:
                return folder, [path.relative_to(folder).as_posix()]
    given = os.path.normpath(wanted)
    tails = dict.fromkeys([*_tails(given), *_tails(os.path.abspath(wanted))])
    return None, [name for name in tails if not name.startswith("..")]


def _tails(path: str) -> Iterator[str]:
    """Yield a path without its first part, its first two parts, and so on; first itself, if relative."""
    parts = Path(path).parts
    for start in range(1 if Path(path).is_absolute() else 0, len(parts)):
        yield "/".join(parts[start:])
