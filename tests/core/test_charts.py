"""Charts: positions are the numbers' own, and no chart is without its numbers in text."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core import charts
from marrow.core.charts import Bar, Point, Series, bar_chart, line_chart, scatter_chart, stacked_bar
from marrow.core.page import Page

finite = st.floats(allow_nan=False, allow_infinity=False)


def chart(*series: Series, **options: object) -> str:
    return line_chart("title", series, x_label="step", y_label="loss", **options)  # type: ignore[arg-type]


def curves(markup: str) -> list[list[list[tuple[float, float]]]]:
    """Read the curves back: per line the strokes, per stroke the points, in a square of 1,000."""
    found = []
    for drawn in re.findall(r'<path class="line s\d" d="([^"]*)"', markup):
        strokes = [stroke for stroke in drawn.split("M") if stroke]
        found.append([[tuple(map(float, p.split())) for p in s.split("L")] for s in strokes])
    return found  # type: ignore[return-value]


# ---------------------------------------------------------------- lines


def test_points_stand_where_their_numbers_are() -> None:
    ((stroke,),) = curves(chart(Series("a", [(0, 0), (5, 10), (10, 5)])))
    assert stroke == [(0, 1000), (500, 0), (1000, 500)]


def test_a_logarithmic_axis_spaces_powers_evenly() -> None:
    ((stroke,),) = curves(chart(Series("a", [(0, 1), (1, 10), (2, 100)]), log_y=True))
    assert [y for _, y in stroke] == [1000, 500, 0]


def test_a_gap_in_the_numbers_is_a_gap_in_the_line() -> None:
    points = [(0, 1), (1, 2), (2, float("nan")), (3, 2), (4, 1)]
    ((first, second),) = curves(chart(Series("a", points)))
    assert (len(first), len(second)) == (2, 2)


def test_zero_is_a_gap_on_a_logarithmic_axis() -> None:
    ((first, second),) = curves(chart(Series("a", [(0, 1), (1, 0), (2, 1)]), log_y=True))
    assert (len(first), len(second)) == (1, 1)


def test_without_a_finite_point_there_is_no_chart() -> None:
    assert chart(Series("a", [])) == ""
    assert chart(Series("a", [(0, float("inf"))])) == ""


def test_many_points_are_thinned_but_extremes_stay() -> None:
    points = [(x, 50.0) for x in range(100_000)]
    points[33_333] = (33_333, 100.0)
    points[77_777] = (77_777, 0.0)
    markup = chart(Series("a", points))
    ((stroke,),) = curves(markup)
    assert len(stroke) <= charts.MAX_POINTS
    assert {y for _, y in stroke} == {0, 500, 1000}
    assert len(markup) < 40_000


def test_references_are_lines_with_names_and_values() -> None:
    markup = chart(Series("ours", [(0, 3), (1, 1)]), references={"5-gram": 2.0})
    assert re.search(r'<line x1="0" x2="100%" y1="110" y2="110" class="reference r0">', markup)
    assert "5-gram" in markup and "<b>2</b>" in markup


def test_lines_differ_in_dashes_not_only_in_colour() -> None:
    markup = chart(*(Series(str(i), [(0, i), (1, i)]) for i in range(4)))
    assert re.findall(r'<path class="line (s\d)"', markup) == ["s0", "s1", "s2", "s3"]
    styles = dict(re.findall(r"\.(s[0-3])\{([^}]*)\}", Page("t").html()))
    dashes = {re.sub(r"stroke:[^;]*;?", "", style) for style in styles.values()}
    assert len(dashes) == 4


@given(
    st.lists(st.tuples(st.floats(), st.floats()), max_size=40),
    st.booleans(),
    st.booleans(),
    st.dictionaries(st.text(max_size=5), st.floats(), max_size=2),
)
def test_any_numbers_stay_inside_the_plot(
    points: list[tuple[float, float]], log_y: bool, from_zero: bool, references: dict[str, float]
) -> None:
    points.sort(key=lambda p: (p[0] != p[0], p[0]))
    markup = chart(Series("a", points), log_y=log_y, from_zero=from_zero, references=references)
    for line in curves(markup):
        for stroke in line:
            assert all(0 <= x <= 1000 and 0 <= y <= 1000 for x, y in stroke)
    ticks = re.findall(r'<text x="-8" y="([-\d.]+)"', markup)
    assert all(0 <= float(y) <= charts.HEIGHT for y in ticks)
    assert not markup or 1 <= len(ticks) <= 12
    assert "nan" not in markup.replace("title", "") and "inf" not in markup


@given(finite, finite)
def test_a_line_chart_has_its_numbers_in_a_table(one: float, two: float) -> None:
    markup = chart(Series("a", [(0, one), (1, two)]))
    assert not markup or len(re.findall(r"<tr><td", markup)) in (1, 2)


# ---------------------------------------------------------------- bars


def test_bars_begin_at_zero_and_are_in_proportion() -> None:
    markup = bar_chart("t", [Bar("a", 1), Bar("b", 4, ours=True), Bar("c", 0)])
    assert re.findall(r'<rect x="0" y="0" width="([\d.]+)%" height="10" rx="1.5"><', markup) == [
        "25",
        "100",
        "0",
    ]
    assert markup.count('class="ours"') == 1


def test_bars_can_be_shares_of_a_whole() -> None:
    markup = bar_chart("t", [Bar("a", 0.41, "41%")], top=1.0)
    assert 'width="41%" height="10" rx="1.5"><title>a: 41%' in markup


def test_bars_of_nothing_are_drawn_as_nothing() -> None:
    assert bar_chart("t", []) == ""
    assert "nan" not in bar_chart("t", [Bar("x", 0.0)])


def parts_of(markup: str) -> list[tuple[float, float]]:
    return [
        (float(x), float(width))
        for x, width in re.findall(r'<rect x="([\d.]+)%" y="0" width="([\d.]+)%" height="22"', markup)
    ]


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.floats(0, 1e6), min_size=1, max_size=14))
def test_parts_add_up_and_touch(parts: dict[str, float]) -> None:
    markup = stacked_bar("t", parts, total="x")
    drawn = parts_of(markup)
    if sum(parts.values()) <= 0:
        assert markup == ""
        return
    assert len(drawn) <= charts.MAX_PARTS
    # coordinates have two decimals: each is off by 0.005 at most
    assert sum(width for _, width in drawn) == pytest.approx(100, abs=0.005 * len(drawn) + 0.01)
    for (left, width), (following, _) in pairwise(drawn):
        assert left + width == pytest.approx(following, abs=0.02)


def test_the_largest_part_comes_first_and_other_last() -> None:
    markup = stacked_bar("t", {"other": 9, "small": 1, "large": 5}, total="15 s")
    names = re.findall(r"<li><span[^>]*>(\w)</span> (\w+) <b>", markup)
    assert names == [("a", "large"), ("b", "small"), ("c", "other")]


def test_small_parts_are_added_up_not_dropped() -> None:
    markup = stacked_bar("t", {f"p{i}": 10.0 - i * 0.1 for i in range(10)}, total="x")
    assert "3 smaller parts" in markup
    assert len(parts_of(markup)) == charts.MAX_PARTS


# ---------------------------------------------------------------- points


def scatter(*points: Point, lines: tuple[Series, ...] = ()) -> str:
    return scatter_chart("title", points, lines, x_label="intensity", y_label="rate")


def circles(markup: str) -> list[tuple[str, str]]:
    return re.findall(r'<circle cx="([\d.]+)%" cy="([\d.]+)"', markup)


def test_points_stand_at_the_powers_of_their_numbers() -> None:
    found = circles(scatter(Point("a", 1, 1), Point("b", 10, 10), Point("c", 100, 100)))
    assert [(float(x), float(y)) for x, y in found] == [(0, 360), (50, 180), (100, 0)]


def test_lines_of_a_scatter_chart_share_its_axes() -> None:
    line = Series("roof", [(1, 1), (100, 100)])
    markup = scatter(Point("a", 10, 1), lines=(line,))
    assert curves(markup) == [[[(0, 1000), (1000, 0)]]]
    assert circles(markup) == [("50", "360")]


def test_a_point_that_no_logarithm_takes_is_left_out_and_the_others_keep_their_numbers() -> None:
    markup = scatter(Point("zero", 0, 1), Point("nan", 1, float("nan")), Point("good", 2, 3))
    assert len(circles(markup)) == 1
    assert "3: good: 3 at intensity 2" in markup
    assert scatter(Point("zero", 0, 1)) == ""


def test_full_points_are_told_apart_and_numbered_first() -> None:
    """Two points at one place have room for one number: that of the full one."""
    markup = scatter(Point("a", 1, 1), Point("b", 1, 1, full=True), Point("c", 1000, 1000))
    assert markup.count('class="dot s0 full"') == 1
    assert re.findall(r">(\d+)</text>", markup.split("<circle", 1)[1]) == ["2", "3"]


# ---------------------------------------------------------------- every chart


@pytest.fixture
def every(tmp_path: Path) -> Path:
    """A page of charts that are hard to set: long names, many ticks, huge and tiny numbers."""
    page = Page("charts")
    tiny = [(i, 1e-5 * i) for i in range(9)]
    huge = [(i * 1e6, 1e9 * (9 - i)) for i in range(9)]
    page.section(
        "Lines",
        chart(Series("tiny", tiny), Series("a rather long name of a line", [(0, 5e-5), (8, 5e-5)])),
        chart(Series("huge", huge), references={"a baseline": 3e9, "another baseline": 4e9}),
        chart(Series("log", [(i, 10.0**i) for i in range(-4, 9)]), log_y=True),
        chart(Series("point", [(3, 3)])),
    )
    crowd = [Point(f"point {i}", 2.0**i, 3.0 ** (i % 7), i % 2 == 0) for i in range(24)]
    page.section("Points", scatter(*crowd, *crowd, lines=(Series("roof", [(1, 1), (1e7, 1e4)]),)))
    page.section(
        "Bars",
        bar_chart(
            "bars", [Bar("a name that takes a whole line on a phone", i, note="and a note") for i in (1, 2)]
        ),
        stacked_bar("parts", {f"part number {i}": 2.0**i for i in range(12)}, total="all", note="A note."),
    )
    path = tmp_path / "every.html"
    path.write_text(page.html(), encoding="utf-8")
    return path


OVERLAPS = """(() => {
  const bad = [];
  for (const svg of document.querySelectorAll('svg')) {
    const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
      if (p.left < q.right - .5 && q.left < p.right - .5 && p.top < q.bottom - 3 && q.top < p.bottom - 3)
        bad.push(a + ' | ' + b);
    }));
  }
  return bad;
})()"""


@pytest.mark.parametrize("width", [320, 390, 1100])
def test_labels_do_not_overlap_and_nothing_sticks_out(browser, every: Path, width: int) -> None:
    browser.open(every)
    browser.resize(width, 900)
    assert browser.evaluate(OVERLAPS) == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    outside = (
        "[...document.querySelectorAll('svg text')].filter(t => t.getBoundingClientRect().left < 0).length"
    )
    assert browser.evaluate(outside) == 0
    assert browser.errors == []


def test_every_chart_is_named_and_described(browser, every: Path) -> None:
    browser.open(every)
    figures = "[...document.querySelectorAll('figure')]"
    assert browser.evaluate(f"{figures}.every(f => f.querySelector('figcaption').textContent.trim())")
    assert browser.evaluate(
        "[...document.querySelectorAll('svg[role=img]')].every(s => s.querySelector('title').textContent)"
    )
    assert browser.evaluate(
        "[...document.querySelectorAll('svg')].every("
        "s => s.getAttribute('role') || s.getAttribute('aria-hidden') || s.parentElement.closest('svg'))"
    )
