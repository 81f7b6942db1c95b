"""Versions of datasets: commit, log, diff, branch, tag, merge. What git, DVC and lakeFS do for data.

A version is an artifact with the version before as its parent, its files named by a manifest
(`manifests.py`); `commits.py` makes one of a folder, `verification.py` checks what is kept.
Branches and tags are two rows each. A merge works on manifests alone and reads no data.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from marrow.core.errors import ArtifactNotFound, DamagedBlob, StoreError, explain_os_errors
from marrow.core.hashes import hash_file
from marrow.core.progress import Progress, silent
from marrow.core.records import Artifact, Parent
from marrow.core.span import span
from marrow.store.datasets import manifests
from marrow.store.datasets.contents import Deposit
from marrow.store.datasets.dataset import changes_between, entries_of, fill_folder, label
from marrow.store.datasets.manifests import Change, Entry
from marrow.store.datasets.refs import DATASET
from marrow.store.store import Store
from marrow.store.versions.commits import Committed, Version, commit, new_version, write_manifest
from marrow.store.versions.folder_index import FolderIndex, known_entries, manifest_check
from marrow.store.versions.folder_walk import scan
from marrow.store.versions.merge import Side, common_ancestor, is_ancestor, merge_entries
from marrow.store.versions.verification import Verified, verify

Gate = Callable[[list[Entry]], None]
"""Looks at what a merge would give; raises to refuse it."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did: nothing, moved the branch ("forward"), or made a version with two parents."""

    how: Literal["nothing", "forward", "merged"]
    version: Version
    taken: tuple[str, ...] = ()


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
        return commit(
            self.store,
            folder,
            name,
            message,
            follow_links=follow_links,
            allow_empty=allow_empty,
            replace=replace,
            progress=progress,
            threads=threads,
        )

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
        return label(self.store.catalog, artifact)

    def label_as(self, artifact: Artifact, target: str) -> str:
        """Return what a version is called by the name that it was asked for; else as `label`."""
        name = target.partition("~")[0].partition("@")[0]
        ref = self.refs.get(target)
        if (ref is not None and ref.kind == "tag") or ("@" in target and "~" not in target):
            return target
        return self.label_on(artifact, name)

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
            listings = scan(folder, links="follow" if follow_links else "refuse", avoid=self.store.home)
            index = FolderIndex.open(self.store.home, folder)
            found = index.compare(listings, lambda digest: True, index.packs)
            now = [Entry(s.name, hash_file(folder / s.name), s.stamp[0]) for s in found.read]
            if index.manifest == manifest_check(base.files):
                return manifests.compare(known_entries(found.before), now)
            read = {seen.name for seen in found.read}
            same = {n: known for n, known in index.known.items() if n not in read | found.before.keys()}
            return manifests.compare(self.entries(base), known_entries(same) + now)

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
                return Merged("nothing", Version(self.label_on(ours, target), ours))
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
                files = write_manifest(merged, deposit)
                deposit.publish()
            edges = (Parent("previous", ours.id), Parent("merged", theirs.id))
            message = message or f"merge {source} into {target}"
            artifact = new_version(self.store, merged, files, edges, message, ours)
            number = self.refs.advance(target, ours.id, artifact)
        return Merged("merged", Version(f"{target}@{number}", artifact), tuple(taken))

    def require_files(self, artifact: Artifact) -> None:
        """Raise DamagedBlob if the store does not keep the files of a version."""
        if artifact.id in self.refs.absent():
            raise DamagedBlob(
                f"the files of {self.label(artifact)} are not kept here",
                hint="marrow data pull NAME URL brings them, if they were pushed",
            )

    def verify(
        self, target: str | None = None, *, progress: Progress = silent, threads: int | None = None
    ) -> Verified:
        """Hash every stored byte anew, set aside what is damaged, and find what versions lack now.

        Args: target: look at this version only, instead of all that the store keeps.
        """
        with self.store.no_collection():
            return verify(self.store, [self.resolve(target)] if target else None, progress, threads)

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

    def label_on(self, artifact: Artifact, name: str) -> str:
        """Return the newest version of a name that is this artifact, as "name@3"."""
        return label(self.store.catalog, artifact, name)

    def _parents(self, artifact_id: str) -> list[str]:
        return [parent.artifact_id for parent in self.store.get(artifact_id).parents]


def dataset_folder(store: Store, target: str) -> Path:
    """Return a read-only folder with the files of a dataset version, all verified just now.

    Args: target: as in "reviews", "reviews@2", "reviews~1". Raises: ArtifactNotFound, DamagedBlob.
    """
    versions = Versions(store)
    artifact = versions.resolve(target)
    versions.require_files(artifact)
    return store.view(artifact)
