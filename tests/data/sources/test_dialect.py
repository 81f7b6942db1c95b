"""How a CSV is written is found from its beginning, whatever is in its text."""

import csv
import io
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import SourceError
from marrow.data.sources.dialect import DELIMITERS, Dialect, sniff
from marrow.data.sources.file import SourceFile
from marrow.data.sources.streams import open_bytes

WORDS = st.text(st.sampled_from("abcxyz é漢'"), min_size=1, max_size=6)


def sniffed(path: Path, data: bytes) -> Dialect | None:
    path.write_bytes(data)
    file = SourceFile(str(path), path.name, "csv", "", len(data))
    with open_bytes(file) as stream:
        return sniff(file, stream)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=3, max_size=20),
    st.sampled_from(DELIMITERS),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_what_the_csv_module_wrote_is_recognised(
    tmp_path_factory, rows, delimiter, ending, quoting, encoding
):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=ending, quoting=quoting)
    writer.writerow(["first", "second", "third"])
    writer.writerows(rows)
    path = tmp_path_factory.mktemp("d") / "a.csv"
    dialect = sniffed(path, text.getvalue().encode(encoding))
    assert dialect == Dialect(delimiter, None, ("first", "second", "third"))


@pytest.mark.parametrize(("delimiter", "other"), list(itertools.permutations(DELIMITERS, 2)))
def test_another_delimiter_in_quotes_or_in_prose_does_not_win(tmp_path, delimiter, other):
    head = delimiter.join(["name", "text", "n"]) + "\n"
    quoted = "".join(f'x{i}{delimiter}"{other * 3}"{delimiter}{i}\n' for i in range(20))
    prose = "".join(f"x{i}{delimiter}a{other * (i % 3)} b{delimiter}{i}\n" for i in range(20))
    for body in (quoted, prose, quoted + prose):
        dialect = sniffed(tmp_path / "a.csv", (head + body).encode())
        assert dialect == Dialect(delimiter, None, ("name", "text", "n"))


@pytest.mark.parametrize(
    ("name", "data", "delimiter", "names"),
    [
        ("a.csv", b"name\nx\ny\n", ",", ("name",)),
        ("a.csv", b"name", ",", ("name",)),
        ("a.csv", b'"one, two"\nx\n', ",", ("one, two",)),
        ("a.csv", b'"a\nb",c\n1,2\n', ",", ("a\nb", "c")),
        ("a.csv", b"\n\n,,\na,b\n1,2\n", ",", ("a", "b")),
        ("a.csv", b"a,,a\n1,2,3\n", ",", ("a", "column_2", "a_2")),
        ("a.csv", b" a , b\n1,2\n", ",", ("a", "b")),
        ("a.csv", b"a;b\n1,5;2,5\n3,5;4,5\n", ";", ("a", "b")),
        ("a.csv", b"a|b|c\n1|2,3|4\n", "|", ("a", "b", "c")),
        ("a.csv", b"text\nwell, yes\nno; or, so\n", ",", ("text",)),
        ("a.tsv", b"a,b\tc\n1,2\t3\n", "\t", ("a,b", "c")),
        ("a.tsv.gz", b"a,b\n1,2\n", "\t", ("a,b",)),
        ("a.tsv", b"plain\nx\n", "\t", ("plain",)),
        ("a.csv", b"a\tb\n1\t2\n", "\t", ("a", "b")),
        ("a.csv", b"a,b\r1,2\r", ",", ("a", "b")),
        ("a.csv", b"a,\xff\n1,2\n", ",", ("a", "�")),
        ("a.csv", b"a,b\0c\n1,2\n", ",", ("a", "b\0c")),
        ("a.csv", b'a,5" pipe\n1,2\n', ",", ("a", '5" pipe')),
        ("a.csv", "é;漢\n1;2\n".encode(), ";", ("é", "漢")),
    ],
)
def test_delimiter_and_names(tmp_path, name, data, delimiter, names):
    dialect = sniffed(tmp_path / name, data)
    assert dialect is not None
    assert (dialect.delimiter, dialect.names) == (delimiter, names)


@pytest.mark.parametrize(
    ("text", "escape"),
    [
        ('a,b\n1,"x \\"y\\" z"\n', "\\"),
        ('a,b\n1,"x ""y"" z"\n', None),
        ('a,b\n1,"c:\\dir\\"\n2,"say ""no"" twice"\n', None),
        ("a,b\n1,c:\\dir\n", None),
        ('a,b\n1,"x \\"y\\""\n2,""\n', "\\"),
        ('a,b\n"1","x \\"y\\" z"\n' + '"",""\n"2",""\n' * 9, "\\"),
        ('a,b\n1,"""x\\"""\n2,"y ""z"""\n', None),
    ],
)
def test_a_backslash_escapes_only_where_the_file_says_so(tmp_path, text, escape):
    dialect = sniffed(tmp_path / "a.csv", text.encode())
    assert dialect is not None
    assert dialect.escape == escape


@pytest.mark.parametrize(
    "data", [b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", b"\xff\xfe\n\0"]
)
def test_a_blank_file_has_no_dialect(tmp_path, data):
    assert sniffed(tmp_path / "a.csv", data) is None


@pytest.mark.parametrize("data", [b",,\n,,\n", b'"",""\n'])
def test_a_file_of_empty_fields_has_no_header(tmp_path, data):
    assert sniffed(tmp_path / "a.csv", data) is None


@pytest.mark.parametrize("rest", ["", "1,2\n3,4\n", "1,2\n" * 40_000], ids=["none", "short", "long"])
def test_a_header_whose_quote_never_closes_is_an_error_and_not_one_wide_name(tmp_path, rest):
    with pytest.raises(SourceError, match=r"a\.csv: a quote in the header") as caught:
        sniffed(tmp_path / "a.csv", ('a,"b\n' + rest).encode())
    assert "first line" in str(caught.value.hint)


def test_only_the_beginning_is_read_and_a_character_cut_there_does_no_harm(tmp_path):
    body = ("é" * 100 + ",x\n") * 2000
    data = b"a,b\n" + body.encode()
    assert len(data) > 1 << 18
    for shift in range(3):
        dialect = sniffed(tmp_path / "a.csv", b"n" * shift + data)
        assert dialect == Dialect(",", None, ("n" * shift + "a", "b"))


@pytest.mark.parametrize("num_columns", [1, 2, 50, 300])
def test_tables_of_any_width_are_recognised(tmp_path, num_columns):
    names = tuple(f"c{i}" for i in range(num_columns))
    body = ";".join(names) + "\n" + (";".join(["1,5"] * num_columns) + "\n") * 5
    dialect = sniffed(tmp_path / "a.csv", body.encode())
    assert dialect is not None
    assert dialect.names == names


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_a_dialect_or_none_or_a_said_error(tmp_path_factory, data):
    try:
        dialect = sniffed(tmp_path_factory.mktemp("b") / "a.csv", data)
    except SourceError:  # a quote in the header, or half a UTF-16
        return
    if dialect is not None:
        assert dialect.delimiter in DELIMITERS
        assert len(set(dialect.names)) == len(dialect.names) >= 1
        assert all(dialect.names)
