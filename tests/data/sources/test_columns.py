import datetime

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.data.sources.columns import SchemaGrewError, column_of, fit, infer_text, join_schemas, join_types

TYPES = [
    pa.null(), pa.int64(), pa.float64(), pa.bool_(), pa.string(), pa.date32(), pa.timestamp("us"),
    pa.list_(pa.int64()), pa.struct([("a", pa.int64())]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "-20", ""], pa.int64()),
        (["1", "2.5", "NA"], pa.float64()),
        (["1e3", "nan"], pa.float64()),
        (["007", "1"], pa.string()),
        (["+1"], pa.string()),
        (["true", "False", ""], pa.bool_()),
        (["2024-01-31", "2024-02-29"], pa.date32()),
        (["2024-01-31", "2024-01-31 10:20:30"], pa.timestamp("us")),
        (["1", "x"], pa.string()),
        (["", "NA"], pa.null()),
        ([" 1"], pa.string()),
        (["99999999999999999999"], pa.string()),
        (["1", "99999999999999999999.5"], pa.float64()),
    ],
)
def test_text_takes_the_narrowest_type_that_loses_nothing(values, kind):
    assert infer_text(pa.array(values)) == kind


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_whole_numbers_come_back_as_they_were(numbers):
    column = pa.array([str(n) for n in numbers])
    assert infer_text(column) == pa.int64()
    batch = pa.RecordBatch.from_arrays([column], names=["n"])
    assert fit(batch, pa.schema([("n", pa.int64())]), is_text=True).column(0).to_pylist() == numbers


@given(st.sampled_from(TYPES), st.sampled_from(TYPES), st.sampled_from(TYPES))
def test_joining_types_needs_no_order_and_grows_only(one, other, third):
    joined = join_types(one, other)
    assert joined == join_types(other, one)
    assert join_types(joined, one) == joined
    assert join_types(join_types(one, other), third) == join_types(one, join_types(other, third))


def test_schemas_join_in_the_order_of_first_appearance():
    one = pa.schema([("b", pa.int64()), ("a", pa.string())])
    other = pa.schema([("c", pa.bool_()), ("b", pa.float64())])
    assert join_schemas(one, other) == pa.schema([("b", pa.float64()), ("a", pa.string()), ("c", pa.bool_())])


def test_a_value_or_column_without_a_place_is_never_lost():
    batch = pa.RecordBatch.from_pydict({"n": ["1", "x"]})
    with pytest.raises(SchemaGrewError):
        fit(batch, pa.schema([("n", pa.int64())]), is_text=True)
    with pytest.raises(SchemaGrewError):
        fit(batch, pa.schema([("n", pa.null())]), is_text=True)
    with pytest.raises(SchemaGrewError):
        fit(batch, pa.schema([("m", pa.string())]), is_text=True)
    with pytest.raises(SchemaGrewError):
        fit(pa.RecordBatch.from_pydict({"n": [1.5]}), pa.schema([("n", pa.int64())]), is_text=False)


def test_mixed_values_become_text_that_is_json():
    column = column_of([1, "a", None, {"k": [1, 2]}, 2.5, True])
    assert column.to_pylist() == ["1", "a", None, '{"k": [1, 2]}', "2.5", "true"]
    typed = pa.RecordBatch.from_pydict({"v": [1.0, None]})
    assert fit(typed, pa.schema([("v", pa.string())]), is_text=False).column(0).to_pylist() == ["1.0", None]


def test_missing_columns_are_null_and_dates_widen_to_times():
    batch = pa.RecordBatch.from_pydict({"d": ["2024-01-31", ""]})
    fitted = fit(batch, pa.schema([("x", pa.string()), ("d", pa.timestamp("us"))]), is_text=True)
    assert fitted.to_pylist() == [
        {"x": None, "d": datetime.datetime(2024, 1, 31)},
        {"x": None, "d": None},
    ]


# Text of CSVs: what is inferred must be written back as it was read.


@pytest.mark.parametrize(
    ("values", "kind", "read"),
    [
        (["007", "7"], pa.string(), ["007", "7"]),
        (["12345678901234567890", "1"], pa.string(), ["12345678901234567890", "1"]),
        (["1234567890123456", "0.5"], pa.string(), ["1234567890123456", "0.5"]),
        (["9223372036854775807", "-9223372036854775808"], pa.int64(), [2**63 - 1, -(2**63)]),
        (["1e5", "2"], pa.float64(), [1e5, 2.0]),
        (["1E-3", "inf"], pa.float64(), [1e-3, float("inf")]),
        (["1e5", "x"], pa.string(), ["1e5", "x"]),
        (["-0", "1"], pa.string(), ["-0", "1"]),
        (["1_000", "2"], pa.string(), ["1_000", "2"]),
        (["1,5", "2"], pa.string(), ["1,5", "2"]),
        (["0x10", "2"], pa.string(), ["0x10", "2"]),
        (["0xE1"], pa.string(), ["0xE1"]),
        (["1 ", "2"], pa.string(), ["1 ", "2"]),
        (["1\n", "2"], pa.string(), ["1\n", "2"]),
        (["\u0661", "2"], pa.string(), ["\u0661", "2"]),
        (["true", "FALSE", "NA"], pa.bool_(), [True, False, None]),
        (["true", "1"], pa.string(), ["true", "1"]),
        (["yes", "no"], pa.string(), ["yes", "no"]),
        (
            ["2024-02-29", "", "1969-12-31"],
            pa.date32(),
            [datetime.date(2024, 2, 29), None, datetime.date(1969, 12, 31)],
        ),
        (["2024-02-30"], pa.string(), ["2024-02-30"]),
        (["2024-1-2"], pa.string(), ["2024-1-2"]),
        (["31.12.2024"], pa.string(), ["31.12.2024"]),
        (["2024-01-02T03:04:05.000001"], pa.timestamp("us"), [datetime.datetime(2024, 1, 2, 3, 4, 5, 1)]),
        (["NA", "x"], pa.string(), ["NA", "x"]),
        (["null", "1"], pa.int64(), [None, 1]),
    ],
)
def test_text_is_read_as_what_it_says_and_nothing_else(values, kind, read):
    batch = pa.RecordBatch.from_pydict({"c": values})
    assert infer_text(batch.column("c")) == kind
    assert fit(batch, pa.schema([("c", kind)]), is_text=True).column(0).to_pylist() == read


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from("0123456789-+.eEx "), max_size=22), min_size=1, max_size=4))
def test_numbers_that_are_inferred_say_what_the_text_said(values):
    batch = pa.RecordBatch.from_pydict({"c": values})
    kind = infer_text(batch.column("c"))
    got = fit(batch, pa.schema([("c", kind)]), is_text=True).column(0).to_pylist()
    for text, value in zip(values, got, strict=True):
        if pa.types.is_integer(kind):
            assert (value is None and text == "") or str(value) == text
        elif pa.types.is_floating(kind):
            assert (value is None and text == "") or value == float(text)
        elif pa.types.is_string(kind):
            assert value == text


@given(st.lists(st.floats(allow_nan=False), min_size=1))
def test_floats_come_back_bit_for_bit(numbers):
    batch = pa.RecordBatch.from_pydict({"c": [repr(number) for number in numbers]})
    kind = infer_text(batch.column("c"))
    if pa.types.is_floating(kind):
        assert fit(batch, pa.schema([("c", kind)]), is_text=True).column(0).to_pylist() == numbers
    else:  # digits without point or exponent are never written by repr
        raise AssertionError(f"{numbers} became {kind}")


def test_the_column_that_does_not_fit_is_named():
    batch = pa.RecordBatch.from_pydict({"a": ["1"], "b": ["1234567890123456"]})
    schema = pa.schema([("a", pa.int64()), ("b", pa.float64())])
    with pytest.raises(SchemaGrewError) as caught:
        fit(batch, schema, is_text=True)
    assert caught.value.args == ("b",)


def test_a_decimal_beside_a_float_keeps_its_digits():
    kind = pa.decimal128(38, 1)
    assert join_types(kind, pa.float64()) == join_types(pa.float32(), kind) == pa.string()
    assert join_types(kind, kind) == kind
    assert join_types(pa.float32(), pa.float64()) == pa.float64()
