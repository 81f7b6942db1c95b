"""Push and pull: dataset versions between this store and a URL, only what is missing.

Bytes go first and are verified by their hash on arrival; versions follow, and the names that make
them visible come last. Interrupted, either goes on where it was: what arrived is not sent again.
A name's next version is written only if there is none yet, so two who push at once cannot both win.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marrow.core.errors import ArtifactNotFound, DamagedBlob, StaleVersion
from marrow.core.hashes import hash_file
from marrow.core.progress import Progress, silent
from marrow.core.records import Artifact
from marrow.store.catalog import check_name
from marrow.store.datasets.contents import Deposit, need_room
from marrow.store.datasets.dataset import entries_of
from marrow.store.datasets.manifests import decode
from marrow.store.datasets.packs import MAX_MEMBER_BYTES, MAX_PACK_BYTES, Member, PackWriter
from marrow.store.remote.client import Remote
from marrow.store.store import Store
from marrow.store.threads import in_order
from marrow.store.versions.merge import ancestors
from marrow.store.versions.remote_dataset import (
    THREADS,
    Named,
    blob_name,
    check_prefix,
    fetch_records,
    members_at,
    names_there,
    pack_name,
    series_at,
    write_name,
    write_record,
)

BATCH_BYTES = 256 << 20
"""Bytes after which what arrived is made visible, so that a pull that is cut short keeps it."""
MAX_GAP_BYTES = 16 << 10
MAX_RUN_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Transferred:
    """What a push or pull did. num_files: whole remote files that moved; versions: newly named ones."""

    versions: tuple[str, ...]
    num_files: int
    num_bytes: int


def push(store: Store, name: str, url: str, *, progress: Progress = silent) -> Transferred:
    """Bring a branch or tag, with all its versions and what they were made from, to a URL.

    Raises: ArtifactNotFound (no such branch); StaleVersion if the remote's versions are not the
        beginning of ours; DamagedBlob; Unreachable, NotPermitted.
    """
    with Remote.open(url) as remote, store.no_collection():
        store.contents.packs.refresh()
        ref = store.refs.get(name)
        if ref is None:
            raise ArtifactNotFound(
                f"there is no dataset or branch {name!r}", hint="marrow data branch lists them"
            )
        series = store.catalog.names(name=name)
        theirs = series_at(remote, name)
        check_prefix(name, theirs, [(n.version, n.artifact_id) for n in series], url)
        records = _closure(store, (n.artifact_id for n in series))
        absent = store.refs.absent()
        ranges = {file.sha256: file.num_bytes for record in records for file in record.files}
        needed = {
            entry.sha256: entry.num_bytes
            for digest in {f.sha256 for r in records if r.id not in absent for f in r.files}
            for entry in decode(store.contents.read(digest))
        }
        sender = _Sender(store, remote, progress)
        sender.send(needed, ranges)
        for record in records:
            write_record(remote, record, complete=record.id not in absent)
        for named in series[len(theirs) :]:
            write_name(remote, Named(named.version, named.artifact_id, named.created_s, ref.kind), name)
    new = tuple(str(named) for named in series[len(theirs) :])
    return Transferred(new, sender.num_files, sender.num_bytes)


def pull(
    store: Store, name: str, url: str, *, into: str = "", newest: bool = False, progress: Progress = silent
) -> Transferred:
    """Bring a branch or tag from a URL; also what this store lost of versions that it has.

    Args: into: what it is to be called here, by default the same. newest: only the newest
        version's files, of the older ones only what they were.
    Raises: ArtifactNotFound, StaleVersion if this store's versions are not the beginning of the
        remote's, DamagedBlob if the remote's bytes are not what they should be, Unreachable.
    """
    into = into or name
    check_name(into)
    with Remote.open(url) as remote, store.no_collection():
        store.contents.packs.refresh()
        theirs = series_at(remote, name)
        if not theirs:
            raise ArtifactNotFound(f"{url} has no dataset {name!r}", hint=names_there(remote))
        ours = store.catalog.names(name=into)
        ref = store.refs.get(into)
        ahead = len(ours) > len(theirs)
        mine = [(n.version, n.artifact_id) for n in ours]
        shared = min(len(ours), len(theirs))
        if mine[:shared] != [(n.version, n.artifact_id) for n in theirs[:shared]]:
            raise StaleVersion(
                f"{into!r} has other versions here than at {url}",
                hint=f"pull it under another name (--as), then marrow data merge NAME {into}",
            )
        records, complete = fetch_records(remote, [n.artifact_id for n in theirs])
        wanted = [r for r in records if complete[r.id] and (not newest or r.id == theirs[-1].artifact_id)]
        receiver = _Receiver(store, remote, progress)
        receiver.receive_blobs({file.sha256: file.num_bytes for r in records for file in r.files})
        receiver.receive(
            {
                entry.sha256: entry.num_bytes
                for digest in {file.sha256 for r in wanted for file in r.files}
                for entry in decode(store.contents.read(digest))
            }
        )
        for record in records:
            store.catalog.add(record)
        here = {record.id for record in wanted}
        known = {n.artifact_id for n in ours}
        store.refs.mark_absent(r.id for r in records if r.id not in here | known and not _is_here(store, r))
        store.refs.mark_present(here)
        if not ahead:
            rows = [(n.version, n.artifact_id, n.created_s) for n in theirs]
            store.refs.restore(into, theirs[-1].kind, ref.artifact_id if ref else None, rows)
    new = () if ahead else tuple(f"{into}@{n.version}" for n in theirs[len(ours) :])
    return Transferred(new, receiver.num_files, receiver.num_bytes)


class _Sender:
    """Sends the bytes that a remote lacks."""

    def __init__(self, store: Store, remote: Remote, progress: Progress) -> None:
        self.contents = store.contents
        self.remote = remote
        self.progress = progress
        self.num_files = self.num_bytes = 0

    def send(self, needed: dict[str, int], ranges: dict[str, int]) -> None:
        """Send what is missing of these files and manifests. Raises: DamagedBlob."""
        contents = self.contents
        sizes = {file.name: file.num_bytes for file in self.remote.list("blobs/")}
        packed = {digest for digest in needed if contents.packs.has(digest)}
        jobs: list[tuple[str, Path]] = []
        for digest in sorted((needed.keys() - packed) | ranges.keys()):
            num_bytes = needed[digest] if digest in needed else ranges[digest]
            if sizes.get(blob_name(digest)) != num_bytes:
                jobs.append(
                    (blob_name(digest), contents.blobs.path(digest))
                )  # verified: damage must not travel
        there = {member.digest for _, member in members_at(self.remote, contents)}
        staged = list(self._packs(sorted(packed - there)))
        try:
            self._write_all(jobs + staged)
        finally:
            for name, path in staged:
                if path != contents.packs.place(pack_name(name)):
                    path.unlink(missing_ok=True)

    def _packs(self, missing: list[str]) -> Iterator[tuple[str, Path]]:
        """Yield packs of exactly the missing members: whole ones of the store, the rest made anew.

        A pack of the store may hold other datasets' files, which are nobody's business there.
        """
        contents = self.contents
        left = set(missing)
        for name in sorted({p for digest in missing if (p := contents.packs.pack_of(digest))}):
            members = contents.packs.members(name)
            if {m.digest for m in members} <= left and len(members) > 1:
                if contents.packs.check(name)[1]:
                    raise DamagedBlob(f"pack {name[:12]} is damaged", hint="marrow data verify")
                left -= {m.digest for m in members}
                yield f"packs/{name}.pack", contents.packs.place(name)
        writer: PackWriter | None = None
        for digest in sorted(left):
            writer = writer or PackWriter(contents.staging.new())
            writer.add(digest, contents.packs.read(digest))
            if writer.num_bytes >= MAX_PACK_BYTES:
                yield f"packs/{writer.finish()}.pack", writer.path
                writer = None
        if writer is not None:
            yield f"packs/{writer.finish()}.pack", writer.path

    def _write_all(self, jobs: list[tuple[str, Path]]) -> None:
        total = sum(path.stat().st_size for _, path in jobs)

        def write(job: tuple[str, Path]) -> int:
            self.remote.write(job[0], job[1])
            return job[1].stat().st_size

        for num_bytes in in_order(write, jobs, THREADS):
            self.num_files += 1
            self.num_bytes += num_bytes
            self.progress(self.num_bytes, total, "bytes", {"files": f"{self.num_files:,}"})


class _Receiver:
    """Fetches the bytes that this store lacks."""

    def __init__(self, store: Store, remote: Remote, progress: Progress) -> None:
        self.store = store
        self.contents = store.contents
        self.remote = remote
        self.progress = progress
        self.num_files = self.num_bytes = 0
        self.total = 0

    def receive_blobs(self, wanted: dict[str, int]) -> None:
        """Fetch those blobs that are missing, each under its own name at the remote."""
        missing = {d: n for d, n in wanted.items() if not self.contents.blobs.place(d).exists()}
        self.total += sum(missing.values())
        need_room(self.store.home, sum(missing.values()))

        def fetch(digest: str) -> tuple[str, Path, int]:
            staged = self.contents.staging.new()
            num_bytes = self.remote.download(blob_name(digest), staged)
            if hash_file(staged) != digest:
                staged.unlink()
                raise DamagedBlob(
                    f"{self.remote.url}/{blob_name(digest)} is damaged: its bytes are not those of its name",
                    hint="push the version again from a store that has it, after deleting that file",
                )
            return digest, staged, num_bytes

        self._take(in_order(fetch, sorted(missing), THREADS), lambda d, job: d.keep_blob(job[0], job[1]))

    def receive(self, wanted: dict[str, int]) -> None:
        """Fetch those files that are missing, from blobs and packs."""
        missing = {digest: n for digest, n in wanted.items() if not self.contents.has(digest)}
        if not missing:
            return
        small = {digest for digest, n in missing.items() if n <= MAX_MEMBER_BYTES}
        if small:
            self._receive_packed(small)
        self.receive_blobs({digest: n for digest, n in missing.items() if not self.contents.has(digest)})

    def _receive_packed(self, wanted: set[str]) -> None:
        by_pack: dict[str, list[Member]] = {}
        seen: set[str] = set()
        for pack, member in members_at(self.remote, self.contents):
            if member.digest in wanted and member.digest not in seen:
                seen.add(member.digest)
                by_pack.setdefault(pack, []).append(member)
        jobs = [(pack, run) for pack, members in sorted(by_pack.items()) for run in _runs(members)]
        num_bytes = sum(member.num_bytes for _, run in jobs for member in run)
        self.total += num_bytes
        need_room(self.store.home, num_bytes)

        def fetch(job: tuple[str, list[Member]]) -> tuple[list[tuple[str, bytes]], None, int]:
            pack, run = job
            start = run[0].offset
            data = self.remote.read(f"packs/{pack}.pack", start, run[-1].offset + run[-1].num_bytes - start)
            files = []
            for member in run:
                piece = data[member.offset - start : member.offset - start + member.num_bytes]
                if hashlib.sha256(piece).hexdigest() != member.digest:
                    raise DamagedBlob(
                        f"{self.remote.url}/packs/{pack}.pack is damaged",
                        hint="push the version again from a store that has it, after deleting that file",
                    )
                files.append((member.digest, piece))
            return files, None, len(data)

        def keep(deposit: Deposit, job: tuple[list[tuple[str, bytes]], None, int]) -> None:
            for digest, data in job[0]:
                deposit.add(digest, data)

        self._take(in_order(fetch, jobs, THREADS), keep)

    def _take(self, arriving: Iterator[Any], keep: Callable[[Deposit, Any], None]) -> None:
        """Put what arrives into the store, a batch at a time."""
        done = False
        while not done:
            with Deposit(self.contents) as deposit:
                size = 0
                done = True
                for job in arriving:
                    keep(deposit, job)
                    size += job[2]
                    self.num_files += 1
                    self.num_bytes += job[2]
                    self.progress(self.num_bytes, self.total, "bytes", {"files": f"{self.num_files:,}"})
                    if size >= BATCH_BYTES:
                        done = False
                        break
                deposit.publish()


def _runs(members: list[Member]) -> Iterator[list[Member]]:
    """Group members that lie near each other, so that a request brings many."""
    run: list[Member] = []
    # An empty file lies where the next one begins: it must come first, or it would end the run there.
    for member in sorted(members, key=lambda member: (member.offset, member.num_bytes)):
        if run:
            end = run[-1].offset + run[-1].num_bytes
            if member.offset - end > MAX_GAP_BYTES or end - run[0].offset > MAX_RUN_BYTES:
                yield run
                run = []
        run.append(member)
    if run:
        yield run


def _closure(store: Store, ids: Iterable[str]) -> list[Artifact]:
    """Return versions and all that they were made from, parents first."""

    def parents(artifact_id: str) -> list[str]:
        return [parent.artifact_id for parent in store.get(artifact_id).parents]

    wanted = {i for start in ids for i in ancestors(start, parents)}
    return [store.get(artifact_id) for artifact_id in store.refs.datasets() if artifact_id in wanted]


def _is_here(store: Store, record: Artifact) -> bool:
    return all(store.contents.has(entry.sha256) for entry in entries_of(store.contents, record))
