"""Counts are exact and samples fair, however the rows were cut into pieces."""

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.data.tally import MAX_SAMPLES, Samples, Tally


def offer(samples: Samples, rule: str, line: int) -> None:
    samples.offer(rule, "a.csv", line, lambda: {"rule": rule, "line": line})


def lines(samples: Samples, rule: str = "short") -> list[int]:
    return [one["line"] for one in samples.rows() if one["rule"] == rule]


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.sampled_from(["short", "digits"]), st.integers(1, 9)), max_size=300),
    cuts=st.lists(st.integers(0, 300), max_size=6),
)
def test_the_tallies_of_pieces_add_up_to_that_of_one_pass(
    rows: list[tuple[str, int]], cuts: list[int]
) -> None:
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    whole, total = Tally(), Tally()
    for low, high in itertools.pairwise(edges):
        part = Tally()
        for line, (rule, size) in enumerate(rows[low:high], low):
            for tally in (whole, part):
                tally.drop(rule, size)
                offer(tally.samples, rule, line)
        total.add(part)
    assert total.documents == whole.documents
    assert total.samples.rows() == whole.samples.rows()
    for rule, counts in whole.documents.items():
        assert counts["documents"] == sum(one == rule for one, _ in rows)
        assert len(lines(whole.samples, rule)) == min(MAX_SAMPLES, counts["documents"])


def test_every_row_has_the_same_chance() -> None:
    """Thirds of 2,000 files of 300 rows: of 40,000 samples each third gets 13,333 +- 94 (one sigma)."""
    thirds = [0, 0, 0]
    for file in range(2_000):
        samples = Samples()
        for line in range(300):
            samples.offer("short", f"{file}.csv", line, partial(dict, line=line))
        for one in samples.rows():
            thirds[one["line"] // 100] += 1
    assert sum(thirds) == 2_000 * MAX_SAMPLES
    assert all(abs(count - sum(thirds) / 3) < 4 * 94 for count in thirds)


def test_samples_come_in_the_order_of_the_rows_and_are_made_only_if_kept() -> None:
    samples, made = Samples(), []

    def make(line: int) -> dict[str, Any]:
        made.append(line)
        return {"line": line}

    for line in range(10_000):
        samples.offer("short", "a.csv", line, partial(make, line))
    kept = [one["line"] for one in samples.rows()]
    assert kept == sorted(kept) and len(kept) == MAX_SAMPLES
    assert kept[-1] > 5_000, "the first rows are not preferred"
    assert len(made) < 400  # MAX_SAMPLES * (1 + ln(10,000 / MAX_SAMPLES)) = 144 are expected


def test_a_rare_rule_has_all_its_rows_beside_a_frequent_one() -> None:
    samples = Samples()
    for line in range(1_000):
        offer(samples, "digits" if line % 500 == 7 else "short", line)
    assert lines(samples, "digits") == [7, 507]


def test_a_row_with_many_findings_is_not_the_sample_by_itself() -> None:
    rows = []
    for file in range(20):
        samples = Samples()
        for line in range(100):
            for _ in range(50 if line == 3 else 1):
                samples.offer("email", f"{file}.csv", line, partial(dict, line=line))
        rows.append(sum(one["line"] == 3 for one in samples.rows()))
    assert 0 < sum(rows) / len(rows) < 12, "50 of 149 findings: about a third of 20"


def test_samples_are_written_as_json_lines(tmp_path: Path) -> None:
    samples = Samples()
    offer(samples, "short", 3)
    samples.write(tmp_path / "dropped.jsonl")
    assert json.loads((tmp_path / "dropped.jsonl").read_text()) == {"rule": "short", "line": 3}
