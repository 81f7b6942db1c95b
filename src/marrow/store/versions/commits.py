"""A folder becomes the next version of a dataset; what has not changed is neither read nor written.

The folder's index (`folder_index.py`) holds one version's files. Where that is the branch's newest
version, what differs from the index is all that there is to do: those files are read
(`intake.py`) and the manifest's ranges that name them written anew. Else all files' names go into a
manifest anew, which is the same one byte for byte. Then the version is added and the branch moved
by compare-and-swap, in one transaction: killed before it, nothing happened.
"""

import dataclasses
import getpass
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from marrow.core.errors import DamagedBlob, SourceError, StaleVersion, explain_os_errors
from marrow.core.hashes import hash_bytes, hash_value
from marrow.core.progress import Progress, silent
from marrow.core.records import Artifact, FileEntry, Parent
from marrow.core.span import span
from marrow.store.datasets.contents import Deposit
from marrow.store.datasets.dataset import changes_between, label
from marrow.store.datasets.manifests import Change, Entry, compare, encode, splice
from marrow.store.datasets.packs import MAX_MEMBER_BYTES
from marrow.store.datasets.refs import DATASET
from marrow.store.store import Store, artifact_id
from marrow.store.version import code_version
from marrow.store.versions.folder_index import Difference, FolderIndex, Known, known_entries, manifest_check
from marrow.store.versions.folder_walk import Links, Listing, scan
from marrow.store.versions.intake import Taken, take_in

ATTEMPTS = 10  # to get onto a branch that others move


@dataclass(frozen=True, slots=True)
class Version:
    """A dataset version as people see it. label: "reviews@3", or the id's first digits."""

    label: str
    artifact: Artifact

    @property
    def facts(self) -> dict[str, Any]:
        """message, author, files, bytes, added, modified, deleted, renamed."""
        return dict(self.artifact.facts)


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit did. num_read, bytes_read: of the folder; stored_bytes: new in the store."""

    version: Version
    is_new: bool
    num_read: int
    bytes_read: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class _Content:
    """The files that a version is to have. changes: from `since`'s files, where that is known already."""

    files: tuple[FileEntry, ...]
    num_files: int
    num_bytes: int
    since: str = ""
    changes: tuple[Change, ...] = ()


def commit(
    store: Store,
    folder: Path,
    name: str,
    message: str = "",
    *,
    follow_links: bool = False,
    allow_empty: bool = False,
    replace: bool = False,
    progress: Progress = silent,
    threads: int | None = None,
) -> Committed:
    """Make the files of a folder the next version of a branch; see `Versions.commit`."""
    folder = folder.expanduser()
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise SourceError(f"{folder} {what}", hint="give the folder whose files are the dataset")
    with store.no_collection(), explain_os_errors("commit the folder", folder):
        work = _Commit(store, folder, name)
        work.look("follow" if follow_links else "refuse", allow_empty)
        if work.stands_still():
            return Committed(work.version_at(work.head), False, 0, 0, 0)
        with Deposit(store.contents) as deposit:
            taken = work.read(deposit, progress, threads)
            files = work.write_manifest(taken, deposit)
            stored_bytes = deposit.num_bytes
            with span("sync"):
                deposit.publish()
        content = work.remember(taken, files)
        version, is_new = work.put_on_branch(content, message, replace)
    return Committed(version, is_new, taken.num_read, taken.bytes_read, stored_bytes)


class _Commit:
    """A commit under way."""

    def __init__(self, store: Store, folder: Path, name: str) -> None:
        self.store = store
        self.folder = folder
        self.name = name
        store.contents.packs.refresh()
        self.head = self._head()
        self.index = FolderIndex.open(store.home, folder)
        self.listings: list[Listing] = []
        self.found = Difference([], {}, {})
        self.is_based_on_head = self._is_based_on_head()

    def look(self, links: Links, allow_empty: bool) -> None:
        """Find what differs from the index. Raises: SourceError."""
        contents = self.store.contents
        with span("look"):
            self.listings = scan(self.folder, links=links, avoid=self.store.home)
            self.found = self.index.compare(self.listings, contents.has, set(contents.packs.names()))
        if not self.listings and not allow_empty:
            raise SourceError(
                f"{self.folder} has no files", hint="--allow-empty commits a version without files"
            )

    def stands_still(self) -> bool:
        """Tell whether the folder is as it was when it became the branch's newest version."""
        return (
            self.is_based_on_head
            and not (self.found.read or self.found.before or self.found.same)
            and self.index.bases.get(self.name) == [self.head.id if self.head else ""]
        )

    def version_at(self, artifact: Artifact | None) -> Version:
        """Return a version of this branch."""
        assert artifact is not None
        return Version(label(self.store.catalog, artifact, self.name), artifact)

    def read(self, deposit: Deposit, progress: Progress, threads: int | None) -> Taken:
        """Read the files that differ."""
        is_any_large = any(seen.stamp[0] > MAX_MEMBER_BYTES for seen in self.found.read)
        return take_in(
            self.folder,
            self.found.read,
            self.store.contents,
            deposit,
            sizes=self.index.sizes() if is_any_large else frozenset(),
            progress=progress,
            threads=threads,
        )

    def write_manifest(self, taken: Taken, deposit: Deposit) -> tuple[FileEntry, ...]:
        """Write the new version's manifest: its changed ranges, if the index stands on the branch."""
        if self.is_based_on_head:
            assert self.head is not None
            changes: dict[str, Entry | None] = dict.fromkeys(self.found.gone)
            changes |= {entry.name: entry for entry in taken.entries if self._is_changed(entry)}
            try:
                return _spliced(self.store, self.head.files, changes, deposit)
            except DamagedBlob:  # of the old manifest: it is written anew
                self.is_based_on_head = False
        read = {entry.name for entry in taken.entries}
        differs = read | self.found.before.keys()
        same = {name: known for name, known in self.index.known.items() if name not in differs}
        return write_manifest(sorted(known_entries(same) + taken.entries), deposit)

    def remember(self, taken: Taken, files: tuple[FileEntry, ...]) -> _Content:
        """Write the index: it holds the new version's files now."""
        index, packs = self.index, self.store.contents.packs
        is_based, head = self.is_based_on_head, self.head
        known: Known = self.found.same | taken.known
        if known or self.found.before or index.manifest != manifest_check(files):
            present = set(packs.names())
            index.save(known, files, listings=self.listings, packs=present, is_packed=packs.has)
        content = _Content(files, index.num_files, index.num_bytes)
        if not is_based or head is None:
            return content
        changes = compare(known_entries(self.found.before), taken.entries)
        return dataclasses.replace(content, since=head.id, changes=tuple(changes))

    def put_on_branch(self, content: _Content, message: str, replace: bool) -> tuple[Version, bool]:
        """Add the version and move the branch; on top of what others committed meanwhile, if that is fair."""
        index, name, store = self.index, self.name, self.store
        for attempt in range(ATTEMPTS):
            head = self.head
            if head is not None and _same_files(head.files, content.files):
                index.stand_on(name, head.id)
                return self.version_at(head), False
            bases = index.bases.get(name, [])
            if head is not None and bases and head.id not in bases and not replace:
                raise StaleVersion(
                    f"{name!r} has moved to {self.version_at(head).label} since this folder was "
                    "committed or checked out; to commit now would undo what changed there",
                    hint=f"marrow data branch {bases[0][:12]} NEW, commit the folder --to NEW, then "
                    f"marrow data merge NEW {name}; or commit with --replace",
                )
            edges = () if head is None else (Parent("previous", head.id),)
            artifact = _artifact(store, content, edges, message, head)
            # Both, until one is sure: a kill in between must not make the folder look outdated.
            index.stand_on(name, *([head.id] if head else []), artifact.id)
            try:
                number = store.refs.advance(name, None if head is None else head.id, artifact)
            except StaleVersion:
                index.stand_on(name, *bases) if bases else index.forget(name)
                if attempt == ATTEMPTS - 1:
                    raise
                self.head = self._head()
                continue
            index.stand_on(name, artifact.id)
            return Version(f"{name}@{number}", artifact), True
        raise AssertionError("unreachable")

    def _head(self) -> Artifact | None:
        if self.store.refs.get(self.name) is None:
            return None
        return self.store.get(self.store.refs.branch(self.name).artifact_id)  # a tag is refused

    def _is_based_on_head(self) -> bool:
        """Tell whether the index holds the files of the branch's newest version, which is all here."""
        head = self.head
        return (
            head is not None
            and self.index.manifest == manifest_check(head.files)
            and head.id not in self.store.refs.absent()
            and all(self.store.blobs.has(file.sha256) for file in head.files)
        )

    def _is_changed(self, entry: Entry) -> bool:
        known = self.found.before.get(entry.name)
        return known is None or known[1] != entry.sha256


def new_version(
    store: Store,
    entries: list[Entry],
    files: tuple[FileEntry, ...],
    parents: tuple[Parent, ...],
    message: str,
    before: Artifact | None,
) -> Artifact:
    """Make the record of a version; it is in no catalog yet. Args: before: what its counts compare with."""
    content = _Content(files, len(entries), sum(entry.num_bytes for entry in entries))
    return _artifact(store, content, parents, message, before)


def write_manifest(entries: list[Entry], deposit: Deposit) -> tuple[FileEntry, ...]:
    """Put the manifest of some files, sorted by name, into a deposit; return its ranges."""
    return tuple(_range(number, data, deposit) for number, data in enumerate(encode(entries)))


def _spliced(
    store: Store, old: tuple[FileEntry, ...], changes: Mapping[str, Entry | None], deposit: Deposit
) -> tuple[FileEntry, ...]:
    if not changes:
        return old
    files = []
    for number, piece in enumerate(splice(len(old), lambda n: store.contents.read(old[n].sha256), changes)):
        if isinstance(piece, int):
            files.append(dataclasses.replace(old[piece], name=f"{number:06d}"))
        else:
            files.append(_range(number, piece, deposit))
    return tuple(files)


def _range(number: int, data: bytes, deposit: Deposit) -> FileEntry:
    digest = hash_bytes(data)
    deposit.add_blob(digest, data)
    return FileEntry(f"{number:06d}", digest, xxhash.xxh3_128_hexdigest(data), len(data))


def _artifact(
    store: Store, content: _Content, parents: tuple[Parent, ...], message: str, before: Artifact | None
) -> Artifact:
    key = hash_value(["dataset", 1, message])
    record = Artifact(
        id=artifact_id(DATASET, key, parents, content.files),
        kind=DATASET,
        key=key,
        parents=parents,
        files=content.files,
        facts={},
        code_version=code_version(),
        recipe_hash="",
        environment={},
        created_s=time.time(),
    )
    facts: dict[str, Any] = {
        "message": message,
        "author": _author(),
        "files": content.num_files,
        "bytes": content.num_bytes,
    }
    if before is None:
        counts = Counter(A=content.num_files)
    else:
        known = before.id == content.since
        changes = content.changes if known else changes_between(store.contents, before, record)
        counts = Counter(change.letter for change in changes)
    words = {"added": "A", "modified": "M", "deleted": "D", "renamed": "R"}
    facts |= {word: counts[letter] for word, letter in words.items()}
    return dataclasses.replace(record, facts=facts)


def _same_files(one: tuple[FileEntry, ...], other: tuple[FileEntry, ...]) -> bool:
    return [file.sha256 for file in one] == [file.sha256 for file in other]


def _author() -> str:
    try:
        return os.environ.get("MARROW_AUTHOR") or getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in many containers
        return str(os.getuid())
