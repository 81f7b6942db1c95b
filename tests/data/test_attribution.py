import inspect
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError
from marrow.data import attribution
from marrow.data.attribution import NGRAM, Match, nearest_documents
from marrow.text.tokenizer import Tokenizer

SOURCE = inspect.getsource(textwrap)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([SOURCE], 700)


def write_split(
    folder: Path,
    texts: Sequence[str],
    *,
    files: Sequence[str] | None = None,
    line: int = 1,
    group_rows: int = 2,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "document_id": pa.array(range(10, 10 + len(texts)), pa.int64()),
            "text": pa.array(texts, pa.string()),
            "file": files or [f"file{i}.py" for i in range(len(texts))],
            "line": pa.array([line] * len(texts), pa.int64()),
            "group": [f"group{i}" for i in range(len(texts))],
        }
    )
    pq.write_table(table, folder / "train.parquet", row_group_size=group_rows)
    return folder


def longest_by_hand(a: list[int], b: list[int]) -> int:
    """The longest common run by dynamic programming, one pair of texts at a time."""
    best, row = 0, [0] * (len(b) + 1)
    for x in a:
        row = [0, *(row[j] + 1 if x == y else 0 for j, y in enumerate(b))]
        best = max(best, *row)
    return best


def overlap_by_hand(text: list[int], document: list[int]) -> float:
    def ngrams(ids: list[int]) -> set[tuple[int, ...]]:
        return {tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)}

    return len(ngrams(text) & ngrams(document)) / len(ngrams(text))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_runs_are_those_found_by_hand(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, data: st.DataObject
) -> None:
    words = st.lists(st.sampled_from([" self", " return", "\n", "x", " = ", "é", "def "]), max_size=14)
    documents = data.draw(st.lists(words.map("".join), min_size=1, max_size=6))
    texts = data.draw(st.lists(words.map("".join), min_size=1, max_size=4))
    split = write_split(tmp_path_factory.mktemp("split"), documents)
    found = nearest_documents(split, tokenizer, texts, top=len(documents))
    assert len(found) == len(texts)
    for text, matches in zip(texts, found, strict=True):
        ids = tokenizer.encode(text)
        by_hand = {}
        for i, document in enumerate(documents):
            other = tokenizer.encode(document)
            if (longest := longest_by_hand(ids, other)) >= NGRAM:
                by_hand[10 + i] = (longest, pytest.approx(overlap_by_hand(ids, other)))
        assert {m.document_id: (m.num_shared_tokens, m.overlap) for m in matches} == by_hand
        order = [(-m.num_shared_tokens, -m.overlap) for m in matches]
        assert order == sorted(order)
        for match in matches:
            assert match.span_text in text
            assert match.span_text in documents[match.document_id - 10]
            run = ids[match.text_start : match.text_start + match.num_shared_tokens]
            assert tokenizer.decode(run) == match.span_text


def test_a_copied_passage_is_found_with_its_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    split = write_split(tmp_path, ["import os\n" * 30, SOURCE, "x = 1\n" * 30], line=1)
    lines = SOURCE.split("\n")
    number = next(i for i, line in enumerate(lines, 1) if "def _split_chunks" in line)
    passage = "\n".join(lines[number - 1 : number + 3])
    [[match]] = nearest_documents(split, tokenizer, [f"zz qq\n{passage}"])
    assert (match.document_id, match.file, match.group) == (11, "file1.py", "group1")
    assert match.span_text.strip().startswith("def _split_chunks")
    assert match.line == number
    assert match.overlap > 0.7


@pytest.mark.parametrize("before", ["", "a = 1\n", "\n\n\n", "é\n中\n"])
def test_the_line_counts_from_where_the_document_begins(
    tmp_path: Path, tokenizer: Tokenizer, before: str
) -> None:
    passage = "class TextWrapper:\n    return self\n"
    split = write_split(tmp_path, [before + passage], line=40)
    [[match]] = nearest_documents(split, tokenizer, [passage])
    assert match.line == 40 + before.count("\n")


@pytest.mark.parametrize(("file", "line"), [("a.csv", 7), ("a.JSONL.gz", 7), ("b.parquet", 7), ("a.py", 9)])
def test_a_row_of_a_table_stands_on_one_line(
    tmp_path: Path, tokenizer: Tokenizer, file: str, line: int
) -> None:
    passage = "return self.width - indent"
    split = write_split(tmp_path, ["title\n\n" + passage], files=[file], line=7)
    [[match]] = nearest_documents(split, tokenizer, [passage])
    assert (match.file, match.line) == (file, line)


def test_a_text_without_anything_in_common_has_no_match(tmp_path: Path, tokenizer: Tokenizer) -> None:
    split = write_split(tmp_path, ["aaa bbb ccc", ""])
    assert nearest_documents(split, tokenizer, ["☃☃☃☃☃☃", "", "a"]) == [[], [], []]
    assert nearest_documents(split, tokenizer, []) == []


def test_runs_do_not_cross_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    passage = "return self.width - indent + subsequent"
    ids = tokenizer.encode(passage)
    half = len(ids) // 2
    split = write_split(tmp_path, [tokenizer.decode(ids[:half]), tokenizer.decode(ids[half:])])
    for match in nearest_documents(split, tokenizer, [passage], top=5)[0]:
        assert match.num_shared_tokens <= max(half, len(ids) - half)


def test_a_hash_that_collides_claims_nothing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = write_split(tmp_path, [SOURCE])
    honest = nearest_documents(split, tokenizer, [SOURCE[500:900], "☃" * 9])
    monkeypatch.setattr(attribution, "_hash", lambda tokens: (tokens % 7).astype("uint64") << 61)
    colliding = nearest_documents(split, tokenizer, [SOURCE[500:900], "☃" * 9])
    assert colliding[1] == honest[1] == []
    assert [m.num_shared_tokens for m in colliding[0]] <= [m.num_shared_tokens for m in honest[0]]
    assert colliding[0][0].span_text in SOURCE


def test_a_looping_text_costs_bounded_work(tmp_path: Path, tokenizer: Tokenizer) -> None:
    loop = "    return None\n" * 400
    split = write_split(tmp_path, [loop] * 8)
    start_s = time.process_time()
    [[match]] = nearest_documents(split, tokenizer, [loop])
    # If every repeat were followed up, 8 x 1.4 M hits and more would take 20 seconds.
    assert time.process_time() - start_s < 5
    tokens_a_round = len(tokenizer.encode(loop)) // 400
    assert match.num_shared_tokens >= 16 * tokens_a_round, "the rounds that are followed up"


def test_the_best_of_all_row_groups_wins(tmp_path: Path, tokenizer: Tokenizer) -> None:
    passage = SOURCE[1000:1400]
    parts = [passage[:100], passage[:200], passage, passage[:300], passage[:50]]
    split = write_split(tmp_path, parts, group_rows=1)
    [matches] = nearest_documents(split, tokenizer, [passage], top=3)
    assert [match.document_id for match in matches] == [12, 13, 11]


def test_a_missing_split_is_a_clear_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"train\.parquet"):
        nearest_documents(tmp_path, tokenizer, ["return self.width"])


def test_a_match_is_plain_data(tmp_path: Path, tokenizer: Tokenizer) -> None:
    split = write_split(tmp_path, [SOURCE])
    [[match]] = nearest_documents(split, tokenizer, [SOURCE[:200]])
    assert isinstance(match, Match)
    for name in Match.__slots__:
        assert type(getattr(match, name)) in (int, str, float)
