"""Graphs: nothing overlaps, arrows go down, and each box says what it stands for."""

import re
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.core.graph import BOX, Edge, Node, graph
from marrow.core.page import Page

NASTY = (
    "WWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWW",
    "mmmmmmmm@@@@@@@%%%%%%%MMMMMMM",
    "数据集和模型的谱系图谱数据集和模型",
    "👩‍👩‍👧‍👦🏳️‍🌈🧪🧫🧬🔬🔭📡💉🩸💊🩹",
    "نموذج اللغة والبيانات المصدرية",
    "zażółć gęślą jaźń é̶̛́",
    "﷽﷽﷽﷽",
    "QOGDHNUQOGDHNUQOGDHNUQOGDHNUQOGDHN",
    "0123456789bdpqghknuo0123456789bdpq",
    "illiilliillii....,,,,''''",
    "a" * 500,
    "",
    "<script>alert(1)</script>",
)


def boxes(markup: str) -> list[tuple[float, float, float, float]]:
    """Read the boxes back: left, top, right, bottom; in the order of the nodes."""
    found = re.findall(r'<rect x="([-\d.]+)" y="([-\d.]+)" width="([\d.]+)" height="([\d.]+)"', markup)
    rects = [tuple(map(float, one)) for one in found]
    return [(x, y, x + width, y + height) for x, y, width, height in rects]


def arrows(markup: str) -> list[list[tuple[float, float]]]:
    """Read the arrows back as points along their curves, without the heads."""
    return [follow(path) for path in re.findall(r'<path d="([^"]*)m-4 -7l4 7l4 -7" class="edge"', markup)]


def follow(path: str) -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    for command, numbers in re.findall(r"([MCV])([^MCV]*)", path):
        values = [float(number) for number in numbers.split()]
        if command == "M":
            points.append((values[0], values[1]))
        elif command == "V":
            points.append((points[-1][0], values[0]))
        else:
            (x0, y0), (x1, y1, x2, y2, x3, y3) = points[-1], values
            for t in (i / 16 for i in range(1, 17)):
                s = 1 - t
                points.append(
                    (
                        s**3 * x0 + 3 * s * s * t * x1 + 3 * s * t * t * x2 + t**3 * x3,
                        s**3 * y0 + 3 * s * s * t * y1 + 3 * s * t * t * y2 + t**3 * y3,
                    )
                )
    return points


@st.composite
def dags(draw: st.DrawFn) -> tuple[list[Node], list[Edge]]:
    count = draw(st.integers(1, 14))
    names = draw(st.lists(st.text(max_size=40), min_size=count, max_size=count))
    order = draw(st.permutations(range(count)))
    pairs = draw(st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=30))
    nodes = [Node(str(i), names[i], f"note {i}") for i in order]
    return nodes, [Edge(str(a), str(b), "role") for a, b in pairs if a < b]


@settings(max_examples=60)
@given(dags())
def test_no_two_boxes_overlap_and_arrows_go_down(dag: tuple[list[Node], list[Edge]]) -> None:
    nodes, edges = dag
    markup = graph("t", nodes, edges)
    rects = boxes(markup)
    assert len(rects) == len(nodes)
    for one, two in combinations(rects, 2):
        apart = one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
        assert apart, (one, two)
    place = {node.id: rect for node, rect in zip(nodes, rects, strict=True)}
    for edge, points in zip(edges, arrows(markup), strict=True):
        source, target = place[edge.source], place[edge.target]
        assert source[3] < target[1]
        # the ends lie on the box edges, to the two decimals that are written
        assert points[0][1] == pytest.approx(source[3], abs=0.02)
        assert points[-1][1] == pytest.approx(target[1], abs=0.02)
        assert source[0] <= points[0][0] <= source[2]
        assert target[0] <= points[-1][0] <= target[2]
        assert all(one[1] <= two[1] + 0.02 for one, two in pairwise(points))


@settings(max_examples=60)
@given(dags())
def test_no_arrow_crosses_a_box(dag: tuple[list[Node], list[Edge]]) -> None:
    markup = graph("t", *dag)
    rects = boxes(markup)
    for points in arrows(markup):
        for (x0, y0), (x1, y1) in pairwise(points):
            x, y = (x0 + x1) / 2, (y0 + y1) / 2
            inside = [r for r in rects if r[0] < x < r[2] and r[1] + 0.02 < y < r[3] - 0.02]
            assert not inside, (x, y, inside)


@given(dags())
@settings(max_examples=20)
def test_everything_lies_within_the_drawing(dag: tuple[list[Node], list[Edge]]) -> None:
    markup = graph("t", *dag)
    width, height = map(
        float, re.search(r'class="graph" width="([\d.]+)" height="([\d.]+)"', markup).groups()
    )
    for left, top, right, bottom in boxes(markup):
        assert left >= 0 and top >= 0 and right <= width + 0.02 and bottom <= height + 0.02
    for points in arrows(markup):
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_a_chain_is_a_straight_line() -> None:
    nodes = [Node(str(i), "x" * (3 * i + 1)) for i in range(5)]
    markup = graph("t", nodes, [Edge(str(i), str(i + 1)) for i in range(4)])
    middles = {round((left + right) / 2) for left, _, right, _ in boxes(markup)}
    assert len(middles) == 1


def test_a_node_is_below_its_lowest_parent() -> None:
    nodes = [Node(name, name) for name in "abcd"]
    edges = [Edge("a", "b"), Edge("b", "c"), Edge("a", "d"), Edge("c", "d")]
    tops = [top for _, top, _, _ in boxes(graph("t", nodes, edges))]
    assert tops == sorted(tops)
    assert len(set(tops)) == 4
    assert all(lower - upper > BOX for upper, lower in pairwise(tops))


def test_crossings_that_need_not_be_are_undone() -> None:
    nodes = [Node(name, name) for name in ("a", "b", "y", "x")]
    markup = graph("t", nodes, [Edge("a", "x"), Edge("b", "y")])
    a, b, y, x = boxes(markup)
    assert (a[0] < b[0]) == (x[0] < y[0])


@pytest.mark.parametrize(
    ("edges", "said"),
    [
        ([Edge("a", "b"), Edge("b", "a")], "circle"),
        ([Edge("a", "a")], "circle"),
        ([Edge("a", "z")], "'z' names no node"),
    ],
)
def test_what_is_no_graph_is_refused(edges: list[Edge], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        graph("t", [Node("a", "a"), Node("b", "b")], edges)
    with pytest.raises(ValueError, match="share an id"):
        graph("t", [Node("a", "a"), Node("a", "b")], [])


def test_no_nodes_give_no_drawing() -> None:
    assert graph("t", [], []) == ""


def test_roles_are_told_in_the_table_and_doubles_are_kept() -> None:
    nodes = [Node("a", "split"), Node("b", "train")]
    markup = graph("t", nodes, [Edge("a", "b", "rows"), Edge("a", "b", "tokenizer")])
    assert "<td>rows</td>" in markup and "<td>tokenizer</td>" in markup


def test_equal_input_gives_equal_bytes() -> None:
    nodes = [Node(str(i), f"node {i}") for i in range(9)]
    edges = [Edge(str(i), str(j)) for i in range(9) for j in range(i + 1, 9, 2)]
    assert graph("t", nodes, edges) == graph("t", nodes, edges)


def test_a_thousand_nodes_take_a_moment() -> None:
    nodes = [Node(str(i), f"node {i}") for i in range(1000)]
    edges = [Edge(str(i), str(i + step)) for i in range(1000) for step in (1, 7) if i + step < 1000]
    assert len(boxes(graph("t", nodes, edges))) == 1000


TEXTS = """(() => {
  const bad = [];
  const texts = [...document.querySelectorAll('.graph text')].map(t => [t, t.getBBox()]);
  for (const [t, b] of texts) {
    const r = t.parentElement.querySelector('rect').getBBox();
    if (b.width && (b.x < r.x || b.x + b.width > r.x + r.width)) bad.push('sticks out: ' + t.textContent);
  }
  texts.forEach(([t, a], i) => texts.slice(i + 1).forEach(([u, b]) => {
    const wide = a.x < b.x + b.width && b.x < a.x + a.width;
    const high = a.y < b.y + b.height - 2 && b.y < a.y + a.height - 2;
    if (wide && high) bad.push([t.textContent, u.textContent]);
  }));
  return bad;
})()"""


def test_texts_stay_in_their_boxes_in_a_real_browser(browser, tmp_path: Path) -> None:
    nodes = [Node(str(i), text, NASTY[-1 - i]) for i, text in enumerate(NASTY)]
    edges = [Edge("0", str(i)) for i in range(1, 6)] + [Edge("1", str(i)) for i in range(6, len(NASTY))]
    page = Page("graph")
    page.section("Lineage", graph("nasty", nodes, edges))
    path = tmp_path / "graph.html"
    path.write_text(page.html(), encoding="utf-8")
    browser.open(path)
    assert browser.evaluate(TEXTS) == []
    browser.resize(390, 800)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.errors == []
