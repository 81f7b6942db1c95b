"""What a look at files finds: the join of their types, whatever the order, the cut and the engine."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import SourceError
from marrow.data.engine import INLINE, Engine, Threads
from marrow.data.sources import delimited, pieces
from marrow.data.sources import survey as survey_module
from marrow.data.sources.columns import SchemaGrewError, join_schemas
from marrow.data.sources.listing import Found, find_files
from marrow.data.sources.survey import Types, grown, survey, survey_all

LATE = 10_000  # rows


def written(folder: Path, files: dict[str, str | bytes]) -> Found:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return find_files(str(folder))


def kinds(types: Types) -> dict[str, str]:
    return {field.name: str(field.type) for field in types.schema}


def test_columns_of_all_files_are_joined_in_the_order_they_came(tmp_path: Path) -> None:
    found = written(
        tmp_path,
        {
            "a.csv": "n,when\n1,2024-01-31\n",
            "b.jsonl": '{"text": "x", "n": 2.5}\n',
            "c.csv": "when,n\n2024-02-29,3\n",
        },
    )
    assert kinds(survey(found)) == {"n": "double", "when": "date32[day]", "text": "string"}
    assert not survey(found).is_whole


CELLS = st.sampled_from(["1", "-7", "2.5", "true", "x", "007", "", "2024-01-31", "99999999999999999999"])


@given(st.lists(st.lists(CELLS, min_size=1, max_size=4), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_a_survey_of_files_is_the_join_of_surveys_of_each(
    tmp_path_factory: pytest.TempPathFactory, columns: list[list[str]]
) -> None:
    folder = tmp_path_factory.mktemp("s")
    texts = {
        f"{i}.csv": "c,d\n" + "".join(f"{cell},1\n" for cell in cells) for i, cells in enumerate(columns)
    }
    found = written(folder, dict(texts))
    expected = pa.schema([])
    for name in sorted(texts):
        expected = join_schemas(expected, survey(find_files(str(folder / name))).schema)
    assert survey(found).schema == expected
    whole = survey_all(found, INLINE)
    assert whole.schema == expected and whole.is_whole, "small files are looked at whole by both"


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of about 8 KiB, so that the last rows are in another one than the first."""
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 8 << 10)


def late_csv() -> str:
    return "n,t\n" + "".join(f"{i},x\n" for i in range(LATE)) + "oops,x\n"


@pytest.mark.usefixtures("blocks")
def test_a_look_at_the_beginning_does_not_see_the_end_and_a_whole_one_does(tmp_path: Path) -> None:
    found = written(tmp_path, {"late.csv": late_csv()})
    types = survey(found)
    assert kinds(types) == {"n": "int64", "t": "string"}
    more = grown(types, SchemaGrewError("n"), found, INLINE)
    assert kinds(more) == {"n": "string", "t": "string"} and more.is_whole
    assert more.repeating == types.repeating == {"t"}


@pytest.mark.parametrize("engine", [INLINE, Threads(2)], ids=["inline", "threads"])
def test_pieces_of_a_file_give_the_types_of_the_whole(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = written(tmp_path, {"late.csv": late_csv()})
    expected = survey_all(found, INLINE)
    for name, size in (("PIECE_BYTES", 16 << 10), ("_STEP_BYTES", 2 << 10), ("_SHORT_BYTES", 64)):
        monkeypatch.setattr(pieces, name, size)
    assert len(list(pieces.pieces_of(iter(found.files)))) > 3
    assert survey_all(found, engine) == expected
    engine.close()


def test_what_no_type_holds_becomes_text_and_nothing_else_changes(tmp_path: Path) -> None:
    found = written(tmp_path, {"a.csv": "n,key,t\n1,0.5,x\n"})
    whole = survey_all(found, INLINE)
    more = grown(whole, SchemaGrewError("key"), found, INLINE)
    assert kinds(more) == {"n": "int64", "key": "string", "t": "string"}
    assert kinds(whole)["key"] == "double", "the types given are left as they were"
    assert grown(more, SchemaGrewError("key"), found, INLINE) == more


def test_later_files_beyond_the_first_are_left_to_the_second_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey_module, "SURVEY_FILES", 2)
    found = written(tmp_path, {f"{i}.csv": f"n\n{'1' if i < 2 else 'x'}\n" for i in range(4)})
    assert kinds(survey(found)) == {"n": "int64"}
    assert kinds(survey_all(found, INLINE)) == {"n": "string"}


def test_files_without_bytes_and_files_of_a_header_alone_say_what_they_can(tmp_path: Path) -> None:
    found = written(tmp_path, {"a.csv": "", "b.csv": "n,t\n", "c.csv": "n\n1\n"})
    assert kinds(survey(found)) == {"n": "int64"}, "a column without a row has no type yet"
    assert survey(found).repeating == frozenset()


REPEATS = {
    "word": (["yes", "no"] * 1024, True),
    "null": ([None] * 2048, False),
    "rare": ([i // 16 for i in range(2048)], True),
    "often": ([i // 15 for i in range(2048)], False),
    "id": (list(range(2048)), False),
    "list": ([[1]] * 2048, False),
    "struct": ([{"a": 1}] * 2048, False),
}


@pytest.mark.parametrize("name", REPEATS)
def test_a_column_repeats_if_each_value_comes_sixteen_times(tmp_path: Path, name: str) -> None:
    values, does = REPEATS[name]
    pq.write_table(pa.table({name: pa.array(values)}), tmp_path / "a.parquet")
    assert survey(find_files(str(tmp_path))).repeating == ({name} if does else set())


@pytest.mark.parametrize("rows", [1023, 1024])
def test_few_rows_do_not_tell_whether_a_column_repeats(tmp_path: Path, rows: int) -> None:
    pq.write_table(pa.table({"c": ["x"] * rows}), tmp_path / "a.parquet")
    assert survey(find_files(str(tmp_path))).repeating == ({"c"} if rows == 1024 else set())


def test_a_column_repeats_only_if_it_does_so_in_every_file(tmp_path: Path) -> None:
    for name, values in (("a", [1, 2] * 1024), ("b", list(range(2048))), ("c", [1, 2] * 1024)):
        pq.write_table(pa.table({"c": values, "d": [0] * 2048}), tmp_path / f"{name}.parquet")
    assert survey(find_files(str(tmp_path))).repeating == {"d"}


@pytest.mark.parametrize("engine", [INLINE, Threads(2)], ids=["inline", "threads"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, engine: Engine) -> None:
    pq.write_table(pa.table({"c": list(range(1000))}), tmp_path / "good.parquet")
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-200])
    found = find_files(str(tmp_path))
    for look in (lambda: survey(found), lambda: survey_all(found, engine)):
        with pytest.raises(SourceError, match=r"bad\.parquet"):
            look()
    engine.close()


def test_json_of_all_depths_is_joined(tmp_path: Path) -> None:
    rows: list[Any] = [{"a": {"b": 1}}, {"a": {"c": [1.5]}}, {"a": None, "z": True}]
    found = written(tmp_path, {f"{i}.jsonl": json.dumps(row) + "\n" for i, row in enumerate(rows)})
    types = survey(found)
    assert types.schema.names == ["a", "z"]
    assert str(types.schema.field("z").type) == "bool"
    assert {field.name for field in types.schema.field("a").type} == {"b", "c"}
