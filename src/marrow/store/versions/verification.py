"""A check of the store: every stored byte is what its name says, every version has all of its files."""

from dataclasses import dataclass

from marrow.core.progress import Progress, silent
from marrow.core.records import Artifact
from marrow.store.datasets.contents import Damage
from marrow.store.datasets.dataset import label
from marrow.store.datasets.manifests import decode, printable
from marrow.store.datasets.refs import DATASET
from marrow.store.store import Store


@dataclass(frozen=True, slots=True)
class Verified:
    """What `verify` found. missing: names of lost files by version; artifacts: of other kinds, damaged."""

    damage: Damage
    missing: dict[str, list[str]]
    artifacts: list[str]


def verify(
    store: Store,
    wanted: list[Artifact] | None = None,
    progress: Progress = silent,
    threads: int | None = None,
) -> Verified:
    """Hash every stored byte anew, set aside what is damaged, and find what versions lack now.

    Args: wanted: the versions to look at, by default all that the store keeps.
    """
    contents = store.contents
    damage = contents.verify(lambda done: progress(done, None, "bytes"), threads)
    if wanted is None:
        absent = store.refs.absent()
        wanted = [store.get(i) for i in store.refs.datasets() if i not in absent]
    missing: dict[str, list[str]] = {}
    here: dict[str, bool] = {}
    for artifact in wanted:
        lost = []
        for file in artifact.files:
            if not contents.blobs.has(file.sha256):
                lost.append(f"manifest {file.name}")
                continue
            for entry in decode(contents.read(file.sha256)):
                if entry.sha256 not in here:
                    here[entry.sha256] = contents.has(entry.sha256)
                if not here[entry.sha256]:
                    lost.append(printable(entry.name))
        if lost:
            missing[label(store.catalog, artifact)] = lost
    return Verified(damage, missing, _damaged_artifacts(store, damage))


def _damaged_artifacts(store: Store, damage: Damage) -> list[str]:
    catalog = store.catalog
    users = (catalog.get_many(catalog.users_of_blob(digest)) for digest in damage.digests)
    found = {a.id: a for artifacts in users for a in artifacts.values() if a.kind != DATASET}
    return sorted(f"{artifact.kind} {artifact.id[:12]}" for artifact in found.values())
