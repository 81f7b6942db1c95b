"""Charts for pages: lines, bars and stacked bars, as SVG inside HTML.

One idea: the drawing stretches, the text does not. Horizontal positions are percentages and the
curves sit in an inner SVG that scales without its strokes, so a chart has readable 12-pixel text
on a phone, on a desk and on paper, with no script.

Nothing is told by colour alone: lines differ in dashes, parts of a bar carry letters, and the
numbers stand in text or in a table behind the chart. Equal input gives equal bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from marrow.core.page import Html, compact, details, figure, pixels, table, tag

MAX_POINTS = 600  # per line; more cannot be seen at 1,000 pixels
MAX_PARTS = 8  # of a stacked bar; the smallest are added up
HEIGHT = 220  # of a line chart's plot, CSS pixels
SCATTER_HEIGHT = 360


@dataclass(frozen=True, slots=True)
class Series:
    """A line: points in order of x. A y that is not finite breaks the line."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Bar:
    """One value of a bar chart; `ours` sets it apart from what it is compared with."""

    name: str
    value: float
    text: str = ""
    note: str = ""
    ours: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a scatter chart, > 0 in both directions; `full` sets it apart from hollow ones."""

    name: str
    x: float
    y: float
    full: bool = False


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    references: Mapping[str, float] | None = None,
    from_zero: bool = False,
) -> Html:
    """Draw lines over a common x, with horizontal `references` to compare them with.

    Args: log_y: logarithmic y; values <= 0 break the line. from_zero: the y axis begins at 0.
    Returns: a figure, or nothing if there is no finite point.
    """
    references = {name: y for name, y in (references or {}).items() if _drawable(y, log_y)}
    good = [[(x, y) for x, y in one.points if _drawable(x, False) and _drawable(y, log_y)] for one in series]
    xs = [x for points in good for x, _ in points]
    ys = [y for points in good for _, y in points] + list(references.values())
    if not xs:
        return Html("")
    x_axis = _Axis.over(min(xs), max(xs), tight=True)
    zero = [0.0] if from_zero and not log_y else []
    y_axis = _Axis.over(min(ys + zero), max(ys + zero), log=log_y)

    marks: list[Html] = []
    for y in y_axis.ticks:
        at = pixels((1 - y_axis.place(y)) * HEIGHT)
        marks.append(tag("line", x1=0, x2="100%", y1=at, y2=at, class_="grid"))
        marks.append(tag("text", compact(y), x=-8, y=at, dy=".32em", class_="end"))
    for x in x_axis.ticks:
        side = "start" if x_axis.place(x) < 0.04 else "end" if x_axis.place(x) > 0.96 else "middle"
        marks.append(tag("text", compact(x), x=_percent(x_axis.place(x)), y=HEIGHT + 18, class_=side))
    marks.append(tag("text", x_label, x="100%", y=HEIGHT + 36, class_="end"))
    curves: list[Html] = []
    keys: list[Html] = []
    for index, one in enumerate(series):
        style = f"line s{index % 4}"
        curves.append(tag("path", class_=style, d=_path(one.points, x_axis, y_axis)))
        last = good[index][-1:]
        keys.append(_key(style, one.name, compact(last[0][1]) if last else ""))
        for x, y in _thin(good[index], 40):
            dot = {"cx": _percent(x_axis.place(x)), "cy": pixels((1 - y_axis.place(y)) * HEIGHT)}
            told = tag("title", f"{one.name}: {compact(y)} at {x_label} {compact(x)}")
            alone = len(good[index]) == 1
            marks.append(tag("circle", told, **dot, r=4, class_=f"dot s{index % 4}" if alone else "touch"))
    for index, (name, y) in enumerate(references.items()):
        at = pixels((1 - y_axis.place(y)) * HEIGHT)
        marks.append(tag("line", x1=0, x2="100%", y1=at, y2=at, class_=f"reference r{index % 3}"))
        keys.append(_key(f"reference r{index % 3}", name, compact(y)))
    inner = tag(
        "svg",
        *curves,
        viewBox="0 0 1000 1000",
        preserveAspectRatio="none",
        width="100%",
        height=HEIGHT,
        overflow="visible",
    )
    summary = f"{y_label} over {x_label}: " + "; ".join(
        f"{one.name} from {compact(points[0][1])} to {compact(points[-1][1])}"
        for one, points in zip(series, good, strict=True)
        if points
    )
    drawing = tag(
        "svg",
        tag("title", title),
        tag("desc", summary),
        *marks[: -len(references) or None],
        inner,
        *(marks[-len(references) :] if references else ()),
        role="img",
        class_="plot",
        width="100%",
        height=HEIGHT + 44,
    )
    rows = [(one.name, x, y) for one, points in zip(series, good, strict=True) for x, y in _thin(points, 16)]
    numbers = details("Numbers", table(("line", x_label, y_label), rows))
    return figure(
        title, tag("p", tag("span", y_label, class_="axis"), *keys, class_="keys"), drawing, numbers
    )


def scatter_chart(
    title: str, points: Sequence[Point], lines: Sequence[Series] = (), *, x_label: str, y_label: str
) -> Html:
    """Draw points over two logarithmic axes, each with its number in `points` from 1, and lines to judge by.

    Returns: a figure, or nothing if no point can be drawn. What the numbers mean stands in the table behind
    the chart; points that are not finite and positive are left out.
    """
    numbered = [(number, one) for number, one in enumerate(points, 1)]
    shown = [(n, one) for n, one in numbered if _drawable(one.x, True) and _drawable(one.y, True)]
    if not shown:
        return Html("")
    corners = [(one.x, one.y) for _, one in shown] + [corner for line in lines for corner in line.points]
    x_axis, y_axis = (_Axis.over(min(side), max(side), log=True) for side in zip(*corners, strict=True))

    def height(y: float) -> str:
        return pixels((1 - y_axis.place(y)) * SCATTER_HEIGHT)

    marks: list[Html] = []
    for y in y_axis.ticks:
        marks.append(tag("line", x1=0, x2="100%", y1=height(y), y2=height(y), class_="grid"))
        marks.append(tag("text", compact(y), x=-8, y=height(y), dy=".32em", class_="end"))
    for x in x_axis.ticks[:: math.ceil(len(x_axis.ticks) / 5)]:  # what fits on a phone
        side = "start" if x_axis.place(x) < 0.04 else "end" if x_axis.place(x) > 0.96 else "middle"
        at = _percent(x_axis.place(x))
        marks.append(tag("text", compact(x), x=at, y=SCATTER_HEIGHT + 18, class_=side))
    marks.append(tag("text", x_label, x="100%", y=SCATTER_HEIGHT + 36, class_="end"))
    curves = [
        tag("path", class_=f"line s{index % 4}", d=_path(line.points, x_axis, y_axis))
        for index, line in enumerate(lines)
    ]
    whole = {"viewBox": "0 0 1000 1000", "preserveAspectRatio": "none", "overflow": "visible"}
    marks.append(tag("svg", *curves, width="100%", height=SCATTER_HEIGHT, **whole))
    taken: list[tuple[float, float]] = []
    for number, one in sorted(shown, key=lambda item: not item[1].full):
        place = x_axis.place(one.x), y_axis.place(one.y)
        told = tag("title", f"{number}: {one.name}: {compact(one.y)} at {x_label} {compact(one.x)}")
        style = f"dot s0{' full' if one.full else ''}"
        marks.append(tag("circle", told, cx=_percent(place[0]), cy=height(one.y), r=3.5, class_=style))
        # A number is left out where another one stands: too near on a phone, 14 pixels high.
        if all(abs(place[0] - x) > 0.1 or abs(place[1] - y) > 16 / SCATTER_HEIGHT for x, y in taken):
            taken.append(place)
            side, shift = ("end", -7) if place[0] > 0.9 else ("start", 7)
            at, top = _percent(place[0]), height(one.y)
            marks.append(tag("text", str(number), x=at, y=top, dx=shift, dy=".32em", class_=side))
    keys = [_key(f"line s{index % 4}", line.name, "") for index, line in enumerate(lines)]
    said = tag("desc", f"{y_label} over {x_label}: {len(shown)} points")
    drawing = tag(
        "svg",
        tag("title", title),
        said,
        *marks,
        role="img",
        class_="plot",
        width="100%",
        height=SCATTER_HEIGHT + 44,
    )
    rows = [(number, one.name, one.x, one.y) for number, one in shown]
    numbers = details("Numbers", table(("", "point", x_label, y_label), rows))
    return figure(
        title, tag("p", tag("span", y_label, class_="axis"), *keys, class_="keys"), drawing, numbers
    )


def bar_chart(title: str, bars: Sequence[Bar], *, note: str = "", top: float | None = None) -> Html:
    """Compare values by bars that all begin at 0; each says its own number.

    Args: bars: values >= 0; `text` is what is printed for the value. top: the value of a full
            bar; None means the largest.
    """
    if not bars:
        return Html("")
    full = top or max(bar.value for bar in bars) or 1.0
    track = tag("rect", x=0, y=0, width="100%", height=10, rx=1.5, class_="track")
    rows = []
    for bar in bars:
        text = bar.text or compact(bar.value)
        told = tag("title", f"{bar.name}: {text}")
        rect = tag("rect", told, x=0, y=0, width=_percent(bar.value / full), height=10, rx=1.5)
        rows.append(
            tag(
                "li",
                tag("span", bar.name, class_="name"),
                tag("span", bar.note, class_="note"),
                tag("span", text, class_="value"),
                tag("svg", track, rect, role="img", width="100%", height=10),
                class_="ours" if bar.ours else "",
            )
        )
    return figure(title, tag("ul", *rows, class_="bars", role="list"), note=note)


def stacked_bar(
    title: str, parts: Mapping[str, float], *, total: str, unit: str = "s", note: str = ""
) -> Html:
    """Show how parts add up to a whole; the largest first, "other" always last.

    Args: parts: values >= 0. total: what is printed for their sum. unit: printed after each value.
    """
    whole = sum(parts.values())
    if whole <= 0:
        return Html("")
    shown = sorted(parts.items(), key=lambda item: (item[0] == "other", -item[1], item[0]))
    shown = [(name, value) for name, value in shown if value > 0]
    if len(shown) > MAX_PARTS:
        kept, rest = shown[: MAX_PARTS - 1], shown[MAX_PARTS - 1 :]
        shown = [*kept, (f"{len(rest)} smaller parts", sum(value for _, value in rest))]
    drawn: list[Html] = []
    keys: list[Html] = []
    left = 0.0
    for index, (name, value) in enumerate(shown):
        share = value / whole
        letter = "abcdefgh"[index]
        style = "other" if name == "other" or name.endswith(" smaller parts") else f"p{index % 6}"
        text = f"{compact(value)} {unit}".strip()
        told = tag("title", f"{name}: {text}, {share:.1%}")
        drawn.append(
            tag("rect", told, x=_percent(left), y=0, width=_percent(share), height=22, class_=f"part {style}")
        )
        if share >= 0.04:
            drawn.append(tag("text", letter, x=_percent(left + share / 2), y=15.5, class_=f"letter {style}"))
        sample = tag("span", letter, class_=f"letter {style}", aria_hidden="true")
        keys.append(tag("li", sample, f" {name} ", tag("b", text), f" {share:.0%}"))
        left += share
    summary = ", ".join(f"{name} {value / whole:.0%}" for name, value in shown)
    drawing = tag(
        "svg",
        tag("title", f"{title}: {total}"),
        tag("desc", summary),
        *drawn,
        role="img",
        width="100%",
        height=22,
    )
    return figure(title, drawing, tag("ul", *keys, class_="parts", role="list"), note=note, aside=total)


def _key(style: str, name: str, value: str) -> Html:
    line = tag("line", x1=0, x2=26, y1=5, y2=5, class_=style)
    sample = tag("svg", line, width=26, height=10, aria_hidden="true")
    return tag("span", sample, f" {name} ", tag("b", value), class_="key")


def _drawable(value: float, log: bool) -> bool:
    """Tell whether an axis can hold a value: differences and powers of it must be floats too."""
    return abs(value) < 1e300 and (value > 1e-300 or not log)


def _percent(share: float) -> str:
    return pixels(share * 100) + "%"


def _thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Keep at most `most` points, evenly spread, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _path(points: Sequence[tuple[float, float]], x_axis: "_Axis", y_axis: "_Axis") -> str:
    """Write an SVG path in a square of 1,000; each bucket of points keeps its extremes."""
    bucket = max(1, math.ceil(len(points) / (MAX_POINTS // 2)))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), bucket):
        some = points[start : start + bucket]
        if len(some) > 2 and all(_drawable(y, y_axis.log) for _, y in some):
            low, high = min(some, key=lambda p: p[1]), max(some, key=lambda p: p[1])
            some = sorted({low, high})
        kept.extend(some)
    steps, pen = [], "M"
    for x, y in kept:
        if _drawable(x, False) and _drawable(y, y_axis.log):
            steps.append(f"{pen}{pixels(x_axis.place(x) * 1000)} {pixels((1 - y_axis.place(y)) * 1000)}")
            pen = "L"
        else:
            pen = "M"
    return "".join(steps)


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    @classmethod
    def over(cls, low: float, high: float, *, log: bool = False, tight: bool = False) -> "_Axis":
        """Choose round ticks for a range; the axis ends at ticks unless `tight`."""
        if log:
            return cls._over_decades(low, high)
        if high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-290):
            low, high = low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
        rough = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))
        if tight:
            return cls(low, high, tuple(t for t in ticks if low <= t <= high))
        return cls(min(ticks[0], low), max(ticks[-1], high), ticks)

    @classmethod
    def _over_decades(cls, low: float, high: float) -> "_Axis":
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        decades = range(first, max(last, first + 1) + 1)
        steps = (1, 2, 5) if len(decades) <= 3 else (1,)
        ticks = [m * 10.0**d for d in decades[:: math.ceil(len(decades) / 8)] for m in steps]
        bottom = max((t for t in ticks if t <= low), default=low)
        top = min((t for t in ticks if t >= high and t > bottom), default=max(high, bottom * 10))
        return cls(bottom, top, tuple(t for t in ticks if bottom <= t <= top), True)

    def place(self, value: float) -> float:
        """Return where a value lies: 0 at the low end, 1 at the high end."""
        if self.log:
            low = math.log(self.low)
            return (math.log(value) - low) / (math.log(self.high) - low)
        return (value - self.low) / (self.high - self.low)
