"""What a run tells to the outside while it runs: OpenLineage events, if MARROW_OPENLINEAGE says where to."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from marrow.cli import console
from marrow.core.records import Artifact
from marrow.store.open_lineage import ENVIRONMENT, RunEvents
from marrow.store.store import Store


def events_of(recipe: str, run_id: str, store: Store) -> AbstractContextManager[RunEvents | None]:
    """Return what tells of a run's steps while it is open; None inside if nobody is to be told.

    Raises: UsageError if MARROW_OPENLINEAGE is neither a file nor an HTTP address.
    """
    url = os.environ.get(ENVIRONMENT)
    if not url:
        return nullcontext()
    return RunEvents.open(
        url,
        recipe,
        run_id,
        store,
        schema_of=lambda artifact: columns_of(store, artifact),
        say=console.say,
    )


def columns_of(store: Store, artifact: Artifact) -> Mapping[str, str] | None:
    """Read the columns of an artifact and their types from its first table; None if it has none."""
    tables = [file for file in artifact.files if file.name.endswith((".parquet", ".arrow"))]
    if not tables:
        return None
    import pyarrow as pa  # a command that tells nobody does without
    import pyarrow.parquet as pq

    path = store.blobs.path(tables[0].sha256)
    try:
        if tables[0].name.endswith(".parquet"):
            schema = pq.read_schema(path)
        else:
            with pa.memory_map(str(path)) as file:
                schema = pa.ipc.open_file(file).schema
    except (pa.ArrowException, OSError):  # telling never stops a run
        return None
    return {field.name: str(field.type) for field in schema}
