"""Train and held-out part: whole groups, joined where near-duplicates tie them.

A unit is what must stay on one side: groups that share a near-duplicate cluster are one unit. Units
are taken in the order of a keyed hash of their name until the held-out share of bytes is reached, so
that a unit keeps its side, as far as sizes allow, when others come or go (another Python version,
a few more rows). A unit larger than a quarter of the held-out part is passed over at first, so that
the part is a mixture; only if there are too few smaller ones is it considered.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from marrow.core.errors import DataError
from marrow.core.progress import Progress, silent
from marrow.core.span import span
from marrow.data.config import DataRecipe
from marrow.data.dedup.clusters import components
from marrow.data.documents import DOCUMENT_SCHEMA, DOCUMENTS
from marrow.data.tables import ParquetFile, open_table, stream

TRAIN = "train.parquet"
HELDOUT = "heldout.parquet"
MIXTURE = 0.25  # the largest part of the held-out bytes that one unit may be, if others can fill it
MAX_OVERSHOOT = 3.0  # a held-out part larger than this times the asked share is refused
ENOUGH = 0.9  # of the asked share: then no further unit is taken


@dataclass(frozen=True, slots=True)
class Unit:
    """What must stay on one side: a name (its smallest group), its bytes, its groups."""

    name: str
    num_bytes: int
    groups: tuple[str, ...]


def split(recipe: DataRecipe, documents: Path, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write train.parquet and heldout.parquet in `out` from documents.parquet.

    Returns: facts: documents, bytes and groups of each part, the share and the held-out groups.
    Raises: DataError if there are too few rows or groups to hold a part out.
    """
    path = documents / DOCUMENTS
    with span("group"):
        units = read_units(path)
        heldout = choose_heldout(units, recipe.split.heldout_share, recipe.split.seed)
    groups = {group for unit in heldout for group in unit.groups}
    total = open_table(path).metadata.num_rows
    with (
        span("write parts"),
        ParquetFile(out / TRAIN, DOCUMENT_SCHEMA, recipe.row_group_bytes) as train_file,
        ParquetFile(out / HELDOUT, DOCUMENT_SCHEMA, recipe.row_group_bytes) as heldout_file,
    ):
        done = 0
        for _, batch in stream([path]):
            held = np.fromiter((g in groups for g in batch.column("group").to_pylist()), bool, batch.num_rows)
            for file, mask in ((train_file, ~held), (heldout_file, held)):
                if mask.any():
                    file.write(batch.filter(pa.array(mask)))
            done += batch.num_rows
            progress(done, total, "documents")
    num_bytes = sum(unit.num_bytes for unit in units)
    heldout_bytes = sum(unit.num_bytes for unit in heldout)
    return {
        "train": {"documents": train_file.num_rows, "bytes": num_bytes - heldout_bytes},
        "heldout": {"documents": heldout_file.num_rows, "bytes": heldout_bytes, "groups": len(groups)},
        "heldout_share": round(heldout_bytes / num_bytes, 4),
        "units": len(units),
        "heldout_groups": sorted(groups)[:50],
    }


def read_units(path: Path) -> list[Unit]:
    """Join the groups of a documents file that share a cluster; return the units by name."""
    sizes: dict[str, int] = {}
    first_of_cluster: dict[int, str] = {}
    ties: set[tuple[str, str]] = set()
    for _, batch in stream([path], ["group", "num_bytes", "cluster"]):
        columns = (batch.column(name).to_pylist() for name in ("group", "num_bytes", "cluster"))
        for group, num_bytes, cluster in zip(*columns, strict=True):
            sizes[group] = sizes.get(group, 0) + num_bytes
            other = first_of_cluster.setdefault(cluster, group)
            if other != group:
                ties.add((other, group))
    return join(sizes, ties)


def join(sizes: Mapping[str, int], ties: set[tuple[str, str]]) -> list[Unit]:
    """Make units of groups: those that are tied, directly or through others, are one."""
    names = sorted(sizes)
    index = {name: i for i, name in enumerate(names)}
    pairs = np.array(sorted((index[a], index[b]) for a, b in ties), np.int64).reshape(-1, 2)
    members: dict[int, list[str]] = {}
    for name, first in zip(names, components(len(names), pairs).tolist(), strict=True):
        members.setdefault(first, []).append(name)
    return [
        Unit(names[first], sum(sizes[name] for name in group), tuple(group))
        for first, group in members.items()
    ]


def choose_heldout(units: list[Unit], share: float, seed: int) -> list[Unit]:
    """Choose the units to hold out: a pure function of names, sizes, share and seed.

    Raises: DataError if no choice comes near the share.
    """
    total = sum(unit.num_bytes for unit in units)
    target = share * total
    ordered = sorted(units, key=lambda unit: (_rank(seed, unit), unit.name))
    chosen = _fill(ordered, target, MIXTURE * target)
    if sum(unit.num_bytes for unit in chosen) < ENOUGH * target:
        chosen = _fill(ordered, target, target)
    if not chosen and units:
        chosen = [min(ordered, key=lambda unit: unit.num_bytes)]
    heldout = sum(unit.num_bytes for unit in chosen)
    if len(units) < 2 or heldout > MAX_OVERSHOOT * target or heldout == total:
        smallest = heldout / total if total else 1.0
        raise DataError(
            f"too few rows for a held-out part: {len(units)} independent groups, the smallest choice holds "
            f"{smallest:.0%} of the bytes out where data.split.heldout_share asks for {share:.1%}",
            hint="give more rows, set data.group to a column with more values (or leave it empty), "
            "or raise data.split.heldout_share",
        )
    return chosen


def _fill(ordered: list[Unit], target: float, largest: float) -> list[Unit]:
    """Take units in order, none larger than `largest`, as long as the target is not passed."""
    chosen: list[Unit] = []
    taken = 0
    for unit in ordered:
        if taken >= ENOUGH * target:
            break
        if unit.num_bytes <= largest and taken + unit.num_bytes <= target * (2 - ENOUGH):
            chosen.append(unit)
            taken += unit.num_bytes
    return chosen


def _rank(seed: int, unit: Unit) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed}:{unit.name}".encode())
