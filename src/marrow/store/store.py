"""The store: artifacts in a folder, every byte of them verified before it is read.

    home
    |- blobs/ab/cd/...      content, by SHA-256
    |- packs/...            small files of datasets, many in one
    |- views/<id>/...       an artifact as a folder of relative symlinks to its blobs
    |- work/<key>/          what an unfinished step keeps between attempts
    |- indexes/             what is known of users' folders, so that unchanged files are not read
    `- staging/, locks/, damaged/, catalog.sqlite

Publishing moves a folder's files to blobs, then adds artifact, files and edges in one
transaction. Killed before it, the catalog knows nothing and the blobs are garbage that `collect`
removes; killed after it, the artifact is whole. There is no state in between.
"""

import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from marrow.core.errors import DamagedBlob, StoreError, explain_os_errors
from marrow.core.files import atomic_folder, fsync, publish
from marrow.core.hashes import canonical_json, hash_value
from marrow.core.records import Artifact, FileEntry, Parent
from marrow.store.blobs import Blobs, Freed
from marrow.store.catalog import Catalog
from marrow.store.database import Database
from marrow.store.datasets.contents import Contents
from marrow.store.datasets.dataset import entries_of, fill_folder, is_dataset, live_digests, make_view
from marrow.store.datasets.packs import Packs
from marrow.store.datasets.refs import Refs
from marrow.store.lock import FileLock, Say
from marrow.store.runs import Runs
from marrow.store.staging import Staging
from marrow.store.version import code_version

WORK_KEPT_S = 14 * 86_400.0


class Store:
    """An open store. Its parts are public: `blobs`, `contents`, `catalog`, `refs`, `runs`."""

    def __init__(self, home: Path, url: str | None = None, *, read_only: bool = False) -> None:
        self.home = home
        # Of a store that may not be written, what reading makes lies elsewhere and goes with it.
        self._scratch = tempfile.TemporaryDirectory(prefix="marrow-store-") if read_only else None
        place = home if self._scratch is None else Path(self._scratch.name)
        self._views = place / "views"
        self._locks = place / "locks"
        self.staging = Staging(place / "staging")
        self.blobs = Blobs(home / "blobs", home / "damaged", self.staging)
        self.contents = Contents(
            self.blobs, Packs(home / "packs", home / "damaged", self.staging), self.staging
        )
        try:
            self._database = Database(home, url, read_only=read_only)
        except BaseException:
            if self._scratch is not None:
                self._scratch.cleanup()
            raise
        self.catalog = Catalog(self._database)
        self.refs = Refs(self._database)
        self.runs = Runs(self._database, self._locks)

    @classmethod
    def open(
        cls,
        home: Path | None = None,
        *,
        catalog: str | None = None,
        create: bool = True,
        reading: bool = False,
    ) -> "Store":
        """Open the store, and remove what killed processes left unfinished.

        Args: home: by default $MARROW_HOME, else .marrow in the working folder. catalog: database
            URL, by default $MARROW_CATALOG, else SQLite in the store. create: make it if absent.
            reading: open it also if it may only be read; views then go when it is closed, and a
            `collect` elsewhere does not wait for this reader.
        Raises: StoreError, NotPermitted, DiskFull, UsageError (a URL that is none).
        """
        home = home or Path(os.environ.get("MARROW_HOME") or ".marrow")
        home = home.expanduser().absolute()
        with explain_os_errors("open the store", home):
            if not home.is_dir():
                if not create:
                    raise StoreError(
                        f"there is no store at {home}", hint="run a recipe first, or set MARROW_HOME"
                    )
                try:
                    home.mkdir(parents=True, exist_ok=True)  # another process may have made it just now
                except FileExistsError as error:
                    raise StoreError(
                        f"{home} is not a folder", hint="set MARROW_HOME to another path"
                    ) from error
            if create and not (home / ".gitignore").exists():
                (home / ".gitignore").write_text("*\n", encoding="utf-8")
            read_only = reading and not _may_write(home)
            store = cls(home, catalog or os.environ.get("MARROW_CATALOG") or None, read_only=read_only)
            store.staging.sweep()
        return store

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the store; closing twice is fine."""
        self.runs.close()
        self.staging.close()
        self._database.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def publish(
        self,
        kind: str,
        key: str,
        folder: Path,
        *,
        parents: Sequence[Parent] = (),
        facts: Mapping[str, Any] | None = None,
        recipe_hash: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> Artifact:
        """Make an artifact of a folder's files, which are moved into the store.

        Args: key: hash of what the step depends on. facts: JSON values; not part of the id.
        Returns: the artifact; if equal work was published before, that one, with its facts.
        Raises: StoreError (facts that JSON cannot hold, files that are not files),
            ArtifactNotFound (unknown parent), DiskFull, NotPermitted.
        """
        facts = _checked(facts or {}, kind)
        with self.no_collection(), explain_os_errors(f"publish {kind}", folder):
            files = tuple(self._store_files(folder))
            artifact = Artifact(
                id=artifact_id(kind, key, parents, files),
                kind=kind,
                key=key,
                parents=tuple(parents),
                files=files,
                facts=facts,
                code_version=code_version(),
                recipe_hash=recipe_hash,
                environment=dict(environment or {}),
                created_s=time.time(),
            )
            return self.catalog.add(artifact)

    def get(self, artifact_id: str) -> Artifact:
        """Return the artifact of that full id. Raises: ArtifactNotFound."""
        return self.catalog.get(artifact_id)

    def find_key(self, key: str) -> Artifact | None:
        """Return the newest artifact of a step's key, if any; its blobs are not verified."""
        return self.catalog.find_key(key)

    def resolve(self, target: str) -> Artifact:
        """Find an artifact by name, name@version or id prefix. Raises: ArtifactNotFound."""
        return self.catalog.resolve(target)

    def name(self, artifact: Artifact, name: str) -> int:
        """Give an artifact the next version of a name; the same one if it has it already."""
        return self.catalog.name(artifact.id, name)

    def verify(self, artifact: Artifact) -> tuple[FileEntry, ...]:
        """Return the files of an artifact whose blobs are damaged or missing: none, if all is well."""
        damaged = []
        for file in artifact.files:
            try:
                self.blobs.path(file.sha256)
            except DamagedBlob:
                damaged.append(file)
        return tuple(damaged)

    def view(self, artifact: Artifact) -> Path:
        """Return a folder with the artifact's files: symlinks to blobs, all verified just now.

        Of a dataset version these are the dataset's files; its small ones are copies.
        Raises: DamagedBlob. The folder is read-only by convention, and stays.
        """
        if is_dataset(artifact):
            return self._view_dataset(artifact)
        for file in artifact.files:
            self.blobs.path(file.sha256)
        folder = self._views / artifact.id
        if not self._is_view(folder, artifact):
            with explain_os_errors("make a view of an artifact", folder):
                self._make_view(folder, artifact)
        return folder

    def _view_dataset(self, artifact: Artifact) -> Path:
        folder = self._views / artifact.id
        lock = FileLock(self._locks / f"view-{artifact.id}.lock", doing="making a view")
        with self.no_collection(), lock:
            self.contents.packs.refresh()
            make_view(self.contents, artifact, folder, self.home / "blobs")
        return folder

    def checkout(self, artifact: Artifact, folder: Path) -> Path:
        """Copy an artifact's verified files to a new (or empty) folder, which is then the user's.

        Raises: StoreError if the folder has files; DamagedBlob, DiskFull, NotPermitted.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StoreError(f"{folder} is not empty", hint="give a folder that does not exist yet")
        folder = folder.absolute()
        with explain_os_errors("copy an artifact", folder), atomic_folder(folder) as temporary:
            if is_dataset(artifact):
                with self.no_collection():
                    self.contents.packs.refresh()
                    fill_folder(self.contents, entries_of(self.contents, artifact), temporary)
                return folder
            for file in artifact.files:
                target = temporary / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.blobs.path(file.sha256), target)
        return folder

    def step_lock(self, key: str, *, doing: str = "", say: Say | None = None) -> FileLock:
        """Return the lock that whoever builds a step of that key holds, its work folder with it."""
        return FileLock(self._locks / f"step-{key}.lock", doing=doing, say=say)

    def work_folder(self, key: str) -> Path:
        """Return the folder that an unfinished step keeps between attempts; made if absent."""
        folder = self.home / "work" / key
        with explain_os_errors("make a work folder", folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def discard_work(self, key: str) -> None:
        """Remove a step's work folder. The caller holds the step's lock."""
        shutil.rmtree(self.home / "work" / key, ignore_errors=True)

    def discard_finished_work(self, key: str) -> None:
        """Remove what a process left that was killed after it published; not if the step is locked."""
        lock = self.step_lock(key)
        if (self.home / "work" / key).exists() and lock.try_acquire():
            self.discard_work(key)
            lock.release()

    def collect(self, *, work_kept_s: float = WORK_KEPT_S, say: Say | None = None) -> Freed:
        """Remove files that nothing refers to; after that long also work folders and damaged blobs.

        The files of dataset versions that no branch, tag or later step needs go too; their manifests
        and lineage stay. Waits for those who publish or read.
        Raises: DamagedBlob if a manifest is damaged: then nothing is removed.
        """
        with FileLock(self._locks / "collect.lock", doing="collecting garbage", say=say):
            live, unneeded = live_digests(self.catalog, self.refs, self.contents)
            self.refs.mark_absent(
                unneeded
            )  # first: killed after it, a version is at worst said to lack files
            freed = self.contents.collect(live | self.catalog.blobs())
            for artifact_id in unneeded:
                shutil.rmtree(self.home / "views" / artifact_id, ignore_errors=True)
        for folder in sorted((self.home / "work").glob("*")):
            lock = self.step_lock(folder.name)
            if time.time() - _last_change(folder) > work_kept_s and lock.try_acquire():
                shutil.rmtree(folder, ignore_errors=True)
                lock.release()
        for path in sorted((self.home / "damaged").glob("*")):
            if time.time() - path.stat().st_ctime > work_kept_s:
                path.unlink(missing_ok=True)
        return freed

    def no_collection(self) -> FileLock:
        """Keep `collect` away: while blobs lie here that no artifact refers to yet, or files are read."""
        return FileLock(self._locks / "collect.lock", shared=True)

    def _store_files(self, folder: Path) -> list[FileEntry]:
        files = []
        for path in sorted(folder.rglob("*")):
            if path.is_dir() and not path.is_symlink():
                continue
            if not stat.S_ISREG(path.stat().st_mode):
                raise StoreError(f"{path} is not a file", hint="an artifact holds files only")
            blob = self.blobs.put_file(path, move=True)
            name = path.relative_to(folder).as_posix()
            files.append(FileEntry(name, blob.sha256, blob.xxh3, blob.num_bytes))
        return sorted(files, key=lambda file: file.name)

    def _links(self, artifact: Artifact) -> dict[str, str]:
        """Map each file's name to the relative target of its symlink."""
        blobs = os.path.relpath(self.home / "blobs", self._views / artifact.id)
        return {
            file.name: os.path.join(
                *[".."] * file.name.count("/"), blobs, file.sha256[:2], file.sha256[2:4], file.sha256
            )
            for file in artifact.files
        }

    def _is_view(self, folder: Path, artifact: Artifact) -> bool:
        try:
            links = self._links(artifact).items()
            return folder.is_dir() and all(os.readlink(folder / name) == target for name, target in links)
        except OSError:
            return False

    def _make_view(self, folder: Path, artifact: Artifact) -> None:
        temporary = self.staging.new()
        temporary.mkdir()
        for name, target in self._links(artifact).items():
            link = temporary / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)
        folder.parent.mkdir(exist_ok=True)
        # One at a time: a rename onto a folder that another process just made would fail.
        with FileLock(self._locks / f"view-{artifact.id}.lock", doing="making a view"):
            if self._is_view(folder, artifact):
                shutil.rmtree(temporary)
                return
            if folder.exists():
                folder.rename(self.staging.new())
            fsync(temporary)
            publish(temporary, folder)


def artifact_id(kind: str, key: str, parents: Sequence[Parent], files: Sequence[FileEntry]) -> str:
    """Return the id: a hash of what an artifact is and came from, never of when or how fast.

    Facts, code version and environment stay out: a rebuild that gives the same bytes from the
    same parents is the same artifact.
    """
    return hash_value(
        {
            "kind": kind,
            "key": key,
            "parents": sorted([p.role, p.artifact_id, canonical_json(p.detail)] for p in parents),
            "files": sorted([f.name, f.sha256, f.num_bytes] for f in files),
        }
    )


def _checked(facts: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """Return the facts as JSON gives them back. Raises: StoreError, before anything is moved."""
    try:
        return json.loads(canonical_json(facts))  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        raise StoreError(f"the facts of {kind} cannot be written as JSON: {error}") from error


def _may_write(home: Path) -> bool:
    effective = os.access in os.supports_effective_ids
    return os.access(home, os.W_OK, effective_ids=effective)


def _last_change(folder: Path) -> float:
    return max(path.lstat().st_mtime for path in [folder, *folder.rglob("*")])
