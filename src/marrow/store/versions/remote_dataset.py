"""Where a dataset lies at a URL, and what stands there.

    blobs/ab/<sha256>             large files and manifests
    packs/<name>.pack             small files, as in the store
    versions/<id>.json            what a version is: parents, manifest, facts
    names/<name>/00000003.json    which version a branch's third one is; written once, never again

A version's record is checked against its id, so another one cannot be passed off as it.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass

from marrow.core.errors import Conflict, DamagedBlob, StaleVersion
from marrow.core.hashes import canonical_json
from marrow.core.records import Artifact, FileEntry, Parent
from marrow.store.datasets.contents import Contents
from marrow.store.datasets.packs import Member, members_of, read_index
from marrow.store.datasets.refs import DATASET, Kind
from marrow.store.remote.client import Remote
from marrow.store.store import artifact_id
from marrow.store.threads import in_order
from marrow.store.versions.merge import ancestors

THREADS = 8


@dataclass(frozen=True, slots=True)
class Named:
    """One version of a name at the remote."""

    version: int
    artifact_id: str
    created_s: float
    kind: Kind


def members_at(remote: Remote, contents: Contents) -> Iterator[tuple[str, Member]]:
    """Yield (pack, member) of all packs at the remote. A pack that this store has too is not asked."""
    here = set(contents.packs.names())
    packs = [(pack_name(file.name), file.num_bytes) for file in remote.list("packs/")]

    def members(pack: tuple[str, int]) -> tuple[str, list[Member]]:
        name, size = pack
        if name in here:
            return name, contents.packs.members(name)
        return name, members_of(read_index(name, size, lambda s, n: remote.read(f"packs/{name}.pack", s, n)))

    for name, found in in_order(members, packs, THREADS):
        for member in found:
            yield name, member


def fetch_records(remote: Remote, ids: list[str]) -> tuple[list[Artifact], dict[str, bool]]:
    """Read versions and all that they were made from, parents first; and whose files the remote has."""
    found: dict[str, Artifact] = {}
    complete: dict[str, bool] = {}
    waiting = list(ids)
    while waiting:
        artifact_id = waiting.pop()
        if artifact_id not in found:
            found[artifact_id], complete[artifact_id] = _read_record(remote, artifact_id)
            waiting += [parent.artifact_id for parent in found[artifact_id].parents]
    ordered: dict[str, Artifact] = {}

    def parents(artifact_id: str) -> list[str]:
        return [parent.artifact_id for parent in found[artifact_id].parents]

    for artifact_id in sorted(found, key=lambda i: (len(ancestors(i, parents)), found[i].created_s, i)):
        ordered[artifact_id] = found[artifact_id]
    return list(ordered.values()), complete


def write_record(remote: Remote, record: Artifact, *, complete: bool) -> None:
    """Write what a version is; an incomplete one, whose files are not all there, replaces nothing."""
    data = canonical_json(dataclasses.asdict(record) | {"complete": complete}).encode()
    name = f"versions/{record.id}.json"
    if complete or not remote.exists(name):
        remote.write(name, data)


def _read_record(remote: Remote, wanted: str) -> tuple[Artifact, bool]:
    where = f"{remote.url}/versions/{wanted}.json"
    try:
        data = json.loads(remote.read(f"versions/{wanted}.json"))
        complete = bool(data.pop("complete"))
        parents = tuple(Parent(**parent) for parent in data.pop("parents"))
        files = tuple(FileEntry(**file) for file in data.pop("files"))
        artifact = Artifact(parents=parents, files=files, **data)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedBlob(f"{where} cannot be read: {error}", hint="push the dataset again") from error
    real = artifact_id(artifact.kind, artifact.key, parents, files)
    if real != wanted or artifact.id != wanted or artifact.kind != DATASET:
        raise DamagedBlob(f"{where} is not the version of its name", hint="push the dataset again")
    return artifact, complete


def series_at(remote: Remote, name: str) -> list[Named]:
    """Return the versions of a name, in order. Raises: DamagedBlob."""
    found = []
    for file in remote.list(f"names/{name}/"):
        where = f"{remote.url}/{file.name}"
        try:
            found.append(Named(**json.loads(remote.read(file.name))))
        except (ValueError, TypeError) as error:
            raise DamagedBlob(f"{where} cannot be read: {error}", hint="push the dataset again") from error
    return sorted(found, key=lambda named: named.version)


def write_name(remote: Remote, named: Named, name: str) -> None:
    """Name a version, if the name has none of that number yet. Raises: StaleVersion."""
    path = f"names/{name}/{named.version:08d}.json"
    try:
        remote.write(path, canonical_json(named).encode(), if_absent=True)
    except Conflict as error:
        there = Named(**json.loads(remote.read(path)))
        if there.artifact_id != named.artifact_id:
            raise StaleVersion(
                f"someone else pushed {name}@{named.version} meanwhile",
                hint="pull it under another name (--as), merge, then push again",
            ) from error


def check_prefix(name: str, theirs: list[Named], ours: list[tuple[int, str]], url: str) -> None:
    """Raise StaleVersion unless the remote's versions are the beginning of ours."""
    if [(n.version, n.artifact_id) for n in theirs] != ours[: len(theirs)]:
        raise StaleVersion(
            f"{url} has versions of {name!r} that this store has not",
            hint=f"marrow data pull {name} {url} first; if both went on, pull --as another name and merge",
        )


def names_there(remote: Remote) -> str:
    """Return a hint: the names that the remote has."""
    names = sorted({file.name.split("/")[1] for file in remote.list("names/")})
    return f"it has: {', '.join(names[:8])}" if names else "it has no datasets; is the address right?"


def blob_name(digest: str) -> str:
    """Return where a blob lies at the remote."""
    return f"blobs/{digest[:2]}/{digest}"


def pack_name(path: str) -> str:
    """Return the name of the pack at a path of the remote."""
    return path.removeprefix("packs/").removesuffix(".pack")
