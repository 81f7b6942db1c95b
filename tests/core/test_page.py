"""Pages: what goes in as text comes out as text, and anyone can read it."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.core import page as pages
from marrow.core.page import (
    Html,
    Page,
    Tile,
    beside,
    card,
    code,
    compact,
    details,
    escape,
    prose,
    table,
    tag,
    tiles,
    visible,
)

HOSTILE = "</code></script><script>console.error('in')</script><img src=x onerror=console.error(1)>&amp;\"'"
anything = st.one_of(
    st.text(), st.text(alphabet="<>&\"'/=! scriptamp;\n\r\x00\x1b\ud800\u202e"), st.just(HOSTILE)
)


class Reader(HTMLParser):
    """What a browser reads: the tags, the attributes, and the text outside style."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data


# ---------------------------------------------------------------- text stays text


@given(anything)
def test_text_comes_back_as_it_went_in(text: str) -> None:
    read = Reader(tag("p", text, title=text, aria_label=text))
    assert read.tags == ["p"]
    assert read.text == visible(text)
    assert [value for _, value in read.attributes] == [visible(text)] * (2 if text else 0)


@given(anything, anything)
def test_no_block_lets_markup_in(one: str, two: str) -> None:
    blocks = (
        (prose(one, two), ["p"] if one or two else []),
        (code(one, two), ["pre", "code"]),
        (details(one, prose("x")), ["details", "summary", "p"]),
        (card(one or "x", prose("x")), ["article", "h3", "p"]),
        (beside((one, prose("x"))), ["div", "div", "h4", "p"]),
        (tiles(Tile(one, two, "x")), ["dl", "div", "dt", "dd", "dd"]),
    )
    for markup, expected in blocks:
        assert Reader(markup).tags == expected
    tags = Reader(table((one,), [(two,)], caption="x")).tags
    assert tags == ["div", "table", "caption", "thead", "tr", "th", "tbody", "tr", "td"]


@given(anything)
def test_a_page_can_be_encoded_and_holds_no_control_characters(text: str) -> None:
    page = Page(text, text, footer=text)
    page.section(text, prose(text))
    written = page.html().encode("utf-8").decode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", written)


def test_control_characters_stay_visible() -> None:
    assert visible("a\x00b\x1b[31m\x7f\r\nc\rd") == "a␀b␛[31m␡\nc␍d"
    assert visible("tab\tand\nline") == "tab\tand\nline"
    assert visible("\ud800") == "?"


def test_safe_markup_is_not_escaped_twice() -> None:
    assert tag("p", tag("b", "<"), "<") == "<p><b>&lt;</b>&lt;</p>"
    assert isinstance(escape("<"), Html)


# ---------------------------------------------------------------- the page


def test_a_page_is_whole_and_says_what_it_is() -> None:
    page = Page("Title <1>", "sub")
    page.section("One", prose("first"))
    written = page.html()
    assert written.startswith('<!doctype html>\n<html lang="en">')
    assert written.endswith("</body></html>\n")
    assert "<title>Title &lt;1&gt;</title>" in written
    assert "default-src 'none'" in written
    assert "<script" not in written


def test_sections_without_blocks_are_left_out() -> None:
    page = Page("t")
    page.section("Empty", Html(""), prose(""))
    page.section("Full", Html(""), prose("x"))
    assert "Empty" not in page.html()
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", page.html()) == ["Full"]


def test_contents_link_to_their_sections() -> None:
    page = Page("t")
    for name in ("One", "Two", "Three"):
        page.section(name, prose("x"))
    links = re.findall(r'<a href="#(\w+)">', page.html())
    assert len(links) == 3
    assert all(f'<section id="{link}"' in page.html() for link in links)


def test_equal_input_gives_equal_bytes() -> None:
    def make() -> str:
        page = Page("t", "s")
        page.section("A", table(("a", "b"), [(1, 2.5)]), tiles(Tile("x", "1")))
        return page.html()

    assert make() == make()


# ---------------------------------------------------------------- tables and numbers


def test_columns_of_figures_are_set_flush_right() -> None:
    rows = [("train", 12, 0.5, "4.2 ms", "1.1x", None), ("split", 1_234, 1e9, "2m05s", "87%", None)]
    markup = table(("name", "int", "float", "time", "ratio", "none"), rows)
    assert re.findall(r"<th scope=\"col\"( class=\"n\")?>(\w+)", markup) == [
        ("", "name"),
        *((' class="n"', name) for name in ("int", "float", "time", "ratio")),
        ("", "none"),
    ]
    assert ">1,234<" in markup


def test_one_word_makes_a_column_text() -> None:
    assert 'class="n"' not in table(("x",), [("1",), ("about 2",), ("3a4b5c6d7e",)])


def test_a_long_table_says_what_it_leaves_out() -> None:
    markup = table(("x",), [(i,) for i in range(pages.LONGEST_TABLE + 7)])
    assert markup.count("<tr>") == pages.LONGEST_TABLE + 1
    assert "7 more rows" in markup
    assert table(("x",), []) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0312, "0.0312"),
        (1.934, "1.93"),
        (999.4, "999"),
        (999.6, "1,000"),
        (1234, "1,234"),
        (12_500, "12.5k"),
        (999_700, "1M"),
        (3_400_000, "3.4M"),
        (-15_000, "-15k"),
        (2e-7, "2.0e-07"),
        (math.inf, "inf"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert compact(value) == text


@given(st.floats(min_value=1e-9, max_value=1e14))
def test_short_numbers_are_near_their_values(value: float) -> None:
    text = compact(value).replace(",", "")
    scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1.0)
    read = float(text.rstrip("kMGT")) * scale
    # three digits: half a unit in the third is 0.5 %; below 1e-4 two digits: 5 %
    assert read == pytest.approx(value, rel=0.0051 if value >= 1e-4 else 0.051)
    assert len(text) <= 7


# ---------------------------------------------------------------- anyone can read it


def palette(part: str) -> dict[str, str]:
    return dict(re.findall(r"--(\w+):(#[0-9a-f]{6})", part))


def contrast(one: str, two: str) -> float:
    """WCAG 2.2, relative luminance."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast_meets_wcag_aa(scheme: int) -> None:
    colours = palette(re.findall(r":root\{(.*?)\}", pages.STYLE, re.DOTALL)[scheme])
    fills = [f"p{i}" for i in range(6)] + ["other"]
    assert contrast(colours["ink"], colours["paper"]) >= 7
    for text in ("ink", "muted", "accent"):
        for ground in ("paper", "raised"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["ink"], colours["mark"]) >= 4.5
    for fill in fills:
        assert contrast(colours["on"], colours[fill]) >= 4.5, fill
        assert contrast(colours[fill], colours["paper"]) >= 3, fill


def test_contrast_agrees_with_the_published_example() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)  # the AA grey of WCAG's docs


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A page whose every block is wider than a phone."""
    long = "W" * 400
    page = Page(long, long, footer=long)
    page.lead(tiles(*(Tile(long[:60], long[:60], long[:60]) for _ in range(3))))
    page.section(
        long,
        prose(long),
        code(long),
        table([long[:40]] * 9, [[long] * 9]),
        beside((long, code(long)), (long, code(long))),
        card(long, details(long, prose(long))),
        prose(HOSTILE),
    )
    path = tmp_path / "wide.html"
    path.write_text(page.html(), encoding="utf-8")
    return path


@pytest.mark.parametrize("media", ["screen", "print"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_window(browser, wide: Path, width: int, media: str) -> None:
    browser.open(wide)
    browser.resize(width, 800, media=media)
    if media == "screen":
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.errors == []
    assert browser.requests == [wide.as_uri()]


def test_dark_and_light_differ_and_paper_is_light(browser, wide: Path) -> None:
    browser.open(wide)
    grounds = []
    for dark, media in ((False, "screen"), (True, "screen"), (True, "print")):
        browser.resize(800, 600, dark=dark, media=media)
        grounds.append(
            browser.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--paper')")
        )
    assert grounds[0] != grounds[1]
    assert grounds[0] == grounds[2]
