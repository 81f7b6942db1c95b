"""Rows to documents: every drop is counted, every document is found again, duplicates go."""

import itertools
import json
import linecache
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marrow.core.errors import DataError
from marrow.data.clean import DOCUMENT_SCHEMA, clean
from marrow.data.config import DataRecipe, DedupRecipe
from marrow.data.ingest import ingest
from marrow.data.quality_config import QualityRecipe
from marrow.data.sources.stdlib import stdlib_folder

WORDS = ["".join(letters) for letters in itertools.product("bdklmnrst", "aeiou", "bdklmnrst", "aeiou")]


def text_of(seed: int, num_words: int = 80) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def run(tmp_path: Path, source: Path | str, **settings: Any) -> tuple[pa.Table, dict[str, Any], list[dict]]:
    recipe = DataRecipe(source=str(source), **settings)
    number = len(list(tmp_path.glob("clean-*")))
    rows, out = tmp_path / f"rows-{number}", tmp_path / f"clean-{number}"
    rows.mkdir()
    out.mkdir()
    ingest(recipe, rows)
    facts = clean(recipe, rows, out)
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    return pq.read_table(out / "documents.parquet"), facts, dropped


@pytest.fixture(scope="module")
def documentation(stdlib_rows, tmp_path_factory) -> tuple[pa.Table, dict[str, Any]]:
    out = tmp_path_factory.mktemp("clean")
    facts = clean(DataRecipe(), stdlib_rows, out)
    return pq.read_table(out / "documents.parquet"), facts


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    """40 posts, then an exact copy, a near copy, a short one, one of digits, one without text."""
    path = tmp_path / "posts.jsonl"
    texts: list[str | None] = [text_of(i) for i in range(40)]
    near = text_of(7).split()
    near[40] = "changed"
    texts += [f"{text_of(3)}\n", " ".join(near), "short", "3.14 " * 20, None]
    with path.open("w") as file:
        for i, text in enumerate(texts):
            file.write(json.dumps({"id": i, "text": text, "author": f"author {i % 8}"}) + "\n")
    return path


def test_each_drop_is_counted_under_its_rule_with_a_sample(tmp_path, posts):
    table, facts, dropped = run(tmp_path, posts, text="{text}", dedup=DedupRecipe(similarity=0.7))
    assert {name: count["documents"] for name, count in facts["dropped"].items()} == {
        "exact_duplicate": 1, "near_duplicate": 1, "too_short": 1, "digits": 1, "no_text": 1,
    }  # fmt: skip
    assert facts["documents"] == table.num_rows == 40
    assert facts["documents"] + sum(c["documents"] for c in facts["dropped"].values()) == facts["rows"] == 45
    places = {d["rule"]: (d["line"], d.get("of")) for d in dropped}
    assert places["exact_duplicate"] == (41, "posts.jsonl:4")
    assert places["near_duplicate"] == (42, "posts.jsonl:8")
    assert places["no_text"] == (45, None)


def test_near_duplicates_may_be_kept_in_one_cluster_or_not_looked_for(tmp_path, posts):
    kept, _, _ = run(tmp_path, posts, text="{text}", dedup=DedupRecipe(near="keep", similarity=0.7))
    assert kept.num_rows == 41
    assert kept["cluster"].to_pylist()[-1] == 7
    assert kept["cluster"].to_pylist()[:40] == list(range(40))
    off, facts, _ = run(tmp_path, posts, text="{text}", dedup=DedupRecipe(near="off", exact=False))
    assert off["cluster"].to_pylist() == list(range(42))
    assert facts["clusters_of_several"] == 0


def test_every_document_is_the_row_that_it_names(tmp_path, posts):
    table, _, _ = run(tmp_path, posts, text="{author}: {text}", row_group_bytes=1 << 16)
    assert table.schema == DOCUMENT_SCHEMA
    lines = posts.read_text().splitlines()
    for document in table.to_pylist():
        part = pq.ParquetFile(tmp_path / "rows-0" / document["source_part"])
        row = part.read_row_group(document["row_group"]).slice(document["row"], 1).to_pylist()[0]
        assert document["text"] == f"{row['author']}: {row['text']}"
        assert json.loads(lines[document["line"] - 1])["id"] == row["id"]
        assert document["file"] == "posts.jsonl"
        assert document["num_bytes"] == len(document["text"].encode())
    assert table["document_id"].to_pylist() == list(range(table.num_rows))


def test_a_row_is_found_again_in_a_later_row_group_and_rows_file(tmp_path, monkeypatch):
    monkeypatch.setattr("marrow.data.ingest.MAX_FILE_BYTES", 1 << 18)
    path = tmp_path / "a.csv"
    path.write_text("n,text\n" + "".join(f"{i},{text_of(i)}\n" for i in range(4000)))
    table, _, _ = run(tmp_path, path, row_group_bytes=1 << 16, dedup=DedupRecipe(near="off"))
    assert table["source_part"].unique().to_pylist()[-1] == "rows-00001.parquet"
    assert max(table["row_group"].to_pylist()) > 1
    for document in table.to_pylist()[::97]:
        part = pq.ParquetFile(tmp_path / "rows-0" / document["source_part"])
        row = part.read_row_group(document["row_group"]).slice(document["row"], 1).to_pylist()[0]
        assert row["text"] == document["text"]
        assert row["n"] == document["document_id"] == document["line"] - 2


def test_the_group_is_a_column_or_the_file_or_the_row(tmp_path, posts):
    by_author, _, _ = run(tmp_path, posts, group="author")
    assert set(by_author["group"].to_pylist()) == {f"author {i}" for i in range(8)}
    by_row, facts, _ = run(tmp_path, posts)
    assert facts["groups"] == facts["documents"] == len(set(by_row["group"].to_pylist()))
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02d}.csv").write_text(f"t\n{text_of(2 * i)}\n{text_of(2 * i + 1)}\n")
    by_file, _, _ = run(tmp_path, folder)
    assert by_file["group"].to_pylist() == [f"{i // 2:02d}.csv" for i in range(40)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"text": "{txet}"}, "did you mean 'text'"),
        ({"group": "autor"}, "did you mean 'author'"),
        ({"quality": QualityRecipe(min_chars=10_000)}, "no document is left of 45 rows"),
    ],
)
def test_what_cannot_be_made_is_an_error_with_a_hint(tmp_path, posts, settings, words):
    with pytest.raises(DataError) as caught:
        run(tmp_path, posts, **settings)
    assert words in str(caught.value)
    assert caught.value.hint


def test_a_folder_without_rows_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no rows-\*.parquet"):
        clean(DataRecipe(), tmp_path, tmp_path)


@pytest.mark.slow
def test_the_documentation_holds_every_kept_byte_once(documentation, stdlib_rows):
    table, facts = documentation
    rows = pq.read_table(stdlib_rows / "rows-00000.parquet", columns=["source", "file"])
    sources = {text for text in rows["source"].to_pylist() if text is not None}
    texts = table["text"].to_pylist()
    assert set(texts) <= sources
    assert len(set(texts)) == len(texts)
    assert facts["bytes"] == sum(table["num_bytes"].to_pylist()) > 8e6
    assert facts["dropped"]["table"]["bytes"] > 5e5
    assert "no_text" not in facts["dropped"]


@pytest.mark.slow
def test_the_documentation_is_found_again_at_file_and_line(documentation):
    table, _ = documentation
    for document in table.to_pylist()[::40]:
        first = document["text"].split("\n")[0]
        line = linecache.getline(str(stdlib_folder() / document["file"]), document["line"])
        if document["group"].startswith("topics."):
            assert document["group"].removeprefix("topics.") in line
        else:
            assert line.rstrip("\n") == first


def test_two_runs_give_equal_bytes(tmp_path, posts):
    run(tmp_path, posts)
    run(tmp_path, posts)
    for name in ("documents.parquet", "dropped.jsonl"):
        assert (tmp_path / "clean-0" / name).read_bytes() == (tmp_path / "clean-1" / name).read_bytes()
