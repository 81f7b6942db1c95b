"""Any file as columns: what is read twice is the same, and what is not what its name says is an error."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marrow.core.errors import DataError, SourceError
from marrow.data import diff_tables
from marrow.data.diff_tables import Rows, can_compare, open_lines, open_rows

SHARED = [HealthCheck.function_scoped_fixture]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


def read(rows: Rows, *names: str) -> list[dict[str, Any]]:
    return [row for batch in rows.read(names) for row in batch.to_pylist()]


@pytest.fixture
def write(tmp_path: Path):
    def make(name: str, text: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


@settings(max_examples=60, suppress_health_check=SHARED)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), JSON, max_size=3), max_size=8))
def test_json_lines_are_columns_of_their_values_as_text(tmp_path: Path, objects) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in objects), encoding="utf-8")
    rows = open_rows(path)
    names = sorted({name for value in objects for name in value})
    assert sorted(rows.types) == names
    assert set(rows.arrow.values()) <= {pa.string()}
    found = read(rows, *names)
    assert len(found) == len(objects)
    for value, row in zip(objects, found, strict=True):
        for name in names:
            kept, text = value.get(name), row.get(name)
            if kept is None:
                assert text is None
            elif isinstance(kept, str):
                assert text == kept.encode("utf-8", "backslashreplace").decode()
            else:
                assert json.loads(text) == kept
    assert read(rows, *names) == found, "read again, it is the same"


TYPES = [
    ([1, 2], "integer"),
    ([1, 2.5], "number"),
    ([2.5, 1], "number"),
    ([None, 1], "integer"),
    ([1, None], "integer"),
    ([None, 1, 2.5], "number"),
    ([None, None], "null"),
    ([True, False], "boolean"),
    ([True, 1], "mixed"),
    (["1", 1], "mixed"),
    (["1", 1, None], "mixed"),
    (["1", 1, "1"], "mixed"),
    ([[], [1]], "array"),
    ([{}, {"a": 1}], "object"),
    ([[], {}], "mixed"),
    ([1, 2.5, "x"], "mixed"),
]


@pytest.mark.parametrize(("values", "kind"), TYPES)
def test_the_type_of_a_key_is_that_of_all_its_values(write, values: list[Any], kind: str) -> None:
    path = write("a.jsonl", "".join(json.dumps({"k": value}) + "\n" for value in values))
    assert open_rows(path).types == {"k": kind}


def test_equal_objects_are_equal_texts_however_they_were_written(write) -> None:
    path = write("a.jsonl", '{"k": {"a": 1, "b": [2]}}\n{"k":{"b":[2],"a":1}}\n')
    first, second = read(open_rows(path), "k")
    assert first == second


def test_a_key_that_a_row_lacks_is_null_and_blank_lines_are_no_rows(write) -> None:
    path = write("a.jsonl", '{"a": 1}\n\n  \n{"b": "x"}')
    assert read(open_rows(path), "a", "b") == [{"a": "1", "b": None}, {"a": None, "b": "x"}]


def test_rows_are_counted_without_any_column(write) -> None:
    path = write("a.jsonl", '{"a": 1}\n{"a": 2}\n')
    assert sum(batch.num_rows for batch in open_rows(path).read([])) == 2


def test_half_a_surrogate_pair_is_a_value_like_any_other(write) -> None:
    path = write("a.jsonl", '{"a": "\\ud800x"}\n{"a": "fine"}\n{"a": null}\n')
    assert [row["a"] for row in read(open_rows(path), "a")] == ["\\ud800x", "fine", None]


def test_a_byte_order_mark_is_no_part_of_the_first_row(write) -> None:
    path = write("a.jsonl", b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    assert read(open_rows(path), "a") == [{"a": "1"}, {"a": "2"}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1}\n{"a": \n', "line 2, is no JSON: "),
        ('{"a": 1}\n\n[1]\n', "line 3, is no JSON object"),
        ('"text"\n', "line 1, is no JSON object"),
        ("[" * 100_000, "line 1, is no JSON: "),
        ('{"a": ' + "9" * 5000 + "}", "line 1, is no JSON: "),
        (b"\xff\xfe\x00\n", "line 1, is no JSON: "),
    ],
)
def test_what_is_no_json_lines_is_named_with_its_line(write, text: str | bytes, said: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl") as caught:
        open_rows(write("a.jsonl", text))
    assert said in str(caught.value)


@settings(max_examples=60, suppress_health_check=SHARED)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), max_size=6)))
def test_lines_come_without_their_ends(tmp_path: Path, lines: list[str]) -> None:
    """A carriage return alone, a form feed and the line ends of Unicode are no ends of lines."""
    path = tmp_path / "a.txt"
    for end in ("\n", "\r\n"):
        path.write_bytes("".join(line + end for line in lines).encode())
        assert [row["line"] for row in read(open_lines(path), "line")] == lines


def test_a_last_line_without_an_end_counts_and_no_utf8_is_shown_as_bytes(write) -> None:
    path = write("a.txt", b"one\n\xff\xfe two")
    assert [row["line"] for row in read(open_rows(path), "line")] == ["one", "\\xff\\xfe two"]


def test_an_endless_line_comes_in_pieces(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff_tables, "_MAX_LINE_CHARS", 10)
    path = write("a.txt", "x" * 25 + "\nshort\n")
    assert [row["line"] for row in read(open_rows(path), "line")] == ["x" * 10, "x" * 10, "x" * 5, "short"]


@pytest.mark.parametrize("count", [0, 1, 4, 5, 9])
def test_batches_are_bounded_and_none_is_empty(write, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(diff_tables, "_BATCH_LINES", 4)
    for path, name in (
        (write("a.txt", "".join(f"{n}\n" for n in range(count))), "line"),
        (write("a.jsonl", "".join(f'{{"n": {n}}}\n' for n in range(count))), "n"),
    ):
        sizes = [batch.num_rows for batch in open_rows(path).read([name])]
        assert sum(sizes) == count
        assert all(0 < size <= 4 for size in sizes)


def test_tables_keep_their_types(tmp_path: Path) -> None:
    table = pa.table({"n": pa.array([1, None, 3], pa.int32()), "t": ["a", "b", None]})
    pq.write_table(table, tmp_path / "a.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "a.feather")
    for name in ("a.parquet", "a.feather"):
        rows = open_rows(tmp_path / name)
        assert rows.types == {"n": "int32", "t": "string"}
        assert rows.arrow == {"n": pa.int32(), "t": pa.string()}
        assert read(rows, "t", "n") == [
            {"t": t, "n": n} for n, t in zip([1, None, 3], "ab", strict=False)
        ] + [{"t": None, "n": 3}]
    pyarrow.csv.write_csv(table, tmp_path / "a.csv")
    assert open_rows(tmp_path / "a.csv").types == {"n": "int64", "t": "string"}


def test_a_table_that_is_none_is_an_error_that_names_it(write) -> None:
    with pytest.raises((DataError, SourceError), match=r"a\.parquet"):
        open_rows(write("a.parquet", b"PAR1 and no more"))


def test_a_file_that_is_gone_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot compare a file") as caught:
        open_rows(tmp_path / "gone.jsonl")
    assert "check the path" in caught.value.hint
    lines = open_rows(tmp_path / "gone.txt")  # opened when it is read
    with pytest.raises(SourceError, match=r"gone\.txt"):
        read(lines, "line")


@pytest.mark.parametrize(
    ("name", "yes"),
    [
        ("a.csv", True),
        ("A.CSV", True),
        ("a.parquet", True),
        ("a.jsonl", True),
        ("deep/er/a.md", True),
        ("a.json", True),
        ("a.bin", False),
        ("a.png", False),
        ("README", False),
        (".csv", False),
    ],
)
def test_what_can_be_compared_is_known_by_the_name(name: str, yes: bool) -> None:
    assert can_compare(name) == yes
