"""Rows to candidates and documents: rules, personal data and evaluations meet; any engine, equal bytes."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from marrow.data.clean import clean
from marrow.data.config import DataRecipe, DecontaminateRecipe, DedupRecipe
from marrow.data.engine import INLINE, Engine, Processes, Threads
from marrow.data.ingest import ingest
from marrow.data.prepare import pieces_of
from marrow.data.quality_config import LineRecipe, PiiRecipe, QualityRecipe
from marrow.data.tally import MAX_SAMPLES

WORDS = ["".join(letters) for letters in itertools.product("bdklm", "aeiou", "nrst", "aeiou")]


def text_of(seed: int, num_words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def write_posts(path: Path, texts: list[str | None]) -> Path:
    lines = [json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)]
    path.write_text("".join(lines))
    return path


def run(
    folder: Path, source: Path, engine: Engine = INLINE, **settings: Any
) -> tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, Any]]]:
    recipe = DataRecipe(source=str(source), text="{text}", row_group_bytes=1 << 16, **settings)
    rows, out = folder / "rows", folder / "out"
    rows.mkdir(parents=True)
    out.mkdir()
    ingest(recipe, rows)
    facts = clean(recipe, rows, out, engine=engine)
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    return pq.read_table(out / "documents.parquet").to_pylist(), facts, dropped


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """1,200 posts with a bit of everything that goes."""
    texts: list[str | None] = []
    for i in range(1200):
        text = text_of(i % 1100)
        match i % 12:
            case 0:
                text += f" write to user{i}@example.org or +4420718387{i % 100:02}"
            case 1:
                text = "short"
            case 2:
                text += "\naccept all cookies\nlast line here"
            case 3:
                text = "5.25 " * 40
            case 4:
                text = text_of(3)
            case 5:
                text += " 4111 1111 1111 1111"
            case 6:
                text = text_of(i) + " the quick brown fox jumps over the lazy dog near the old river bank"
        texts.append(None if i % 97 == 0 else text)
    (tmp_path / "eval.jsonl").write_text(
        json.dumps({"q": "the quick brown fox jumps over the lazy dog near the old river bank"}) + "\n"
    )
    return write_posts(tmp_path / "posts.jsonl", texts)


def everything(folder: Path) -> dict[str, Any]:
    return {
        "quality": QualityRecipe(lines=LineRecipe(containing=("cookies",))),
        "pii": PiiRecipe(email="replace", phone="count", card="drop"),
        "decontaminate": DecontaminateRecipe(against=(str(folder / "eval.jsonl"),)),
    }


def test_every_row_is_a_document_or_counted_where_it_fell(tmp_path, mixed):
    documents, facts, dropped = run(tmp_path / "a", mixed, **everything(tmp_path))
    fallen = {name: count["documents"] for name, count in facts["dropped"].items()}
    assert facts["documents"] == len(documents)
    assert facts["documents"] + sum(fallen.values()) == facts["rows"] == 1200
    assert set(fallen) >= {
        "no_text", "too_short", "digits", "pii:card", "contaminated", "exact_duplicate",
    }  # fmt: skip
    assert facts["contaminated"] == fallen["contaminated"] > 50
    assert facts["dropped_lines"]["line:containing"]["lines"] > 80
    assert facts["pii"]["email"]["found"] > 80
    assert facts["pii"]["phone"]["documents"] == facts["pii"]["phone"]["found"]
    assert facts["dedup"]["texts"] == facts["documents"] + sum(
        fallen.get(name, 0) for name in ("exact_duplicate", "near_duplicate")
    )
    assert {sample["rule"] for sample in dropped} == set(fallen)
    notes = [json.loads(line) for line in (tmp_path / "a" / "out" / "notes.jsonl").read_text().splitlines()]
    assert {note["rule"] for note in notes} == {"line:containing"}
    assert len(notes) == MAX_SAMPLES
    assert notes[0]["text"] == "accept all cookies"
    assert all(sum(s["rule"] == rule for s in dropped) <= MAX_SAMPLES for rule in fallen)


def test_documents_hold_what_the_rules_left(tmp_path, mixed):
    documents, _, _ = run(tmp_path / "a", mixed, **everything(tmp_path))
    texts = [document["text"] for document in documents]
    assert not any("@example.org" in text or "4111" in text or "cookies" in text for text in texts)
    assert any("[EMAIL] or +44" in text for text in texts)
    assert any(text.endswith("\nlast line here") for text in texts)
    assert all(document["num_bytes"] == len(document["text"].encode()) for document in documents)


def test_no_sample_shows_personal_data(tmp_path, mixed):
    run(tmp_path / "a", mixed, **everything(tmp_path) | {"pii": PiiRecipe(*["replace"] * 8)})
    for name in ("dropped.jsonl", "pii.jsonl", "notes.jsonl"):
        text = (tmp_path / "a" / "out" / name).read_text()
        assert "@example.org" not in text
        assert "4111" not in text
        assert "20718387" not in text
    findings = [json.loads(line) for line in (tmp_path / "a" / "out" / "pii.jsonl").read_text().splitlines()]
    emails = [one for one in findings if one["kind"] == "email"]
    assert {(one["file"], one["action"]) for one in emails} == {("posts.jsonl", "replace")}
    assert all(one["form"].startswith("xxxx") and one["form"].endswith("@xxxxxxx.xxx") for one in emails)
    assert [one["line"] for one in emails] == sorted({one["line"] for one in emails})
    assert max(sum(one["kind"] == kind for one in findings) for kind in ("email", "card")) == MAX_SAMPLES


def test_what_is_only_reported_stays(tmp_path, mixed):
    settings = everything(tmp_path)
    settings["decontaminate"] = DecontaminateRecipe(against=(str(tmp_path / "eval.jsonl"),), action="report")
    documents, facts, dropped = run(tmp_path / "a", mixed, **settings)
    assert "contaminated" not in {*facts["dropped"], *(sample["rule"] for sample in dropped)}
    assert facts["contaminated"] > 50
    assert any("lazy dog" in document["text"] for document in documents)
    notes = [json.loads(line) for line in (tmp_path / "a" / "out" / "notes.jsonl").read_text().splitlines()]
    kept = [note for note in notes if note["rule"] == "contaminated"]
    assert kept[0]["evaluation"].endswith("eval.jsonl:1")


def test_without_rules_texts_and_facts_are_bare(tmp_path):
    source = write_posts(tmp_path / "p.jsonl", [text_of(i) for i in range(20)])
    documents, facts, dropped = run(tmp_path / "a", source, dedup=DedupRecipe(exact=False, near="off"))
    assert [document["text"] for document in documents] == [text_of(i) for i in range(20)]
    assert dropped == []
    assert not {"pii", "dropped_lines", "contaminated", "dedup", "expectations"} & set(facts)
    assert sorted(path.name for path in (tmp_path / "a" / "out").iterdir()) == [
        "documents.parquet",
        "dropped.jsonl",
    ]


@pytest.mark.parametrize("make", [lambda: Threads(2), lambda: Processes(2)], ids=["threads", "processes"])
@pytest.mark.slow
def test_every_engine_gives_the_same_bytes(tmp_path, mixed, make):
    settings = everything(tmp_path)
    _, facts, _ = run(tmp_path / "inline", mixed, **settings)
    with make() as engine:
        _, same, _ = run(tmp_path / "engine", mixed, engine, **settings)
    assert same == facts
    names = sorted(path.name for path in (tmp_path / "inline" / "out").iterdir())
    assert names == ["documents.parquet", "dropped.jsonl", "notes.jsonl", "pii.jsonl"]
    for name in names:
        one, other = ((tmp_path / kind / "out" / name).read_bytes() for kind in ("inline", "engine"))
        assert one == other, name


def test_pieces_are_the_row_groups_in_order(tmp_path, mixed):
    run(tmp_path / "a", mixed, dedup=DedupRecipe(near="off"))
    pieces = pieces_of(tmp_path / "a" / "rows")
    assert len(pieces) > 3
    assert [piece.row_group for piece in pieces] == list(range(len(pieces)))


def test_a_text_of_lines_that_all_go_is_too_short(tmp_path):
    source = write_posts(tmp_path / "p.jsonl", ["cookies here\ncookies there", text_of(1)])
    lines = LineRecipe(containing=("cookies",))
    documents, facts, _ = run(tmp_path / "a", source, quality=QualityRecipe(lines=lines))
    assert len(documents) == 1
    assert facts["dropped"]["too_short"] == {"documents": 1, "bytes": 0}


def test_an_evaluation_file_that_changed_is_read_again(tmp_path):
    source = write_posts(tmp_path / "p.jsonl", [text_of(1), text_of(2)])
    evaluation = tmp_path / "e.jsonl"
    recipe = DecontaminateRecipe(against=(str(evaluation),))
    for i in (1, 2):
        evaluation.write_text(json.dumps({"q": text_of(i)}) + "\n")
        documents, _, _ = run(tmp_path / str(i), source, decontaminate=recipe)
        assert [document["text"] for document in documents] == [text_of(3 - i)]
