"""Types that the recipe asks for: taken, and what does not fit is quarantined with its line."""

import datetime
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.config import load_recipe
from marrow.core.errors import RecipeError, SourceError
from marrow.data.config import TYPE_ALIASES, TYPES, DataRecipe, settings_of
from marrow.data.ingest import ingest
from marrow.data.sources.columns import as_asked, type_named


def quarantine(folder: Path) -> list[tuple[int, str]]:
    lines = (folder / "quarantine.jsonl").read_text().splitlines()
    return [(b["line"], b["reason"]) for b in map(json.loads, lines)]


@pytest.mark.parametrize("use_c", [True, False])
def test_a_type_of_the_recipe_is_taken_and_what_does_not_fit_is_quarantined(
    tmp_path, read_rows, monkeypatch, use_c
):
    if not use_c:
        monkeypatch.setattr("marrow.kernels.rows.scan_csv._library", lambda: None)
    path = tmp_path / "a.csv"
    path.write_text(
        "id,price,day\n007,1.5,2024-01-02\n8,free,2024-01-03\n"
        '" 9 ",,2024-01-04\nx,2,2024-01-05\n10,"3",soon\n11,4,\n'
    )
    types = {"id": "int64", "price": "float64", "day": "date"}
    table, facts = read_rows(path, types=types)
    assert table.drop(["_file"]).to_pylist() == [
        {"id": 7, "price": 1.5, "day": datetime.date(2024, 1, 2), "_row": 2},
        {"id": 9, "price": None, "day": datetime.date(2024, 1, 4), "_row": 4},
        {"id": 11, "price": 4.0, "day": None, "_row": 7},
    ]
    assert facts["columns"] == {"id": "int64", "price": "double", "day": "date32[day]"}
    assert (facts["rows"], facts["broken_rows"]) == (3, 3)
    assert quarantine(tmp_path / "rows-0") == [
        (3, "price is no double"),
        (5, "id is no int64"),
        (6, "day is no date32[day]"),
    ]


@pytest.mark.parametrize(
    ("kind", "texts", "values"),
    [
        ("string", ["007", "NA", "1.50", ""], ["007", "NA", "1.50", ""]),
        ("text", ["1", "2"], ["1", "2"]),
        ("bool", ["true", "0", "1", "FALSE"], [True, False, True, False]),
        ("int8", ["127", "-128"], [127, -128]),
        ("uint64", ["18446744073709551615", "0"], [2**64 - 1, 0]),
        ("float32", ["0.5", "1e3"], [0.5, 1000.0]),
        ("double", ["16000000000000001", "inf", "7"], [1.6e16, float("inf"), 7.0]),
        (
            "timestamp",
            ["2024-01-02", "2024-01-02 03:04"],
            [datetime.datetime(2024, 1, 2), datetime.datetime(2024, 1, 2, 3, 4)],
        ),
        ("binary", ["a", "b"], [b"a", b"b"]),
    ],
)
def test_every_type_can_be_asked_for(tmp_path, read_rows, kind, texts, values):
    (tmp_path / "a.csv").write_text("n,c\n" + "".join(f"{i},{text}\n" for i, text in enumerate(texts)))
    table, facts = read_rows(tmp_path / "a.csv", types={"c": kind})
    assert table["c"].to_pylist() == values
    assert table.schema.field("c").type == type_named(kind)
    assert facts["broken_rows"] == 0


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_all_formats_take_types(tmp_path, read_rows, suffix):
    path = tmp_path / f"a.{suffix}"
    values = ["1", "2", "x", "4", "300"]
    if suffix == "jsonl":
        path.write_text("".join(json.dumps({"c": v, "d": i}) + "\n" for i, v in enumerate(values)))
    elif suffix == "parquet":
        pq.write_table(pa.table({"c": values, "d": range(5)}), path)
    else:
        path.write_text("c,d\n" + "".join(f"{v},{i}\n" for i, v in enumerate(values)))
    table, facts = read_rows(path, types={"c": "uint8", "d": "string"})
    assert table["c"].to_pylist() == [1, 2, 4]
    assert table["d"].to_pylist() == ["0", "1", "3"]
    assert facts["broken_rows"] == 2
    first = 2 if suffix == "csv" else 1
    assert quarantine(tmp_path / "rows-0") == [(first + 2, "c is no uint8"), (first + 4, "c is no uint8")]


def test_two_files_that_disagree_are_held_to_the_recipes_type(tmp_path, read_rows):
    source = tmp_path / "s"
    source.mkdir()
    (source / "a.csv").write_text("n\n1\n2\n")
    (source / "b.csv").write_text("n\n3\nlate word\n")
    table, facts = read_rows(source, types={"n": "int64"})
    assert table["n"].to_pylist() == [1, 2, 3]
    assert (facts["broken_rows"], facts["columns"]) == (1, {"n": "int64"})


def test_a_column_that_comes_late_is_found_before_it_is_missed(tmp_path, read_rows):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' * 10_000 + '{"a": 2, "b": "7"}\n')
    assert read_rows(path, types={"b": "int32"})[0]["b"].to_pylist()[-1] == 7


def test_a_column_that_is_not_there_is_refused_with_the_nearest(tmp_path, read_rows):
    (tmp_path / "a.csv").write_text("price,n\n1,2\n")
    with pytest.raises(SourceError, match="no column 'prise'") as caught:
        read_rows(tmp_path / "a.csv", types={"prise": "float64"})
    assert "'price'" in str(caught.value.hint)
    with pytest.raises(SourceError) as caught:
        read_rows(tmp_path / "a.csv", types={"zzz": "float64"})
    assert "price, n" in str(caught.value.hint)


def test_a_type_that_is_none_is_refused_with_the_recipes_line(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('[data]\nsource = "x"\n[data.types]\nprice = "flaot64"\n')
    with pytest.raises(RecipeError, match='price = "flaot64" is no type; did you mean "float64"'):
        load_recipe(path, {"data": DataRecipe})


def test_types_of_a_recipe_reach_the_step_and_change_its_key(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('[data]\nsource = "x"\n[data.types]\nprice = "float64"\n')
    recipe = load_recipe(path, {"data": DataRecipe}).section(DataRecipe)
    assert settings_of(recipe, "ingest")["types"] == {"price": "float64"}
    assert settings_of(recipe, "ingest") != settings_of(DataRecipe(source="x"), "ingest")
    assert settings_of(recipe, "split") == settings_of(DataRecipe(source="x"), "split")


def test_mostly_misfits_are_an_error(tmp_path, read_rows):
    (tmp_path / "a.csv").write_text("n\nx\ny\n3\n")
    with pytest.raises(SourceError, match="2 of 3 rows do not fit the types of n"):
        read_rows(tmp_path / "a.csv", types={"n": "int64"})


def test_every_name_of_a_type_is_one():
    for name in (*TYPES, *TYPE_ALIASES):
        assert isinstance(type_named(name), pa.DataType)
    for kind in (pa.int64(), pa.float64(), pa.date32(), pa.timestamp("us"), pa.bool_(), pa.string()):
        assert type_named(str(kind)) == kind, "a type can be written as the facts show it"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["1", "-7", "007", "x", "", "NA", " 3 ", "9" * 30, "1.5"]), max_size=40))
def test_what_fits_is_what_a_cast_of_each_alone_takes(texts):
    column, bad = as_asked(pa.array(texts, pa.string()), pa.int64())
    for text, value, is_bad in zip(texts, column.to_pylist(), bad.tolist(), strict=True):
        if text.strip() in ("", "NA"):
            assert (value, is_bad) == (None, False)
        else:
            fits = text.strip().lstrip("-").isdigit() and abs(int(text)) < 2**63
            assert (value, is_bad) == ((int(text), False) if fits else (None, True))


def test_rows_that_do_not_fit_in_every_block_cost_no_more_than_a_few_casts(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("n,t\n" + "".join(f"{i if i % 50 else 'x'},text {i}\n" for i in range(60_000)))
    (tmp_path / "out").mkdir()
    facts = ingest(DataRecipe(source=str(path), types={"n": "int64"}), tmp_path / "out")
    assert (facts["rows"], facts["broken_rows"]) == (58_800, 1200)
