"""What a word on the command line means: a path, else a name of the catalog, else an id prefix."""

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from marrow.core.errors import ArtifactNotFound, ModelError
from marrow.core.records import Artifact
from marrow.data.config import PYTHON
from marrow.store.store import Store
from marrow.store.versions.versions import Versions


@dataclass(frozen=True, slots=True)
class ModelTarget:
    """A Hugging Face folder and what the model is called."""

    folder: Path
    name: str


def find_model(target: str) -> ModelTarget:
    """Find the Hugging Face folder that a target means.

    Raises: ModelError if it is no model; ArtifactNotFound.
    """
    path = Path(target)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json", hint="give a Hugging Face model folder")
        return ModelTarget(path, path.resolve().name)
    with find_artifact(target) as (store, artifact):
        if not {file.name for file in artifact.files} >= {"config.json", "tokenizer.json"}:
            raise ModelError(
                f"{target} is an artifact of kind {artifact.kind}, not an exported model",
                hint="give the name of a run, such as quickstart, or the id of an export",
            )
        return ModelTarget(store.view(artifact), target.partition("@")[0])


@contextmanager
def find_artifact(target: str, *, reading: bool = False) -> Iterator[tuple[Store, Artifact]]:
    """Open the store and find an artifact in it. Raises: ArtifactNotFound.

    Args: reading: open a store that may not be written too; its views go with the block.
    """
    with Store.open(create=False, reading=reading) as store:
        yield store, store.resolve(target)


def find_version(store: Store, source: str) -> Artifact | None:
    """Find the dataset version that a recipe's `data.source` names; None if it means something else.

    A path that is there comes first, as everywhere.
    Raises: StoreError if it names an artifact that is no dataset; ArtifactNotFound for a version that a
        dataset of that name does not have.
    """
    # Of a path that may not be looked at, the reader of the source tells.
    is_file = os.path.exists(Path(source).expanduser())
    if source == PYTHON or "://" in source or glob.has_magic(source) or is_file:
        return None
    versions = Versions(store)
    try:
        return versions.resolve(source)
    except ArtifactNotFound:
        name = re.split("[@~]", source, maxsplit=1)[0]
        if name != source and store.catalog.names(name=name):
            raise
        return None
