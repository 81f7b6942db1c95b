"""Finding the way back after broken rows: a brute-force reading with the csv module is the oracle."""

import csv
import io
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from marrow.data.sources import delimited
from marrow.data.sources.delimited import Tally, read_delimited
from marrow.data.sources.dialect import Dialect
from marrow.data.sources.file import SourceFile
from marrow.data.sources.streams import Broken
from marrow.kernels.rows.scan_csv import MAX_RECORD_BYTES

NAMES = ("a", "b")
END = "an end that no record holds"
Rows = list[tuple[int, tuple[str, ...]]]


def read(
    folder: Path, data: bytes, block_bytes: int = 1 << 20, escape: str | None = None
) -> tuple[Rows, list[Broken], Tally]:
    """Read as ingest does; a file that is mostly broken is read as well."""
    path = folder / "a.csv"
    path.write_bytes(data)
    rows: Rows = []
    broken: list[Broken] = []
    tally = Tally()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "BLOCK_BYTES", block_bytes)
        patch.setattr(delimited, "sniff", lambda *_: Dialect(",", escape, NAMES))
        for records in read_delimited(
            SourceFile(str(path), path.name, "csv", "", len(data)), tally, broken.append
        ):
            values = zip(*(column.to_pylist() for column in records.batch.columns), strict=True)
            rows += zip(records.lines.tolist(), values, strict=True)
    assert (tally.num_rows, tally.num_broken) == (len(rows), len(broken))
    return rows, broken, tally


def oracle(text: str, escape: str | None = None) -> tuple[Rows, list[int], int]:
    """Read a file by trying every end of every record: rows with their lines, broken lines, blanks."""
    lines = io.StringIO(text, newline="").readlines()
    rows: Rows = []
    broken: list[int] = []
    blank = start = 0
    needs_header = True
    while start < len(lines):
        end, record = _shortest(lines, start, escape)
        if record is None:
            broken.append(start + 1)
        elif not any(record):
            blank += 1
        elif needs_header:
            needs_header = False
        elif len(record) == len(NAMES):
            rows.append((start + 1, tuple(record)))
        else:
            broken.append(start + 1)
            end = start + 1 if not _is_in_order(lines[start:end], escape) else end
        start = end
    return rows, broken, blank


def _reader(lines: list[str], escape: str | None, *, strict: bool = False):
    return csv.reader(lines, escapechar=escape, doublequote=escape is None, strict=strict)


def _shortest(lines: list[str], start: int, escape: str | None) -> tuple[int, list[str] | None]:
    """A record is over when a line of another record can follow it."""
    for end in range(start + 1, len(lines) + 1):
        whole = lines[start:end]
        if not whole[-1].endswith(("\r", "\n")):
            whole[-1] += "\n"
        records = list(_reader([*whole, END], escape))
        if len(records) == 2 and records[1] == [END]:
            return end, records[0]
    return start + 1, None


def _is_in_order(lines: list[str], escape: str | None) -> bool:
    try:
        list(_reader(lines, escape, strict=True))
    except csv.Error:
        return False
    return True


# Lines that go wrong in every way, among lines that do not.
LINE = st.one_of(
    st.sampled_from(
        [
            "1,x\n",
            "2,y\r\n",
            '3,"z"\n',
            '4,"a ""b"" c"\n',
            '5,"over\nlines"\n',
            '6,"over\r\nlines"\n',
            '7,"never\n',
            '"8,never\n',
            "9\n",
            "10,a,b\n",
            '11,a,"b\n',
            '12,5" pipe\n',
            "\n",
            ",\n",
            "\r\n",
            '13,"x"y\n',
            '14,"x" \n',
            ' "15",z\n',
            '16,"lone\rreturn"\n',
            "17,é漢😀\n",
            '18,","\n',
            '""\n',
        ]
    ),
    st.text(st.sampled_from('ab,"\n'), max_size=6).map(lambda text: text + "\n"),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(LINE, max_size=14), st.sampled_from([16, 48, 1 << 20]))
@example(['7,"never\n', '4,"a ""b"" c"\n'], 16)
@example(["1,x\n", '11,a,"b\n', '12,5" pipe\n', '5,"over\nlines"\n', "1,x\n"], 1 << 20)
def test_rows_and_broken_lines_are_those_of_the_brute_force_reading(tmp_path_factory, lines, block_bytes):
    text = "a,b\n" + "".join(lines)
    rows, broken, tally = read(tmp_path_factory.mktemp("r"), text.encode(), block_bytes)
    expected_rows, expected_broken, expected_blank = oracle(text)
    assert rows == expected_rows
    assert [b.line for b in broken] == expected_broken
    assert tally.num_blank == expected_blank


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(LINE, st.sampled_from(['1,"a \\" b"\n', '2,"ends \\\\"\n', '3,"open \\"\n', "4,\\,\n"]))
    ),
    st.sampled_from([16, 1 << 20]),
)
def test_so_they_are_where_quotes_are_escaped(tmp_path_factory, lines, block_bytes):
    text = "a,b\n" + "".join(lines)
    rows, broken, tally = read(tmp_path_factory.mktemp("e"), text.encode(), block_bytes, "\\")
    assert (rows, [b.line for b in broken], tally.num_blank) == oracle(text, "\\")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(['{},"plain"\n', "{},x\n", '{},"two\nlines"\n', '{},"q ""q"""\n']), min_size=2),
    st.data(),
)
def test_one_open_quote_where_no_other_quote_follows_costs_one_line(tmp_path_factory, shapes, data):
    place = data.draw(st.integers(0, len(shapes)))
    before = [shape.format(i) for i, shape in enumerate(shapes[:place])]
    after = [f"{i},unquoted\n" for i in range(place, len(shapes))]
    text = "a,b\n" + "".join(before) + 'bad,"open\n' + "".join(after)
    rows, broken, _ = read(tmp_path_factory.mktemp("o"), text.encode())
    assert [int(row[0]) for _, row in rows] == list(range(len(shapes)))
    assert [(b.line, b.text) for b in broken] == [(2 + "".join(before).count("\n"), 'bad,"open\n')]


@pytest.mark.parametrize("block_bytes", [16, 1 << 20])
@pytest.mark.parametrize(
    ("text", "rows", "broken"),
    [
        # A quote that a later row's quote closes: the rows between are good, and stay.
        ('1,u\n2,b,"open\n3,p\n4,5" pipe\n5,t\n', [(2, "1"), (4, "3"), (5, "4"), (6, "5")], [3]),
        ('1,u\n"2,open\n3,"p"\n4,"q"\n5,t\n', [(2, "1"), (4, "3"), (5, "4"), (6, "5")], [3]),
        # Quotes in order, yet of the wrong width: one broken record, and nothing made of its inside.
        ('1,u\n2,"in,side\n8,9\n",3\n4,v\n5,w\n', [(2, "1"), (6, "4"), (7, "5")], [3]),
        ('1,u\n"2\n8,9\n7,7"\n4,v\n5,w\n', [(2, "1"), (6, "4"), (7, "5")], [3]),
        # A carriage return alone ends a line for both paths, so that no row falls between them.
        ('1,u\n0,"open\n2,x\r3,y\n4,z\n', [(2, "1"), (4, "2"), (5, "3"), (6, "4")], [3]),
        ('1,u\r2,x\n0,"open\n3,y\n4,z\n', [(2, "1"), (3, "2"), (5, "3"), (6, "4")], [4]),
        ('1,u\r2,"v\rw"\r0,"open\r3,y\r', [(2, "1"), (3, "2"), (6, "3")], [5]),
        ("1,u\r2\r3,y\r4,z\r", [(2, "1"), (4, "3"), (5, "4")], [3]),
        # Several open quotes, one after the other and apart.
        ('1,u\n0,p,"o\n2,x\n3,y\n0,p,"o\n4,z\n', [(2, "1"), (4, "2"), (5, "3"), (7, "4")], [3, 6]),
        # A wrong byte on the way is the fault of its own line.
        ('1,u\n2,"two\nlines"\n0,"o\n3,y\n', [(2, "1"), (3, "2"), (6, "3")], [5]),
    ],
)
def test_only_the_broken_line_is_lost(tmp_path, text, rows, broken, block_bytes):
    got, quarantined, _ = read(tmp_path, b"a,b\n" + text.encode(), block_bytes)
    assert [(line, row[0]) for line, row in got] == rows
    assert [b.line for b in quarantined] == broken


@pytest.mark.parametrize("block_bytes", [32, 1 << 20])
def test_bytes_that_are_no_utf8_or_nul_after_an_open_quote(tmp_path, block_bytes, capfd):
    data = b'a,b\n1,u\n0,"open\n2,x\0y\n3,\xff\xfe\n4,z\n5,"p\nq\xc3"\n6,w\n7,v\n8,\xff,wide\n'
    rows, broken, _ = read(tmp_path, data, block_bytes)
    assert rows == [(2, ("1", "u")), (4, ("2", "x\0y")), (6, ("4", "z")), (9, ("6", "w")), (10, ("7", "v"))]
    assert [(b.line, b.reason) for b in broken] == [
        (3, "a quote is never closed, or only by a later row's"),
        (5, "not UTF-8"),
        (7, "not UTF-8"),
        (11, "not 2 fields"),
    ]
    assert "\\xff\\xfe" in broken[1].text
    assert capfd.readouterr() == ("", ""), "a library prints nothing"


def test_a_record_above_the_limit_costs_its_first_line(tmp_path):
    filler = b"x" * 1023 + b"\n"
    data = b'a,b\n1,a\n2,"' + filler * (MAX_RECORD_BYTES // 1024 + 8) + b'"\n3,b\n'
    rows, broken, _ = read(tmp_path, data)
    assert (rows[0], rows[-1][1]) == ((2, ("1", "a")), ("3", "b"))
    assert broken[0].line == 3
    assert "4 MiB" in broken[0].reason


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\r"])
def test_a_single_line_above_the_limit_is_reported_by_its_beginning(tmp_path, ending):
    data = ending.join([b"a,b", b"1,a", b"2," + b"y" * (MAX_RECORD_BYTES + 10), b"3,b", b""])
    for block_bytes in (len(data) - 6, len(data) - 5, 1 << 20):  # also cut within the long line's end
        rows, broken, _ = read(tmp_path, data, block_bytes)
        assert rows == [(2, ("1", "a")), (4, ("3", "b"))]
        assert [(b.line, b.text[:4]) for b in broken] == [(3, "2,yy")]


def test_many_open_quotes_cost_no_more_than_as_many_good_rows(tmp_path):
    """Each looks for its end; a search to the end of the file for each would take minutes."""
    rows, broken, _ = read(tmp_path, b"a,b\n" + b'1,"never\n2,x\n' * 20_000)
    # Every second quote closes the one before: two lines over, of the wrong width or not, and no more.
    assert len(rows) + len(broken) >= 20_000
    text = b"a,b\n" + b"0,x\n" * 400_000 + b'1,"never\n' + b"2,x\n" * 400_000
    start = time.process_time()
    rows, broken, _ = read(tmp_path, text)
    assert (len(rows), [b.line for b in broken]) == (800_000, [400_002])
    assert time.process_time() - start < 5, "about 1 s, most of it to make the rows Python's"
