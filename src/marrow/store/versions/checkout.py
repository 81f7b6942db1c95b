"""A dataset version in a folder of the user's: what differs is written, what is the user's stays.

A file may be overwritten or deleted only if its bytes are those of a version that the store keeps;
anything else is the user's own change, and the checkout stops before it has touched a file. Files
that no version knows are left alone. New files are written beside the old ones, flushed, then
renamed: killed in between, the same command goes on from there.
"""

import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from marrow.core.errors import DamagedBlob, UnsavedFiles, explain_os_errors
from marrow.core.files import fsync, sweep, temporary_beside
from marrow.core.hashes import hash_file
from marrow.core.progress import Progress, silent
from marrow.core.records import Artifact
from marrow.store.datasets.contents import Contents, need_room
from marrow.store.datasets.dataset import entries_of, live_digests
from marrow.store.datasets.manifests import Entry, printable
from marrow.store.durable import make_durable
from marrow.store.store import Store
from marrow.store.threads import default_threads, in_order
from marrow.store.versions.folder_index import FolderIndex, Known, unsettled
from marrow.store.versions.folder_walk import FINE_GRAIN_NS, Stamp, is_settled, now_ns, stamp_of, walk

SHOWN = 10


@dataclass(frozen=True, slots=True)
class CheckedOut:
    """What a checkout did to the folder."""

    folder: Path
    num_written: int
    num_deleted: int
    num_kept: int
    bytes_written: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be written and deleted, and the stamps of the files as they were looked at."""

    write: list[Entry]
    delete: list[str]
    kept: Known
    stamps: dict[str, Stamp]


def checkout(
    store: Store,
    artifact: Artifact,
    folder: Path,
    *,
    name: str = "",
    force: bool = False,
    progress: Progress = silent,
) -> CheckedOut:
    """Make a folder hold the files of a dataset version.

    Args: name: the branch that the folder stands on afterwards, for its next commit. force:
        overwrite and delete changed files too.
    Raises: UnsavedFiles, DamagedBlob, DiskFull, NotPermitted, SourceError (the path is a file).
    Cost: a stat of every file, a read of those that the index does not know, a write of what differs.
    """
    folder = folder.expanduser().absolute()
    with store.no_collection(), explain_os_errors("check out", folder):
        store.contents.packs.refresh()
        entries = entries_of(store.contents, artifact)
        if folder.is_dir() and any(folder.iterdir()):
            done = _update(store, artifact, entries, folder, force, progress)
        else:
            done = _create(store.contents, entries, folder, progress)
        index = FolderIndex.open(store.home, folder)
        packs = store.contents.packs
        index.save(done[1], artifact.files, packs=set(packs.names()), is_packed=packs.has)
        index.stand_on(name, artifact.id)
    return done[0]


def _create(
    contents: Contents, entries: list[Entry], folder: Path, progress: Progress
) -> tuple[CheckedOut, Known]:
    """Fill a folder beside, then give it its name: it is there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    num_bytes = sum(entry.num_bytes for entry in entries)
    need_room(folder.parent, num_bytes)
    temporary = temporary_beside(folder)
    temporary.mkdir()
    try:
        for place in {os.path.dirname(entry.name) for entry in entries}:
            (temporary / place).mkdir(parents=True, exist_ok=True)
        _copy_all(contents, [(entry, temporary / entry.name) for entry in entries], progress)
        make_durable([temporary, *(temporary / entry.name for entry in entries)])
        temporary.rename(folder)  # onto an empty folder too
        fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    known = _settled(folder, {entry.name: entry.sha256 for entry in entries})
    return CheckedOut(folder, len(entries), 0, 0, num_bytes), known


def _update(
    store: Store, artifact: Artifact, entries: list[Entry], folder: Path, force: bool, progress: Progress
) -> tuple[CheckedOut, Known]:
    index = FolderIndex.open(store.home, folder)
    plan = _plan(store, entries, folder, index, force)
    num_bytes = sum(entry.num_bytes for entry in plan.write)
    need_room(folder, num_bytes)
    staged: list[tuple[Entry, Path]] = []
    try:
        for entry in plan.write:
            parent = _deepest(folder, entry.name)
            sweep(parent)
            staged.append((entry, temporary_beside(parent / "x")))
        _copy_all(store.contents, staged, progress)
        make_durable(path for _, path in staged)
        touched = {folder}
        for name in plan.delete:
            _still(folder / name, plan.stamps[name], force)
            (folder / name).unlink()
            touched.add(_prune(folder, name))
        for entry, temporary in staged:
            target = folder / entry.name
            _make_parents(folder, entry.name)
            _still(target, plan.stamps.get(entry.name), force)
            temporary.replace(target)
            touched.add(target.parent)
        make_durable(path for path in touched if path.is_dir())
    finally:
        for _, path in staged:
            path.unlink(missing_ok=True)
    known = plan.kept | _settled(folder, {entry.name: entry.sha256 for entry in plan.write})
    kept = len(entries) - len(plan.write)
    return CheckedOut(folder, len(plan.write), len(plan.delete), kept, num_bytes), known


def _plan(store: Store, entries: list[Entry], folder: Path, index: FolderIndex, force: bool) -> _Plan:
    """Decide what to write and delete. Raises: UnsavedFiles, before anything was touched."""
    wanted = {entry.name: entry for entry in entries}
    bases = _bases(store, index)
    saved: set[str] | None = None
    unsaved: list[str] = []
    kept: Known = {}
    stamps: dict[str, Stamp] = {}
    write = dict(wanted)
    delete: list[str] = []
    folders = {head for name in wanted for head in _heads(name)}
    for seen in walk(folder, links="skip", avoid=store.home):
        entry = wanted.get(seen.name)
        in_the_way = seen.name in folders or any(head in wanted for head in _heads(seen.name))
        if entry is None and not in_the_way and seen.name not in bases:
            continue  # no version's file: the user's, and in nobody's way
        digest = index.digest(seen) or hash_file(folder / seen.name)
        if entry is not None and digest == entry.sha256:
            del write[seen.name]
            kept[seen.name] = (_sure(seen.stamp), digest)
            continue
        stamps[seen.name] = seen.stamp
        if entry is None:
            delete.append(seen.name)
        if not force and digest not in bases.get(seen.name, ()):
            if saved is None:
                saved = live_digests(store.catalog, store.refs, store.contents)[0]
            if digest not in saved:
                unsaved.append(seen.name)
    unsaved += _links_in_the_way(folder, write, folders)
    if unsaved:
        listed = "".join(f"\n  {printable(name)}" for name in unsaved[:SHOWN])
        more = f"\n  and {len(unsaved) - SHOWN:,} more" if len(unsaved) > SHOWN else ""
        raise UnsavedFiles(
            f"{len(unsaved):,} changed file{'s' * (len(unsaved) > 1)} in {folder} would be lost:"
            f"{listed}{more}",
            hint="commit the folder first, check out into another folder, or overwrite them with --force",
        )
    return _Plan(list(write.values()), delete, kept, stamps)


def _bases(store: Store, index: FolderIndex) -> dict[str, set[str]]:
    """Return the files of the versions that the folder stands on: their hashes by name."""
    known: dict[str, set[str]] = {}
    ids = {artifact_id for found in index.bases.values() for artifact_id in found}
    for artifact in store.catalog.get_many(sorted(ids)).values():
        try:
            for entry in entries_of(store.contents, artifact):
                known.setdefault(entry.name, set()).add(entry.sha256)
        except DamagedBlob:
            continue  # less is known, so less may be overwritten
    return known


def _links_in_the_way(folder: Path, write: Iterable[str], folders: set[str]) -> list[str]:
    """Return links (and other things that are no files) where a file or folder of the version must be."""
    found = []
    for name in [*write, *sorted(folders)]:
        path = folder / name
        is_folder = name in folders
        odd = path.is_symlink() or (os.path.lexists(path) and not path.is_file() and not path.is_dir())
        if odd or (not is_folder and path.is_dir() and any(p.is_symlink() for p in path.rglob("*"))):
            found.append(name)
    return found


def _copy_all(contents: Contents, jobs: list[tuple[Entry, Path]], progress: Progress) -> None:
    total, done = sum(entry.num_bytes for entry, _ in jobs), 0

    def copy(job: tuple[Entry, Path]) -> int:
        contents.copy(job[0].sha256, job[1])
        return job[0].num_bytes

    for num_bytes in in_order(copy, jobs, default_threads()):
        done += num_bytes
        progress(done, total, "bytes")


def _still(path: Path, stamp: Stamp | None, force: bool) -> None:
    """Raise UnsavedFiles if a file has changed since the plan was made."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not force and (stamp is None or stamp_of(status) != stamp):
        raise UnsavedFiles(
            f"{path} was changed while the version was checked out", hint="run the same command again"
        )


def _settled(folder: Path, digests: dict[str, str]) -> Known:
    """Return what the index may keep of files that were written just now."""
    before = {name: stamp_of((folder / name).lstat()) for name in digests}
    time.sleep(1.2e-9 * FINE_GRAIN_NS)  # until a later change must show in their times
    known = {}
    for name, stamp in before.items():
        is_still = stamp_of((folder / name).lstat()) == stamp
        known[name] = (_sure(stamp) if is_still else unsettled(stamp), digests[name])
    return known


def _sure(stamp: Stamp) -> Stamp:
    return stamp if is_settled(stamp, now_ns()) else unsettled(stamp)


def _heads(name: str) -> list[str]:
    """Return the folders that a name lies in: "a/b/c" -> ["a", "a/b"]."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _deepest(folder: Path, name: str) -> Path:
    """Return the deepest folder of a name that exists, for a temporary on the same file system."""
    path = folder
    for part in name.split("/")[:-1]:
        if not (path / part).is_dir() or (path / part).is_symlink():
            break
        path /= part
    return path


def _make_parents(folder: Path, name: str) -> None:
    for head in _heads(name):
        (folder / head).mkdir(exist_ok=True)


def _prune(folder: Path, name: str) -> Path:
    """Remove the folders that a deleted file leaves empty; return the first that stays."""
    path = (folder / name).parent
    while path != folder:
        try:
            path.rmdir()
        except OSError:  # not empty
            break
        path = path.parent
    return path
