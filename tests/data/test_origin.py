"""Where a source file went: each step's answer against the whole tables, read by hand."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marrow.core.errors import UsageError
from marrow.data.clean import clean
from marrow.data.config import DataRecipe
from marrow.data.ingest import ingest
from marrow.data.origin import (
    Origin,
    broken_rows,
    count_rows,
    document_ids,
    dropped_rows,
    find_names,
    packed_rows,
    split_sides,
)
from marrow.data.shards import train_tokenizer, write_shards
from marrow.data.shards_config import ShardsRecipe
from marrow.data.split import split
from marrow.text.config import TokenizerRecipe

WORDS = [f"{a}{b}{c}" for a in ("lo", "ma", "ri", "te", "su") for b in ("n", "r", "st") for c in ("a", "ed")]


def sentence(file: int, row: int) -> str:
    draw = random.Random(1000 * file + row)
    return f"The {' and the '.join(draw.choice(WORDS) + ' ' + draw.choice(WORDS) for _ in range(12))}."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three files, one of them with a copy and a broken row, through all steps."""
    root = tmp_path_factory.mktemp("origin")
    source = root / "source"
    (source / "deep").mkdir(parents=True)
    for number, name in enumerate(["a.jsonl", "b.jsonl", "deep/c.jsonl"]):
        rows = [{"text": sentence(number, row)} for row in range(60)]
        if number == 1:
            rows[10] = rows[9]  # an exact duplicate
        lines = [json.dumps(row) for row in rows]
        if number == 1:
            lines[20] = '{"text": "broken'
        (source / name).write_text("\n".join(lines) + "\n")
    folders = {name: root / name for name in ("rows", "documents", "split", "tokenizer", "shards")}
    for folder in folders.values():
        folder.mkdir()
    recipe = DataRecipe(source=str(source), row_group_bytes=1 << 13)
    ingest(recipe, folders["rows"])
    clean(recipe, folders["rows"], folders["documents"])
    recipe = replace(recipe, split=replace(recipe.split, heldout_share=0.1))
    split(recipe, folders["documents"], folders["split"])
    train_tokenizer(TokenizerRecipe(vocab_size=400), folders["split"], folders["tokenizer"])
    shards = ShardsRecipe(context=32, shard_bytes=5000)
    write_shards(shards, folders["split"], folders["tokenizer"], folders["shards"])
    return folders | {"source": source}


def table(*paths: Path) -> list[dict[str, Any]]:
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


ORIGINS = [Origin("a.jsonl"), Origin("b.jsonl"), Origin("deep/c.jsonl"), Origin("b.jsonl", 8), Origin("no")]


@pytest.mark.parametrize("origin", ORIGINS)
def test_each_step_says_what_its_tables_hold(made: dict[str, Path], origin: Origin) -> None:
    def wanted(file: str, line: int) -> bool:
        return file == origin.file and origin.line in (None, line)

    rows = table(*sorted(made["rows"].glob("rows-*.parquet")))
    expected = sum(wanted(row["_file"], row["_row"]) for row in rows)
    groups = count_rows(made["rows"], origin)
    assert sum(group.rows for group in groups) == expected
    with pq.ParquetFile(made["rows"] / "rows-00000.parquet") as file:
        assert file.num_row_groups > 1
        for group in groups:
            part = file.read_row_group(group.row_group).to_pylist()
            assert group.rows == sum(wanted(row["_file"], row["_row"]) for row in part)

    documents = table(made["documents"] / "documents.parquet")
    ids = [row["document_id"] for row in documents if wanted(row["file"], row["line"])]
    assert document_ids(made["documents"], origin).tolist() == ids
    sides = [
        [row["document_id"] for row in table(made["split"] / f"{side}.parquet") if row["document_id"] in ids]
        for side in ("train", "heldout")
    ]
    train, heldout = split_sides(made["split"], origin)
    assert [train.tolist(), heldout.tolist()] == sides
    assert len(sides[0]) + len(sides[1]) == len(ids)

    tables = [pa.ipc.open_file(path).read_all() for path in sorted(made["shards"].glob("*.arrow"))]
    packed = [row["document_ids"] for part in tables for row in part.to_pylist()]
    held = [number for number, owners in enumerate(packed) if set(owners) & set(sides[0])]
    found, by_shard = packed_rows(made["shards"], train)
    assert found.tolist() == held
    assert sum(by_shard.values()) == len(held)
    assert len(tables) > 2, "so that rows are counted over several shards"


def test_what_was_dropped_or_broken_is_named(made: dict[str, Path]) -> None:
    (broken,) = broken_rows(made["rows"], Origin("b.jsonl"))
    assert broken["line"] == 21
    assert broken_rows(made["rows"], Origin("a.jsonl")) == []
    (dropped,) = dropped_rows(made["documents"], Origin("b.jsonl", 11))
    assert (dropped["rule"], dropped["of"]) == ("exact_duplicate", "b.jsonl:10")
    assert dropped_rows(made["documents"], Origin("b.jsonl", 12)) == []


def test_no_documents_are_in_no_packed_row(made: dict[str, Path]) -> None:
    rows, by_shard = packed_rows(made["shards"], np.empty(0, np.int64))
    assert len(rows) == 0 and by_shard == {}


def test_a_file_is_found_by_path_by_name_and_by_its_end(made: dict[str, Path], tmp_path: Path) -> None:
    source = str(made["source"])
    for wanted in ("deep/c.jsonl", "c.jsonl", f"{source}/deep/c.jsonl"):
        assert find_names(made["rows"], wanted, source) == ["deep/c.jsonl"]
    for wanted in ("jsonl", "x.jsonl", str(tmp_path / "c.jsonl"), "", "deep"):
        assert find_names(made["rows"], wanted, source) == []


def test_a_name_that_may_be_several_files_is_refused(tmp_path: Path, read_rows: Callable[..., Any]) -> None:
    source = tmp_path / "source"
    for name in ("one/x.txt", "two/x.txt"):
        (source / name).parent.mkdir(parents=True)
        (source / name).write_text(f"text of {name}\n")
    out = tmp_path / "rows"
    out.mkdir()
    ingest(DataRecipe(source=str(source)), out)
    with pytest.raises(UsageError, match=r"may be any of 2 files: one/x\.txt, two/x\.txt"):
        find_names(out, "x.txt", str(source))
    assert find_names(out, "two/x.txt", str(source)) == ["two/x.txt"]


@pytest.mark.slow
def test_the_interpreters_own_documentation_is_found_too(stdlib_rows: Path) -> None:
    (name,) = find_names(stdlib_rows, "textwrap.py", "python")
    assert sum(group.rows for group in count_rows(stdlib_rows, Origin(name))) > 5
