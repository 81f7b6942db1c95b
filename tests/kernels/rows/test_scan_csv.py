"""Records: C beside regular expressions beside the csv module. Typed columns: C beside pyarrow."""

import csv
import io
import itertools
import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from marrow.data.sources.columns import NULLS, SchemaGrewError, parse
from marrow.kernels.rows import scan_csv as module
from marrow.kernels.rows.scan_csv import (
    Layout,
    Scan,
    cut_csv,
    cut_csv_reference,
    scan_csv,
    scan_csv_reference,
)

needs_c = pytest.mark.skipif(module._library() is None, reason="no C compiler")
TOKENS = st.lists(
    st.sampled_from(
        [
            *(b"a", b"1", b",", b",", b'"', b'"', b"\n", b"\n", b"\r", b"\r\n", b'""', b'","', b"\\", b" "),
            *(b"\0", "é".encode(), "😀".encode(), b"\xff", b"\xc3"),
        ]
    ),
    max_size=40,
).map(b"".join)


def block(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def values(scan: Scan) -> list[list[bytes]]:
    """All fields, row by row."""
    columns = []
    for column in range(scan.layout.width):
        offsets, text = scan.text(column)
        columns.append([text[a:b].tobytes() for a, b in itertools.pairwise(offsets)])
    return [list(row) for row in zip(*columns, strict=True)]


def state(scan: Scan) -> tuple[object, ...]:
    return (
        scan.consumed, scan.line, scan.lines_N.tolist(), scan.num_blank, scan.broken, scan.needs_header,
        scan.is_long_line,
    )  # fmt: skip


@needs_c
@settings(max_examples=300, deadline=None)
@given(
    TOKENS,
    st.sampled_from([None, None, "\\"]),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([4, 10, 1000]),
)
@example(b'0,"open\n1,\xff\n2,"x\n', None, 2, True, False, 1000)
def test_c_finds_what_the_reference_finds(data, escape, width, is_last, needs_header, max_record):
    layout = Layout(",", escape, width)
    fast = scan_csv(
        block(data), layout, is_last=is_last, line=7, needs_header=needs_header, max_record=max_record
    )
    slow = scan_csv_reference(block(data), layout, is_last, 7, needs_header, max_record)
    assert state(fast) == state(slow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_library", lambda: None)
        reference = values(slow)
    assert values(fast) == reference


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(*[st.text(st.sampled_from('ab ,;"\n\r\té漢😀\0'), max_size=9)] * 3), max_size=30),
    st.sampled_from(",;\t|"),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.booleans(),
)
def test_what_the_csv_module_wrote_comes_back(rows, delimiter, ending, quoting, use_c):
    text = io.StringIO(newline="")
    if ending != "\r\n":
        quoting = csv.QUOTE_ALL  # the writer quotes the line ends that it uses itself, and no others
    csv.writer(text, delimiter=delimiter, lineterminator=ending, quoting=quoting).writerows(rows)
    with pytest.MonkeyPatch.context() as patch:
        if not use_c:
            patch.setattr(module, "_library", lambda: None)
        scan = scan_csv(block(text.getvalue().encode()), Layout(delimiter, None, 3), is_last=True)
        got = values(scan)
    assert got == [[value.encode() for value in row] for row in rows if any(row)]
    assert (scan.broken, scan.num_blank) == ([], sum(not any(row) for row in rows))


@settings(max_examples=300, deadline=None)
@given(TOKENS, st.integers(1, 3), st.lists(st.integers(0, 80), max_size=6), st.booleans())
def test_blocks_are_read_as_the_whole_is(data, width, cuts, use_c):
    layout = Layout(",", None, width)
    with pytest.MonkeyPatch.context() as patch:
        if not use_c:
            patch.setattr(module, "_library", lambda: None)
        whole = scan_csv(block(data), layout, is_last=True)
        rows: list[list[bytes]] = []
        lines: list[int] = []
        broken: list[tuple[int, str]] = []
        rest, line = b"", 1
        edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        for start, end in itertools.pairwise(edges):
            rest += data[start:end]
            scan = scan_csv(block(rest), layout, is_last=end == len(data), line=line)
            rows += values(scan)
            lines += scan.lines_N.tolist()
            broken += [(b.line, b.reason) for b in scan.broken]
            rest, line = rest[scan.consumed :], scan.line
            if end == len(data):
                break
        assert rows == values(whole)
    assert lines == whole.lines_N.tolist()
    assert broken == [(b.line, b.reason) for b in whole.broken]
    assert rest == b""


@settings(max_examples=400, deadline=None)
@given(TOKENS, st.integers(0, 60), st.sampled_from([3, 1000]))
def test_c_cuts_where_the_reference_cuts(data, target, max_record):
    assert cut_csv(block(data), ",", target, max_record) == cut_csv_reference(
        block(data), ",", target, max_record
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(*[st.text(st.sampled_from('ab ,"\n\r é'), max_size=9)] * 2), min_size=1, max_size=30),
    st.integers(0, 300),
)
def test_both_sides_of_a_cut_hold_the_rows_of_the_whole(rows, target):
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows(rows)
    data = text.getvalue().encode()
    end, lines = cut_csv(block(data), ",", target)
    if end < 0:
        assert target > len(data) - max(len(line) for line in data.split(b"\r\n")) * 30
        return
    assert target <= end <= len(data)
    layout = Layout(",", None, 2)
    whole = scan_csv(block(data), layout, is_last=True)
    left = scan_csv(block(data[:end]), layout, is_last=True)
    right = scan_csv(block(data[end:]), layout, is_last=True, line=1 + lines)
    assert values(left) + values(right) == values(whole)
    assert [*left.lines_N, *right.lines_N] == whole.lines_N.tolist()


def test_a_field_of_every_length_around_the_vector_width_is_found_whole():
    for length in range(70):
        for tail in (b",", b"\n", b'"'):
            data = b"x" * length + b"," + b"y" * (70 - length) + b"\n" + (b"z" * length + tail)
            scan = scan_csv(block(data + b"\n"), Layout(",", None, 2), is_last=True)
            assert values(scan)[0] == [b"x" * length, b"y" * (70 - length)]


# Types

KINDS = {
    "int64": pa.int64(),
    "float64": pa.float64(),
    "date32": pa.date32(),
    "timestamp": pa.timestamp("us"),
    "bool": pa.bool_(),
    "null": pa.null(),
}
NUMBERS = st.one_of(
    st.integers(-(2**64), 2**64).map(str),
    st.floats().map(repr),
    st.floats(-1e6, 1e6).map(lambda x: f"{x:.3f}"),
    st.from_regex(r"\A-?[0-9]{1,21}(\.[0-9]{0,21})?([eE][+-]?[0-9]{1,4})?\Z"),
    st.text(st.sampled_from("0123456789.-+eE xna"), max_size=8),
)
TIMES = st.one_of(
    st.datetimes().map(str),
    st.datetimes().map(lambda t: t.isoformat()),
    st.dates().map(str),
    st.from_regex(
        r"\A[0-9]{4}-[01][0-9]-[0-3][0-9]([ T][0-2][0-9]:[0-6][0-9](:[0-6][0-9](\.[0-9]{0,7})?)?)?Z?\Z"
    ),
)
OTHERS = st.sampled_from(
    [*NULLS.to_pylist(), "true", "True", "TRUE", "false", "False", "FALSE", "yes", "x", '"1"']
)


@needs_c
@settings(max_examples=250, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.lists(st.one_of(NUMBERS, TIMES, OTHERS), min_size=1, max_size=12))
@example("float64", ["9007199254740993", "0.1", "123456789012345.678", "1e22", "1e23", "8.41e21"])
@example(
    "float64", ["9007199254740992.5", "179769313486231580793e289", "4.9e-324", "2.2250738585072011e-308"]
)
def test_what_c_is_sure_of_is_what_the_reference_reads(kind, texts):
    data = "".join(f"{text},\n" for text in texts).encode()
    scan = scan_csv(block(data), Layout(",", None, 2), is_last=True)
    texts = [text.strip('"') if text == '"1"' else text for text in texts if text]
    found = scan.values(0, kind)
    assert found is not None
    got, valid, num_nulls, unsure = found
    sure = ~unsure.astype(bool)
    bits = np.unpackbits(valid, bitorder="little")[: len(texts)].astype(bool)
    assert num_nulls + bits.sum() + unsure.sum() == len(texts)
    for row in np.flatnonzero(sure).tolist():
        expected = parse(pa.array([texts[row]]), KINDS[kind])
        assert bits[row] == expected.is_valid()[0].as_py()
        if bits[row] and kind == "bool":
            assert bool(np.unpackbits(got, bitorder="little")[row]) == expected[0].as_py()
        elif bits[row]:
            assert got[row].tobytes() == expected.to_numpy(zero_copy_only=False)[0].tobytes() or (
                kind == "date32" and got[row] == expected.cast(pa.int32())[0].as_py()
            )


@needs_c
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("int64", lambda r: str(r.randrange(-(2**63), 2**63))),
        ("float64", lambda r: repr(r.random())),
        ("float64", lambda r: f"{r.uniform(-1e5, 1e5):.2f}"),
        ("float64", lambda r: repr(r.uniform(-1, 1) * 10 ** r.randrange(-19, 12))),
        ("date32", lambda r: f"{r.randrange(1, 9999):04}-{r.randrange(1, 13):02}-{r.randrange(1, 29):02}"),
        (
            "timestamp",
            lambda r: f"20{r.randrange(100):02}-02-28 {r.randrange(24):02}:59:00.{r.randrange(10**6):06}",
        ),
        ("bool", lambda r: r.choice(["true", "False", "", "NA"])),
    ],
)
def test_plainly_written_values_are_never_in_doubt(kind, make):
    rng = random.Random(0)
    texts = [make(rng) for _ in range(4000)]
    scan = scan_csv(block("".join(f"{t},x\n" for t in texts).encode()), Layout(",", None, 2), is_last=True)
    found = scan.values(0, kind)
    assert found is not None
    got, _, _, unsure = found
    assert not unsure.any()
    if kind != "bool":
        expected = parse(pa.array(texts), KINDS[kind])
        assert pa.array(got).cast(KINDS[kind]).equals(expected)


def test_every_way_to_write_nothing_is_known_to_c():
    texts = [text for text in NULLS.to_pylist() if text]
    scan = scan_csv(block("".join(f"{t},x\n" for t in texts).encode()), Layout(",", None, 2), is_last=True)
    for kind in KINDS:
        found = scan.values(0, kind)
        assert found is None or (found[2], found[3].sum()) == (len(texts), 0)


def test_a_type_that_fits_no_value_leaves_all_to_the_caller():
    scan = scan_csv(block(b"007,x\n+1,x\n0x1F,x\n 1,x\n"), Layout(",", None, 2), is_last=True)
    for kind in KINDS:
        found = scan.values(0, kind)
        assert found is None or found[3].all()
        with pytest.raises(SchemaGrewError):
            parse(pa.array(["007", "+1", "0x1F", " 1"]), KINDS[kind])
