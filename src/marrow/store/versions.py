"""Versions of datasets: commit, log, diff, branch, tag, merge. What git, DVC and lakeFS do for data.

A commit reads a folder's changed files (`intake.py`), writes a manifest of all of them
(`manifests.py`) and adds an artifact with the version before as its parent; then the branch moves
to it by compare-and-swap. One transaction makes it visible: killed before it, nothing happened.
Branches and tags are two rows each. A merge works on manifests alone and reads no data.
"""

import dataclasses
import getpass
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash

from marrow.core.errors import (
    ArtifactNotFound,
    DamagedBlob,
    SourceError,
    StaleVersion,
    StoreError,
    explain_os_errors,
)
from marrow.core.hashes import hash_bytes, hash_file, hash_value
from marrow.core.progress import Progress, silent
from marrow.core.records import Artifact, FileEntry, Parent
from marrow.core.span import span
from marrow.store import manifests
from marrow.store.contents import Damage, Deposit
from marrow.store.dataset import changes_between, entries_of, fill_folder
from marrow.store.folder_index import FolderIndex, Seen, walk
from marrow.store.intake import take_in
from marrow.store.manifests import Change, Entry
from marrow.store.merge import Side, common_ancestor, is_ancestor, merge_entries
from marrow.store.refs import DATASET
from marrow.store.store import Store, artifact_id
from marrow.store.version import code_version

ATTEMPTS = 10  # to get onto a branch that others move

Gate = Callable[[list[Entry]], None]
"""Looks at what a merge would give; raises to refuse it."""


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
class Merged:
    """What a merge did: nothing, moved the branch ("forward"), or made a version with two parents."""

    how: Literal["nothing", "forward", "merged"]
    version: Version
    taken: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verified:
    """What `verify` found. missing: names of lost files by version; artifacts: of other kinds, damaged."""

    damage: Damage
    missing: dict[str, list[str]]
    artifacts: list[str]


class Versions:
    """The dataset versions of an open store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.contents = store.contents
        self.refs = store.refs

    def commit(
        self,
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
        """Make the files of a folder the next version of a branch (made if there is none).

        Args: replace: also when the branch has moved since the folder was committed or checked
            out; without it that is an error, since the others' changes would be undone.
        Raises: SourceError (no folder, links, a file that keeps changing), StaleVersion, StoreError
            (a tag, another kind's name), DiskFull, NotPermitted.
        Cost: a stat of every file; a read and a write of what changed; two waits for the disk.
        """
        folder = folder.expanduser()
        if not folder.is_dir():
            what = "is no folder" if folder.exists() else "does not exist"
            raise SourceError(f"{folder} {what}", hint="give the folder whose files are the dataset")
        with self.store.no_collection(), explain_os_errors("commit the folder", folder):
            self.contents.packs.refresh()
            head = self._head(name)
            with span("look"):
                found = walk(folder, links="follow" if follow_links else "refuse", avoid=self.store.home)
                index = FolderIndex.open(self.store.home, folder)
            if not found and not allow_empty:
                raise SourceError(
                    f"{folder} has no files", hint="--allow-empty commits a version without files"
                )
            if self._stands_still(head, name, found, index):
                assert head is not None
                return Committed(Version(self.label_on(head, name), head), False, 0, 0, 0)
            with Deposit(self.contents) as deposit:
                sizes = {stamp[0] for stamp, _ in index.known.values()}
                taken = take_in(
                    folder,
                    found,
                    index,
                    self.contents,
                    deposit,
                    sizes=sizes,
                    progress=progress,
                    threads=threads,
                )
                files = self._write_manifest(taken.entries, deposit)
                stored_bytes = deposit.num_bytes
                with span("sync"):
                    deposit.publish()
            if taken.known != index.known:
                index.save(taken.known)
            version, is_new = self._put_on_branch(
                name, head, taken.entries, files, message=message, index=index, replace=replace
            )
        return Committed(version, is_new, taken.num_read, taken.bytes_read, stored_bytes)

    def resolve(self, target: str) -> Artifact:
        """Find a version: a branch or tag, `name@2`, digits of an id; each with `~n` for n steps back.

        Raises: ArtifactNotFound; StoreError if it is no dataset.
        """
        text, tilde, back = target.partition("~")
        if tilde and not (back or "1").isdigit():
            raise ArtifactNotFound(f"{target!r} names no version", hint="as in reviews, reviews@2, reviews~1")
        artifact = self.store.resolve(text)
        if artifact.kind != DATASET:
            raise StoreError(
                f"{text!r} is an artifact of kind {artifact.kind}, not a dataset",
                hint="marrow data branch lists the datasets",
            )
        for _ in range(int(back or "1") if tilde else 0):
            if not artifact.parents:
                raise ArtifactNotFound(f"{target!r} goes back before the first version")
            artifact = self.store.get(artifact.parents[0].artifact_id)
        return artifact

    def label(self, artifact: Artifact) -> str:
        """Return the first name@version of a version, else the first digits of its id."""
        names = self.store.catalog.names(artifact_id=artifact.id)
        return str(min(names, key=lambda n: (n.created_s, n.name))) if names else artifact.id[:12]

    def entries(self, artifact: Artifact) -> list[Entry]:
        """Return the files of a version, sorted by name. Raises: DamagedBlob."""
        return entries_of(self.contents, artifact)

    def log(self, target: str, limit: int = 1_000) -> Iterator[Version]:
        """Yield a version and those that it was made from, newest first."""
        names: dict[str, list[str]] = {}
        for named in self.store.catalog.names():
            names.setdefault(named.artifact_id, []).append(str(named))
        start = self.resolve(target)
        prefix = f"{target.partition('@')[0].partition('~')[0]}@"
        # The order of the catalog: a child always comes after its parents there, whatever clocks say.
        order = {artifact_id: number for number, artifact_id in enumerate(self.refs.datasets())}
        waiting, seen = {start.id: start}, {start.id}
        while waiting and limit > 0:
            artifact = max(waiting.values(), key=lambda a: order[a.id])
            del waiting[artifact.id]
            own = names.get(artifact.id, [])
            label = next((n for n in own if n.startswith(prefix)), own[0] if own else artifact.id[:12])
            yield Version(label, artifact)
            limit -= 1
            for parent in artifact.parents:
                if parent.artifact_id not in seen:
                    seen.add(parent.artifact_id)
                    waiting[parent.artifact_id] = self.store.get(parent.artifact_id)

    def diff(self, old: str, new: str) -> list[Change]:
        """Return the files that differ between two versions. Raises: ArtifactNotFound, DamagedBlob."""
        with self.store.no_collection():
            return changes_between(self.contents, self.resolve(old), self.resolve(new))

    def status(self, folder: Path, name: str, *, follow_links: bool = False) -> list[Change]:
        """Return how a folder differs from a branch's newest version; changed files are hashed, not kept."""
        with self.store.no_collection(), explain_os_errors("look at the folder", folder):
            base = self.resolve(name)
            found = walk(folder, links="follow" if follow_links else "refuse", avoid=self.store.home)
            index = FolderIndex.open(self.store.home, folder)
            now = []
            for seen in found:
                digest = index.digest(seen) or hash_file(folder / seen.name)
                now.append(Entry(seen.name, digest, seen.stamp[0]))
            return manifests.compare(self.entries(base), now)

    def branch(self, at: str, name: str) -> Version:
        """Make a branch that begins at a version. Cost: two rows. Raises: DamagedBlob."""
        artifact = self.resolve(at)
        self.require_files(artifact)
        return Version(f"{name}@{self.refs.create(name, 'branch', artifact.id)}", artifact)

    def tag(self, at: str, name: str) -> Version:
        """Give a version a name that never moves."""
        artifact = self.resolve(at)
        self.require_files(artifact)
        self.refs.create(name, "tag", artifact.id)
        return Version(name, artifact)

    def merge(
        self,
        source: str,
        target: str,
        *,
        take: Side | None = None,
        gate: Gate | None = None,
        message: str = "",
    ) -> Merged:
        """Bring what changed in `source` since it left `target` into the branch `target`.

        Args: take: whose file to keep where both changed it. gate: sees the files that the merge
            would give and raises to refuse it; nothing has happened then.
        Raises: MergeConflict; StaleVersion if the branch moved meanwhile; what the gate raises.
        """
        with self.store.no_collection():
            self.contents.packs.refresh()
            ours = self.store.get(self.refs.branch(target).artifact_id)
            theirs = self.resolve(source)
            self.require_files(theirs)
            parents = self._parents
            if is_ancestor(theirs.id, ours.id, parents):
                return Merged("nothing", Version(self.label(ours), ours))
            taken: list[str] = []
            forward = is_ancestor(ours.id, theirs.id, parents)
            if forward:
                merged = self.entries(theirs)
            else:
                base = common_ancestor(ours.id, theirs.id, parents)
                merged, taken = merge_entries(
                    [] if base is None else self.entries(self.store.get(base)),
                    self.entries(ours),
                    self.entries(theirs),
                    take,
                    (target, source),
                )
            if gate is not None:
                with span("gate"):
                    gate(merged)
            if forward:
                number = self.refs.advance(target, ours.id, theirs)
                return Merged("forward", Version(f"{target}@{number}", theirs))
            with Deposit(self.contents) as deposit:
                files = self._write_manifest(merged, deposit)
                deposit.publish()
            edges = (Parent("previous", ours.id), Parent("merged", theirs.id))
            artifact = self._artifact(merged, files, edges, message or f"merge {source} into {target}", ours)
            number = self.refs.advance(target, ours.id, artifact)
        return Merged("merged", Version(f"{target}@{number}", artifact), tuple(taken))

    def _stands_still(self, head: Artifact | None, name: str, found: list[Seen], index: FolderIndex) -> bool:
        """Tell whether the folder is as it was when it became the branch's newest version."""
        return (
            head is not None
            and index.bases.get(name) == [head.id]
            and len(found) == len(index.known) == head.facts["files"]
            and head.id not in self.refs.absent()
            and all(
                (digest := index.digest(seen)) is not None and self.contents.has(digest) for seen in found
            )
        )

    def _put_on_branch(
        self,
        name: str,
        head: Artifact | None,
        entries: list[Entry],
        files: tuple[FileEntry, ...],
        *,
        message: str,
        index: FolderIndex,
        replace: bool,
    ) -> tuple[Version, bool]:
        """Add the version and move the branch; on top of what others committed meanwhile, if that is fair."""
        for attempt in range(ATTEMPTS):
            if head is not None and _same_files(head.files, files):
                index.stand_on(name, head.id)
                return Version(self.label_on(head, name), head), False
            bases = index.bases.get(name, [])
            if head is not None and bases and head.id not in bases and not replace:
                raise StaleVersion(
                    f"{name!r} has moved to {self.label_on(head, name)} since this folder was committed or "
                    "checked out; to commit now would undo what changed there",
                    hint=f"marrow data branch {bases[0][:12]} NEW, commit the folder --to NEW, then "
                    f"marrow data merge NEW {name}; or commit with --replace",
                )
            edges = () if head is None else (Parent("previous", head.id),)
            artifact = self._artifact(entries, files, edges, message, head)
            # Both, until one is sure: a kill in between must not make the folder look outdated.
            index.stand_on(name, *([head.id] if head else []), artifact.id)
            try:
                number = self.refs.advance(name, None if head is None else head.id, artifact)
            except StaleVersion:
                index.stand_on(name, *bases) if bases else index.forget(name)
                if attempt == ATTEMPTS - 1:
                    raise
                head = self._head(name)
                continue
            index.stand_on(name, artifact.id)
            return Version(f"{name}@{number}", artifact), True
        raise AssertionError("unreachable")

    def require_files(self, artifact: Artifact) -> None:
        """Raise DamagedBlob if the store does not keep the files of a version."""
        if artifact.id in self.refs.absent():
            raise DamagedBlob(
                f"the files of {self.label(artifact)} are not kept here",
                hint="marrow data pull NAME URL brings them, if they were pushed",
            )

    def verify(self, target: str | None = None, *, progress: Progress = silent) -> Verified:
        """Hash every stored byte anew, set aside what is damaged, and find what versions lack now.

        Args: target: look at this version only, instead of all that the store keeps.
        """
        with self.store.no_collection():
            damage = self.contents.verify(lambda done: progress(done, None, "bytes"))
            wanted = [self.resolve(target)] if target else list(self._kept())
            missing: dict[str, list[str]] = {}
            here: dict[str, bool] = {}
            for artifact in wanted:
                lost = []
                for file in artifact.files:
                    if not self.contents.blobs.place(file.sha256).exists():
                        lost.append(f"manifest {file.name}")
                        continue
                    for entry in manifests.decode(self.contents.read(file.sha256)):
                        if entry.sha256 not in here:
                            here[entry.sha256] = self.contents.has(entry.sha256)
                        if not here[entry.sha256]:
                            lost.append(manifests.printable(entry.name))
                if lost:
                    missing[self.label(artifact)] = lost
            others = sorted(
                {
                    f"{artifact.kind} {artifact.id[:12]}"
                    for digest in damage.digests
                    for artifact in self.store.catalog.get_many(
                        self.store.catalog.users_of_blob(digest)
                    ).values()
                    if artifact.kind != DATASET
                }
            )
        return Verified(damage, missing, others)

    @contextmanager
    def as_files(self, *entries: Entry) -> Iterator[tuple[Path, ...]]:
        """Give some files as paths with their own names' ends, verified, while the block runs."""
        with self.store.no_collection(), self.scratch() as folder:
            self.contents.packs.refresh()
            paths = []
            for number, entry in enumerate(entries):
                path = folder / f"{number}{Path(entry.name).suffix}"
                if self.contents.packs.has(entry.sha256):
                    self.contents.copy(entry.sha256, path)
                else:
                    path.symlink_to(self.contents.blobs.path(entry.sha256))
                paths.append(path)
            yield tuple(paths)

    @contextmanager
    def as_folder(self, entries: list[Entry]) -> Iterator[Path]:
        """Give the folder of some files while the block runs: links to large ones, copies of small ones."""
        with self.store.no_collection(), self.scratch() as scratch:
            folder = scratch / "files"
            blobs = os.path.relpath(self.store.home / "blobs", folder)
            fill_folder(self.contents, entries, folder, links=blobs)
            yield folder

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give an empty folder in staging while the block runs."""
        folder = self.store.staging.new()
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _kept(self) -> Iterator[Artifact]:
        absent = self.refs.absent()
        yield from (self.store.get(i) for i in self.refs.datasets() if i not in absent)

    def label_on(self, artifact: Artifact, name: str) -> str:
        """Return the newest version of a name that is this artifact, as "name@3"."""
        found = [n for n in self.store.catalog.names(artifact_id=artifact.id) if n.name == name]
        return str(found[-1]) if found else self.label(artifact)

    def _head(self, name: str) -> Artifact | None:
        ref = self.refs.get(name)
        return None if ref is None else self.store.get(ref.artifact_id)

    def _write_manifest(self, entries: list[Entry], deposit: Deposit) -> tuple[FileEntry, ...]:
        files = []
        for number, data in enumerate(manifests.encode(entries)):
            digest = hash_bytes(data)
            deposit.add_blob(digest, data)
            files.append(FileEntry(f"{number:06d}", digest, xxhash.xxh3_128_hexdigest(data), len(data)))
        return tuple(files)

    def _artifact(
        self,
        entries: list[Entry],
        files: tuple[FileEntry, ...],
        parents: tuple[Parent, ...],
        message: str,
        before: Artifact | None,
    ) -> Artifact:
        key = hash_value(["dataset", 1, message])
        record = Artifact(
            id=artifact_id(DATASET, key, parents, files),
            kind=DATASET,
            key=key,
            parents=parents,
            files=files,
            facts={},
            code_version=code_version(),
            recipe_hash="",
            environment={},
            created_s=time.time(),
        )
        letters = (
            ["A"] * len(entries)
            if before is None
            else [change.letter for change in changes_between(self.contents, before, record)]
        )
        facts = {
            "message": message,
            "author": _author(),
            "files": len(entries),
            "bytes": sum(entry.num_bytes for entry in entries),
            "added": letters.count("A"),
            "modified": letters.count("M"),
            "deleted": letters.count("D"),
            "renamed": letters.count("R"),
        }
        return dataclasses.replace(record, facts=facts)

    def _parents(self, artifact_id: str) -> list[str]:
        return [parent.artifact_id for parent in self.store.get(artifact_id).parents]


def _same_files(one: tuple[FileEntry, ...], other: tuple[FileEntry, ...]) -> bool:
    return [file.sha256 for file in one] == [file.sha256 for file in other]


def _author() -> str:
    try:
        return os.environ.get("MARROW_AUTHOR") or getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in many containers
        return str(os.getuid())


def dataset_folder(store: Store, target: str) -> Path:
    """Return a read-only folder with the files of a dataset version, all verified just now.

    Args: target: as in "reviews", "reviews@2", "reviews~1". Raises: ArtifactNotFound, DamagedBlob.
    """
    versions = Versions(store)
    artifact = versions.resolve(target)
    versions.require_files(artifact)
    return store.view(artifact)
