import base64
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.data.quality.rules import digit_share, judge, repeated_share, rules_of, table_share
from marrow.data.quality_config import QualityRecipe

RULES = rules_of(QualityRecipe())
PROSE = "It was a bright cold day in April, and the clocks were striking thirteen. " * 1
CODE = Path(__file__).read_text()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "too_short"),
        ("   a few   ", "too_short"),
        ("a text with a NUL \0 in it", "not_text"),
        ("\x01\x02\x03 control characters \x04", "not_text"),
        ("decoded the wrong way ���", "not_text"),
        ("3.14159 2.71828 1.41421 1.73205", "digits"),
        (base64.b64encode(random.Random(0).randbytes(900)).decode(), "blob"),
        (
            "t = {\n" + "".join(f"    0x{ord(c):02x}: '{c}',  # letter {c}\n" for c in "abcdefgh") + "}",
            "table",
        ),
        ("words = [\n" + "".join(f"    '{w}',\n" for w in PROSE.split()) + "]", "table"),
        ("spam and eggs and spam\n" * 10, "repeated"),
    ],
)
def test_each_rule_drops_what_it_is_for(text, rule):
    verdict = judge(text, RULES)
    assert verdict is not None
    assert verdict.rule == rule


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        CODE,
        '"Hello," she said.\n"Hello," he said.\n"Is it cold?"\n"It is."\n',
        "1. First, boil water.\n2. Then add salt.\n3. Wait for ten minutes.\n",
        "12:30:01 INFO the server has started\n12:30:02 INFO it listens\n",
        "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
        "Ein Satz mit Umlauten: Öl, Äpfel, Übermut und Straße.",
    ],
)
def test_real_prose_and_code_stay(text):
    assert judge(text, RULES) is None


def test_encodings_tables_go_and_the_code_of_the_library_stays(stdlib_rows):
    table = pq.read_table(stdlib_rows / "rows-00000.parquet", columns=["file", "source", "kind"])
    verdicts = {
        row["file"]: judge(row["source"], RULES) for row in table.to_pylist() if row["kind"] == "module"
    }
    dropped = {file for file, verdict in verdicts.items() if verdict is not None}
    assert {"encodings/cp1252.py", "encodings/mac_arabic.py", "html/entities.py"} <= dropped
    kept_code = {"encodings/__init__.py", "encodings/utf_8.py", "encodings/idna.py", "argparse.py", "enum.py"}
    assert not dropped & kept_code
    outside = {file for file in dropped if not file.startswith("encodings/")}
    empty = {file for file in outside if verdicts[file].rule == "too_short"}
    assert len(outside - empty) <= 12, sorted(outside - empty)


@given(st.text())
def test_measures_are_shares_and_judging_never_fails(text):
    for measure in (digit_share, table_share, repeated_share):
        assert 0 <= measure(text) <= 1.01
    judge(text, RULES)


def test_a_limit_of_one_switches_a_rule_off():
    off = rules_of(QualityRecipe(min_chars=0, max_table_share=1, max_digit_share=1, max_repeated_share=1))
    assert judge("1 2 3 4 5 6 7 8 9", off) is None
    assert judge("spam and eggs and spam\n" * 10, off) is None
