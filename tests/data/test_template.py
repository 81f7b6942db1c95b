import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core.errors import DataError
from marrow.data.template import parse_template

BATCH = pa.RecordBatch.from_pydict(
    {
        "title": ["T", None, ""],
        "body": ["B", None, "b"],
        "n": pa.array([1, None, 3]),
        "tags": [["x"], None, []],
        "_file": ["f"] * 3,
        "_row": [1, 2, 3],
    }
)


def test_the_template_is_filled_and_a_row_of_nulls_has_no_text():
    template = parse_template("{title}\n\n{ body }{{{n}}}", BATCH.schema)
    assert template.render(BATCH) == ["T\n\nB{1}", None, "\n\nb{3}"]


def test_the_default_joins_text_columns_and_leaves_provenance_and_numbers_out():
    assert parse_template("", BATCH.schema).render(BATCH) == ["T\n\nB", None, "b"]


def test_lists_are_written_as_json():
    assert parse_template("{tags}", BATCH.schema).render(BATCH) == ['["x"]', None, "[]"]


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), min_size=1, max_size=4))
def test_rendering_equals_str_format_for_plain_names(literals):
    text = "{title}".join(part.replace("{", "{{").replace("}", "}}") for part in literals) + "{body}"
    got = parse_template(text, BATCH.schema).render(BATCH)
    assert got[0] == text.format(title="T", body="B")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{titel}", "did you mean 'title'"),
        ("{zzz}", "columns: title, body"),
        ("{title", "lone '{'"),
        ("title}", "lone '}' at character 6"),
        ("no column", "names no column"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_with_a_hint(text, words):
    with pytest.raises(DataError) as caught:
        parse_template(text, BATCH.schema)
    assert words in str(caught.value)


def test_a_table_without_text_columns_asks_for_a_template():
    with pytest.raises(DataError, match="no text column"):
        parse_template("", pa.schema([("n", pa.int64())]))
