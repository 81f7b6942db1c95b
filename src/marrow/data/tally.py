"""What rules did to documents: exact counts, and of each rule a fair sample of what it did.

The sample of a rule is the rows whose hashes are the smallest, so every row has the same chance and
which ones are kept depends on the rows alone: pieces may be tallied anywhere, in any number, and
added in their order. Source: bottom-k sketches (Cohen and Kaplan 2007).
"""

import heapq
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_intdigest

from marrow.core.errors import explain_os_errors
from marrow.core.files import atomic_file

MAX_SAMPLES = 20

Counts = dict[str, dict[str, int]]


class Samples:
    """At most MAX_SAMPLES of each rule, as they came; a sample is any dict that JSON can hold."""

    def __init__(self) -> None:
        self._kept: dict[str, list[tuple[int, int, dict[str, Any]]]] = {}  # heaps, the largest hash first
        self._last: dict[str, tuple[str, int]] = {}  # by rule: its last row, and how often it met it
        self._next = 0

    def offer(self, rule: str, file: str, line: int, make: Callable[[], dict[str, Any]]) -> None:
        """Keep what `make` gives if the row is of the rule's sample. Cost: 0.5 us if it is not."""
        row = f"{file}:{line}"
        last, times = self._last.get(rule, ("", 0))
        times = times + 1 if row == last else 0
        self._last[rule] = row, times
        # The times are in the hash, or a row with a hundred findings would be a sample by itself.
        rank = xxh3_64_intdigest(f"{row}:{times}".encode("utf-8", "surrogatepass"))
        if self._wants(rule, rank):
            self._keep(rule, rank, make())

    def add(self, other: "Samples") -> None:
        """Add the samples of the piece that comes next."""
        for _, rank, rule, sample in other._in_order():
            if self._wants(rule, rank):
                self._keep(rule, rank, sample)

    def rows(self) -> list[dict[str, Any]]:
        """Return the samples of all rules, in the order in which they were offered."""
        return [sample for _, _, _, sample in self._in_order()]

    def write(self, path: Path) -> None:
        """Write JSON lines."""
        with explain_os_errors("write the samples", path), atomic_file(path, "w") as file:
            for sample in self.rows():
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")

    def _wants(self, rule: str, rank: int) -> bool:
        kept = self._kept.get(rule, [])
        return len(kept) < MAX_SAMPLES or rank < -kept[0][0]

    def _keep(self, rule: str, rank: int, sample: dict[str, Any]) -> None:
        kept = self._kept.setdefault(rule, [])
        entry = (-rank, self._next, sample)
        if len(kept) < MAX_SAMPLES:
            heapq.heappush(kept, entry)
        else:
            heapq.heapreplace(kept, entry)
        self._next += 1

    def _in_order(self) -> list[tuple[int, int, str, dict[str, Any]]]:
        found = [
            (number, -rank, rule, sample)
            for rule, kept in self._kept.items()
            for rank, number, sample in kept
        ]
        return sorted(found, key=lambda one: one[0])


@dataclass(slots=True)
class Tally:
    """What the rules did in a piece, or in all of them.

    documents: dropped, by rule. lines: dropped from texts that stayed or not. found: personal data,
    by kind. samples go to dropped.jsonl, findings to pii.jsonl, and notes, of lines that went and of
    contamination that is only reported, to notes.jsonl.
    """

    documents: Counts = field(default_factory=dict)
    lines: Counts = field(default_factory=dict)
    found: Counts = field(default_factory=dict)
    contaminated: int = 0
    samples: Samples = field(default_factory=Samples)
    findings: Samples = field(default_factory=Samples)
    notes: Samples = field(default_factory=Samples)

    def drop(self, rule: str, num_bytes: int, count: int = 1) -> None:
        """Count dropped documents."""
        add_counts(self.documents, rule, {"documents": count, "bytes": num_bytes})

    def add(self, other: "Tally") -> None:
        """Add the tally of the piece that comes next."""
        for mine, theirs in (
            (self.documents, other.documents),
            (self.lines, other.lines),
            (self.found, other.found),
        ):
            for rule, counts in theirs.items():
                add_counts(mine, rule, counts)
        self.contaminated += other.contaminated
        self.samples.add(other.samples)
        self.findings.add(other.findings)
        self.notes.add(other.notes)


def add_counts(table: Counts, rule: str, counts: dict[str, int]) -> None:
    """Add some counts to those of a rule."""
    mine = table.setdefault(rule, {})
    for name, count in counts.items():
        mine[name] = mine.get(name, 0) + count
