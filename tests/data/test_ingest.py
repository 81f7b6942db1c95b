"""Sources to rows: every format, broken input, types over files, provenance, equal bytes."""

import csv
import gzip
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import NotPermitted, SourceError
from marrow.data.config import DataRecipe
from marrow.data.ingest import ingest

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xy"), inner, max_size=2),
    max_leaves=4,
)


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_numbers_equal_what_pyarrow_reads_directly(tmp_path, read_rows):
    path = tmp_path / "a.csv"
    rng = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["i", "f", "t"])
        writer.writerows([rng.randrange(10**6), rng.random(), f'text "{i}",\nmore'] for i in range(3000))
    got, _ = read_rows(path)
    peer = pacsv.read_csv(path, parse_options=pacsv.ParseOptions(newlines_in_values=True))
    assert got.select(["i", "f", "t"]).cast(peer.schema).equals(peer)


def test_rows_are_found_again_in_their_files(tmp_path, read_rows):
    source = tmp_path / "source"
    source.mkdir()
    with (source / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "text"])
        writer.writerows((f"csv{i}", "line\n" * (i % 4) + "end") for i in range(100))
    (source / "b.jsonl").write_text("".join(f'{{"name": "jsonl{i}", "text": "x"}}\n\n' for i in range(100)))
    pq.write_table(pa.table({"name": [f"parquet{i}" for i in range(100)]}), source / "c.parquet")
    (source / "d.txt").write_text("".join(f"name {i} is here\n\n" for i in range(20_000)))
    table, facts = read_rows(source)
    assert facts["files"] == 4
    for row in table.to_pylist():
        path = source / row["_file"]
        if path.suffix == ".parquet":
            assert pq.read_table(path)["name"][row["_row"] - 1].as_py() == row["name"]
            continue
        line = path.read_text().split("\n")[row["_row"] - 1]
        assert (row["name"] or row["text"].split("\n")[0]) in line
    pieces = [row["text"] for row in table.to_pylist() if row["_file"] == "d.txt"]
    assert "".join(pieces) == (source / "d.txt").read_text()
    assert len(pieces) > 4


def test_files_of_all_formats_hold_the_same_rows(tmp_path, read_rows):
    table = pa.table(
        {"n": [1, 2, 3], "f": [0.5, 1.5, -2.0], "t": ["a", 'b "x"', "ü\nz"], "b": [True, False, True]}
    )
    pacsv.write_csv(table, tmp_path / "a.csv")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    pq.write_table(table, tmp_path / "c.parquet")
    feather.write_feather(table, tmp_path / "d.feather")
    with pa.ipc.new_stream(str(tmp_path / "e.arrow"), table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "f.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    for path in sorted(tmp_path.glob("?.*")):
        got, _ = read_rows(path)
        assert got.select(table.schema.names).equals(table), path


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["a", "b", "c"]), JSON, max_size=3), max_size=8))
def test_no_value_of_json_lines_is_lost(tmp_path_factory, objects):
    folder = tmp_path_factory.mktemp("j")
    (folder / "a.jsonl").write_text("".join(json.dumps(o) + "\n" for o in [*objects, {"a": 1}, {}]))
    (folder / "out").mkdir()
    ingest(DataRecipe(source=str(folder / "a.jsonl")), folder / "out")
    rows = pq.read_table(folder / "out" / "rows-00000.parquet").to_pylist()
    for row, expected in zip(rows, [*(o for o in objects if o), {"a": 1}], strict=True):
        for name, value in expected.items():
            got = row[name]
            if isinstance(got, str) and not isinstance(value, str):
                got = json.loads(got)
            assert without_nulls(got) == without_nulls(value)


def without_nulls(value):
    """A struct column gives every row all keys of the column; a null stands for a missing one."""
    if isinstance(value, dict):
        return {
            k: without_nulls(v) for k, v in value.items() if v is not None and without_nulls(v) != {}
        } or None
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def test_a_mixed_folder_joins_columns_and_types(tmp_path, read_rows):
    source = tmp_path / "s"
    source.mkdir()
    (source / "a.csv").write_text("id,text\n1,x\n2,y\n")
    (source / "b.csv").write_text("id,extra\n1.5,p\n")
    (source / "c.jsonl").write_text('{"text": "z", "flag": true}\n')
    table, facts = read_rows(source)
    assert facts["columns"] == {"id": "double", "text": "string", "extra": "string", "flag": "bool"}
    assert table["id"].to_pylist() == [1.0, 2.0, 1.5, None]
    assert table["text"].to_pylist() == ["x", "y", None, "z"]
    assert table["flag"].to_pylist() == [None, None, None, True]


@pytest.mark.parametrize("late", ["late word", "1.5", "007"])
def test_a_type_that_changes_late_in_the_file_loses_no_value(tmp_path, read_rows, late):
    path = tmp_path / "a.csv"
    filler = "x" * 80
    lines = [f"{i},{filler}" for i in range(40_000)] + [f"{late},{filler}"]
    path.write_text("n,t\n" + "\n".join(lines) + "\n")
    table, _ = read_rows(path)
    values = table["n"].to_pylist()
    assert len(values) == 40_001
    assert str(values[-1]) == late
    assert float(values[39_999]) == 39_999


def test_a_column_that_comes_late_is_taken_up(tmp_path, read_rows):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' * 10_000 + '{"a": "x", "b": [1]}\n')
    table, _ = read_rows(path)
    assert table["a"].to_pylist()[-2:] == ["1", "x"]
    assert table["b"].to_pylist()[-2:] == [None, [1]]


def test_broken_rows_are_counted_and_quarantined_never_silently_gone(tmp_path, read_rows):
    source = tmp_path / "s"
    source.mkdir()
    good = "".join(f"{i},ok\n" for i in range(20))
    (source / "a.csv").write_bytes(b"a,b\n1\n" + good.encode() + b"2,\xff\xfe\n")
    (source / "b.jsonl").write_bytes(
        b'{"a": 1}\n{"a": \n[1]\n{"a": "\xff"}\n{"a": "\\ud800"}\n' + b'{"a": 2}\n' * 9
    )
    table, facts = read_rows(source)
    assert facts["broken_rows"] == 6
    assert facts["rows"] == table.num_rows == 20 + 10
    lines = (tmp_path / "rows-0" / "quarantine.jsonl").read_text().splitlines()
    assert [(b["file"], b["line"]) for b in map(json.loads, lines)] == [
        ("a.csv", 2), ("a.csv", 23), ("b.jsonl", 2), ("b.jsonl", 3), ("b.jsonl", 4), ("b.jsonl", 5),
    ]  # fmt: skip
    assert all(json.loads(line)["reason"] for line in lines)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl", "a.csv.gz", "a.txt.gz"])
def test_a_damaged_file_is_an_error_with_a_hint(tmp_path, read_rows, name):
    (tmp_path / name).write_bytes(b"PAR1 this is nothing of the kind\n" * 10)
    with pytest.raises(SourceError) as caught:
        read_rows(tmp_path / name)
    assert name in str(caught.value)
    assert caught.value.hint


def test_a_torn_parquet_and_a_torn_gzip_are_errors(tmp_path, read_rows):
    pq.write_table(pa.table({"a": list(range(10_000))}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl.gz").write_bytes(
        gzip.compress(b"".join(b'{"a": %d}\n' % (i * 7919) for i in range(90_000)), compresslevel=1)
    )
    for name in ("a.parquet", "b.jsonl.gz"):
        data = (tmp_path / name).read_bytes()
        assert read_rows(tmp_path / name)[1]["rows"] > 9000
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(SourceError):
            read_rows(tmp_path / name)


def test_one_json_array_is_refused_with_the_way_out(tmp_path, read_rows):
    (tmp_path / "a.json").write_text('[\n{"a": 1},\n{"a": 2}\n]')
    with pytest.raises(SourceError, match="one JSON array"):
        read_rows(tmp_path / "a.json")


def test_text_that_another_maker_wrote_wrongly_is_a_broken_row(tmp_path, read_rows):
    binary = pa.array([b"good", b"bad \xff", None, b"fine"])
    text = pa.Array.from_buffers(pa.string(), 4, binary.buffers())
    columns = pa.Table.from_arrays([text, pa.array([1, 2, 3, 4]), text], names=["t", "n", "t"])
    pq.write_table(columns, tmp_path / "a.parquet")
    table, facts = read_rows(tmp_path / "a.parquet")
    assert facts["broken_rows"] == 1
    assert table.select(["t", "n", "t_2", "_row"]).to_pylist() == [
        {"t": t, "n": n, "t_2": t, "_row": n} for t, n in (("good", 1), (None, 3), ("fine", 4))
    ]


def test_empty_files_among_others_are_counted(tmp_path, read_rows):
    source = tmp_path / "s"
    source.mkdir()
    for name, text in {
        "a.csv": "",
        "b.csv": "\n\n",
        "c.csv": "t\n",
        "d.csv": "t\nx\n",
        "e.jsonl": "{}\n",
    }.items():
        (source / name).write_text(text)
    table, facts = read_rows(source)
    assert (table.num_rows, facts["files"], facts["empty_files"]) == (1, 5, 4)


def test_progress_ends_at_the_whole(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("n,t\n" + "".join(f"{i},{'x' * 90}\n" for i in range(60_000)))
    (tmp_path / "out").mkdir()
    seen: list[tuple[float, float | None]] = []
    ingest(DataRecipe(source=str(path)), tmp_path / "out", lambda done, total, *_: seen.append((done, total)))
    assert len(seen) > 4
    assert seen == sorted(seen)
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)


def test_only_a_header_is_no_row(tmp_path, read_rows):
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(SourceError, match="has no row"):
        read_rows(tmp_path / "a.csv")


def test_own_columns_named_like_provenance_are_kept_under_another_name(tmp_path, read_rows):
    (tmp_path / "a.csv").write_text("_file,_row,t\nf,7,x\n")
    table, facts = read_rows(tmp_path / "a.csv")
    assert facts["renamed_columns"] == {"_file": "file_original", "_row": "row_original"}
    assert table.to_pylist() == [
        {"file_original": "f", "row_original": 7, "t": "x", "_file": "a.csv", "_row": 2}
    ]


def test_two_runs_give_equal_bytes(tmp_path):
    source = tmp_path / "s"
    source.mkdir()
    (source / "a.csv").write_text("a,b\n1\n" + "".join(f"{i},text {i}\n" for i in range(5000)))
    (source / "b.txt").write_text("some text\n\n" * 20_000)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        ingest(DataRecipe(source=str(source), row_group_bytes=1 << 16), tmp_path / name)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert pq.ParquetFile(tmp_path / "one" / "rows-00000.parquet").num_row_groups > 3


@pytest.mark.slow
def test_the_documentation_gives_equal_bytes_in_another_process(tmp_path, stdlib_rows):
    program = (
        "from pathlib import Path; from marrow.data.config import DataRecipe\n"
        "from marrow.data.ingest import ingest\n"
        f"ingest(DataRecipe(), Path({str(tmp_path)!r}))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONHASHSEED": "7", "PATH": ""})
    assert digest(tmp_path) == digest(stdlib_rows)


def test_an_output_folder_that_may_not_be_written_is_said(tmp_path):
    (tmp_path / "a.csv").write_text("a\nx\n")
    with pytest.raises((NotPermitted, SourceError), match="cannot write rows"):
        ingest(DataRecipe(source=str(tmp_path / "a.csv")), tmp_path / "missing")


@pytest.mark.slow
def test_memory_stays_bounded_whatever_the_size(tmp_path):
    """200 MB of CSV in under 400 MB, in a process of its own."""
    line = "x" * 90
    with (tmp_path / "a.csv").open("w") as file:
        file.write("n,t\n")
        for i in range(2_000_000):
            file.write(f"{i},{line}\n")
    program = (
        "import re, resource, sys; from pathlib import Path\n"
        "from marrow.data.config import DataRecipe\n"
        "from marrow.data.ingest import ingest\n"
        f"out = Path({str(tmp_path)!r}) / 'out'; out.mkdir()\n"
        f"facts = ingest(DataRecipe(source={str(tmp_path / 'a.csv')!r}), out)\n"
        "assert facts['rows'] == 2_000_000\n"
        # On Linux ru_maxrss begins with the peak of the process that started this one; VmHWM does not.
        "status = Path('/proc/self/status')\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]) * 1024 if status.exists()\n"
        "      else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 400e6
