import datetime

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.data.columns import SchemaGrewError, column_of, fit, infer_text, join_schemas, join_types

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
