"""What became of a source file: every artifact that holds it or learned from it, in every run.

    told = trace_file(store, "notes.csv")           # or one row of it
    told["artifacts"]                               # in the order of the data's way
    to_forget(told)                                 # what a delete request asks for

The walk begins at each ingest that read the file and follows the catalog downwards. `data/origin.py`
says which rows, documents and packed rows hold it, `loader/seen.py` which training runs consumed
those; both read the artifacts themselves, so the answer rests on no bookkeeping beside them. Dataset
versions (`marrow data`) that ever held a file of that name, or its bytes by another one, come last
(`store/versions/occurrences.py`); what was made of any of them is walked too.

Each artifact gets one effect:
    holds       text of it lies in its files
    learned     it was made by learning from it, or of something that was
    measured    it only holds figures measured on it
    untouched   it comes later on the way, and has nothing of it
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from marrow.core.records import Artifact, Parent
from marrow.store.datasets.refs import DATASET
from marrow.store.lineage import Graph, trace
from marrow.store.store import Store
from marrow.store.versions.occurrences import Occurrence, Occurrences, find_occurrences

HOLDS, LEARNED, MEASURED, UNTOUCHED = "holds", "learned", "measured", "untouched"
_STRENGTH = [UNTOUCHED, MEASURED, HOLDS, LEARNED]
_ALL = 1 << 31
_MEASURES = {"evaluate"}  # kinds whose files are figures

_TRAINED = {"train", "tokenizer"}


@dataclass
class _Walk:
    """One ingest's descendants, judged in the order in which they were made."""

    store: Store
    graph: Graph
    names: tuple[str, ...]
    line: int | None
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    train_ids: dict[str, Any] = field(default_factory=dict)  # split artifact -> documents trained on

    def run(self) -> Iterator[dict[str, Any]]:
        """Yield what is to be said of each artifact."""
        for artifact in sorted(self.graph.artifacts.values(), key=lambda one: (one.created_s, one.id)):
            judge = getattr(self, f"_{artifact.kind}", self._later)
            told = {
                "id": artifact.id,
                "kind": artifact.kind,
                "names": list(self.graph.names.get(artifact.id, ())),
                **judge(artifact),
            }
            self.found[artifact.id] = told
            yield told

    def _ingest(self, artifact: Artifact) -> dict[str, Any]:
        from marrow.data.origin import broken_rows, count_rows

        folder = self.store.view(artifact)
        groups = count_rows(folder, self._origin)
        broken = broken_rows(folder, self._origin)
        return {
            "effect": HOLDS if groups or broken else UNTOUCHED,
            "source": artifact.facts["source"],
            "file": ", ".join(self.names),
            "rows": sum(group.rows for group in groups),
            "row_groups": [{"part": g.part, "row_group": g.row_group, "rows": g.rows} for g in groups],
            "broken": [{key: value for key, value in row.items() if key != "text"} for row in broken],
        }

    def _clean(self, artifact: Artifact) -> dict[str, Any]:
        from marrow.data.origin import document_ids, dropped_rows

        folder = self.store.view(artifact)
        ids = document_ids(folder, self._origin)
        dropped = dropped_rows(folder, self._origin)
        rows = sum(self.found[p.artifact_id].get("rows", 0) for p in self._parents(artifact))
        return {
            "effect": HOLDS if len(ids) or dropped else UNTOUCHED,
            "documents": len(ids),
            "document_ids": ids[:100].tolist(),
            "rows_without_document": max(0, rows - len(ids)),
            "dropped": [{key: value for key, value in row.items() if key != "text"} for row in dropped],
        }

    def _split(self, artifact: Artifact) -> dict[str, Any]:
        from marrow.data.origin import split_sides

        train, heldout = split_sides(self.store.view(artifact), self._origin)
        self.train_ids[artifact.id] = train
        effect = HOLDS if len(train) or len(heldout) else UNTOUCHED
        return {"effect": effect, "train_documents": len(train), "heldout_documents": len(heldout)}

    def _tokenizer(self, artifact: Artifact) -> dict[str, Any]:
        count = sum(len(self.train_ids.get(parent.artifact_id, ())) for parent in artifact.parents)
        return {"effect": LEARNED if count else UNTOUCHED, "train_documents": count}

    def _shards(self, artifact: Artifact) -> dict[str, Any]:
        from marrow.data.origin import packed_rows

        ids = [self.train_ids[p.artifact_id] for p in artifact.parents if p.artifact_id in self.train_ids]
        rows, by_shard = packed_rows(self.store.view(artifact), np.concatenate([np.empty(0, np.int64), *ids]))
        self.found[artifact.id] = {}
        told = {"packed_rows": len(rows), "rows": rows[:100].tolist(), "shards": by_shard}
        return {"effect": HOLDS if len(rows) else UNTOUCHED, **told}

    def _train(self, artifact: Artifact) -> dict[str, Any]:
        runs = [self._consumed(artifact, parent) for parent in self._parents(artifact, "shards")]
        times = sum(run["times"] for run in runs)
        own = LEARNED if times else UNTOUCHED
        return {"effect": own, "times_seen": times, "consumed": runs} | self._by_tokenizer(artifact, own)

    def _consumed(self, artifact: Artifact, shards: Parent) -> dict[str, Any]:
        """Say how often a training run consumed rows that hold the file."""
        from marrow.cli.consumption import seen
        from marrow.data.manifest import Manifest
        from marrow.data.origin import packed_rows

        made_of = self.store.get(shards.artifact_id)
        folder = self.store.view(made_of)
        ids = [self.train_ids[p.artifact_id] for p in made_of.parents if p.artifact_id in self.train_ids]
        rows, _ = packed_rows(folder, np.concatenate([np.empty(0, np.int64), *ids]))
        detail = shards.detail
        found = seen(detail, [shard.num_rows for shard in Manifest.read(folder).shards], rows)
        if found is None:  # what was consumed is not known: then all of it may have been
            return {"times": len(rows), "first_position": None, "samples": None, "exact": False}
        place = {"seed": detail["seed"], "samples": list(detail["samples"]), "exact": True}
        return {"times": found.times, "first_position": found.first, **place}

    def _by_tokenizer(self, artifact: Artifact, effect: str) -> dict[str, Any]:
        """Note a model that never saw the file, but whose tokenizer did."""
        counted = any(
            self.found[p.artifact_id]["effect"] == LEARNED for p in self._parents(artifact, "tokenizer")
        )
        return {"tokenizer_learned": counted, "effect": LEARNED if counted else effect}

    def _later(self, artifact: Artifact) -> dict[str, Any]:
        """Judge what comes after: it has of the file what its parents have."""
        effects = {self.found[parent.artifact_id]["effect"] for parent in self._parents(artifact)}
        if artifact.kind in _MEASURES and effects - {UNTOUCHED}:
            return {"effect": MEASURED}
        return {"effect": max(effects, key=_STRENGTH.index, default=UNTOUCHED)}

    def _parents(self, artifact: Artifact, role: str | None = None) -> list[Parent]:
        """Return the parents that this walk met; "shards" are those of a mixture's sources too."""
        return [
            p
            for p in artifact.parents
            if p.artifact_id in self.found and role in (None, p.role.partition(":")[0])
        ]

    @property
    def _origin(self) -> Any:
        from marrow.data.origin import Origin

        return Origin(self.names[0], self.line, self.names[1:])


def trace_file(store: Store, wanted: str, line: int | None = None) -> dict[str, Any]:
    """Tell what became of a source file, or of the row at one of its lines.

    Args: wanted: a path, or the name or last parts of the name under which an ingest knows it. line:
        as documents and rows count it, from 1.
    Returns: plain data: "file", "line", "seen", "matching" (what dataset versions were searched for),
        and "artifacts" in the order of their making, each with its effect.
    Raises: UsageError if the name is not clear; DamagedBlob.
    Cost: one scan over the place columns of every ingest, and of what was made of those that know it.
    """
    found = find_occurrences(store, wanted)
    told: dict[str, dict[str, Any]] = {}
    for ingest in reversed(store.catalog.latest(kind="ingest", limit=_ALL)):
        if names := _names_in(store, ingest, wanted, found):
            walk = _Walk(store, trace(store.catalog, ingest, "descendants"), names, line)
            for one in walk.run():  # an artifact can have several ingests above it
                known = told.setdefault(one["id"], one)
                told[one["id"]] = max(known, one, key=lambda each: _STRENGTH.index(each["effect"]))
    labels: dict[str, list[str]] = {}
    for name in store.catalog.names():
        labels.setdefault(name.artifact_id, []).append(str(name))
    told |= {one.artifact.id: _version(one, labels) for one in found.versions}
    artifacts = list(told.values())
    seen = any(one["effect"] != UNTOUCHED for one in artifacts)
    folder = None if found.folder is None else str(found.folder)
    matching = {"folder": folder, "names": list(found.names), "contents": found.contents}
    return {"file": wanted, "line": line, "seen": seen, "matching": matching, "artifacts": artifacts}


def _names_in(store: Store, ingest: Artifact, wanted: str, found: Occurrences) -> tuple[str, ...]:
    """Return what the rows of an ingest call the file: in those of a dataset version, what that has of it."""
    from marrow.data.origin import find_names, known_names

    folder = store.view(ingest)
    versions = {one.artifact.id: one.files for one in found.versions}
    read = {parent.artifact_id for parent in ingest.parents if parent.role == "source"}
    if not read:
        return tuple(find_names(folder, wanted, str(ingest.facts.get("source", ""))))
    held = {name for version in read for name in versions.get(version, {})}
    return tuple(sorted(held & known_names(folder))) if held else ()


def _version(found: Occurrence, names: Mapping[str, list[str]]) -> dict[str, Any]:
    """Say of a dataset version what it holds."""
    return {
        "id": found.artifact.id,
        "kind": DATASET,
        "names": names.get(found.artifact.id, []),
        "effect": HOLDS,
        "files": list(found.files)[:100],
        "matched": dict(itertools.islice(found.files.items(), 100)),
        "num_files": len(found.files),
    }


def to_forget(told: Mapping[str, Any]) -> dict[str, Any]:
    """Turn what `trace_file` told into the answer to a delete request: what is to be done, in order."""
    actions = [
        {
            "action": _action(one),
            "kind": one["kind"],
            "id": one["id"],
            "names": one["names"],
            "why": why(one),
        }
        for one in told["artifacts"]
        if one["effect"] != UNTOUCHED
    ]
    clear = [
        {"kind": one["kind"], "id": one["id"], "names": one["names"], "why": why(one)}
        for one in told["artifacts"]
        if one["effect"] == UNTOUCHED
    ]
    sources = sorted({one["source"] for one in told["artifacts"] if one["kind"] == "ingest"})
    keys = ("file", "line", "seen", "matching")
    return {key: told[key] for key in keys} | {"sources": sources, "actions": actions, "clear": clear}


def as_text(told: Mapping[str, Any]) -> str:
    """Write what `trace_file` told for a person."""
    lines = [f"{_what(told)}: {'seen' if told['seen'] else 'never seen by this store'}"]
    lines += _matching(told, told["artifacts"])
    lines += [f"  {one['kind']:<10} {_label(one)}  {one['effect']}: {why(one)}" for one in told["artifacts"]]
    return "\n".join(lines)


def forget_as_text(answer: Mapping[str, Any]) -> str:
    """Write the answer to a delete request for a person."""
    if not answer["seen"]:
        return f"{_what(answer)}: never seen by this store; there is nothing to forget"
    lines = [f"to forget {_what(answer)}:", *_matching(answer, answer["actions"])]
    if answer["sources"]:
        lines.append(f"  remove it from the source: {', '.join(answer['sources'])}")
    lines += [
        f"  {one['kind']:<10} {_label(one)}  {one['action']}: {one['why']}" for one in answer["actions"]
    ]
    lines += [f"  {one['kind']:<10} {_label(one)}  nothing to do: {one['why']}" for one in answer["clear"]]
    return "\n".join([*lines, "this is a report: nothing was changed"])


def why(one: Mapping[str, Any]) -> str:
    """Say in words what an artifact has of the file."""
    kind = one["kind"]
    if kind == "ingest":
        parts = {group["part"] for group in one["row_groups"]}
        broken = f"; {len(one['broken'])} broken rows set aside" if one["broken"] else ""
        return f"{one['rows']:,} rows in {len(one['row_groups'])} row groups of {len(parts)} files{broken}"
    if kind == "clean":
        rules = sorted({row["rule"] for row in one["dropped"]})
        dropped = f", {one['rows_without_document']:,} rows dropped" if one["rows_without_document"] else ""
        return f"{one['documents']:,} documents{dropped}{' by ' + ', '.join(rules) if rules else ''}"
    if kind == "split":
        return f"{one['train_documents']:,} documents trained on, {one['heldout_documents']:,} held out"
    if kind == "tokenizer":
        return f"counted {one['train_documents']:,} documents"
    if kind == "shards":
        return f"{one['packed_rows']:,} packed rows in {len(one['shards'])} shards"
    if kind == "train":
        return _why_train(one)
    if kind == DATASET:
        files = list(one["matched"].items())[:3]
        named = [name if how == "name" else f"{name} (the same bytes)" for name, how in files]
        return f"{one['num_files']:,} files: {', '.join(named)}"
    return {
        HOLDS: "made of what holds it",
        LEARNED: "made of a model or tokenizer that learned from it",
        MEASURED: "figures measured on it",
    }.get(one["effect"], "made of nothing that has it")


def _action(one: Mapping[str, Any]) -> str:
    if one["kind"] == DATASET:
        return "commit without it, then remove"
    if one["kind"] in _TRAINED:
        return "train again without it, then remove"
    again = "measure" if one["effect"] == MEASURED else "make"
    return f"{again} again without it, then remove"


def _why_train(one: Mapping[str, Any]) -> str:
    runs = one["consumed"]
    if one["times_seen"] and not all(run["exact"] for run in runs):  # an edge that does not tell
        return f"may have consumed it: {one['times_seen']:,} of the packed rows that it drew from hold it"
    if one["times_seen"]:
        samples = [f"{run['samples'][0]:,} to {run['samples'][1]:,}" for run in runs if run["samples"]]
        first = min((r["first_position"] for r in runs if r["first_position"] is not None), default=None)
        at = "" if first is None else f", first at position {first:,}"
        return f"consumed it {one['times_seen']:,} times in samples {', '.join(samples)}{at}"
    tokenizer = ", but its tokenizer counted it" if one["tokenizer_learned"] else ""
    return f"consumed none of its rows{tokenizer}"


def _matching(told: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what dataset versions were searched for, if any was found."""
    if not any(one["kind"] == DATASET for one in found):
        return []
    looked = told["matching"]
    folder = f" (its name below {looked['folder']})" if looked["folder"] else ""
    names = " or ".join(looked["names"][:4]) + (" ..." if len(looked["names"]) > 4 else "")
    bytes_too = f", and all files with one of the {looked['contents']:,} contents that such a file had"
    return [f"  in dataset versions: files named {names}{folder}{bytes_too}"]


def _label(one: Mapping[str, Any]) -> str:
    return " ".join([one["id"][:12], *one["names"]])


def _what(told: Mapping[str, Any]) -> str:
    return str(told["file"]) if told["line"] is None else f"{told['file']}, line {told['line']}"


def split_place(text: str) -> tuple[str, int | None]:
    """Split FILE or FILE:ROW; a file whose name ends like a row is given by its path."""
    file, colon, row = text.rpartition(":")
    if colon and row.isdigit() and not Path(text).exists():
        return file, int(row)
    return text, None
