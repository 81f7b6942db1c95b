"""Self-contained HTML pages: a report is one file that any browser reads without a network.

    page = Page("quickstart", "what the run made")
    page.section("Loss", prose("Falls."), line_chart(...))
    path.write_text(page.html(), encoding="utf-8")

One idea: `Html` is text that is already safe, every other string is escaped when it enters a
tag, and `tag` is the only place that writes markup. No script; a content security policy in the
page forbids every request. Light and dark, phone and paper come from the style sheet below.
Charts are in `charts`, graphs in `graph`. Equal input gives equal bytes.
"""

import html as _html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Cell = str | int | float | None  # None leaves a cell empty

LONGEST_TABLE = 1000  # rows; a page is to be read


class Html(str):
    """Markup that is safe to put into a page as it is."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Tile:
    """A key figure: a small label, a large value, and a note to compare it with."""

    label: str
    value: str
    note: str = ""


class Page:
    """A page of sections under a title."""

    def __init__(self, title: str, subtitle: str = "", *, footer: str = "") -> None:
        self._title = title
        self._subtitle = subtitle
        self._footer = footer
        self._lead: list[Html] = []
        self._sections: list[tuple[str, list[Html]]] = []

    def lead(self, *blocks: Html) -> None:
        """Put blocks between the title and the first section."""
        self._lead.extend(block for block in blocks if block)

    def section(self, title: str, *blocks: Html) -> None:
        """Add a section, unless all its blocks are empty."""
        if kept := [block for block in blocks if block]:
            self._sections.append((title, kept))

    def html(self) -> str:
        """Write the page."""
        links = [
            tag("li", tag("a", title, href=f"#s{number}"))
            for number, (title, _) in enumerate(self._sections, 1)
        ]
        sections = [
            tag(
                "section",
                tag("h2", title, id=f"h{number}"),
                *blocks,
                id=f"s{number}",
                aria_labelledby=f"h{number}",
            )
            for number, (title, blocks) in enumerate(self._sections, 1)
        ]
        contents = tag("nav", tag("ul", *links), aria_label="Contents") if len(links) > 2 else ""
        subtitle = tag("p", self._subtitle, class_="subtitle") if self._subtitle else ""
        return "".join(
            [
                '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
                tag("title", self._title),
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                '<meta name="color-scheme" content="light dark">',
                '<meta http-equiv="Content-Security-Policy" '
                "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
                f"<style>{STYLE}</style></head>\n<body>",
                tag("header", tag("h1", self._title), subtitle, *self._lead, contents),
                tag("main", *sections),
                tag("footer", tag("p", self._footer)) if self._footer else "",
                "</body></html>\n",
            ]
        )


def tag(name: str, *children: str, **attributes: str | float | None) -> Html:
    """Write one element; children that are not Html are escaped.

    Args: attributes: None and "" are left out; a trailing underscore is dropped (class_), others
        turn to hyphens (aria_label).
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None and value != ""
    )
    inside = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    if name in ("br", "wbr"):
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{inside}</{name}>")


# Control characters are shown as pictures of themselves, so that hostile bytes stay visible.
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {0x7F: 0x2421}
_CONTROLS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def visible(text: str) -> str:
    """Replace what neither a page nor a terminal may be sent: controls and lone surrogates."""
    return text.replace("\r\n", "\n").translate(_CONTROLS).encode("utf-8", "replace").decode("utf-8")


def escape(text: str) -> Html:
    """Make any text safe between tags and inside quoted attributes."""
    return Html(_html.escape(visible(text), quote=True))


def join(*blocks: Html) -> Html:
    """Put blocks after each other."""
    return Html("".join(blocks))


def prose(*texts: str) -> Html:
    """Write a paragraph; parts that are Html stay as they are."""
    return tag("p", *texts) if any(texts) else Html("")


def code(*texts: str) -> Html:
    """Write a block of fixed-width text; parts that are Html stay as they are."""
    return tag("pre", tag("code", *texts))


def details(summary: str, *blocks: Html) -> Html:
    """Fold blocks away behind a line; works without script."""
    return tag("details", tag("summary", summary), *blocks)


def beside(*columns: tuple[str, Html]) -> Html:
    """Set blocks side by side under small headings; below each other on a phone."""
    return tag("div", *(tag("div", tag("h4", title), block) for title, block in columns), class_="beside")


def card(title: str, *blocks: Html) -> Html:
    """Keep blocks together, under a small title if there is one."""
    return tag("article", tag("h3", title) if title else "", *blocks)


def tiles(*figures: Tile) -> Html:
    """Write key figures in a row that wraps."""
    if not figures:
        return Html("")
    items = [
        tag(
            "div",
            tag("dt", one.label),
            tag("dd", one.value, class_="value"),
            tag("dd", one.note, class_="note") if one.note else "",
        )
        for one in figures
    ]
    return tag("dl", *items, class_="tiles")


_NUMBER = re.compile(r"[-−+<]?(?:[\d.,]+(?:e[-+]\d+)? ?[a-zA-Zµ%/]{0,7}){1,2}")  # 1,234; 4.2 ms; 2m05s


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]], *, caption: str = "") -> Html:
    """Write a table. Columns that hold only figures (with units) are set flush right.

    Returns: nothing if there are no rows; at most LONGEST_TABLE rows, saying how many are left out.
    """
    rows = list(rows)
    if not rows:
        return Html("")
    shown = [[_cell(cell) for cell in row] for row in rows[:LONGEST_TABLE]]
    columns = range(len(header))
    right = [
        any(row[i] for row in shown) and all(_NUMBER.fullmatch(row[i]) for row in shown if row[i])
        for i in columns
    ]
    style = ["n" if is_right else "" for is_right in right]
    head = tag("tr", *(tag("th", header[i], scope="col", class_=style[i]) for i in columns))
    body = [tag("tr", *(tag("td", row[i], class_=style[i]) for i in columns)) for row in shown]
    left_out = len(rows) - len(shown)
    written = tag(
        "table", tag("caption", caption) if caption else "", tag("thead", head), tag("tbody", *body)
    )
    more = prose(f"{left_out:,} more rows are left out here.") if left_out else Html("")
    return join(
        tag("div", written, class_="scroll", tabindex=0, role="group", aria_label=caption or "table"), more
    )


def figure(title: str, *blocks: str, note: str = "", aside: str = "") -> Html:
    """Put a caption over a drawing; `aside` stands at its right, `note` below it."""
    caption = tag("figcaption", tag("b", title), tag("span", aside) if aside else "")
    return tag("figure", caption, *blocks, tag("p", note, class_="note") if note else "")


def compact(value: float) -> str:
    """Write a number in at most four significant digits: 0.0312, 1.93, 1,234, 12.5k, 3.4M."""
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    for scale, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= 0.9995 * scale:
            scaled = value / min(scale, 1e3) if suffix == "k" else value / scale
            return f"{scaled:.3g}{suffix}" if abs(scaled) < 999.5 else f"{scaled:,.0f}{suffix}"
    if size >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.3g}" if size >= 1e-4 or size == 0 else f"{value:.1e}"


def pixels(value: float) -> str:
    """Write a coordinate of a drawing in at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell
    return f"{cell:,}" if isinstance(cell, int) else compact(cell)


# Text on paper is at least 7:1 in contrast, muted text and letters in bars at least 4.5:1, lines
# and fills 3:1; tests/core/test_page.py computes them from the variables of :root.
STYLE = """
:root{color-scheme:light dark;--paper:#fffefb;--raised:#f6f4ee;--ink:#1c1f23;--muted:#5d636b;--rule:#dcd8ce;
--accent:#0f5c7a;--mark:#fbe7a8;--on:#ffffff;
--p0:#0f5c7a;--p1:#9a4a1c;--p2:#2f6b4f;--p3:#6d4a86;--p4:#806010;--p5:#9c3550;--other:#6b7178}
@media screen and (prefers-color-scheme:dark){:root{--paper:#15181b;--raised:#1d2125;--ink:#e9e6df;
--muted:#a0a6ad;--rule:#343a40;--accent:#7cc0dc;--mark:#5b4a12;--on:#121518;
--p0:#7cc0dc;--p1:#e39b6d;--p2:#85c5a2;--p3:#c3a4da;--p4:#d6b65c;--p5:#e995aa;--other:#a2a8ae}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0 auto;padding:3.5rem 1.5rem 4rem;max-width:62rem;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
h1,h2{font-family:Charter,"Bitstream Charter","Sitka Text",Cambria,"Noto Serif","Liberation Serif",Georgia,
serif;
font-weight:600;line-height:1.2;text-wrap:balance}
h1{margin:0;font-size:2.5rem;letter-spacing:-.015em}
h2{margin:0 0 1.25rem;font-size:1.5rem;letter-spacing:-.005em}
h3{margin:0 0 .75rem;font-size:.9375rem}
h4{margin:0 0 .375rem;font-size:.8125rem;font-weight:600;color:var(--muted)}
p{margin:0 0 1rem;max-width:42rem}
a{color:var(--accent);text-decoration-thickness:1px;text-underline-offset:.2em}
:focus-visible{outline:2px solid var(--accent);outline-offset:3px}
.subtitle{margin:.5rem 0 0;max-width:none;font-size:1.0625rem;color:var(--muted)}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin:2rem 0 0;padding:0;list-style:none;
font-size:.875rem}
section{margin-top:3.25rem;padding-top:1.25rem;border-top:1px solid var(--rule);scroll-margin-top:1rem}
section>:last-child,article>:last-child,figure>:last-child{margin-bottom:0}
footer{margin-top:3.5rem;padding-top:1rem;border-top:1px solid var(--rule);font-size:.8125rem;
color:var(--muted)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8rem,1fr));gap:1.25rem 1.75rem;
margin:2rem 0 0;
padding:1.25rem 0;border-block:1px solid var(--rule)}
.tiles>div{display:grid;grid-row:span 3;grid-template-rows:subgrid;row-gap:0;align-items:start}
.tiles dt{font-size:.8125rem;color:var(--muted)}
.tiles dd{margin:0}
.tiles .value{font-size:1.625rem;line-height:1.3;letter-spacing:-.01em}
.note,.tiles .note,.axis,.keys,.parts,figcaption span{font-size:.8125rem;color:var(--muted)}
.scroll{margin:0 0 1.25rem;overflow-x:auto}
table{width:100%;border-collapse:collapse;font-size:.875rem;line-height:1.4}
caption{padding-bottom:.5rem;text-align:left;font-weight:600}
th,td{padding:.4375rem 1.25rem .4375rem 0;border-bottom:1px solid var(--rule);text-align:left;
vertical-align:top;
unicode-bidi:isolate}
th{font-weight:600;color:var(--muted);white-space:nowrap;border-bottom-color:var(--muted)}
td{min-width:4rem;max-width:30rem;overflow-wrap:break-word}
th:last-child,td:last-child{padding-right:0}
.n{text-align:right;white-space:nowrap}
pre,code{font:.8125rem/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono","Liberation Mono",
monospace}
pre{margin:0 0 1rem;padding:.75rem .875rem;background:var(--raised);border-radius:4px;white-space:pre-wrap;
overflow-wrap:anywhere;unicode-bidi:isolate;tab-size:4}
pre b,h3 code{font-weight:700;color:var(--accent)}
mark{background:var(--mark);color:inherit;border-radius:2px;box-decoration-break:clone;
-webkit-box-decoration-break:clone}
article{margin:0 0 2rem}
.beside{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,17rem),1fr));gap:1rem 1.25rem}
.beside>div{min-width:0;display:flex;flex-direction:column}
.beside pre{flex:1;margin:0}
details{margin-top:.5rem;font-size:.875rem}
summary{width:max-content;max-width:100%;cursor:pointer;color:var(--muted)}
details[open] summary{margin-bottom:.5rem}
figure{margin:0 0 2.25rem;break-inside:avoid}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:0 1rem;margin-bottom:.5rem;
font-size:.9375rem}
svg{display:block;overflow:visible}
svg text{font-size:12px;fill:var(--muted)}
.plot{margin:.75rem .5rem 0 3.25rem;width:calc(100% - 3.75rem)}
.keys{display:flex;flex-wrap:wrap;gap:.125rem 1.25rem;max-width:none;margin:0}
.keys b,.parts b{font-weight:600;color:var(--ink)}
.key{display:inline-flex;align-items:center;gap:.375rem}
.axis{flex:1 1 8rem}
.start{text-anchor:start}.end{text-anchor:end}.middle,.letter,.label,.node .note{text-anchor:middle}
.grid{stroke:var(--rule)}
.line{fill:none;stroke-width:1.75;stroke-linejoin:round;stroke-linecap:round;vector-effect:non-scaling-stroke}
.s0{stroke:var(--p0)}.s1{stroke:var(--p1);stroke-dasharray:7 4}.s2{stroke:var(--p2);stroke-dasharray:2 4}
.s3{stroke:var(--p3);stroke-dasharray:9 3 2 3}
.reference{stroke:var(--muted);stroke-width:1.25}
.r0{stroke-dasharray:5 4}.r1{stroke-dasharray:1.5 3}.r2{stroke-dasharray:10 3 2 3}
.dot{fill:var(--paper);stroke-width:2;stroke-dasharray:none}.full{fill:var(--p0)}.touch{fill:transparent}
.bars,.parts{margin:0;padding:0;list-style:none}
.bars li{display:flex;flex-wrap:wrap;align-items:baseline;gap:0 .75rem;margin-bottom:.875rem;
font-size:.875rem}
.bars .note{flex:1;margin:0}.bars .value{margin-left:auto}
.bars svg{flex-basis:100%;margin-top:.25rem}
.bars rect{fill:var(--other)}.bars .track,.bars .ours .track{fill:var(--raised)}
.bars .ours{font-weight:650}.bars .ours .note{font-weight:400}.bars .ours rect{fill:var(--p0)}
.parts{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin-top:.5rem}
.part{stroke:var(--paper);stroke-width:1.5}
.p0{--fill:var(--p0)}.p1{--fill:var(--p1)}.p2{--fill:var(--p2)}.p3{--fill:var(--p3)}.p4{--fill:var(--p4)}
.p5{--fill:var(--p5)}.other{--fill:var(--other)}
.part{fill:var(--fill)}
svg .letter{fill:var(--on);font-weight:600}
span.letter{display:inline-block;width:1.125rem;background:var(--fill);color:var(--on);border-radius:2px;
font-weight:600;font-size:.75rem;line-height:1.125rem;text-align:center}
.graph{margin:0 auto}
.node rect{fill:var(--raised);stroke:var(--muted)}
.node .label{font-size:13px;font-weight:600;fill:var(--ink)}
.node .note{font-size:11px;fill:var(--muted)}
.edge{fill:none;stroke:var(--muted);stroke-width:1.25}
@media(max-width:36rem){body{padding:2rem 1rem 3rem}h1{font-size:2rem}section{margin-top:2.5rem}
.tiles{grid-template-columns:1fr 1fr}
.bars .note{order:1;flex-basis:100%}.bars svg{order:2}}
@media print{body{max-width:none;padding:0;font-size:10.5pt;background:none}nav{display:none}
section{margin-top:2rem}h2,h3,h4{break-after:avoid}tr,article{break-inside:avoid}.scroll{overflow:visible}
pre{border:1px solid var(--rule)}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
"""
