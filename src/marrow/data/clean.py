"""Rows become documents: expectations, template, rules, personal data, exact and near duplicates.

    rows -> expectations hold? -> candidates (a piece at a time, `prepare.py`) -> set aside on disk
         -> duplicates among them (`dedup.py`) -> documents

Pieces are made by an engine; the documents are the same bytes whichever it is. Candidates are
set aside in a scratch file, so that texts are made and judged once and no pass holds more than a few
pieces.

Every row that does not stay is counted under what dropped it, and a fair sample of each kind is
written to dropped.jsonl with its place (`tally.py`). Every document keeps its place: source file and line,
and the row group and row of the rows file it comes from.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from marrow.core.errors import DataError, explain_os_errors
from marrow.core.hashes import hash_value
from marrow.core.progress import Progress, silent
from marrow.core.span import span
from marrow.data.config import DataRecipe, settings_of
from marrow.data.dedup.duplicates import Duplicates, find_duplicates
from marrow.data.dedup.sketches import scratch
from marrow.data.documents import DOCUMENT_SCHEMA as DOCUMENT_SCHEMA
from marrow.data.documents import DOCUMENTS as DOCUMENTS
from marrow.data.documents import DROPPED as DROPPED
from marrow.data.documents import FINDINGS, NOTES
from marrow.data.documents import ROWS as ROWS
from marrow.data.engine import INLINE, Engine
from marrow.data.keys import mix
from marrow.data.prepare import (
    CANDIDATE_SCHEMA,
    Road,
    Work,
    evaluations_of,
    pieces_of,
    road_of,
)
from marrow.data.quality.expectations import check_expectations
from marrow.data.quality.pii import scrubber
from marrow.data.quality.report import EXPECTATIONS
from marrow.data.tables import ParquetFile, open_table, parts
from marrow.data.tally import MAX_SAMPLES, Tally


def clean(
    recipe: DataRecipe,
    rows: Path,
    out: Path,
    progress: Progress = silent,
    *,
    work: Path | None = None,
    engine: Engine = INLINE,
) -> dict[str, Any]:
    """Make documents.parquet and dropped.jsonl in `out` from the rows files in `rows`.

    With expectations there is an expectations.json; with rules for personal data a pii.jsonl, whose
    samples are masked; samples of lines that went, and of contamination that is only reported, are in
    notes.jsonl.

    Args: work: a folder that outlives a failure, `out` by default: there lies the expectations.json
        of expectations that do not hold, and the dropped.jsonl if every row was dropped. engine:
        what makes candidates and signatures of pieces; the files are the same bytes whichever it is.
    Returns: facts: rows, documents, bytes, clusters, and what each rule dropped.
    Raises: DataError for an unknown column, for expectations that do not hold, or if no document is
        left.
    Cost: one pass over the rows, two over the candidates' texts, which lie on disk once more.
    """
    facts: dict[str, Any] = {}
    if recipe.expect:
        report = check_expectations(parts(rows, ROWS), recipe.expect, progress, spill=out, engine=engine)
        if scrub := scrubber(recipe.pii):
            report = report.shown_as(lambda text: scrub(text).text)
        told_in = ((work or out) if report.failed else out) / EXPECTATIONS
        report.write(told_in)
        report.refuse(told_in)
        facts["expectations"] = report.facts()
        if left_out := report.left_out():
            facts["references_left_out"] = left_out
    road = road_of(recipe, rows)
    with scratch(out) as folder:
        found = _prepare(recipe, rows, road, folder / "candidates.arrow", progress, engine)
        duplicates = None
        if recipe.dedup.exact or recipe.dedup.near != "off":
            texts = (batch.column("text") for batch in found.read())
            duplicates = find_duplicates(texts, recipe.dedup, folder, engine=engine, progress=progress)
        with span("write documents"):
            facts |= _write(recipe, road, out, found, duplicates, progress)
    if facts["documents"] == 0:
        dropped = ", ".join(f"{name} {count['documents']}" for name, count in facts["dropped"].items())
        if work is not None:
            shutil.copyfile(out / DROPPED, work / DROPPED)
        raise DataError(
            f"no document is left of {facts['rows']} rows (dropped: {dropped})",
            hint="look at data.text (which columns make the text) and at the limits in [data.quality]; "
            f"some of the rows: {(work or out) / DROPPED}",
        )
    return facts


@dataclass(slots=True)
class _Candidates:
    """The candidates, set aside in a file."""

    path: Path
    num_rows: int = 0
    count: int = 0
    tally: Tally = field(default_factory=Tally)

    def read(self) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(self.path)) as source, pa.ipc.open_stream(source) as reader:
            yield from reader


def _prepare(
    recipe: DataRecipe, rows: Path, road: Road, path: Path, progress: Progress, engine: Engine
) -> _Candidates:
    """Make the candidates of all pieces and set them aside."""
    total = sum(open_table(part).metadata.num_rows for part in parts(rows, ROWS))
    contents = hash_value(settings_of(recipe, "clean")["evaluations"])
    found = _Candidates(path)
    with (
        explain_os_errors("set texts aside", path),
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, CANDIDATE_SCHEMA) as writer,
        span("read rows"),
    ):
        try:
            for prepared in engine.map(Work(recipe, road, contents).prepare, pieces_of(rows)):
                if prepared.candidates.num_rows:
                    writer.write_batch(prepared.candidates)
                found.tally.add(prepared.tally)
                found.num_rows += prepared.num_rows
                found.count += prepared.candidates.num_rows
                progress(found.num_rows, 2 * total, "rows")
        finally:
            evaluations_of.cache_clear()
    return found


def _write(
    recipe: DataRecipe,
    road: Road,
    out: Path,
    found: _Candidates,
    duplicates: Duplicates | None,
    progress: Progress,
) -> dict[str, Any]:
    """Write the documents that stay; return the facts."""
    stays_N, cluster_N = np.ones(found.count, bool), np.arange(found.count)
    dropped: list[_Duplicate] = []
    if duplicates is not None:
        cluster_N = duplicates.clusters
        dropped.append(_Duplicate.of("exact_duplicate", duplicates.exact_of))
        if recipe.dedup.near == "drop":
            dropped.append(_Duplicate.of("near_duplicate", duplicates.near_of))
        for kind in dropped:
            stays_N = stays_N & (kind.of_N < 0)
    # The first member of a cluster always stays, so its document id can name the cluster.
    document_N = np.where(stays_N, np.cumsum(stays_N) - 1, -1)
    cluster_N = document_N[cluster_N]
    places = {int(one): "" for kind in dropped for one in kind.of_N[kind.shown]}
    groups: set[str] = set()
    seen = size = 0
    with ParquetFile(out / DOCUMENTS, DOCUMENT_SCHEMA, recipe.row_group_bytes) as file:
        for batch in found.read():
            end = seen + batch.num_rows
            _show_duplicates(found.tally, batch, seen, dropped, places)
            kept = batch.filter(pa.array(stays_N[seen:end]))
            ids, clusters = (column[seen:end][stays_N[seen:end]] for column in (document_N, cluster_N))
            columns = [pa.array(ids), *kept.columns, pa.array(clusters)]
            file.write(pa.RecordBatch.from_arrays(columns, schema=DOCUMENT_SCHEMA))
            size += pc.sum(kept.column("num_bytes")).as_py() or 0
            if not road.by_row:
                groups.update(kept.column("group").unique().to_pylist())
            seen = end
            done = found.num_rows * (1 + seen / found.count)
            progress(done, 2 * found.num_rows, "rows", {"documents": f"{file.num_rows:,}"})
        num_documents = file.num_rows
    return {
        "rows": found.num_rows,
        "documents": num_documents,
        "bytes": size,
        "groups": num_documents if road.by_row else len(groups),
        "clusters_of_several": int((np.unique(cluster_N[stays_N], return_counts=True)[1] > 1).sum()),
        "template": recipe.text or "default: " + ", ".join(road.template.columns),
        **_tell(recipe, out, found.tally),
        **({} if duplicates is None else {"dedup": duplicates.figures()}),
    }


def _tell(recipe: DataRecipe, out: Path, tally: Tally) -> dict[str, Any]:
    """Write the samples of what the rules did; return the counts."""
    tally.samples.write(out / DROPPED)
    facts: dict[str, Any] = {"dropped": tally.documents}
    if tally.notes.rows():
        tally.notes.write(out / NOTES)
    if tally.lines:
        facts["dropped_lines"] = tally.lines
    if any(True for _ in recipe.pii.actions()):
        facts["pii"] = tally.found
        tally.findings.write(out / FINDINGS)
    if recipe.decontaminate.against:
        facts["contaminated"] = tally.contaminated
    return facts


@dataclass(frozen=True, slots=True)
class _Duplicate:
    """Duplicates of one kind.

    of_N: of which candidate each is one, -1 of none. shown: candidates that are shown as samples.
    """

    rule: str
    of_N: Any
    shown: list[int]

    @classmethod
    def of(cls, rule: str, of_N: Any) -> "_Duplicate":
        """Choose the samples: those whose numbers' hashes are the smallest."""
        found = np.flatnonzero(of_N >= 0)
        chosen = np.argsort(mix(found.astype(np.uint64)))[:MAX_SAMPLES]
        return cls(rule, of_N, sorted(found[chosen].tolist()))


def _show_duplicates(
    tally: Tally, batch: pa.RecordBatch, start: int, dropped: list[_Duplicate], places: dict[int, str]
) -> None:
    """Count the duplicates of a batch, and show some; an original stands before its duplicates."""

    def place(i: int) -> dict[str, Any]:
        return {name: batch.column(name)[i].as_py() for name in ("file", "line")}

    end = start + batch.num_rows
    for index in places:
        if start <= index < end:
            places[index] = "{file}:{line}".format(**place(index - start))
    sizes = batch.column("num_bytes").to_numpy()
    for kind in dropped:
        is_one = kind.of_N[start:end] >= 0
        if is_one.any():
            tally.drop(kind.rule, int(sizes[is_one].sum()), int(is_one.sum()))
        for index in kind.shown:
            if start <= index < end:
                i = index - start
                text = batch.column("text")[i].as_py()
                of = places[int(kind.of_N[index])]
                sample = {"rule": kind.rule, **place(i), "of": of, "text": text[:200]}
                tally.samples.offer(kind.rule, sample["file"], sample["line"], sample.copy)
