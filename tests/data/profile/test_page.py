"""Pages of profiles and drift: every figure that is known is shown, cut and escaped, and none is made up."""

import dataclasses
import datetime
import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.errors import SourceError
from marrow.data.profile import page as page_module
from marrow.data.profile.drift import ColumnDrift, Drift, DriftLimits, Part
from marrow.data.profile.page import drift_page, profile_page, write_drift_page, write_profile_page
from marrow.data.profile.record import SHARES, ColumnProfile, Distribution, Profile

NUMBERS = Distribution(
    1000, 0.0, 800.0, 123.25, 45.5, tuple(100.0 * i for i in range(len(SHARES))), 0.0,
    ((0.0, 0.0, 1.0),), 0.0, ((0.0, 10.0, 600), (10.0, 20.0, 300), (20.0, 800.0, 100)),
)  # fmt: skip
COLUMN = ColumnProfile(
    "price", "double", "number", 1250, 250, 0, 0, 1000, 0.0, (("7.5", 20), ("8", 10)), 0, "0", "800",
    "values", NUMBERS,
)  # fmt: skip


def shown(**changes: object) -> str:
    """Return the page of one column as text."""
    return text_of(profile_page(Profile(1250, ("a.csv",), (dataclasses.replace(COLUMN, **changes),))))  # type: ignore[arg-type]


def text_of(page: str) -> str:
    body = re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


class Balanced(HTMLParser):
    """Fails where an element is closed that is not the one opened last."""

    EMPTY = frozenset(
        {"meta", "link", "br", "hr", "img", "input", "path", "rect", "line", "circle", "polyline"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.EMPTY:
            self.opened.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """Opened and closed at once."""

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.opened and self.opened.pop() == tag, tag


def check(page: str) -> None:
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.opened == []


def test_the_figures_of_a_column_are_on_its_page() -> None:
    text = shown()
    for words in (
        "1,250 rows, 1 columns of a.csv",
        "20.0%",
        "250 of 1,250",
        "1,000",
        "7.5 (20)",
        "mean 123",
        "standard deviation 45.5",
        "up to 10",
        "from 20",
        "Most frequent values",
    ):
        assert words in text, words
    assert "NaN" not in text and "infinite" not in text and "ranks are off" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nan": 1234}, "NaN 1,234"),
        ({"infinite": 7}, "infinite 7"),
        ({"distinct_error": 0.01, "distinct": 123_456}, "about 123k"),
        ({"top_error": 12}, "Counts may lack up to 12."),
        ({"of": "characters"}, "400 characters"),
        ({"of": "bytes"}, "Numbers, of bytes"),
        ({"name": ""}, "(no name)"),
        ({"top": (("", 9),)}, '""'),
        ({"maximum": "y" * 50}, "y" * 39 + "…"),
        ({"numbers": dataclasses.replace(NUMBERS, rank_error=0.0125)}, "ranks are off by at most 1.25%"),
    ],
)
def test_what_is_odd_about_a_column_is_said(changes: dict[str, object], words: str) -> None:
    assert words not in shown() and words in shown(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"numbers": None}, "mean"),
        ({"numbers": dataclasses.replace(NUMBERS, count=0)}, "mean"),
        ({"numbers": dataclasses.replace(NUMBERS, bins=((0.0, 1.0, 1000),))}, "Distribution of values"),
        ({"top": ()}, "Most frequent values"),
        ({"top": (("7.5", 1),)}, "Most frequent values"),
    ],
)
def test_what_is_not_known_is_left_out(changes: dict[str, object], words: str) -> None:
    assert words in shown() and words not in shown(**changes)


@pytest.mark.parametrize(
    ("kind", "seconds", "told"),
    [
        ("date", 0.0, "1970-01-01"),
        ("timestamp", 1e9, "2001-09-09 01:46:40"),
        ("timestamp", -62_135_596_800.0, "-01-01 00:00:00"),
        ("timestamp", -1e11, "-100G"),
        ("timestamp", 1e12, "1T"),
        ("time", 3600.0, "3,600"),
    ],
)
def test_seconds_are_told_as_dates_where_a_date_has_them(kind: str, seconds: float, told: str) -> None:
    numbers = dataclasses.replace(NUMBERS, quantiles=(seconds,) * len(SHARES))
    text = shown(kind=kind, of="seconds", numbers=numbers)
    assert told in text
    if told.startswith("2001"):
        assert datetime.datetime.fromisoformat(told).replace(tzinfo=datetime.UTC).timestamp() == seconds


HOSTILE = st.sampled_from(
    ["<script>alert(1)</script>", "a&b", "\"'", "</table>", "x" * 100, "", "ü\0\ud7ff", "<"]
)


@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
@settings(max_examples=50)
def test_nothing_in_the_data_becomes_markup(name: str, value: str, file: str, title: str) -> None:
    column = dataclasses.replace(
        COLUMN, name=name, type=value, top=((value, 9),), minimum=value, maximum=name
    )
    page = profile_page(Profile(9, (file,), (column,)), title)
    check(page)
    assert "<script>alert" not in page
    part = Part(value, 0.25, 0.75)
    drifted = ColumnDrift(name, "drift", value, 0.5, 0.1, None, parts=(part,))
    page = drift_page(Drift(1, 2, DriftLimits(), (drifted,)), title)
    check(page)
    assert "<script>alert" not in page


@pytest.mark.parametrize("columns", [0, 1, 3, 4, 9])
def test_charts_are_of_the_first_columns_and_the_table_names_the_rest(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr(page_module, "MAX_DRAWN", 3)
    many = tuple(dataclasses.replace(COLUMN, name=f"column-{i}") for i in range(columns))
    page = profile_page(Profile(1250, ("a", "b"), many))
    check(page)
    assert page.count("Most frequent values") == min(columns, 3)
    assert ("Charts of the first 3 columns only." in page) == (columns > 3)
    assert all(f"column-{i}" in page for i in range(columns)) and "2 files" in page


DRIFTED = ColumnDrift(
    "size", "drift", "", 0.5, 0.01, 0.25, 0.05, 0.001, (0.0, 0.125),
    (Part("up to 3", 0.1, 0.4), Part("more", 0.9, 0.6)),
)  # fmt: skip


def test_a_drift_is_told_with_what_chance_explains_and_the_shares_before_and_now() -> None:
    same, changed = ColumnDrift("id", "same", ""), ColumnDrift("kind", "changed", "it is new")
    page = drift_page(Drift(10_000, 20_000, DriftLimits(), (same, changed, DRIFTED)))
    check(page)
    text = text_of(page)
    for words in (
        "10,000 rows before, 20,000 now: drift",
        "psi 0.5 (chance explains 0.01)",
        "ks 0.25, off by at most 0.001",
        "+30.00 points",
        "-30.00 points",
        "12.5%",
        "psi: 0.1 changed, 0.25 drift; ks: 0.1 changed, 0.2 drift",
    ):
        assert words in text, words
    rows = page[page.index("most changed first") :]
    assert rows.index("size") < rows.index("kind") < rows.index(">id<")


def test_a_measure_that_does_not_apply_is_not_told() -> None:
    column = dataclasses.replace(DRIFTED, ks=None, psi=None, note="the type changed")
    text = text_of(drift_page(Drift(1, 1, DriftLimits(), (column,))))
    assert "chance explains 0.01" not in text and "off by at most" not in text and "the type changed" in text


def test_an_empty_table_and_an_empty_drift_have_pages() -> None:
    check(profile_page(Profile(0, (), ())))
    page = drift_page(Drift(0, 0, DriftLimits(), ()))
    check(page)
    assert "0 rows before, 0 now: same" in page
    nothing = ColumnProfile("c", "null", "none", 0, 0, 0, 0, None, 0.0, (), 0, None, None, "values", None)
    check(profile_page(Profile(0, ("a",), (nothing,))))


def test_pages_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    profile, drift = Profile(1250, ("a.csv",), (COLUMN,)), Drift(1, 1, DriftLimits(), (DRIFTED,))
    write_profile_page(profile, tmp_path / "p.html", "of today")
    write_drift_page(drift, tmp_path / "d.html", "since then")
    assert (tmp_path / "p.html").read_text(encoding="utf-8") == profile_page(profile, "of today")
    assert (tmp_path / "d.html").read_text(encoding="utf-8") == drift_page(drift, "since then")
    for write in (
        lambda path: write_profile_page(profile, path),
        lambda path: write_drift_page(drift, path),
    ):
        with pytest.raises(SourceError, match="cannot write the page"):
            write(tmp_path / "p.html" / "below")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.html", "p.html"]
