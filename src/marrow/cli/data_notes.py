"""What a run says of its rows and documents when their step is done: columns, what fell, what only warns.

The files that the lines name lie in the step's artifact: `marrow export ID FOLDER` copies them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from marrow.core.records import Artifact

MOST_COLUMNS = 12


def notes_of(artifact: Artifact) -> list[str]:
    """Return the lines to say of an artifact of a data step; none of any other."""
    say = {"ingest": _of_rows, "clean": _of_documents}.get(artifact.kind)
    return [] if say is None else list(say(artifact.facts, f"of {artifact.id[:12]}"))


def _of_rows(facts: Mapping[str, Any], where: str) -> Iterator[str]:
    yield f"{_count(facts['rows'], 'row')} in {_count(facts['files'], 'file')}"
    if columns := facts.get("columns"):
        shown = [f"{name} {kind}" for name, kind in list(columns.items())[:MOST_COLUMNS]]
        more = f" and {len(columns) - MOST_COLUMNS:,} more" if len(columns) > MOST_COLUMNS else ""
        yield f"columns: {', '.join(shown)}{more}"
    if renamed := facts.get("renamed_columns"):
        yield f"columns renamed: {', '.join(f'{old} to {new}' for old, new in renamed.items())}"
    passed = [f"{count:,} {suffix}" for suffix, count in facts.get("skipped_files", {}).items()]
    if empty := facts.get("empty_files"):
        passed.append(f"{empty:,} empty")
    if passed:
        yield f"files passed over: {', '.join(passed)}"
    if broken := facts.get("broken_rows"):
        yield f"broken rows set aside with their line numbers: {broken:,}, in quarantine.jsonl {where}"


def _of_documents(facts: Mapping[str, Any], where: str) -> Iterator[str]:
    yield f"{_count(facts['documents'], 'document')} from {_count(facts['rows'], 'row')}"
    if dropped := facts.get("dropped"):
        counts = ", ".join(f"{rule} {count['documents']:,}" for rule, count in dropped.items())
        yield f"dropped: {counts}; samples in dropped.jsonl {where}"
    if contaminated := facts.get("contaminated"):
        yield f"documents that say what evaluation texts ask for: {contaminated:,}"
    if lines := facts.get("dropped_lines"):
        yield f"lines dropped: {', '.join(f'{rule} {count:,}' for rule, count in lines.items())}"
    if found := facts.get("pii"):
        counts = ", ".join(f"{kind} {count['found']:,}" for kind, count in found.items())
        yield f"personal data: {counts}; masked samples in pii.jsonl {where}"
    yield from (f"warning: {told}" for told in facts.get("references_left_out", ()))
    if warned := facts.get("expectations", {}).get("warn"):
        total = sum(facts["expectations"].values())
        yield f"warning: {warned:,} of {total:,} expectations do not hold, see expectations.json {where}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
