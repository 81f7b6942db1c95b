"""Adding tallies: counts never get lost, samples depend on the rows alone, and files hold any text."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from marrow.core.errors import SourceError
from marrow.data.tally import MAX_SAMPLES, Counts, Samples, Tally, add_counts

COUNTS = st.dictionaries(
    st.sampled_from(["short", "email"]),
    st.dictionaries(st.sampled_from(["documents", "bytes", "lines"]), st.integers(0, 10**15), max_size=3),
    max_size=2,
)


@given(st.lists(COUNTS, max_size=5))
def test_counts_of_pieces_add_up_whatever_each_lacks(pieces: list[Counts]) -> None:
    total = Tally()
    for piece in pieces:
        part = Tally(documents=piece, lines=piece, found=piece, contaminated=len(piece))
        total.add(part)
    for table in (total.documents, total.lines, total.found):
        assert set(table) == {rule for piece in pieces for rule in piece}
        for rule, counts in table.items():
            for name, count in counts.items():
                assert count == sum(piece.get(rule, {}).get(name, 0) for piece in pieces)
    assert total.contaminated == sum(map(len, pieces))


def test_adding_leaves_the_piece_as_it_was() -> None:
    piece, total = Tally(), Tally()
    piece.drop("short", 7)
    piece.samples.offer("short", "a", 1, lambda: {"line": 1})
    for _ in range(3):
        total.add(piece)
    assert piece.documents == {"short": {"documents": 1, "bytes": 7}} and len(piece.samples.rows()) == 1
    assert total.documents == {"short": {"documents": 3, "bytes": 21}}


@given(st.integers(0, 99), st.integers(1, 200))
@settings(max_examples=30)
def test_the_sample_is_the_rows_of_the_least_hashes(seed: int, num_rows: int) -> None:
    """The definition, by sorting all of them; the order in which pieces are added changes only the order."""
    lines = random.Random(seed).sample(range(10_000), num_rows)
    expected = sorted(lines, key=lambda line: xxh3_64_intdigest(f"a.csv:{line}:0".encode()))[:MAX_SAMPLES]
    parts = [Samples() for _ in range(3)]
    for i, line in enumerate(lines):
        parts[i % 3].offer("short", "a.csv", line, lambda line=line: {"line": line})  # type: ignore[misc]
    for order in ((0, 1, 2), (2, 0, 1)):
        total = Samples()
        for number in order:
            total.add(parts[number])
        assert sorted(row["line"] for row in total.rows()) == sorted(expected)


@pytest.mark.parametrize("name", ["ü.csv", "a\nb.csv", "broken \udcff name.csv", ""])
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    samples = Samples()
    samples.offer("short", name, 1, lambda: {"line": 1, "text": 'größer\n"quoted"\u2028'})
    samples.write(tmp_path / "s.jsonl")
    (line,) = (tmp_path / "s.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(line) == {"line": 1, "text": 'größer\n"quoted"\u2028'}


def test_no_samples_are_an_empty_file_and_no_place_is_an_error(tmp_path: Path) -> None:
    Samples().write(tmp_path / "s.jsonl")
    assert (tmp_path / "s.jsonl").read_bytes() == b""
    with pytest.raises(SourceError, match="cannot write the samples") as caught:
        Samples().write(tmp_path / "s.jsonl" / "below")
    assert caught.value.hint


def test_a_count_of_nothing_names_the_rule() -> None:
    table: Counts = {}
    add_counts(table, "short", {})
    add_counts(table, "short", {"documents": 0})
    assert table == {"short": {"documents": 0}}
