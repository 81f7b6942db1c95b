import csv
import gzip
import io
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import SourceError
from marrow.data.sources import delimited
from marrow.data.sources.delimited import Tally
from marrow.data.sources.dialect import sniff, unique_names
from marrow.data.sources.file import SourceFile, compression_of
from marrow.data.sources.formats import read_file
from marrow.data.sources.streams import Broken, open_bytes

# A cell in which something may go wrong: quotes, delimiters, newlines, wide characters, blanks.
CELL = st.text(st.sampled_from("ab1 ,;\t|\"\n'\\é漢😀"), max_size=8)


def source_file(path: Path) -> SourceFile:
    return SourceFile(str(path), path.name, "csv", compression_of(path.name), path.stat().st_size)


def read(path: Path) -> tuple[list[tuple[str, ...]], list[int], list[Broken], Tally]:
    rows: list[tuple[str, ...]] = []
    lines: list[int] = []
    broken: list[Broken] = []
    tally = Tally()
    for records in read_file(source_file(path), tally, broken.append):
        rows += zip(*(column.to_pylist() for column in records.batch.columns), strict=True)
        lines += records.lines.tolist()
    assert tally.num_rows == len(rows) and tally.num_broken == len(broken)
    return rows, lines, broken, tally


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=30),
    st.sampled_from(",;\t|"),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([64, 1 << 20]),
)
def test_reads_what_the_csv_module_wrote(tmp_path_factory, rows, delimiter, ending, block_bytes):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=ending, escapechar=None)
        writer.writerow(["first", "second", "third"])
        writer.writerows(rows)
    # The dialect is given by three plain columns in the header; sniffing is tested on its own.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "BLOCK_BYTES", block_bytes)
        patch.setattr(
            delimited, "sniff", lambda *_: delimited.Dialect(delimiter, None, ("first", "second", "third"))
        )
        got, lines, broken, tally = read(path)
    expected = [row for row in rows if any(row)]
    assert got == expected
    assert broken == []
    assert tally.num_blank == len(rows) - len(expected)
    text = path.read_bytes().decode()
    physical = text.split("\n")
    for row, line in zip(got, lines, strict=True):
        rest = "\n".join(physical[line - 1 :])
        assert tuple(next(csv.reader(io.StringIO(rest, newline=""), delimiter=delimiter))) == row


@pytest.mark.parametrize("block_bytes", [32, 1 << 20])
def test_broken_rows_go_to_quarantine_with_their_line_and_the_rest_stays(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(delimited, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'a,b\n1,"x\ny"\n2\n3,z\n\n4,5,6\n7,\xff\n' + b"".join(b"%d,ok\n" % i for i in range(10, 30))
    )
    rows, lines, broken, tally = read(path)
    assert rows == [("1", "x\ny"), ("3", "z"), *((str(i), "ok") for i in range(10, 30))]
    assert lines == [2, 5, *range(9, 29)]
    assert [(b.line, b.text) for b in broken] == [(4, "2"), (7, "4,5,6"), (8, "7,\\xff")]
    assert broken[2].reason == "not UTF-8"
    assert tally.num_blank == 1


@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
@pytest.mark.parametrize("bad", [b'5,"never closed\n', b'"5,6\n', b'5,6,"seven\n'])
def test_a_quote_that_never_closes_costs_one_line(tmp_path, monkeypatch, block_bytes, bad):
    monkeypatch.setattr(delimited, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "a.csv"
    good = [(str(i), f"row {i}") for i in range(50)]
    lines = [f"{a},{b}\n".encode() for a, b in good]
    path.write_bytes(b"a,b\n" + b"".join(lines[:20]) + bad + b"".join(lines[20:]))
    rows, numbers, broken, _ = read(path)
    assert rows == good
    assert numbers == [*range(2, 22), *range(23, 53)]
    assert [b.line for b in broken] == [22]
    assert "never closed" in broken[0].reason


def test_an_open_quote_in_the_last_line_is_broken_but_a_closed_one_over_lines_is_not(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,x\n2,"y\nz"\n')
    assert read(path)[0] == [("1", "x"), ("2", "y\nz")]
    path.write_text('a,b\n1,x\n2,y\n3,"z\n4,w\n')
    rows, lines, broken, _ = read(path)
    assert rows == [("1", "x"), ("2", "y"), ("4", "w")]
    assert lines == [2, 3, 5]
    assert [b.line for b in broken] == [4]
    path.write_text('a,b\n1,x\n1,x\n2,"y\nz ""')  # ends in a doubled quote: still open
    rows, _, broken, _ = read(path)
    assert (rows, [b.line for b in broken]) == ([("1", "x")] * 2, [4, 5])
    path.write_text('a,b\n1,x\n2,"y\nz """')  # and here the third one closes
    assert read(path)[0] == [("1", "x"), ("2", 'y\nz "')]


def test_a_record_larger_than_a_block_is_read_and_one_above_the_limit_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr("marrow.data.sources.delimited.MAX_RECORD_BYTES", 1 << 15)
    path = tmp_path / "a.csv"
    big, huge = "x\n" * 5000, "y" * (1 << 16)
    path.write_text(f'a,b\n1,"{big}"\n2,"{huge}"\n3,z\n4,w\n')
    rows, lines, broken, _ = read(path)
    assert rows == [("1", big), ("3", "z"), ("4", "w")]
    assert lines == [2, 5004, 5005]
    assert [b.line for b in broken] == [5003]


def test_more_broken_than_whole_rows_is_an_error_with_the_dialect(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n" + "x\n" * 5)
    with pytest.raises(SourceError, match=r"5 of 6 rows are broken .*','") as caught:
        read(path)
    assert "delimiter" in str(caught.value.hint)


def test_half_a_gzip_file_is_an_error(tmp_path):
    path = tmp_path / "a.csv.gz"
    body = "".join(f"{i},{random.Random(i).random()}\n" for i in range(20_000))
    whole = gzip.compress(("a,b\n" + body).encode())
    path.write_bytes(whole)
    assert len(read(path)[0]) == 20_000
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="no whole gzip"):
        read(path)


@pytest.mark.parametrize(
    ("encoding", "mark"), [("utf-8", b"\xef\xbb\xbf"), ("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff")]
)
def test_byte_order_marks_are_understood(tmp_path, encoding, mark):
    path = tmp_path / "a.csv"
    path.write_bytes(mark + "naïve,b\n1,é\n2,漢\n".encode(encoding))
    with open_bytes(source_file(path)) as stream:
        assert sniff(source_file(path), stream).names == ("naïve", "b")
    assert read(path)[0] == [("1", "é"), ("2", "漢")]


@pytest.mark.parametrize("delimiter", list(",;\t|"))
def test_the_delimiter_is_found_even_when_others_are_in_the_text(tmp_path, delimiter):
    path = tmp_path / "a.csv"
    others = "".join(d for d in ",;\t|" if d != delimiter)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["name", "text", "n"])
        writer.writerows([f"n{i}", f"some text{others[i % 3] * (i % 4)} and more", i] for i in range(20))
    with open_bytes(source_file(path)) as stream:
        assert sniff(source_file(path), stream).delimiter == delimiter
    assert len(read(path)[0]) == 20


def test_backslash_escapes_are_understood(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,"she said \\"no\\", twice"\n2,"x\\"y"\n')
    assert read(path)[0] == [("1", 'she said "no", twice'), ("2", 'x"y')]


def test_a_nul_byte_is_data_not_an_end(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"a,b\n1,x\0y\n2,z\n")
    assert read(path)[0] == [("1", "x\0y"), ("2", "z")]


@pytest.mark.parametrize("content", [b"\n\n \n", b",,\n,,\n", b"a,b\n", b"a,b", b"\n\na,b\n\n"])
def test_a_file_without_rows_gives_none(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    assert read(path)[:3] == ([], [], [])


@given(st.lists(st.text(st.sampled_from("ab_2 "), max_size=4), max_size=10))
def test_column_names_become_unique_and_stay_where_they_can(names):
    unique = unique_names(names)
    assert len(set(unique)) == len(names) == len(unique)
    assert all(unique)
    for name, given_name in zip(unique, names, strict=True):
        if given_name.strip() and [n.strip() for n in names].count(given_name.strip()) == 1:
            assert name == given_name.strip() or name.startswith(given_name.strip() + "_")
