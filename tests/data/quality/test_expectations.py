"""Expectations: what does not hold is found, counted and placed; what cannot be looked at has failed."""

import datetime
import decimal
import gzip
import json
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.config import load_recipe
from marrow.core.errors import DataError, RecipeError, SourceError
from marrow.data.clean import clean
from marrow.data.config import DataRecipe, settings_of
from marrow.data.engine import Processes, Threads
from marrow.data.ingest import ingest
from marrow.data.quality.expectations import check, check_expectations
from marrow.data.quality.report import CheckResult, ExpectationReport
from marrow.data.quality_config import Expectation, PiiRecipe


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def run(tmp_path: Path, values: Any, /, **expected: Any) -> CheckResult:
    """Check one column with one expectation of one check."""
    path = write(tmp_path / "t.parquet", {"c": values}, row_group_size=3)
    report = check_expectations([path], {"c": Expectation(**expected)})
    [result] = report.results
    assert report.failed == (result.status == "fail")
    return result


# Each check finds what it is for


CASES: list[tuple[Any, dict[str, Any], str, list[int]]] = [
    ([1, 2, 3, 10], {"min": 2}, "range", [1]),
    ([1, 2, 3, 10], {"max": 2.5}, "range", [3, 4]),
    ([1, None, 3], {"min": 2, "max": 2}, "range", [1, 3]),
    ([2**62 + 1, 2**62], {"max": 2**62}, "range", [1]),
    ([1.5, math.nan, math.inf, -math.inf, None], {"min": 0, "max": 9}, "range", [2, 3, 4]),
    (["a", "b", "c"], {"min": "b"}, "range", [1]),
    ([datetime.date(2024, 1, 1), datetime.date(2025, 1, 1)], {"max": "2024-06-30"}, "range", [2]),
    ([datetime.datetime(2024, 1, 1, 12), None], {"min": "2024-01-01T13:00:00"}, "range", [1]),
    ([decimal.Decimal("1.10"), decimal.Decimal("1.20")], {"max": 1.1}, "range", [2]),
    ([None, 1, None], {"max_null_share": 0.5}, "nulls", [1, 3]),
    (["", "abc", "größe", None], {"min_length": 1, "max_length": 4}, "length", [1, 3]),
    ([[1], [], [1, 2, 3]], {"min_length": 1, "max_length": 2}, "length", [2, 3]),
    (["a1", "b2", "c", "a1\n", None], {"regex": "[a-z][0-9]"}, "regex", [3, 4]),
    (["ab", "b"], {"regex": "a|b"}, "regex", [1]),
    (["red", "blue", None, "Red"], {"values": ("red", "blue")}, "values", [4]),
    ([1, 2, None], {"values": (1, 3)}, "values", [2]),
    ([1.0, 2.5], {"values": (1,)}, "values", [2]),
    ([True, False], {"values": (True,)}, "values", [2]),
    (["a", "b", "a", None, None, "a", "A"], {"unique": True}, "unique", [3, 6]),
    ([1, 2, 1, None, None], {"unique": True}, "unique", [3]),
    ([0.0, -0.0, math.nan, math.nan, 1.0], {"unique": True}, "unique", [2, 4]),
    ([b"a", b"a"], {"unique": True}, "unique", [2]),
    ([decimal.Decimal("1.0"), decimal.Decimal("1.0")], {"unique": True}, "unique", [2]),
    ([datetime.date(2024, 1, 1)] * 2, {"unique": True}, "unique", [2]),
    ([True, True], {"unique": True}, "unique", [2]),
]


@pytest.mark.parametrize(("column", "expected", "kind", "lines"), CASES, ids=[str(c[1:3]) for c in CASES])
def test_each_check_finds_the_rows_that_fail(tmp_path, column, expected, kind, lines):
    result = run(tmp_path, column, **expected)
    assert (result.check, result.name) == (kind, f"c.{kind}")
    assert result.failed == len(lines)
    assert [sample.line for sample in result.samples] == lines
    assert {sample.file for sample in result.samples} == {"t.parquet"}
    assert (result.status, result.rows, result.note) == ("fail", len(column), "")
    assert result.share == len(lines) / len(column)


@pytest.mark.parametrize(
    ("column", "kinds"),
    [
        (pa.array([1]), {"integer", "number", "int64", "int"}),
        (pa.array([1.0]), {"number", "double", "float", "float64"}),
        (pa.array(["a"]), {"text", "string", "str"}),
        (pa.array(["a"], pa.large_string()), {"text", "string"}),
        (pa.array(["a"]).dictionary_encode(), {"text", "string"}),
        (pa.array([True]), {"boolean", "bool"}),
        (pa.array([datetime.date(2024, 1, 1)]), {"date", "date32[day]", "date32"}),
        (pa.array([datetime.datetime(2024, 1, 1)]), {"timestamp", "timestamp[us]"}),
        (pa.array([[1]]), {"list", "list<element: int64>"}),
        (pa.array([{"a": 1}]), {"struct"}),
        (pa.array([decimal.Decimal("1.25")]), {"number", "decimal128(3, 2)"}),
        (pa.array([b"a"]), {"binary"}),
    ],
)
def test_types_are_kinds_or_arrow_types(tmp_path, column, kinds):
    asked = {
        *("integer", "number", "int64", "int", "text", "string", "boolean", "date", "timestamp", "list"),
        *("struct", "binary", "int32"),
        *kinds,
    }
    passed = {kind for kind in asked if run(tmp_path, column, type=kind).status == "pass"}
    assert passed == kinds


def test_a_share_of_failures_may_be_allowed_and_a_level_only_warns(tmp_path):
    column = [1, 2, 3, -1]
    assert run(tmp_path, column, min=0, max_failed_share=0.25).status == "pass"
    assert run(tmp_path, column, min=0, max_failed_share=0.24).status == "fail"
    assert run(tmp_path, column, min=0, level="warn").status == "warn"
    assert run(tmp_path, [None, 1], max_null_share=0.5).status == "pass"
    assert run(tmp_path, [None, 1], max_null_share=0.49).status == "fail"


def test_rows_are_counted_without_a_column(tmp_path):
    path = write(tmp_path / "t.parquet", {"c": [1, 2, 3]})
    report = check_expectations(
        [path],
        {"enough": Expectation(min_rows=3), "few": Expectation(max_rows=2), "more": Expectation(min_rows=4)},
    )
    assert [(r.name, r.status, r.note) for r in report.results] == [
        ("enough.rows", "pass", ""),
        ("few.rows", "fail", "the table has 3 rows"),
        ("more.rows", "fail", "the table has 3 rows"),
    ]


def test_one_column_may_have_several_expectations(tmp_path):
    path = write(tmp_path / "t.parquet", {"price": [1, 50, 500]})
    report = check_expectations(
        [path],
        {
            "price": Expectation(min=0, type="number", unique=True, max_null_share=0),
            "dear": Expectation(column="price", max=100, level="warn"),
        },
    )
    assert [(r.name, r.status, r.failed) for r in report.results] == [
        ("dear.range", "warn", 1),
        ("price.type", "pass", 0),
        ("price.nulls", "pass", 0),
        ("price.range", "pass", 0),
        ("price.unique", "pass", 0),
    ]
    assert not report.failed


# References


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv"])
def test_values_must_stand_in_another_table(tmp_path, suffix):
    other = pa.table({"code": ["de", "fr", None, "fr"], "n": [1, 2, 3, 4]})
    path = tmp_path / f"countries.{suffix}"
    if suffix == "parquet":
        pq.write_table(other, path)
    elif suffix == "csv":
        pyarrow.csv.write_csv(other, path)
    else:
        with pa.ipc.new_file(path, other.schema) as writer:
            writer.write_table(other)
    result = run(tmp_path, ["fr", "xx", None, "de", "yy", "xx"], refers_to=f"{path}:code")
    assert (result.status, result.failed) == ("fail", 3)
    assert [(s.line, s.value) for s in result.samples] == [(2, "'xx'"), (5, "'yy'"), (6, "'xx'")]
    assert run(tmp_path, pa.array([1, 4], pa.int8()), refers_to=f"{path}:n").status == "pass"


def test_a_reference_is_read_as_a_run_reads_it_and_its_broken_rows_are_told(tmp_path):
    path = tmp_path / "countries.csv.gz"
    path.write_bytes(gzip.compress("code;n\nde;1\nfr;2\nxx;3;4\n".encode("utf-16")))
    result = run(tmp_path, ["fr", "xx", "de"], refers_to=f"{path}:code")
    assert (result.status, result.failed) == ("fail", 1)
    assert "1 broken row is left out" in result.left_out and result.left_out in result.told()
    assert run(tmp_path, ["fr"], refers_to=f"{path}:code").status == "pass"


def test_a_reference_may_be_a_folder_or_a_glob(tmp_path):
    (tmp_path / "ref").mkdir()
    write(tmp_path / "ref" / "a.parquet", {"k": [1, 2]})
    write(tmp_path / "ref" / "b.parquet", {"k": [3]})
    (tmp_path / "ref" / "README").write_text("no table")
    for where in ("ref", "ref/*.parquet", "re?/*"):
        assert run(tmp_path, [3, 1], refers_to=f"{tmp_path / where}:k").status == "pass"
        assert run(tmp_path, [4, 1], refers_to=f"{tmp_path / where}:k").failed == 1


def test_a_reference_that_is_not_there_is_an_error_with_a_hint(tmp_path):
    with pytest.raises(SourceError, match="there is no such file") as caught:
        run(tmp_path, [1], refers_to="nowhere.parquet:k")
    assert "[data.expect.c] refers_to" in caught.value.message
    assert "working folder" in str(caught.value.hint)


def test_a_reference_to_another_type_or_column_has_failed(tmp_path):
    path = write(tmp_path / "r.parquet", {"code": ["a"], "n": [1.5]})
    assert "has no column 'cod'; did you mean 'code'?" in run(tmp_path, ["a"], refers_to=f"{path}:cod").note
    assert "the column is int64, 'code' of r.parquet is string" in (
        run(tmp_path, [1], refers_to=f"{path}:code").note
    )
    assert run(tmp_path, [1], refers_to=f"{path}:n").status == "fail"


# What the column cannot answer


@pytest.mark.parametrize(
    ("column", "expected", "note"),
    [
        ([1], {"column": "cc", "min": 0}, "no column 'cc'; did you mean 'c'?"),
        ([1], {"column": "zzz"}, "no column 'zzz'; columns: c"),
        ([1], {"regex": "a"}, "a pattern needs text; the column is int64"),
        (["a"], {"regex": "(?=a)a"}, "not a pattern of RE2"),
        (["a"], {"min": 3}, "does not compare with string; write text"),
        ([1], {"min": "a"}, "does not compare with int64; write numbers"),
        ([datetime.date(2024, 1, 1)], {"min": "yesterday"}, "'yesterday' does not fit the column's type"),
        ([[1]], {"min": 0}, "a range needs numbers, times or text"),
        ([[1]], {"unique": True}, "unique values need a plain column"),
        ([{"a": 1}], {"values": (1,)}, "values need a plain column"),
        ([{"a": 1}], {"min_length": 1}, "only text, bytes and lists have a length"),
        ([1], {"values": ("a",)}, "'a' does not fit the column's type int64"),
        (["a"], {"values": (1,)}, "1 does not fit the column's type string"),
        ([1], {"values": (1.5,)}, "1.5 does not fit the column's type int64"),
        ([1], {"values": (True,)}, "True does not fit the column's type int64"),
        ([1], {"type": "text"}, "the column is int64"),
        ([1], {"type": "nubmer"}, "'nubmer' is no type"),
    ],
)
def test_what_cannot_be_checked_has_failed_whatever_the_level(tmp_path, column, expected, note):
    for level in ("warn", "fail"):
        result = run(tmp_path, column, **expected, level=level)
        assert note in result.note
        if "type" not in expected:
            assert result.status == "fail"


def test_nulls_and_types_of_nested_columns_are_checked(tmp_path):
    column = pa.array([[1], None, []])
    assert run(tmp_path, column, max_null_share=0).failed == 1
    assert run(tmp_path, column, type="list").status == "pass"


def test_a_column_of_nulls_alone_holds_what_is_said_of_values(tmp_path):
    for column in (pa.array([None, None], pa.int64()), pa.nulls(2)):
        assert run(tmp_path, column, min=0).status == "pass"
        assert run(tmp_path, column, max_null_share=0.9).status == "fail"
    assert run(tmp_path, pa.array([None] * 2, pa.string()), unique=True).status == "pass"


def test_an_empty_table_holds_all_but_a_row_count(tmp_path):
    schema = pa.schema([("c", pa.int64())])
    pq.write_table(schema.empty_table(), tmp_path / "t.parquet")
    report = check_expectations(
        [tmp_path / "t.parquet"], {"c": Expectation(min=0, unique=True, max_null_share=0, min_rows=1)}
    )
    assert [(r.check, r.status, r.share) for r in report.results] == [
        ("rows", "fail", 0), ("nulls", "pass", 0), ("range", "pass", 0), ("unique", "pass", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["a.b", "", " ", "größe (m²)", 'x"y', "a\nb", "🦴", "select *"])
def test_a_column_may_have_any_name(tmp_path, name):
    path = write(tmp_path / "t.parquet", {name: [1, -1], "other": [1, 1]})
    expected = {name: Expectation(min=0)} if name else {"x": Expectation(column="other", min=0)}
    report = check_expectations([path], expected)
    assert report.results[0].failed == (1 if name else 0)


@pytest.mark.slow
def test_a_thousand_columns_are_checked(tmp_path):
    columns = {f"c{i}": [i, i + 1, None] for i in range(1000)}
    path = write(tmp_path / "t.parquet", columns)
    expected = {name: Expectation(min=10, max_null_share=0.5, unique=True) for name in columns}
    report = check_expectations([path], expected)
    assert len(report.results) == 3000
    assert {r.name for r in report.of("fail")} == {f"c{i}.range" for i in range(10)}


# Files and places


def test_several_files_are_one_table(tmp_path):
    paths = [write(tmp_path / f"{i}.parquet", {"c": [i, 10 + i, 1]}) for i in range(3)]
    report = check_expectations(paths, {"c": Expectation(unique=True, max=11)})
    unique, in_range = sorted(report.results, key=lambda r: r.check, reverse=True)
    assert report.rows == 9
    assert (in_range.failed, unique.failed) == (1, 3)
    assert [(s.file, s.line) for s in unique.samples] == [
        ("1.parquet", 1), ("1.parquet", 3), ("2.parquet", 3),
    ] or [(s.file, s.line) for s in unique.samples] == [
        ("1.parquet", 3), ("1.parquet", 1), ("2.parquet", 3),
    ]  # fmt: skip
    assert [(s.file, s.line, s.value) for s in in_range.samples] == [("2.parquet", 2, "12")]


def test_a_column_that_a_file_lacks_is_null_there(tmp_path):
    paths = [write(tmp_path / "a.parquet", {"c": [1]}), write(tmp_path / "b.parquet", {"d": ["x", "y"]})]
    report = check_expectations(paths, {"c": Expectation(max_null_share=0.5), "d": Expectation(unique=True)})
    assert [(r.name, r.failed, r.rows) for r in report.results] == [("c.nulls", 2, 3), ("d.unique", 0, 3)]
    assert [(s.file, s.line) for s in report.results[0].samples] == [("b.parquet", 1), ("b.parquet", 2)]


def test_files_whose_types_do_not_go_together_are_refused(tmp_path):
    paths = [write(tmp_path / "a.parquet", {"c": [1]}), write(tmp_path / "b.parquet", {"c": ["x"]})]
    with pytest.raises(DataError, match=r"b\.parquet: its columns do not fit"):
        check_expectations(paths, {"c": Expectation(min=0)})


def test_files_that_are_no_tables_are_refused(tmp_path):
    bad = tmp_path / "t.parquet"
    bad.write_bytes(b"PAR1 not really PAR1")
    (tmp_path / "t.arrow").write_bytes(b"")
    for path in (bad, tmp_path / "t.arrow"):
        with pytest.raises(SourceError, match="cannot be read as a table"):
            check_expectations([path], {})
    with pytest.raises(SourceError, match="not"):
        check_expectations([tmp_path / "gone.parquet"], {})
    with pytest.raises(SourceError, match="no file with rows"):
        check_expectations([], {})


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["c", "c"])
    with pa.ipc.new_file(tmp_path / "t.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="more than one column is named 'c'"):
        check_expectations([tmp_path / "t.arrow"], {"c": Expectation(min=0)})


def test_rows_of_a_source_are_found_by_their_file_and_line(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text('id,note\n1,"two\nlines"\n2,x\n2,y\n')
    (tmp_path / "in" / "b.csv").write_text("id,note\n9,z\n")
    (tmp_path / "rows").mkdir()
    ingest(DataRecipe(source=str(tmp_path / "in")), tmp_path / "rows")
    report = check(tmp_path / "rows", {"id": Expectation(unique=True, max=5)})
    places = {r.check: [(s.file, s.line, s.value) for s in r.samples] for r in report.results}
    assert places == {"range": [("b.csv", 2, "9")], "unique": [("a.csv", 5, "2")]}


# Exact, out of core, in bounded memory


@given(
    column=st.lists(st.one_of(st.none(), st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1)), max_size=60),
    known=st.lists(st.integers(-3, 3), max_size=5),
)
@settings(max_examples=15, deadline=None)
def test_unique_and_references_agree_with_brute_force(tmp_path_factory, column, known):
    folder = tmp_path_factory.mktemp("t")
    path = write(folder / "t.parquet", {"c": pa.array(column, pa.int64())}, row_group_size=7)
    other = write(folder / "k.parquet", {"k": pa.array(known, pa.int64())})
    for memory in (1, 1 << 20):
        unique, refers = check_expectations(
            [path], {"c": Expectation(unique=True, refers_to=f"{other}:k")}, memory_bytes=memory
        ).results
        again = [i for i, v in enumerate(column) if v is not None and v in column[:i]]
        lost = [i for i, v in enumerate(column) if v is not None and v not in known]
        assert (unique.failed, refers.failed) == (len(again), len(lost))
        assert [s.line - 1 for s in unique.samples] == again[:5]
        assert [s.line - 1 for s in refers.samples] == lost[:5]


def test_keys_that_do_not_fit_in_memory_give_the_same_report(tmp_path):
    generator = random.Random(5)
    column = [f"key {generator.randrange(40_000)}" for _ in range(50_000)]
    path = write(tmp_path / "t.parquet", {"c": column}, row_group_size=5000)
    known = write(tmp_path / "k.parquet", {"k": [f"key {i}" for i in range(0, 40_000, 2)]})
    expected = {"c": Expectation(unique=True, refers_to=f"{known}:k")}
    spill = tmp_path / "spill"
    spill.mkdir()
    reports = [
        check_expectations([path], expected, spill=spill, memory_bytes=memory).as_dict()
        for memory in (64 << 20, 100_000)
    ]
    assert reports[0] == reports[1]
    assert reports[0]["results"][0]["failed"] == len(column) - len(set(column))
    assert list(spill.iterdir()) == []


# The recipe and the step


def load(tmp_path: Path, text: str) -> DataRecipe:
    path = tmp_path / "r.toml"
    path.write_text(text)
    return load_recipe(path, {"data": DataRecipe}).section(DataRecipe)


def test_expectations_stand_in_the_recipe(tmp_path):
    recipe = load(
        tmp_path,
        "[data.expect.price]\nmin = 0\nmax = 9.5\nvalues = [1, 2.5, true, 'x']\nlevel = 'warn'\n"
        "[data.expect.'unit price']\nmin = '2024-01-01'\n",
    )
    assert recipe.expect == {
        "price": Expectation(min=0, max=9.5, values=(1, 2.5, True, "x"), level="warn"),
        "unit price": Expectation(min="2024-01-01"),
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("regex = '(a'", "regex = '(a' is no regular expression"),
        ("min = 3\nmax = 2", "min = 3 is more than max = 2"),
        ("min = 3\nmax = 'z'", "not of one kind"),
        ("min_length = 3\nmax_length = 2", "min_length = 3 is more than max_length = 2"),
        ("min_rows = 3\nmax_rows = 2", "min_rows = 3 is more than max_rows = 2"),
        ("refers_to = 'x'", 'is not "FILE:COLUMN"'),
        ("max_null_share = 2", "out of range"),
        ("uniqe = true", "did you mean 'unique'?"),
        ("level = 'error'", "is none of 'warn', 'fail'"),
        ("min = nan", "write a finite number"),
    ],
)
def test_a_wrong_expectation_is_refused_with_its_line(tmp_path, text, says):
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, f"[data.expect.price]\n{text}\n")
    assert says in str(caught.value)
    assert "r.toml:2" in str(caught.value)


@pytest.fixture
def posts(tmp_path: Path) -> Path:
    path = tmp_path / "posts.jsonl"
    lines = [
        {"id": i % 30, "text": f"a post with a number {i} in its middle and more words"} for i in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def step(tmp_path: Path, source: Path, **expect: Expectation) -> tuple[dict[str, Any], dict[str, Any]]:
    recipe = DataRecipe(source=str(source), expect=expect)
    rows, out = tmp_path / "rows", tmp_path / "out"
    for folder in (rows, out):
        folder.mkdir(exist_ok=True)
    ingest(recipe, rows)
    facts = clean(recipe, rows, out)
    return facts, json.loads((out / "expectations.json").read_text())


def test_the_step_tells_and_keeps_what_it_found(tmp_path, posts):
    facts, kept = step(tmp_path, posts, id=Expectation(unique=True, min=0, level="warn"))
    assert facts["expectations"] == {"pass": 1, "warn": 1, "fail": 0}
    assert kept["results"][1]["samples"][0] == {"file": "posts.jsonl", "line": 31, "value": "0"}
    assert kept["results"][1]["share"] == 0.25


def test_a_step_whose_expectations_do_not_hold_fails_after_writing_why(tmp_path, posts):
    with pytest.raises(DataError) as caught:
        step(tmp_path, posts, id=Expectation(unique=True), nothing=Expectation(min=1))
    assert "id.unique (no value twice): 10 of 40 rows, first 0 at posts.jsonl:31" in caught.value.message
    assert "nothing.column (the column is there): no column 'nothing'" in caught.value.message
    assert "[data.expect]" in str(caught.value.hint)
    assert caught.value.exit_code == 1
    kept = json.loads((tmp_path / "out" / "expectations.json").read_text())
    assert kept["failed"] is True
    assert not (tmp_path / "out" / "documents.parquet").exists()


def test_samples_show_no_personal_data_that_is_looked_for(tmp_path):
    source = tmp_path / "people.jsonl"
    source.write_text("".join(json.dumps({"mail": "jane@example.org", "t": "x " * 20}) + "\n" for _ in "ab"))
    recipe = DataRecipe(
        source=str(source), expect={"mail": Expectation(unique=True)}, pii=PiiRecipe(email="replace")
    )
    for name in ("rows", "out"):
        (tmp_path / name).mkdir()
    ingest(recipe, tmp_path / "rows")
    with pytest.raises(DataError, match="EMAIL") as caught:
        clean(recipe, tmp_path / "rows", tmp_path / "out")
    assert "jane" not in str(caught.value) + (tmp_path / "out" / "expectations.json").read_text()


def test_the_step_runs_again_when_a_reference_has_changed(tmp_path):
    path = write(tmp_path / "k.parquet", {"k": [1]})
    recipe = DataRecipe(expect={"c": Expectation(refers_to=f"{path}:k")})
    before = settings_of(recipe, "clean")
    assert settings_of(recipe, "clean") == before
    write(path, {"k": [2]})
    assert settings_of(recipe, "clean") != before
    assert "references" not in settings_of(recipe, "split")


def test_the_report_is_plain_data(tmp_path):
    path = write(tmp_path / "t.parquet", {"c": [math.nan, 1.0], "when": [datetime.date(2024, 1, 1)] * 2})
    report = check_expectations([path], {"c": Expectation(min=0), "when": Expectation(unique=True)})
    again = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert again["results"][0]["samples"] == [{"file": "t.parquet", "line": 1, "value": "nan"}]
    assert again["results"][1]["samples"][0]["value"] == "2024-01-01"
    assert isinstance(report, ExpectationReport)


@pytest.mark.parametrize("make", [lambda: Threads(2), lambda: Processes(2)], ids=["threads", "processes"])
def test_every_engine_gives_the_same_report(tmp_path, make):
    columns = {f"c{i}": [(row * 7919 + i) % 1_000 for row in range(5_000)] for i in range(11)}
    path = write(tmp_path / "t.parquet", columns, row_group_size=512)
    known = write(tmp_path / "k.parquet", {"k": list(range(900))})
    expected = {f"c{i}": Expectation(unique=i % 2 == 0, max=990 - i, level="warn") for i in range(11)}
    expected |= {"known": Expectation(column="c3", refers_to=f"{known}:k"), "gone": Expectation(min=0)}
    inline = check_expectations([path], expected)
    with make() as engine:
        assert check_expectations([path], expected, engine=engine) == inline
    assert {one.status for one in inline.results} >= {"warn", "fail"}
