"""A dataset version read back: its entries, its changes against another, its files as a folder.

A version is an artifact of kind "dataset"; its files are the ranges of its manifest, its parents
("previous", "merged") the versions it was made from. What is here needs a catalog and contents
only, so that `Store.view` can give any step that has a version as a parent the folder of its files.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from marrow.core.errors import DamagedBlob, explain_os_errors
from marrow.core.files import fsync, publish
from marrow.core.records import Artifact
from marrow.store.catalog import Catalog
from marrow.store.datasets.contents import Contents
from marrow.store.datasets.manifests import Change, Entry, compare, decode
from marrow.store.datasets.refs import DATASET, Refs


def entries_of(contents: Contents, artifact: Artifact) -> list[Entry]:
    """Return the files of a version, sorted by name. Raises: DamagedBlob if its manifest is."""
    return [entry for file in artifact.files for entry in decode(contents.read(file.sha256))]


def changes_between(contents: Contents, old: Artifact | None, new: Artifact) -> list[Change]:
    """Return what changed from one version to another. Cost: reads only the ranges that differ."""
    before = {} if old is None else {file.sha256: file for file in old.files}
    after = {file.sha256: file for file in new.files}
    shared = before.keys() & after.keys()

    def read(ranges: Iterable[str]) -> Iterator[Entry]:
        for digest in ranges:
            if digest not in shared:
                yield from decode(contents.read(digest))

    return compare(read(before), read(after))


def live_digests(catalog: Catalog, refs: Refs, contents: Contents) -> tuple[set[str], list[str]]:
    """Find what dataset files must be kept: those of versions that something still needs.

    Needed are the versions that a branch or tag stands on, all before them, and those that a step
    of another kind was made from; but not those whose files were let go already.
    Returns: their files' hashes, and the versions that nothing needs.
    Raises: DamagedBlob if a manifest is damaged: then nobody knows what it needs.
    """
    found = catalog.get_many(refs.datasets())
    needed: set[str] = set()
    waiting = [ref.artifact_id for ref in refs.all()]
    waiting += [e.parent_id for e in catalog.edges_down(found) if e.child_id not in found]
    while waiting:
        artifact_id = waiting.pop()
        if artifact_id in found and artifact_id not in needed:
            needed.add(artifact_id)
            waiting += [parent.artifact_id for parent in found[artifact_id].parents]
    absent = refs.absent()
    ranges = {file.sha256 for i in needed - absent for file in found[i].files}
    live = {entry.sha256 for digest in ranges for entry in decode(contents.read(digest))}
    return live, sorted(found.keys() - needed - absent)


def fill_folder(contents: Contents, entries: Iterable[Entry], folder: Path, *, links: str = "") -> None:
    """Put the files of a version into a folder that is new, verified.

    Args: links: where the blobs lie, seen from the folder; then large files are symlinks there.
    Raises: DamagedBlob, DiskFull.
    """
    folder.mkdir(exist_ok=True)
    made = {""}
    for entry in entries:
        parent = entry.name.rpartition("/")[0]
        target = folder / entry.name
        if parent not in made:
            target.parent.mkdir(parents=True, exist_ok=True)
            made.add(parent)
        if links and not contents.packs.has(entry.sha256):
            contents.blobs.path(entry.sha256)
            digest = entry.sha256
            ups = [".."] * entry.name.count("/")
            target.symlink_to(os.path.join(*ups, links, digest[:2], digest[2:4], digest))
        else:
            contents.copy(entry.sha256, target)
            target.chmod(0o444)


def make_view(contents: Contents, artifact: Artifact, folder: Path, blobs: Path) -> None:
    """Make the folder of a version's files at `folder`: large ones are links, small ones copies.

    A view that is there is checked against the hashes and made anew if a byte differs.
    Raises: DamagedBlob if the version's own files are damaged or missing.
    """
    entries = entries_of(contents, artifact)
    if folder.is_dir() and _is_intact(contents, folder, entries):
        return
    with explain_os_errors("make a view of a dataset", folder):
        temporary = contents.staging.new()
        try:
            fill_folder(contents, entries, temporary, links=os.path.relpath(blobs, folder))
            folder.parent.mkdir(exist_ok=True)
            if folder.exists():
                folder.rename(contents.staging.new())
            fsync(temporary)
            publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def label(catalog: Catalog, artifact: Artifact, name: str = "") -> str:
    """Return what people call a version: the newest "name@3" of that name, else any, else its id's start."""
    names = catalog.names(artifact_id=artifact.id)
    own = [named for named in names if named.name == name]
    if own:
        return str(own[-1])
    return str(min(names, key=lambda n: (n.created_s, n.name))) if names else artifact.id[:12]


def is_dataset(artifact: Artifact) -> bool:
    """Tell whether an artifact is a dataset version."""
    return artifact.kind == DATASET


def _is_intact(contents: Contents, folder: Path, entries: list[Entry]) -> bool:
    num_files = sum(len(files) for _, _, files in os.walk(folder))
    if num_files != len(entries):
        return False
    for entry in entries:
        path = folder / entry.name
        try:
            if path.is_symlink():
                if path.name and contents.blobs.path(entry.sha256) != Path(os.path.realpath(path)):
                    return False
            elif hashlib.sha256(path.read_bytes()).hexdigest() != entry.sha256:
                return False
        except (OSError, DamagedBlob):
            return False
    return True
