"""The shards that a recipe's `[loader.mixture]` names: the run's own, artifacts of the store, folders, URLs.

Artifacts become parents of the training step, so that lineage reaches their rows too; of a folder
or URL only the check of its manifest can be noted. Shards at URLs are fetched while they are trained on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from marrow.core.errors import UsageError
from marrow.core.hashes import hash_file
from marrow.core.records import Artifact
from marrow.data.manifest import FILE_NAME as MANIFEST_FILE
from marrow.loader.config import LoaderRecipe
from marrow.loader.far_folder import far_folder
from marrow.loader.streaming.cache import Cache
from marrow.store.remote.client import is_url
from marrow.store.store import Store

OWN = "shards"
CACHE = "cache"  # in the store's folder: shards of URLs


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
    """Find the shards of a mixture's sources; of those at a URL the manifest is fetched.

    Raises: ArtifactNotFound, UsageError; SourceError for a URL without shards.
    """
    parents: dict[str, Artifact] = {}
    roles: dict[str, str] = {}
    folders: dict[str, Path] = {}
    num_far = sum(is_url(source.shards) for source in recipe.mixture.values())
    for name, source in recipe.mixture.items():
        path = Path(source.shards)
        if not source.shards:
            roles[name] = OWN
        elif (path / MANIFEST_FILE).is_file():
            folders[name] = path.absolute()
        elif is_url(source.shards):
            # Not one for all: a batch may need shards of several, which would wait for each other's room.
            cache = Cache(store.home / CACHE / name, recipe.cache_bytes // num_far)
            folders[name] = far_folder(source.shards, cache)
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
