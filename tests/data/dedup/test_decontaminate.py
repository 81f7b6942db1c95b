import json
import pickle
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError, SourceError
from marrow.data.config import DataRecipe, DecontaminateRecipe, settings_of
from marrow.data.dedup.decontaminate import Evaluations
from marrow.kernels.search.minhash import split_words

WORDS = [f"w{i}" for i in range(3000)]


def recipe(*against: Path | str, **settings) -> DecontaminateRecipe:
    return DecontaminateRecipe(against=tuple(map(str, against)), **settings)


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def grams(text: str, ngram: int) -> set[tuple[str, ...]]:
    """The definition, by Python sets."""
    words = split_words(pc.utf8_lower(text).as_py().encode())
    if not words:
        return set()
    width = min(ngram, len(words))
    return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcd"), max_size=12), min_size=1, max_size=6),
    st.lists(st.lists(st.sampled_from("ABcd"), max_size=14), max_size=6),
    st.integers(4, 7),
    st.integers(1, 3),
)
@example([["a", "b"]], [["A", "B"], ["a", "b", "c"]], 4, 1)
def test_contaminated_are_those_that_python_sets_find(tmp_path_factory, asked, trained, ngram, min_matches):
    path = tmp_path_factory.mktemp("evals") / "a.jsonl"
    write_jsonl(path, [{"q": "x", "question": " ".join(words)} for words in asked])
    texts = [", ".join(words) for words in trained]
    found = Evaluations(recipe(path, ngram=ngram, min_matches=min_matches)).find(pa.array(texts, pa.string()))
    theirs = {("x",)}.union(*(grams(" ".join(words), ngram) for words in asked))
    expected = {i: len(grams(text, ngram) & theirs) for i, text in enumerate(texts)}
    assert {one.text: one.matches for one in found} == {i: n for i, n in expected.items() if n >= min_matches}


def test_the_excerpt_and_the_place_are_those_of_the_longest_stretch(tmp_path):
    rng = random.Random(0)
    asked = [" ".join(rng.choices(WORDS, k=40)) for _ in range(50)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": text} for text in asked])
    noise = " ".join(rng.choices(WORDS, k=200))
    words = asked[30].upper().split()
    document = f"{noise} {'; '.join(asked[3].split()[:14])} {noise} {'  '.join(words[5:35])} {noise}"
    (found,) = Evaluations(recipe(path)).find(pa.array([noise, document]))
    assert found.text == 1
    assert found.evaluation == f"{path}:31"
    assert found.matches == 2 + 18
    assert document[found.start : found.end] == "  ".join(words[5:35])
    assert found.excerpt == "  ".join(words[5:35]).lower()[:200]


def test_case_punctuation_and_line_breaks_hide_nothing_and_other_scripts_are_seen(tmp_path):
    english = "In which year did the first of the two ships leave the harbour of Genoa for good?"
    russian = "В КАКОМ году первый из двух кораблей навсегда покинул гавань Генуи и куда он ушёл потом"
    chinese = "两艘船中的第一艘是在哪一年离开热那亚港的"
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": english}, {"q": [russian, {"deep": chinese}]}])
    texts = [
        english.upper().replace(" ", "\n* "),
        "x " + russian.lower() + " x",
        "前言" + chinese + "。",
        english.replace("Genoa", "Pisa").replace("first", "second"),
    ]
    found = Evaluations(recipe(path)).find(pa.array(texts))
    assert [(one.text, one.evaluation) for one in found] == [
        (0, f"{path}:1"),
        (1, f"{path}:2"),
        (2, f"{path}:2"),
    ]


def test_a_short_evaluation_text_counts_only_where_it_is_the_whole_document(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"answer": "The Treaty of Westphalia"}, {"answer": ""}, {"answer": "?"}]
    )
    texts = ["the treaty of Westphalia!", "It was the Treaty of Westphalia.", "", "?", "the treaty of"]
    assert [one.text for one in Evaluations(recipe(path)).find(pa.array(texts))] == [0]


def test_a_hash_alone_drops_nothing(tmp_path):
    """Two texts forced onto one hash: the words decide."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "a b c d e f"}])
    evaluations = Evaluations(recipe(path, ngram=4))
    text = pa.array(["q r s t"])
    from marrow.kernels.search.minhash import shingle_hashes

    (grams_of_file,) = evaluations._files
    forged = shingle_hashes(text, 4)[0][0]
    grams_of_file.hashes[:] = sorted([*grams_of_file.hashes[:-1].tolist(), int(forged)])
    evaluations._hashes = np.array(grams_of_file.hashes)
    evaluations._filter[:] = True
    assert forged in grams_of_file.hashes
    assert evaluations.find(text) == []


def test_every_format_and_each_file_counts_for_itself(tmp_path):
    long = " ".join(WORDS[:20])
    write_jsonl(tmp_path / "a.jsonl", [{"q": long}])
    pq.write_table(pa.table({"n": [1, 2], "q": ["short", " ".join(WORDS[20:50])]}), tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("n,q\n1," + " ".join(WORDS[50:70]) + "\n2,a\n")
    (tmp_path / "d.txt").write_text(" ".join(WORDS[70:90]))
    evaluations = Evaluations(recipe(tmp_path))
    figures = evaluations.figures()
    assert {Path(name).name: one["ngrams"] for name, one in figures.items()} == {
        "a.jsonl": 8,
        "b.parquet": 19,
        "c.csv": 9,
        "d.txt": 8,
    }
    texts = [" ".join(WORDS[i : i + 15]) for i in (0, 25, 52, 72, 100)]
    found = pickle.loads(pickle.dumps(evaluations)).find(pa.array(texts))
    assert [(one.text, Path(one.evaluation).name.split(":")[0]) for one in found] == [
        (0, "a.jsonl"),
        (1, "b.parquet"),
        (2, "c.csv"),
        (3, "d.txt"),
    ]
    some = Evaluations(recipe(tmp_path / "[ab].*", min_matches=3))
    assert [one.text for one in some.find(pa.array(texts))] == [0, 1]
    both = " ".join(WORDS[:15]) + " and " + " ".join(WORDS[20:40])
    (one,) = some.find(pa.array([both]))
    assert [Path(name).name for name in one.files] == ["a.jsonl", "b.parquet"]
    assert Path(one.evaluation).name == "b.parquet:2" and one.matches == 8


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(SourceError, match=r"data\.decontaminate\.against: no file or folder at .*nowhere"):
        Evaluations(recipe(tmp_path / "nowhere.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"q": "a b"}\n{"q": "c d"}\n{"q": \n')
    with pytest.raises(DataError, match=r"a\.jsonl:3: an evaluation row is broken"):
        Evaluations(recipe(tmp_path / "a.jsonl"))
    write_jsonl(tmp_path / "b.jsonl", [{"n": 1, "q": "?!"}])
    with pytest.raises(DataError, match="no text with words in"):
        Evaluations(recipe(tmp_path / "b.jsonl"))


def test_evaluations_of_another_machine_are_refused():
    with pytest.raises(ValueError, match=r"against = .s3://bucket/a\.jsonl. *: evaluation files must lie"):
        recipe("s3://bucket/a.jsonl")


def test_nothing_is_looked_for_by_default():
    assert Evaluations(DecontaminateRecipe()).find(pa.array(["anything", None])) == []


def test_odd_texts_are_texts(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": " ".join(WORDS[:20])}])
    bad = pa.Array.from_buffers(pa.string(), 1, [None, *pa.array(["é" * 3]).buffers()[1:]])
    texts = pa.concat_arrays([pa.array([None, "", "\x00 \x00", " ".join(WORDS * 100), "a\x00b " * 10]), bad])
    found = Evaluations(recipe(path)).find(texts)
    assert [(one.text, one.matches, one.start) for one in found] == [(3, 8, 0)]


def test_a_change_of_an_evaluation_file_changes_the_step(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "one"}])
    wanted = DataRecipe(decontaminate=recipe(tmp_path / "*.jsonl"))
    before = settings_of(wanted, "clean")
    assert settings_of(wanted, "clean") == before
    write_jsonl(path, [{"q": "two"}])
    assert settings_of(wanted, "clean") != before
    assert settings_of(wanted, "ingest") == settings_of(DataRecipe(), "ingest")
