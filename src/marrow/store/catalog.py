"""The catalog: which artifacts exist, what they were made from, and what they are called.

Rows are immutable once written, and an artifact appears with its files and edges in one
transaction. Adding the same artifact again changes nothing. A name is a series of versions;
version n never comes to mean something else.
"""

import difflib
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select

from marrow.core.errors import ArtifactNotFound, StoreError
from marrow.core.hashes import canonical_json
from marrow.core.records import Artifact, FileEntry, Parent
from marrow.store.database import Database
from marrow.store.tables import artifacts, edges, files, names, refs

MIN_PREFIX = 4
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CHUNK = 500  # ids per query; SQLite takes no more than 32,766 variables


@dataclass(frozen=True, slots=True)
class NamedVersion:
    """One version of a name."""

    name: str
    version: int
    artifact_id: str
    created_s: float

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Edge:
    """`child_id` used `parent_id` as its `role`; `detail` says which part of it."""

    child_id: str
    role: str
    parent_id: str
    detail: Mapping[str, Any]


class Catalog:
    """Artifacts, edges and names in a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, artifact: Artifact) -> Artifact:
        """Add an artifact with its files and edges, unless its id is there already.

        Returns: the artifact as catalogued: the first one, if there was one.
        Raises: ArtifactNotFound if a parent is unknown.
        """
        with self._database.write() as connection:
            return add_artifact(connection, artifact)

    def get(self, artifact_id: str) -> Artifact:
        """Return the artifact of that full id. Raises: ArtifactNotFound."""
        with self._database.read() as connection:
            found = _load(connection, [artifact_id])
        if not found:
            raise ArtifactNotFound(f"no artifact {artifact_id[:12]} in the catalog", hint=_LIST)
        return found[0]

    def get_many(self, artifact_ids: Iterable[str]) -> dict[str, Artifact]:
        """Return the artifacts of those ids that exist, by id."""
        with self._database.read() as connection:
            return {artifact.id: artifact for artifact in _load(connection, artifact_ids)}

    def find_key(self, key: str) -> Artifact | None:
        """Return the newest artifact of a step's key, if any."""
        query = select(artifacts.c.id).where(artifacts.c.key == key)
        with self._database.read() as connection:
            found = connection.scalar(query.order_by(artifacts.c.seq.desc()).limit(1))
            return None if found is None else _load(connection, [found])[0]

    def latest(self, *, kind: str | None = None, limit: int = 100) -> list[Artifact]:
        """Return the newest artifacts (of one kind), newest first."""
        query = select(artifacts.c.id).order_by(artifacts.c.seq.desc()).limit(limit)
        if kind is not None:
            query = query.where(artifacts.c.kind == kind)
        with self._database.read() as connection:
            return _load(connection, connection.scalars(query).all())

    def blobs(self) -> set[str]:
        """Return the name of every blob that an artifact refers to."""
        with self._database.read() as connection:
            return set(connection.scalars(select(files.c.sha256).distinct()))

    def users_of_blob(self, digest: str) -> list[str]:
        """Return the ids of the artifacts that contain a blob."""
        query = select(files.c.artifact_id).where(files.c.sha256 == digest).distinct()
        with self._database.read() as connection:
            return sorted(connection.scalars(query))

    def edges_up(self, child_ids: Iterable[str]) -> list[Edge]:
        """Return the edges from these children to their parents, in each child's order."""
        with self._database.read() as connection:
            return _edges(connection, "child_id", child_ids)

    def edges_down(self, parent_ids: Iterable[str]) -> list[Edge]:
        """Return the edges from these parents to their children."""
        with self._database.read() as connection:
            return _edges(connection, "parent_id", parent_ids)

    def name(self, artifact_id: str, name: str) -> int:
        """Give an artifact the next version of a name; no new one if it is the newest already.

        Raises: StoreError for a text that cannot be a name; ArtifactNotFound.
        """
        check_name(name)
        with self._database.write() as connection:
            _refuse_dataset(connection, name)
            return add_name(connection, artifact_id, name)

    def check_free(self, name: str) -> None:
        """Look whether `name` would be refused, so that nothing is made in vain. Raises: StoreError."""
        check_name(name)
        with self._database.read() as connection:
            _refuse_dataset(connection, name)

    def names(self, *, artifact_id: str | None = None, name: str | None = None) -> list[NamedVersion]:
        """Return versions of names (of one artifact, of one name), in order."""
        query = select(names).order_by(names.c.name, names.c.version)
        if artifact_id is not None:
            query = query.where(names.c.artifact_id == artifact_id)
        if name is not None:
            query = query.where(names.c.name == name)
        with self._database.read() as connection:
            return [NamedVersion(**row._mapping) for row in connection.execute(query)]

    def resolve(self, target: str) -> Artifact:
        """Find an artifact by `name`, `name@version` or a prefix of its id, in this order.

        Raises: ArtifactNotFound if none or several answer; the hint lists what is near.
        """
        name, at, version = target.partition("@")
        versions = self.names(name=name)
        if versions and not at:
            return self.get(versions[-1].artifact_id)
        if at:
            for named in versions:
                if version == str(named.version):
                    return self.get(named.artifact_id)
            if versions:
                raise ArtifactNotFound(
                    f"{name!r} has no version {version!r}",
                    hint=f"versions are {versions[0].version} to {versions[-1].version}",
                )
        elif len(target) >= MIN_PREFIX and re.fullmatch(r"[0-9a-f]+", target):
            return self._by_prefix(target)
        raise ArtifactNotFound(f"no artifact is called {target!r}", hint=self._nearby(name))

    def _by_prefix(self, prefix: str) -> Artifact:
        start = func.substr(artifacts.c.id, 1, len(prefix))
        query = select(artifacts.c.id, artifacts.c.kind).where(start == prefix)
        with self._database.read() as connection:
            found = connection.execute(query.order_by(artifacts.c.seq).limit(6)).all()
            if len(found) == 1:
                return _load(connection, [found[0].id])[0]
        if not found:
            raise ArtifactNotFound(
                f"no artifact's name or id begins with {prefix!r}", hint=self._nearby(prefix)
            )
        listed = ", ".join(f"{row.id[: len(prefix) + 6]} ({row.kind})" for row in found[:5])
        raise ArtifactNotFound(
            f"the id prefix {prefix!r} fits several artifacts", hint=f"write more of it: {listed}"
        )

    def _nearby(self, name: str) -> str:
        with self._database.read() as connection:
            known = list(connection.scalars(select(names.c.name).distinct().order_by(names.c.name)))
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        if close:
            return f"did you mean {close[0]!r}?"
        if known:
            return f"known names: {', '.join(known[:8])}"
        return f"nothing has a name yet; run a recipe, or give {MIN_PREFIX} or more digits of an id"


_LIST = "give a name, or the first digits of an id"


def _refuse_dataset(connection: Connection, name: str) -> None:
    if connection.scalar(select(refs.c.kind).where(refs.c.name == name)) is not None:
        raise StoreError(
            f"{name!r} is the name of a dataset: only its own commits add versions to it",
            hint="give the recipe or the dataset another name",
        )


def check_name(name: str) -> None:
    """Raise StoreError for a text that cannot be a name."""
    if not _NAME.fullmatch(name):
        raise StoreError(
            f"{name!r} cannot be a name", hint="letters, digits, '.', '_' and '-', at most 100 of them"
        )


def add_artifact(connection: Connection, artifact: Artifact) -> Artifact:
    """Add an artifact within a transaction, as `Catalog.add` does."""
    if known := _load(connection, [artifact.id]):
        return known[0]
    wanted = {parent.artifact_id for parent in artifact.parents}
    present = set(connection.scalars(select(artifacts.c.id).where(artifacts.c.id.in_(sorted(wanted)))))
    if missing := sorted(wanted - present):
        raise ArtifactNotFound(f"{artifact.kind}: no artifact {missing[0][:12]} to be its parent")
    connection.execute(insert(artifacts), _row(artifact))
    if artifact.files:
        connection.execute(insert(files), [_file_row(artifact.id, file) for file in artifact.files])
    if artifact.parents:
        rows = [_edge_row(artifact.id, i, p) for i, p in enumerate(artifact.parents)]
        connection.execute(insert(edges), rows)
    return artifact


def add_name(connection: Connection, artifact_id: str, name: str) -> int:
    """Give an artifact the next version of a name within a transaction, as `Catalog.name` does."""
    if connection.scalar(select(artifacts.c.id).where(artifacts.c.id == artifact_id)) is None:
        raise ArtifactNotFound(f"no artifact {artifact_id[:12]} to name {name!r}", hint=_LIST)
    newest = select(names.c.version, names.c.artifact_id).where(names.c.name == name)
    last = connection.execute(newest.order_by(names.c.version.desc()).limit(1)).first()
    if last is not None and last.artifact_id == artifact_id:
        return int(last.version)
    version = 1 if last is None else int(last.version) + 1
    row = {"name": name, "version": version, "artifact_id": artifact_id, "created_s": time.time()}
    connection.execute(insert(names), row)
    return version


def _load(connection: Connection, artifact_ids: Iterable[str]) -> list[Artifact]:
    """Read whole artifacts in the order of the ids; unknown ones are left out."""
    found: list[Artifact] = []
    for ids in _chunks(artifact_ids):
        rows = {row.id: row for row in connection.execute(select(artifacts).where(artifacts.c.id.in_(ids)))}
        contents: dict[str, list[FileEntry]] = {key: [] for key in rows}
        parents: dict[str, list[Parent]] = {key: [] for key in rows}
        for row in connection.execute(
            select(files).where(files.c.artifact_id.in_(ids)).order_by(files.c.artifact_id, files.c.name)
        ):
            contents[row.artifact_id].append(FileEntry(row.name, row.sha256, row.xxh3, row.num_bytes))
        for edge in _edges(connection, "child_id", ids):
            parents[edge.child_id].append(Parent(edge.role, edge.parent_id, edge.detail))
        found += [_artifact(rows[i], parents[i], contents[i]) for i in dict.fromkeys(ids) if i in rows]
    return found


def _edges(connection: Connection, column: str, ids: Iterable[str]) -> list[Edge]:
    found: list[Edge] = []
    for chunk in _chunks(ids):
        query = select(edges).where(edges.c[column].in_(chunk)).order_by(edges.c.child_id, edges.c.position)
        found.extend(
            Edge(row.child_id, row.role, row.parent_id, json.loads(row.detail))
            for row in connection.execute(query)
        )
    return found


def _chunks(ids: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(ids)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk


def _artifact(row: Row[Any], parents: Sequence[Parent], contents: Sequence[FileEntry]) -> Artifact:
    return Artifact(
        id=row.id,
        kind=row.kind,
        key=row.key,
        parents=tuple(parents),
        files=tuple(sorted(contents, key=lambda file: file.name)),
        facts=json.loads(row.facts),
        code_version=row.code_version,
        recipe_hash=row.recipe_hash,
        environment=json.loads(row.environment),
        created_s=row.created_s,
    )


def _row(artifact: Artifact) -> dict[str, Any]:
    return {
        "id": artifact.id,
        "kind": artifact.kind,
        "key": artifact.key,
        "facts": canonical_json(artifact.facts),
        "code_version": artifact.code_version,
        "recipe_hash": artifact.recipe_hash,
        "environment": canonical_json(artifact.environment),
        "created_s": artifact.created_s,
    }


def _file_row(artifact_id: str, file: FileEntry) -> dict[str, Any]:
    return {
        "artifact_id": artifact_id,
        "name": file.name,
        "sha256": file.sha256,
        "xxh3": file.xxh3,
        "num_bytes": file.num_bytes,
    }


def _edge_row(child_id: str, position: int, parent: Parent) -> dict[str, Any]:
    return {
        "child_id": child_id,
        "position": position,
        "role": parent.role,
        "parent_id": parent.artifact_id,
        "detail": canonical_json(parent.detail),
    }
