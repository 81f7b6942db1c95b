"""Branches and tags: names of dataset versions, in the catalog.

A branch is a name whose versions are its commits: `reviews@3` is the third thing that `reviews`
stood on, and never comes to mean something else. It moves by compare-and-swap, in the transaction
that adds the new version, so of two commits at once one is told that it was second. A tag is a
name that never moves. Making either costs two rows.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, delete, insert, select, update

from marrow.core.errors import ArtifactNotFound, StaleVersion, StoreError
from marrow.core.records import Artifact
from marrow.store.catalog import add_artifact, add_name, check_name
from marrow.store.database import Database
from marrow.store.tables import absent, artifacts, names, refs

DATASET = "dataset"  # the kind of artifact that a dataset version is

Kind = Literal["branch", "tag"]


@dataclass(frozen=True, slots=True)
class Ref:
    """A branch or a tag, and the version that it stands on."""

    name: str
    kind: Kind
    artifact_id: str
    updated_s: float


class Refs:
    """The branches and tags of a catalog, and which versions' files are not kept in full."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, name: str) -> Ref | None:
        """Return the branch or tag of that name, None if there is none."""
        with self._database.read() as connection:
            row = connection.execute(select(refs).where(refs.c.name == name)).first()
        return None if row is None else _ref(row)

    def all(self) -> list[Ref]:
        """Return all branches and tags, by name."""
        with self._database.read() as connection:
            return [_ref(row) for row in connection.execute(select(refs).order_by(refs.c.name))]

    def branch(self, name: str) -> Ref:
        """Return the branch of that name. Raises: ArtifactNotFound; StoreError if it is a tag."""
        found = self.get(name)
        if found is None:
            known = [ref.name for ref in self.all() if ref.kind == "branch"]
            hint = (
                f"known: {', '.join(known[:8])}" if known else "marrow data commit FOLDER --to NAME makes one"
            )
            raise ArtifactNotFound(f"there is no dataset or branch {name!r}", hint=hint)
        if found.kind != "branch":
            raise _no_branch(name)
        return found

    def create(self, name: str, kind: Kind, artifact_id: str) -> int:
        """Make a branch or tag that stands on a version; return its number of the name's versions.

        Raises: StoreError if the name is taken or no name; ArtifactNotFound.
        """
        check_name(name)
        with self._database.write() as connection:
            if connection.scalar(select(refs.c.name).where(refs.c.name == name)) is not None:
                raise StoreError(f"there is a branch or tag {name!r} already", hint="give another name")
            _refuse_other_kinds(connection, name)
            return _insert(connection, name, kind, artifact_id)

    def advance(self, name: str, expected: str | None, artifact: Artifact) -> int:
        """Add a version to the catalog and move a branch to it, if it still stands on `expected`.

        Args: expected: the id of its version, None if there must be no such branch yet (then it is
            made). Returns: the number of the new version.
        Raises: StaleVersion if someone else moved it; StoreError if it is a tag, or another
            kind's name. All in one transaction.
        """
        check_name(name)
        with self._database.write() as connection:
            row = connection.execute(select(refs).where(refs.c.name == name)).first()
            if row is not None and row.kind != "branch":
                raise _no_branch(name)
            stands_on = None if row is None else row.artifact_id
            if stands_on != expected:
                raise StaleVersion(
                    f"{name!r} was moved by another process meanwhile",
                    hint="run the same command again: it then builds on the newest version",
                )
            added = add_artifact(connection, artifact)
            connection.execute(delete(absent).where(absent.c.artifact_id == added.id))
            if row is None:
                _refuse_other_kinds(connection, name)
                return _insert(connection, name, "branch", added.id)
            moved = update(refs).where(refs.c.name == name)
            connection.execute(moved.values(artifact_id=added.id, updated_s=time.time()))
            return add_name(connection, added.id, name)

    def restore(
        self, name: str, kind: Kind, expected: str | None, series: list[tuple[int, str, float]]
    ) -> None:
        """Take over the versions of a branch or tag as another store numbered them.

        Args: expected: as for `advance`. series: (version, artifact id, time) in order, those that
            are here already first. Raises: StaleVersion, StoreError.
        """
        check_name(name)
        with self._database.write() as connection:
            row = connection.execute(select(refs).where(refs.c.name == name)).first()
            if (None if row is None else row.artifact_id) != expected:
                raise StaleVersion(f"{name!r} was moved by another process meanwhile", hint="pull again")
            _refuse_other_kinds(connection, name)
            query = select(names.c.version).where(names.c.name == name)
            here = set(connection.scalars(query))
            for version, artifact_id, created_s in series:
                if version not in here:
                    values = {"name": name, "version": version, "artifact_id": artifact_id}
                    connection.execute(insert(names), values | {"created_s": created_s})
            now = {"kind": kind, "artifact_id": series[-1][1], "updated_s": time.time()}
            if row is None:
                connection.execute(insert(refs), now | {"name": name})
            else:
                connection.execute(update(refs).where(refs.c.name == name).values(now))

    def remove(self, name: str) -> Ref:
        """Remove a branch or tag; its versions keep their numbers and their lineage.

        Raises: ArtifactNotFound.
        """
        found = self.get(name)
        if found is None:
            raise ArtifactNotFound(
                f"there is no branch or tag {name!r}", hint="marrow data branch lists them"
            )
        with self._database.write() as connection:
            connection.execute(delete(refs).where(refs.c.name == name))
        return found

    def absent(self) -> set[str]:
        """Return the ids of the versions whose files are not kept here in full."""
        with self._database.read() as connection:
            return set(connection.scalars(select(absent.c.artifact_id)))

    def mark_absent(self, artifact_ids: Iterable[str]) -> None:
        """Note that the files of some versions are not kept."""
        with self._database.write() as connection:
            known = set(connection.scalars(select(absent.c.artifact_id)))
            now_s = time.time()
            rows = [{"artifact_id": i, "since_s": now_s} for i in artifact_ids if i not in known]
            if rows:
                connection.execute(insert(absent), rows)

    def mark_present(self, artifact_ids: Iterable[str]) -> None:
        """Note that the files of some versions are here again."""
        with self._database.write() as connection:
            for artifact_id in artifact_ids:
                connection.execute(delete(absent).where(absent.c.artifact_id == artifact_id))

    def datasets(self) -> list[str]:
        """Return the ids of all dataset versions, oldest first."""
        query = select(artifacts.c.id).where(artifacts.c.kind == DATASET).order_by(artifacts.c.seq)
        with self._database.read() as connection:
            return list(connection.scalars(query))


def _insert(connection: Connection, name: str, kind: Kind, artifact_id: str) -> int:
    version = add_name(connection, artifact_id, name)
    row = {"name": name, "kind": kind, "artifact_id": artifact_id, "updated_s": time.time()}
    connection.execute(insert(refs), row)
    return version


def _refuse_other_kinds(connection: Connection, name: str) -> None:
    """Raise StoreError if the name belongs to something that is no dataset."""
    query = select(artifacts.c.kind).join(names, names.c.artifact_id == artifacts.c.id)
    kinds = set(connection.scalars(query.where(names.c.name == name).distinct()))
    if others := sorted(kinds - {DATASET}):
        raise StoreError(f"{name!r} already names an artifact of kind {others[0]}", hint="give another name")


def _no_branch(name: str) -> StoreError:
    return StoreError(
        f"{name!r} is a tag: it never moves",
        hint=f"make a branch from it first: marrow data branch {name} NEW-NAME",
    )


def _ref(row: Row[Any]) -> Ref:
    return Ref(row.name, row.kind, row.artifact_id, row.updated_s)
