"""Where a source file went: the rows, documents, split sides and packed rows that hold it.

    names = find_names(rows_folder, "notes.csv", source)      # what the rows call it
    origin = Origin(names[0], line=17)                        # or all of the file
    count_rows(rows_folder, origin), document_ids(documents_folder, origin), ...

Each step keeps the place of what it passes on (`data/clean.py`), so every question is one scan of two
columns. What was dropped on the way left no text, but its count: rows less documents; some of
each rule, and all broken rows, are named in the files beside. `cli/source_lineage.py` puts the
answers of all artifacts together.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from marrow.core.errors import DataError, UsageError
from marrow.data.documents import DOCUMENTS, DROPPED, ROWS
from marrow.data.ingest import QUARANTINE
from marrow.data.manifest import Manifest
from marrow.data.split import HELDOUT, TRAIN
from marrow.data.tables import open_table, parts, stream
from marrow.data.template import PROVENANCE

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Origin:
    """A source file by the name that its rows bear, and one line (row) of it, from 1, or all.

    also: names of other files that count as the same, such as copies.
    """

    file: str
    line: int | None = None
    also: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """All names."""
        return (self.file, *self.also)


@dataclass(frozen=True, slots=True)
class RowGroup:
    """How many rows of an origin a row group of a rows file holds."""

    part: str
    row_group: int
    rows: int


def find_names(rows: Path, wanted: str, source: str) -> list[str]:
    """Return the names under which an ingest knows a file: none, if it never saw it.

    Args: rows: folder of an ingest. wanted: a path, a name as the rows bear it, or its last parts.
        source: what the ingest read, to which its names are relative.
    Raises: UsageError if several files end in `wanted`.
    """
    names = known_names(rows)
    if wanted in names:
        return [wanted]
    path = Path(wanted).absolute()
    base = Path(source).absolute()
    by_path = sorted(name for name in names if path in (base / name, base.parent / name))
    if by_path:
        return by_path[:1]
    by_end = sorted(name for name in names if name.endswith(f"/{wanted}"))
    if len(by_end) > 1:
        raise UsageError(
            f"{wanted} may be any of {len(by_end)} files: {', '.join(by_end[:5])}",
            hint="give more of its path",
        )
    return by_end


def known_names(rows: Path) -> set[str]:
    """Return the names of all files that an ingest has rows of, broken ones too."""
    return set(_distinct_names(rows)) | {sample["file"] for sample in _lines(rows / QUARANTINE)}


def count_rows(rows: Path, origin: Origin) -> list[RowGroup]:
    """Return where the rows of an origin lie in an ingest."""
    found: dict[tuple[str, int], int] = {}
    for path in parts(rows, ROWS):
        file_column, line_column = _place_columns(path)
        for place, batch in stream([path], [file_column, line_column]):
            count = int(pc.sum(_is_from(batch, file_column, line_column, origin)).as_py() or 0)
            if count:
                key = (place.part, place.row_group)
                found[key] = found.get(key, 0) + count
    return [RowGroup(part, group, count) for (part, group), count in found.items()]


def broken_rows(rows: Path, origin: Origin) -> list[dict[str, Any]]:
    """Return the rows of an origin that an ingest set aside as broken, as quarantine.jsonl has them."""
    return _from(rows / QUARANTINE, origin)


def dropped_rows(documents: Path, origin: Origin) -> list[dict[str, Any]]:
    """Return what dropped.jsonl says of an origin: a sample of each rule's rows, with their rule."""
    return _from(documents / DROPPED, origin)


def document_ids(documents: Path, origin: Origin) -> Int64Array:
    """Return the documents that were made of an origin, ascending."""
    return _ids(documents / DOCUMENTS, origin)


def split_sides(split: Path, origin: Origin) -> tuple[Int64Array, Int64Array]:
    """Return the documents of an origin that are trained on, and those that are held out."""
    train = [_ids(path, origin) for path in parts(split, TRAIN)]
    return np.concatenate(train), _ids(split / HELDOUT, origin)


def packed_rows(shards: Path, ids: Int64Array) -> tuple[Int64Array, dict[str, int]]:
    """Return which packed rows hold a token of those documents, and how many of them each shard has.

    Cost: one pass over the shards' document ids, memory-mapped; no token is read.
    """
    found: list[Int64Array] = []
    by_shard: dict[str, int] = {}
    first = 0
    wanted = pa.array(ids, pa.int64())
    for shard in Manifest.read(shards).shards:
        path = shards / shard.name
        try:
            with pa.memory_map(str(path)) as file:
                lists = pa.ipc.open_file(file).get_batch(0).column("document_ids")
                holds = pc.is_in(lists.flatten(), value_set=wanted).to_numpy(zero_copy_only=False)
                row_of_piece = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
        except (pa.ArrowInvalid, OSError, KeyError) as error:
            raise DataError(f"{path} cannot be read: {error}", hint="run the shards step again") from error
        rows = np.unique(row_of_piece[holds]).astype(np.int64)
        if len(rows):
            by_shard[shard.name] = len(rows)
            found.append(first + rows)
        first += shard.num_rows
    return np.concatenate(found) if found else np.empty(0, np.int64), by_shard


def _place_columns(path: Path) -> tuple[str, str]:
    with open_table(path) as file:
        names = file.schema_arrow.names
    return PROVENANCE if PROVENANCE[0] in names else ("file", "line")  # the documentation's own columns


def _distinct_names(rows: Path) -> Iterator[str]:
    for path in parts(rows, ROWS):
        column = _place_columns(path)[0]
        with open_table(path) as file:
            for group in range(file.num_row_groups):
                values = file.read_row_group(group, [column])[column]
                yield from (name for name in pc.unique(values).to_pylist() if name is not None)


def _ids(path: Path, origin: Origin) -> Int64Array:
    found = [
        batch.filter(_is_from(batch, "file", "line", origin)).column("document_id").to_numpy()
        for _, batch in stream([path], ["document_id", "file", "line"])
    ]
    return np.concatenate([np.empty(0, np.int64), *found]).astype(np.int64)


def _is_from(batch: pa.RecordBatch, file_column: str, line_column: str, origin: Origin) -> pa.Array:
    mask = pc.is_in(batch.column(file_column), value_set=pa.array(origin.files, pa.string()))
    if origin.line is not None:
        mask = pc.and_(mask, pc.equal(batch.column(line_column), origin.line))
    return pc.fill_null(mask, False)


def _from(path: Path, origin: Origin) -> list[dict[str, Any]]:
    return [
        found
        for found in _lines(path)
        if found["file"] in origin.files and origin.line in (None, found.get("line"))
    ]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)
