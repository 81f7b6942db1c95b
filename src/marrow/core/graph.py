"""Layered graphs for pages: boxes and arrows from top to bottom, as SVG.

The layout follows Sugiyama, Tagawa and Toda 1981: each node goes one layer below its lowest
parent, an edge over several layers gets an invisible box in each layer it passes, the order
within layers is swept towards the neighbours' mean, then the positions are. Hence no two boxes
overlap and no arrow crosses a box. Boxes are as wide as their text can be in any system font;
the drawing keeps its size and scrolls. Equal input gives equal bytes.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from marrow.core.page import Html, details, figure, pixels, table, tag

BOX = 46.0  # height of a box, CSS pixels
STEP = 84.0  # from one layer to the next
GAP = 20.0  # between neighbours
MARGIN = 4.0
SWEEPS = 12


@dataclass(frozen=True, slots=True)
class Node:
    """A box: `label` in bold over `note`."""

    id: str
    label: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Edge:
    """An arrow; its `role` is told in the table behind the drawing."""

    source: str
    target: str
    role: str = ""


def graph(title: str, nodes: Sequence[Node], edges: Sequence[Edge]) -> Html:
    """Draw a directed acyclic graph from top to bottom.

    Raises: ValueError if two nodes share an id, an edge names no node, or the edges make a circle.
    Cost: 24 sweeps of O((nodes + edges) * layers).
    """
    if not nodes:
        return Html("")
    layout = _Layout(nodes, edges)
    drawn = [tag("path", d=layout.arrow(edge), class_="edge") for edge in edges]
    for node in nodes:
        x, y, width = layout.box(node.id)
        label, note = _shorten(node.label), _shorten(node.note)
        drawn.append(
            tag(
                "g",
                tag("title", f"{node.label} {node.note}".strip()),
                tag("rect", x=pixels(x), y=pixels(y), width=pixels(width), height=pixels(BOX), rx=6),
                tag(
                    "text", label, x=pixels(x + width / 2), y=pixels(y + (20 if note else 28)), class_="label"
                ),
                tag("text", note, x=pixels(x + width / 2), y=pixels(y + 36), class_="note") if note else "",
                class_="node",
            )
        )
    drawing = tag(
        "svg",
        tag("title", title),
        tag("desc", f"{len(nodes)} nodes and {len(edges)} edges; the edges are listed in the table below."),
        *drawn,
        role="img",
        class_="graph",
        width=pixels(layout.width),
        height=pixels(layout.height),
    )
    names = {node.id: node.label for node in nodes}
    rows = [(names[edge.source], names[edge.target], edge.role) for edge in edges]
    behind = details("Edges", table(("from", "to", "as"), rows)) if rows else ""
    scroll = tag("div", drawing, class_="scroll", tabindex=0, role="group", aria_label=title)
    return figure(title, scroll, behind)


def text_width(text: str, size: float) -> float:
    """Bound, for any common system font, bold or not, the pixels that a text of this size takes."""
    ems = 0.0
    for letter in text:
        if unicodedata.category(letter) in ("Mn", "Me", "Cf"):  # drawn over or not at all
            continue
        if letter in "iljtfrI .,:;|'!()[]-":
            ems += 0.46
        elif letter in "mwMW%@":
            ems += 1.15
        elif ord(letter) < 128:
            ems += 0.76 if letter.islower() or letter.isdigit() else 0.9
        else:
            ems += 1.3  # wide scripts take 1 em, some symbols more
    return ems * size


@dataclass(slots=True)
class _Place:
    """A box in a layer, or the invisible box of an edge that passes; x is its middle."""

    width: float
    layer: int
    above: list["_Place"]
    below: list["_Place"]
    passes: bool = False
    x: float = 0.0


class _Layout:
    """Where everything is. Layers hold places from left to right."""

    def __init__(self, nodes: Sequence[Node], edges: Sequence[Edge]) -> None:
        depth = _layers(nodes, edges)
        self._places = {
            node.id: _Place(
                math.ceil(
                    max(text_width(_shorten(node.label), 13), text_width(_shorten(node.note), 11)) + 20
                ),
                depth[node.id],
                [],
                [],
            )
            for node in nodes
        }
        self._layers: list[list[_Place]] = [[] for _ in range(max(depth.values()) + 1)]
        for place in self._places.values():
            self._layers[place.layer].append(place)
        self._routes: dict[tuple[str, str], list[_Place]] = {}
        for edge in edges:
            if (edge.source, edge.target) not in self._routes:
                self._routes[edge.source, edge.target] = self._route(edge)
        self._order()
        self._position()
        left = min(place.x - place.width / 2 for layer in self._layers for place in layer)
        for layer in self._layers:
            for place in layer:
                place.x += MARGIN - left
        self.width = max(layer[-1].x + layer[-1].width / 2 for layer in self._layers) + MARGIN
        self.height = (len(self._layers) - 1) * STEP + BOX + 2 * MARGIN

    def box(self, node_id: str) -> tuple[float, float, float]:
        """Return a node's left edge, top edge and width."""
        place = self._places[node_id]
        return place.x - place.width / 2, _top(place), place.width

    def arrow(self, edge: Edge) -> str:
        """Write the SVG path of an edge: a smooth curve between layers, straight beside boxes."""
        route = self._routes[edge.source, edge.target]
        steps = [f"M{pixels(_port(route[0], route[1]))} {pixels(_top(route[0]) + BOX)}"]
        for upper, lower in pairwise(route):
            end = _top(lower)
            middle = pixels((_top(upper) + BOX + end) / 2)
            leave, arrive = pixels(_port(upper, lower)), pixels(_port(lower, upper))
            steps.append(f"C{leave} {middle} {arrive} {middle} {arrive} {pixels(end)}")
            if lower is not route[-1]:
                steps.append(f"V{pixels(end + BOX)}")
        return "".join(steps) + "m-4 -7l4 7l4 -7"

    def _route(self, edge: Edge) -> list[_Place]:
        source, target = self._places[edge.source], self._places[edge.target]
        route = [source]
        for layer in range(source.layer + 1, target.layer):
            passing = _Place(4.0, layer, [], [], passes=True)
            self._layers[layer].append(passing)
            route.append(passing)
        route.append(target)
        for upper, lower in pairwise(route):
            upper.below.append(lower)
            lower.above.append(upper)
        return route

    def _order(self) -> None:
        """Sort each layer by the mean rank of its neighbours, downwards and upwards in turn."""
        for sweep in range(SWEEPS):
            layers = self._layers if sweep % 2 == 0 else self._layers[::-1]
            for layer in self._layers:
                for rank, place in enumerate(layer):
                    place.x = rank - (len(layer) - 1) / 2
            for layer in layers:
                wanted = {
                    id(place): _mean(place.above if sweep % 2 == 0 else place.below, place.x)
                    for place in layer
                }
                layer.sort(key=lambda place: wanted[id(place)])
                for rank, place in enumerate(layer):
                    place.x = rank - (len(layer) - 1) / 2

    def _position(self) -> None:
        """Move each place towards its neighbours' mean, keeping the order and the gaps."""
        for layer in self._layers:
            _spread(layer, [(0.0, 1.0)] * len(layer))
        for sweep in range(SWEEPS):
            for layer in self._layers if sweep % 2 == 0 else self._layers[::-1]:
                _spread(layer, [_pull(place) for place in layer])


def _layers(nodes: Sequence[Node], edges: Sequence[Edge]) -> dict[str, int]:
    """Give each node the length of the longest path to it."""
    depth = {node.id: 0 for node in nodes}
    if len(depth) < len(nodes):
        raise ValueError("two nodes of a graph share an id")
    for edge in edges:
        if edge.source not in depth or edge.target not in depth:
            raise ValueError(f"the edge {edge.source!r} -> {edge.target!r} names no node")
    for _ in range(len(nodes)):
        moved = False
        for edge in edges:
            if depth[edge.target] <= depth[edge.source]:
                depth[edge.target] = depth[edge.source] + 1
                moved = True
        if not moved:
            return depth
    raise ValueError("the edges of a graph make a circle")


def _pull(place: _Place) -> tuple[float, float]:
    """Return where the neighbours want a place, and how strongly.

    Edges that pass are pulled straight more strongly, as 1:2:8 in Gansner et al. 1993.
    """
    total, weights = 0.0, 0.0
    for other in (*place.above, *place.below):
        weight = (1.0, 2.0, 8.0)[place.passes + other.passes]
        total += weight * other.x
        weights += weight
    return (total / weights, weights) if weights else (place.x, 1.0)


def _spread(layer: Sequence[_Place], pulls: Sequence[tuple[float, float]]) -> None:
    """Put places as near as they can be to the wanted middles, in order and without overlap.

    Places that would overlap are pooled and share their mean shift (pool adjacent violators).
    """
    offsets, reach = [], 0.0  # where each place would be if all touched
    for index, place in enumerate(layer):
        if index:
            reach += (layer[index - 1].width + place.width) / 2 + GAP
        offsets.append(reach)
    pools: list[tuple[float, float, int]] = []  # shift, weight, places
    for (wanted, weight), offset in zip(pulls, offsets, strict=True):
        pools.append((wanted - offset, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (shift, heavy, count), (before, others, more) = pools.pop(), pools.pop()
            mean = (shift * heavy + before * others) / (heavy + others)
            pools.append((mean, heavy + others, count + more))
    shifts = [shift for shift, _, count in pools for _ in range(count)]
    for place, offset, shift in zip(layer, offsets, shifts, strict=True):
        place.x = offset + shift


def _port(place: _Place, other: _Place) -> float:
    """Return where the edge to `other` meets a box: edges of one side stand apart, in order."""
    if place.passes:
        return place.x
    side = place.below if other.layer > place.layer else place.above
    rank = sum(one.x < other.x for one in side)
    apart = min(12.0, (place.width - 24) / max(len(side) - 1, 1))
    return place.x + (rank - (len(side) - 1) / 2) * apart


def _mean(places: Sequence[_Place], otherwise: float) -> float:
    return sum(place.x for place in places) / len(places) if places else otherwise


def _top(place: _Place) -> float:
    return MARGIN + place.layer * STEP


def _shorten(text: str, most: int = 34) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
