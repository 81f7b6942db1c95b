"""The shards that a recipe's `[loader.mixture]` names: the run's own, artifacts of the store, folders.

Artifacts become parents of the training step, so that lineage reaches their rows too; of a folder
only the check of its manifest can be noted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from marrow.core.errors import UsageError
from marrow.core.hashes import hash_file
from marrow.core.records import Artifact
from marrow.data.manifest import FILE_NAME as MANIFEST_FILE
from marrow.loader.config import LoaderRecipe
from marrow.store.store import Store

OWN = "shards"


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a mixture's shards are. parents: by role. roles, folders: by the source's name."""

    parents: Mapping[str, Artifact]
    roles: Mapping[str, str]
    folders: Mapping[str, Path]

    def checks(self) -> dict[str, str]:
        """Return what identifies the shards that are no artifacts, and who reads which artifact."""
        found = {name: hash_file(path / MANIFEST_FILE) for name, path in self.folders.items()}
        return found | dict(self.roles)

    def used(self) -> set[str]:
        """Return the roles of the artifacts that are read; without a mixture the run's own shards."""
        return set(self.roles.values()) if self.roles or self.folders else {OWN}

    def place(self, recipe: LoaderRecipe, inputs: Mapping[str, Path]) -> LoaderRecipe:
        """Return the recipe with folders for names. Args: inputs: of the training step, by role."""
        views = {name: inputs[role] for name, role in self.roles.items()}
        return recipe.with_folders({**views, **self.folders})


def find_sources(recipe: LoaderRecipe, store: Store) -> Sources:
    """Find the shards of a mixture's sources. Raises: ArtifactNotFound, UsageError."""
    parents: dict[str, Artifact] = {}
    roles: dict[str, str] = {}
    folders: dict[str, Path] = {}
    for name, source in recipe.mixture.items():
        path = Path(source.shards)
        if not source.shards:
            roles[name] = OWN
        elif (path / MANIFEST_FILE).is_file():
            folders[name] = path.absolute()
        elif path.is_dir() or "://" in source.shards:
            raise UsageError(
                f"loader.mixture.{name}.shards = {source.shards!r} is no folder of shards: it has no "
                f"{MANIFEST_FILE}",
                hint="name an artifact of kind shards, or a folder that `marrow export` made of one",
            )
        else:
            artifact = store.resolve(source.shards)
            if MANIFEST_FILE not in {file.name for file in artifact.files}:
                raise UsageError(
                    f"loader.mixture.{name}.shards = {source.shards!r} is of kind {artifact.kind}",
                    hint="`marrow lineage` shows the ids of a run's shards",
                )
            roles[name] = f"{OWN}: {name}"
            parents[roles[name]] = artifact
    return Sources(parents, roles, folders)
