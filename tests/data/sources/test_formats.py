"""Reading each format: what other makers write, files that differ, files that are broken."""

import datetime
import decimal
import gzip
import json
import random
import struct
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import SourceError
from marrow.data.sources import formats
from marrow.data.sources.delimited import Tally
from marrow.data.sources.formats import read_file
from marrow.data.sources.listing import find_files
from marrow.data.sources.streams import Broken

TEXT = pa.string()
NOON = datetime.datetime(2024, 1, 2, 12, 0, 0)
DAY = datetime.date(2024, 1, 2)


def put(path: Path, content: pa.Table | bytes | str) -> Path:
    """Write a file as its name says."""
    if isinstance(content, pa.Table) and path.suffix == ".parquet":
        pq.write_table(content, path)
    elif isinstance(content, pa.Table):
        with pa.ipc.new_file(str(path), content.schema) as file:
            file.write_table(content)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def column(values: list[object], kind: pa.DataType | None = None) -> pa.Table:
    return pa.table({"c": pa.array(values, kind)})


def read(path: Path, format: str = "auto") -> tuple[list[dict[str, object]], list[int], list[Broken]]:
    rows: list[dict[str, object]] = []
    lines: list[int] = []
    broken: list[Broken] = []
    for chunk in read_file(find_files(str(path), format).files[0], Tally(), broken.append):
        rows += chunk.batch.to_pylist()
        lines += chunk.lines.tolist()
    return rows, lines, broken


def wrong_text(kind: pa.DataType = TEXT) -> pa.Array:
    """Three texts, of which the second is no UTF-8, as a careless maker writes them."""
    binary = pa.array(
        [b"good", b"bad \xff", b"fine"], pa.binary() if kind == pa.string() else pa.large_binary()
    )
    return pa.Array.from_buffers(kind, 3, binary.buffers())


# Columns that differ between two files


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("one", "other", "kind", "values"),
    [
        (column([1], pa.int8()), column([2**40]), "int64", [1, 2**40]),
        (column([1]), column([0.5]), "double", [1.0, 0.5]),
        (column([2**53 + 1]), column([0.5]), "string", ["9007199254740993", "0.5"]),
        (column([2**64 - 1], pa.uint64()), column([-1]), "string", ["18446744073709551615", "-1"]),
        (column([2**63 - 1], pa.uint64()), column([-1]), "int64", [2**63 - 1, -1]),
        (column([1]), column(["x"]), "string", ["1", "x"]),
        (column([True]), column([7]), "string", ["true", "7"]),
        (column([None]), column([7]), "int64", [None, 7]),
        (
            column([DAY]),
            column([NOON], pa.timestamp("us")),
            "string",
            ["2024-01-02", "2024-01-02 12:00:00.000000"],
        ),
        (
            column([NOON], pa.timestamp("ms")),
            column([NOON], pa.timestamp("us")),
            "timestamp[us]",
            [NOON, NOON],
        ),
        (
            column([NOON], pa.timestamp("us", "UTC")),
            column([NOON], pa.timestamp("us")),
            "string",
            ["2024-01-02 12:00:00.000000Z", "2024-01-02 12:00:00.000000"],
        ),
        (
            column([decimal.Decimal("12345678901234567890.5")]),
            column([0.5]),
            "string",
            ["12345678901234567890.5", "0.5"],
        ),
        (
            column([decimal.Decimal("1.50")], pa.decimal128(10, 2)),
            column([2**53 + 1]),
            "string",
            ["1.50", "9007199254740993"],
        ),
        (column([b"\xff\0"]), column(["x"]), "binary", [b"\xff\0", b"x"]),
        (column([b"abc"]), column([7]), "string", ["abc", "7"]),
        (column([[1]]), column([[0.5]]), "list<item: double>", [[1.0], [0.5]]),
        (column([[1]]), column([["x"]]), "string", ["[1]", '["x"]']),
        (column([{"x": 1}]), column([[1]]), "string", ['{"x": 1}', "[1]"]),
        (
            column(["a"], pa.dictionary(pa.int8(), pa.string())),
            column(["b"], pa.large_string()),
            "string",
            ["a", "b"],
        ),
    ],
)
def test_files_whose_columns_differ_lose_no_value(tmp_path, read_rows, one, other, kind, values, swap):
    source = tmp_path / "s"
    source.mkdir()
    put(source / "a.arrow", other if swap else one)
    put(source / "b.arrow", one if swap else other)
    table, facts = read_rows(source)
    assert facts["columns"] == {"c": kind}
    assert table["c"].to_pylist() == (values[::-1] if swap else values)


@pytest.mark.parametrize(
    ("files", "column_b"),
    [
        (
            {"a.csv": "a,b\n1,x\n", "b.parquet": pa.table({"b": ["y"]}), "c.jsonl": '{"a": 3}\n'},
            ["x", "y", None],
        ),
        (
            {"a.parquet": pa.table({"b": [1.5]}), "b.csv": "b\nnone\n", "c.jsonl": '{"b": true}\n'},
            ["1.5", "none", "true"],
        ),
        (
            {"a.jsonl": '{"b": 1}\n', "b.jsonl": '{"b": [1]}\n', "c.jsonl": '{"b": {"k": null}}\n'},
            ["1", "[1]", '{"k": null}'],
        ),
        (
            {"a.csv": "b\n16000000000000001\n", "b.csv": "b\n0.5\n", "c.csv": "b\nNA\n"},
            ["16000000000000001", "0.5", "NA"],
        ),
        ({"a.csv": "b\n007\n", "b.csv": "b\n8\n", "c.csv": "b\n\n9\n"}, ["007", "8", "9"]),
    ],
)
def test_formats_mix_in_one_folder(tmp_path, read_rows, files, column_b):
    source = tmp_path / "s"
    source.mkdir()
    for name, content in files.items():
        put(source / name, content)
    assert read_rows(source)[0]["b"].to_pylist() == column_b


def test_several_columns_that_need_text_all_become_text_and_the_others_stay(tmp_path, read_rows):
    source = tmp_path / "s"
    source.mkdir()
    big = 2**53 + 1
    put(source / "a.jsonl", json.dumps({"p": big, "q": big, "r": 1, "s": "t"}) + "\n")
    put(source / "b.jsonl", '{"p": 0.5, "q": 1.5, "r": 2.5, "s": "u"}\n{"p": \n')
    table, facts = read_rows(source)
    assert facts["columns"] == {"p": "string", "q": "string", "r": "double", "s": "string"}
    assert table["q"].to_pylist() == [str(big), "1.5"]
    assert (facts["rows"], facts["broken_rows"]) == (2, 1)
    assert len((tmp_path / "rows-0" / "quarantine.jsonl").read_text().splitlines()) == 1


# JSON lines


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": ', "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"7", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a": 1} {"a": 2}', "not JSON: Extra data"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": "x\0y"}', "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\\ud800"}', "not UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "not JSON"),
        (b'\x00{"a": 1}', "not JSON"),
        (b'{"a": 01}', "not JSON"),
    ],
)
def test_a_broken_line_is_told_with_its_number_and_the_rest_stays(tmp_path, line, reason):
    path = put(tmp_path / "a.jsonl", b'{"a": 1}\n\n' + line + b'\n{"a": 2}\r\n{}\n{"a": 3}')
    rows, lines, broken = read(path)
    assert (rows, lines) == ([{"a": 1}, {"a": 2}, {"a": 3}], [1, 4, 6])
    assert [(b.line, b.file) for b in broken] == [(3, "a.jsonl")]
    assert broken[0].reason.startswith(reason)
    assert len(broken[0].text) <= 1000


@pytest.mark.parametrize(
    "values",
    [
        [1, "x", None, 2.5, True],
        [[1, "x"], [2]],
        [{"k": 1}, {"k": "v"}],
        [{}, {"k": 1}],
        [10**22, 1],
        [2**53 + 1, 0.5],
        [[[]], [[{}]]],
        ["é漢😀", "nul \0 inside"],
        [-(2**63), 2**63 - 1],
        [2**63, 1],
        [{"a": {"b": {"c": [1, {"d": "e"}]}}}, {"a": None}],
        ["2024-01-02", "007"],
    ],
)
def test_nested_and_mixed_values_come_back_as_they_were(tmp_path, read_rows, values):
    put(tmp_path / "a.jsonl", "".join(json.dumps({"a": value}) + "\n" for value in values))
    table, _ = read_rows(tmp_path / "a.jsonl")
    got = [
        json.loads(g) if isinstance(g, str) and not isinstance(v, str) else g
        for g, v in zip(table["a"].to_pylist(), values, strict=True)
    ]
    if not pa.types.is_nested(table.schema.field("a").type):
        assert got == values
    else:  # a struct gives each row all keys of the column
        assert json.loads(json.dumps(got), object_hook=_filled) == json.loads(
            json.dumps(values), object_hook=_filled
        )


def _filled(value: dict[str, object]) -> dict[str, object]:
    return {k: v for k, v in value.items() if v is not None}


@pytest.mark.parametrize("depth", [1, 12, 30, 200, 600])
def test_deep_nesting_is_written_so_that_it_can_be_read(tmp_path, read_rows, depth):
    text = "[" * depth + "1" + "]" * depth
    put(tmp_path / "a.jsonl", f'{{"a": {text}}}\n{{"a": []}}\n')
    table, facts = read_rows(tmp_path / "a.jsonl")
    value = table["a"].to_pylist()[0]
    assert (value if isinstance(value, str) else json.dumps(value)) == text
    assert (facts["columns"]["a"] == "string") == (depth > 16)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([b'{"a": 1}', b'{"a": "x"}', b"", b"  ", b"{}", b"{", b"[]", b"\xff", b"\0"])),
    st.sampled_from([b"\n", b"\r\n"]),
    st.sampled_from([1, 3, 4096]),
)
def test_every_line_is_a_row_or_broken_or_blank(tmp_path_factory, lines, ending, batch_rows):
    path = tmp_path_factory.mktemp("j") / "a.jsonl"
    put(path, b'{"a": 0}' + ending + ending.join(lines))
    broken: list[Broken] = []
    tally = Tally()
    numbers: list[int] = []
    is_refused = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "BATCH_ROWS", batch_rows)
        try:
            for chunk in read_file(find_files(str(path)).files[0], tally, broken.append):
                assert chunk.batch.num_rows <= batch_rows
                numbers += chunk.lines.tolist()
        except SourceError:
            is_refused = True
    assert is_refused == (tally.num_broken > tally.num_rows)
    good = [i for i, line in enumerate(lines, 2) if line.startswith(b'{"a')]
    assert numbers == [1, *good]
    assert [b.line for b in broken] == [
        i for i, line in enumerate(lines, 2) if line in (b"{", b"[]", b"\xff", b"\0")
    ]


# Parquet and Arrow


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-7],
        lambda data: data[:4],
        lambda data: data[:12],
        lambda data: b"PAR2" + data[4:-6] + b"WRONG2",
        lambda data: b"not a table at all\n" * 9,
        lambda data: b"\0" * len(data),
        lambda data: data[len(data) // 2 :],
        lambda data: data[:40] + b"\xff" * 200,
    ],
    ids=[
        "half",
        "without end",
        "magic alone",
        "12 bytes",
        "magic",
        "text",
        "zeros",
        "second half",
        "overwritten",
    ],
)
def test_a_damaged_table_is_a_source_error_that_names_the_file(tmp_path, read_rows, damage, suffix):
    rng = random.Random(0)
    table = pa.table({"c": [rng.randbytes(8).hex() for _ in range(5000)], "n": range(5000)})
    path = put(tmp_path / f"a{suffix}", table)
    assert read_rows(path)[1]["rows"] == 5000
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SourceError) as caught:
        read_rows(path)
    assert path.name in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: wrong_text(),
        lambda: wrong_text(pa.large_string()),
        lambda: pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), wrong_text()),
        lambda: pa.StructArray.from_arrays([wrong_text()], names=["t"]),
    ],
    ids=["text", "large", "list", "struct"],
)
def test_text_that_is_no_utf8_is_a_broken_row_however_deep(tmp_path, make, suffix):
    path = put(tmp_path / f"a{suffix}", pa.table({"c": make(), "n": [1, 2, 3]}))
    rows, lines, broken = read(path)
    assert lines == [1, 3]
    assert [row["n"] for row in rows] == [1, 3]
    assert [(b.line, b.reason) for b in broken] == [(2, "text that is not UTF-8")]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([pa.MonthDayNano([1, 2, 3])]),
        pa.array([{}], pa.struct([])),
        pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array(["a"])),
        pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1]), pa.array(["x"])]),
    ],
    ids=["interval", "empty struct", "run ends", "union"],
)
def test_a_type_without_a_form_in_parquet_is_refused_before_rows_are_written(tmp_path, read_rows, values):
    path = put(tmp_path / "a.arrow", pa.table({"c": values}))
    with pytest.raises(SourceError, match=r"a\.arrow"):
        read_rows(path)


def test_a_dictionary_with_a_wrong_text_costs_the_rows_that_have_it(tmp_path):
    indices = pa.array([0, 1, 2, 1, 0], pa.int8())
    table = pa.table({"c": pa.DictionaryArray.from_arrays(indices, wrong_text())})
    rows, lines, broken = read(put(tmp_path / "a.arrow", table))
    assert (rows, lines) == ([{"c": "good"}, {"c": "fine"}, {"c": "good"}], [1, 3, 5])
    assert [b.line for b in broken] == [2, 4]


def test_offsets_that_point_outside_are_an_error_and_no_crash(tmp_path):
    path = put(tmp_path / "a.arrow", column(["good", "bye", "now"]))
    offsets, wrong = struct.pack("<4i", 0, 4, 7, 10), struct.pack("<4i", 0, 4, 1 << 30, 10)
    data = path.read_bytes()
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, wrong))
    with pytest.raises(SourceError, match=r"a\.arrow"):
        read(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_large_batches_are_cut_and_numbered_through(tmp_path, suffix):
    path = put(tmp_path / f"a{suffix}", pa.table({"n": range(10_000)}))
    file = find_files(str(path)).files[0]
    chunks = list(read_file(file, Tally(), lambda _: None))
    assert max(chunk.batch.num_rows for chunk in chunks) <= formats.BATCH_ROWS
    assert [line for chunk in chunks for line in chunk.lines.tolist()] == list(range(1, 10_001))
    assert [n for chunk in chunks for n in chunk.batch.column("n").to_pylist()] == list(range(10_000))


# Text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab é\r"), max_size=12), max_size=40), st.integers(4, 64))
def test_text_is_cut_into_rows_that_join_to_the_file(tmp_path_factory, lines, row_bytes):
    text = "x" + "\n".join(lines)
    path = put(tmp_path_factory.mktemp("t") / "a.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "TEXT_ROW_BYTES", row_bytes)
        rows, numbers, broken = read(path)
    assert "".join(str(row["text"]) for row in rows) == text
    assert broken == []
    whole = text.split("\n")
    for row, number in zip(rows, numbers, strict=True):
        assert "\n".join(whole[number - 1 :]).startswith(str(row["text"]))
    assert all(len(str(row["text"]).encode()) < 2 * row_bytes + 40 for row in rows)


def test_a_wrong_byte_in_text_is_told_with_its_line(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "TEXT_ROW_BYTES", 8)
    path = put(tmp_path / "a.txt", b"one one\n\ntwo two\n\nthree\nx\xffy\n\nfour four\n\nnul \0 is text\n")
    rows, lines, broken = read(path)
    assert [str(row["text"]).split()[0] for row in rows] == ["one", "two", "four", "nul"]
    assert lines == [1, 3, 8, 10]
    assert [(b.line, b.reason) for b in broken] == [(6, "not UTF-8")]


# Any format


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", '{"text": "é😀"}\n'), ("a.txt", "é😀"), ("a.csv", "text\né😀\n")]
)
def test_byte_order_marks_are_understood_in_every_text_format(tmp_path, name, text, encoding):
    rows, _, broken = read(put(tmp_path / name, text.encode(encoding)))
    assert (rows, broken) == ([{"text": "é😀"}], [])


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
@pytest.mark.parametrize(
    "rest", [b"x", b"\x00\xd8", b"\x00\xd8x\x00"], ids=["odd", "half pair", "lone surrogate"]
)
def test_utf16_cut_short_costs_the_row_that_is_cut(tmp_path, read_rows, name, rest):
    body, last = {"a.csv": ("a,b\n1,2\n", "1,"), "a.jsonl": ('{"a": 1}\n', '{"a": "')}[name]
    path = put(tmp_path / name, (body * 1000 + last).encode("utf-16") + rest)
    _, facts = read_rows(path)
    assert facts["broken_rows"] == 1
    assert json.loads((tmp_path / "rows-0" / "quarantine.jsonl").read_text())["reason"] == "not UTF-16"


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz", "a.txt.gz"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_gzip_cut_short_anywhere_is_a_source_error(tmp_path, read_rows, name, share):
    rng = random.Random(1)
    line = '{{"a": {0}}}\n' if "jsonl" in name else "{0},x\n"
    body = "a,b\n" * ("csv" in name) + "".join(line.format(rng.getrandbits(40)) for _ in range(5_000))
    whole = gzip.compress(body.encode(), mtime=0)
    path = put(tmp_path / name, whole)
    assert read_rows(path)[1]["rows"] >= 1
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(SourceError, match="no whole gzip"):
        read_rows(path)


def test_files_of_no_row_stand_among_others_and_unknown_ones_are_counted(tmp_path, read_rows):
    source = tmp_path / "s"
    (source / "deep").mkdir(parents=True)
    for name, content in {
        "a.parquet": column([], pa.int64()),
        "b.arrow": column([], pa.string()),
        "c.csv": "c\n",
        "d.jsonl": "\n\n",
        "e.parquet": b"",
        "f.arrow": b"",
        "g.txt": "",
        "h.arrow": pa.table({}),
        "deep/i.csv": "c\n5\n",
        "image.png": b"\x89PNG",
        "noname": "c\n9\n",
        ".hidden.csv": "c\n9\n",
        "j.csv.bak": "c\n9\n",
    }.items():
        put(source / name, content)
    table, facts = read_rows(source)
    assert table.select(["_file", "_row"]).to_pylist() == [{"_file": "deep/i.csv", "_row": 2}]
    assert table["c"].to_pylist() in ([5], ["5"])
    assert (facts["files"], facts["empty_files"]) == (9, 8)
    assert facts["skipped_files"] == {".bak": 1, ".png": 1, "no suffix": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.parquet", column([], pa.int64())), ("a.arrow", column([])), ("a.jsonl", "\n{}\n")],
)
def test_a_source_of_no_row_at_all_is_an_error(tmp_path, read_rows, name, content):
    with pytest.raises(SourceError, match="has no row"):
        read_rows(put(tmp_path / name, content))


def test_provenance_is_right_after_quarantined_rows_in_every_format(tmp_path, read_rows):
    source = tmp_path / "s"
    source.mkdir()
    bad = {2, 3, 7}
    ok = [n for n in range(1, 11) if n not in bad]
    put(source / "a.csv", "t\n" + "".join("x,y\n" if n in bad else f"r{n}\n" for n in range(1, 11)))
    put(source / "b.jsonl", "".join("{\n" if n in bad else f'{{"t": "r{n}"}}\n' for n in range(1, 11)))
    texts = pa.array([b"\xff" if n in bad else f"r{n}".encode() for n in range(1, 11)])
    text = pa.Array.from_buffers(pa.string(), 10, texts.buffers())
    put(source / "c.parquet", pa.table({"t": text}))
    table, facts = read_rows(source)
    assert facts["broken_rows"] == 9
    for name, first in (("a.csv", 2), ("b.jsonl", 1), ("c.parquet", 1)):
        rows = [row for row in table.to_pylist() if row["_file"] == name]
        assert [(row["t"], row["_row"]) for row in rows] == [(f"r{n}", n + first - 1) for n in ok]


def test_memory_is_bounded_by_the_batch_and_not_by_the_file(tmp_path):
    """16 MB of JSON lines at less than 8 MB of Python objects: a batch is 1 MiB of text."""
    path = tmp_path / "a.jsonl"
    line = b'{"a": "' + b"x" * 1000 + b'"}\n'
    path.write_bytes(line * 16_000)
    file = find_files(str(path)).files[0]
    tracemalloc.start()
    try:
        num_rows = sum(chunk.batch.num_rows for chunk in read_file(file, Tally(), lambda _: None))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_rows == 16_000
    assert peak < 8e6
