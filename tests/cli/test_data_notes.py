"""What a run says of the rows: nothing that fell or only warns goes unsaid, and nothing else is said."""

from pathlib import Path
from typing import Any

import pytest
from marrow_process import Marrow, write_csv

from marrow.cli.data_notes import MOST_COLUMNS, notes_of
from marrow.core.records import Artifact


def artifact(kind: str, **facts: Any) -> Artifact:
    return Artifact("a1b2" * 16, kind, "key", (), (), facts, "1", "hash", {}, 0.0)


def test_rows_tell_columns_with_their_types_and_what_was_passed_over() -> None:
    said = notes_of(
        artifact(
            "ingest",
            rows=1000,
            files=1,
            columns={"id": "int64", "title": "string"},
            renamed_columns={"_file": "file_original"},
            skipped_files={".xyz": 2},
            empty_files=1,
            broken_rows=3,
        )
    )
    assert said == [
        "1,000 rows in 1 file",
        "columns: id int64, title string",
        "columns renamed: _file to file_original",
        "files passed over: 2 .xyz, 1 empty",
        "broken rows set aside with their line numbers: 3, in quarantine.jsonl of a1b2a1b2a1b2",
    ]


def test_many_columns_are_cut_and_counted() -> None:
    columns = {f"c{i}": "int64" for i in range(MOST_COLUMNS + 5)}
    assert notes_of(artifact("ingest", rows=1, files=2, columns=columns))[1].endswith(" and 5 more")


def test_documents_tell_every_rule_that_dropped_some_and_expectations_that_only_warn() -> None:
    said = notes_of(
        artifact(
            "clean",
            rows=10,
            documents=1,
            dropped={"too_short": {"documents": 9, "bytes": 90}},
            contaminated=4,
            dropped_lines={"terminal": 7},
            pii={"email": {"found": 5, "documents": 2}},
            expectations={"pass": 2, "warn": 1, "fail": 0},
        )
    )
    assert said == [
        "1 document from 10 rows",
        "dropped: too_short 9; samples in dropped.jsonl of a1b2a1b2a1b2",
        "documents that say what evaluation texts ask for: 4",
        "lines dropped: terminal 7",
        "personal data: email 5; masked samples in pii.jsonl of a1b2a1b2a1b2",
        "warning: 1 of 3 expectations do not hold, see expectations.json of a1b2a1b2a1b2",
    ]


def test_where_nothing_fell_only_the_counts_are_said() -> None:
    assert notes_of(artifact("clean", rows=3, documents=3, dropped={})) == ["3 documents from 3 rows"]
    assert notes_of(artifact("train", rows=3)) == []


@pytest.mark.slow
def test_a_run_says_them(marrow: Marrow, tiny: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "notes.csv", 400)
    settings = ["data.source=notes.csv", "data.expect.title.max_length=3", "data.expect.title.level=warn"]
    told = marrow("run", tiny, *(part for one in settings for part in ("--set", one)))
    assert told.returncode == 0, told.stderr
    for words in ("400 rows in 1 file", "columns: body string, title string", "documents from 400 rows"):
        assert words in told.stderr
    assert "warning: 1 of 1 expectations do not hold" in told.stderr
