"""The report of a run: everything that was measured, as one HTML file.

The page needs neither network nor script; a section whose data a run does not have is left out. The
order is that of a reader's questions: did it learn, what does it write, where does that come from,
how fast is it, what did it cost, what went in, how was it asked for.
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from marrow.cli.console import duration, quantity, size
from marrow.cli.results import LineageNode, NearestRow, RunReport, Score
from marrow.core.charts import Bar, Series, bar_chart, line_chart, stacked_bar
from marrow.core.errors import explain_os_errors
from marrow.core.files import atomic_file
from marrow.core.graph import Edge, Node, graph
from marrow.core.page import (
    Cell,
    Html,
    Page,
    Tile,
    beside,
    card,
    code,
    compact,
    details,
    escape,
    join,
    prose,
    table,
    tag,
    tiles,
)

NONE = Html("")


def write_report(run: RunReport, path: Path) -> None:
    """Write the run as one HTML file that appears whole or not at all.

    Raises: DiskFull, NotPermitted, SourceError.
    """
    with explain_os_errors("write the report", path), atomic_file(path, "w") as file:
        file.write(page_of(run))


def page_of(run: RunReport) -> str:
    """Set the run as an HTML page."""
    about = " · ".join(part for part in (run.when, run.machine) if part)
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    footer = f"Made by Marrow with {versions}." if versions else "Made by Marrow."
    page = Page(run.recipe, about, footer=footer)
    page.lead(tiles(*headline(run)))
    page.section("What it learned", *_learned(run))
    page.section("What it writes", *_writes(run))
    page.section("Where that comes from", *_nearest(run))
    page.section("Serving", *_serving(run))
    page.section("Where the time went", *_time(run))
    page.section("What went in", *_data(run))
    page.section("Lineage", *_lineage(run))
    page.section("Recipe", *_recipe(run))
    return page.html()


def headline(run: RunReport) -> list[Tile]:
    """Return the key figures of the run, those that it has."""
    found: list[Tile] = []
    if ours := next((score for score in run.scores if score.ours), None):
        found.append(Tile("held-out bits per byte", f"{ours.bits_per_byte:.3f}", _against(ours, run.scores)))
    if run.parse_rates:
        (name, rate), *others = run.parse_rates.items()
        note = ", ".join(f"{other} {value:.0%}" for other, value in others)
        found.append(Tile("completions that parse", f"{rate:.0%}", note or name))
    if speeds := sorted(point.tokens_per_s for point in run.metrics if point.tokens_per_s):
        mfus = sorted(point.mfu for point in run.metrics if point.mfu)
        note = f"{mfus[len(mfus) // 2]:.0%} of the GEMM peak" if mfus else ""
        found.append(Tile("training tokens/s", quantity(speeds[len(speeds) // 2]), note))
    if served := run.serving:
        note = f"{served.concurrency} at once, first token in {duration(served.ttft_p50_ms / 1e3)}"
        found.append(Tile("served tokens/s", quantity(served.tokens_per_s), note))
    if run.steps:
        cached = sum(step.status == "cached" for step in run.steps)
        note = f"{duration(run.cpu_s)} of CPU time" + (
            f", {cached} of {len(run.steps)} steps cached" if cached else ""
        )
        found.append(Tile("the whole run", duration(run.wall_s), note))
    if run.peak_rss_bytes:
        largest = max(run.steps, key=lambda step: step.peak_rss_bytes)
        found.append(Tile("peak memory", size(run.peak_rss_bytes), f"in {largest.name}"))
    return found


def _against(ours: Score, scores: tuple[Score, ...]) -> str:
    """Compare with the first baseline in the order given."""
    baseline = next((score for score in scores if not score.ours), None)
    if baseline is None or baseline.bits_per_byte <= 0:
        return ""
    change = ours.bits_per_byte / baseline.bits_per_byte - 1
    word = "below" if change < 0 else "above"
    return f"{abs(change):.1%} {word} {baseline.name} ({baseline.bits_per_byte:.3f})"


def _learned(run: RunReport) -> list[Html]:
    bars = [
        Bar(score.name, score.bits_per_byte, f"{score.bits_per_byte:.3f}", score.note, score.ours)
        for score in sorted(run.scores, key=lambda score: score.bits_per_byte)
    ]
    loss = [(point.step, point.loss) for point in run.metrics]
    speed = [(point.step, point.tokens_per_s) for point in run.metrics if point.tokens_per_s is not None]
    used = [(point.step, point.mfu * 100) for point in run.metrics if point.mfu is not None]
    waited = [(point.step, point.data_wait * 100) for point in run.metrics if point.data_wait is not None]
    shares = [Series("of the measured GEMM peak (MFU)", used), Series("of the time waiting for data", waited)]
    return [
        bar_chart("Bits per byte of the held-out text", bars, note="Lower is better."),
        line_chart("Training loss", [Series("loss", loss)], x_label="step", y_label="nats per token"),
        line_chart(
            "Throughput",
            [Series("training", speed)],
            x_label="step",
            y_label="tokens per second",
            from_zero=True,
        ),
        line_chart(
            "Use of the machine",
            [series for series in shares if series.points],
            x_label="step",
            y_label="percent",
            from_zero=True,
        ),
    ]


def _writes(run: RunReport) -> list[Html]:
    cards = []
    for sample in run.samples:
        ages = (("untrained", sample.before), ("midway", sample.midway), ("trained", sample.after))
        columns = [(age, code(tag("b", sample.prompt), text)) for age, text in ages if text is not None]
        cards.append(card("", beside(*columns)))
    rates = [
        Bar(name, rate, f"{rate:.1%}", ours=not index)
        for index, (name, rate) in enumerate(run.parse_rates.items())
    ]
    lead = "The prompt is set in bold; what follows is the model's own."
    return [
        prose(lead) if cards else NONE,
        *cards,
        bar_chart("Completions that parse as Python", rates, note="Higher is better.", top=1.0),
    ]


def _nearest(run: RunReport) -> list[Html]:
    cards = []
    for row in run.nearest:
        place = row.file if row.line is None else f"{row.file}:{row.line}"
        cards.append(card(tag("code", place), code(_marked(row))))
    lead = "For each completion the training row that shares the longest text with it, which is "
    return [prose(lead, tag("mark", "marked"), "."), *cards] if cards else []


def _marked(row: NearestRow) -> Html:
    """Set the prompt in bold and mark the shared text, which may begin in the prompt."""
    text, bold = row.prompt + row.completion, len(row.prompt)
    start = text.find(row.shared, bold)
    start = text.find(row.shared) if start < 0 else start
    end = start + len(row.shared) if start >= 0 else start
    cuts = sorted({0, bold, max(start, 0), max(end, 0), len(text)})
    pieces = []
    for low, high in pairwise(cuts):
        piece = _mark(text[low:high]) if start <= low < end else escape(text[low:high])
        pieces.append(tag("b", piece) if high <= bold else piece)
    return join(*pieces)


def _mark(text: str) -> Html:
    """Mark each line, but not its indentation."""
    parts = re.split(r"(\s*\n\s*)", text)
    return join(*(escape(part) if not part.strip() else tag("mark", part) for part in parts))


def _serving(run: RunReport) -> list[Html]:
    if run.serving is None:
        return []
    served = run.serving
    rows = [
        ("time to first token", f"{served.ttft_p50_ms:.1f} ms", f"{served.ttft_p99_ms:.1f} ms"),
        ("time between tokens", f"{served.itl_p50_ms:.1f} ms", f"{served.itl_p99_ms:.1f} ms"),
    ]
    failed = "none failed" if not served.errors else f"{served.errors:,} failed"
    text = (
        f"{served.requests:,} streaming requests over HTTP, {served.concurrency} at a time, in "
        f"{duration(served.wall_s)}; {failed}. {quantity(served.tokens_per_s)} tokens/s in all."
    )
    behind = table(("latency", "median", "99th percentile"), rows)
    return [prose(text), behind, _ledger("engine", served.ledger)]


def _ledger(name: str, ledger: Mapping[str, Any] | None) -> Html:
    if not ledger:
        return NONE
    parts = {part: float(value["seconds"]) for part, value in ledger["parts"].items()}
    others = ", ".join(
        f"{part} {duration(value['seconds'])}" for part, value in ledger.get("overlapped", {}).items()
    )
    note = f"Meanwhile, on other threads: {others}." if others else ""
    return stacked_bar(name, parts, total=duration(float(ledger["wall_s"])), note=note)


def _time(run: RunReport) -> list[Html]:
    rows: list[tuple[Cell, ...]] = [
        (
            step.name,
            step.status,
            duration(step.wall_s),
            duration(step.cpu_s),
            size(step.peak_rss_bytes) if step.peak_rss_bytes else None,
            tag("code", step.artifact_id[:12]),
        )
        for step in run.steps
    ]
    whole = {step.name: step.wall_s for step in run.steps}
    header = ("step", "status", "wall", "CPU", "peak memory", "artifact")
    return [
        stacked_bar("the run by step", whole, total=duration(run.wall_s)) if len(whole) > 1 else NONE,
        *(_ledger(step.name, step.ledger) for step in run.steps),
        table(header, rows, caption="Steps"),
    ]


def _data(run: RunReport) -> list[Html]:
    dropped = [
        (rule.rule, rule.num_rows, None if rule.num_bytes is None else size(rule.num_bytes), rule.example)
        for rule in run.dropped
    ]
    facts = [
        details(
            step.name, table(("figure", "value"), [(key, _fact(fact)) for key, fact in step.facts.items()])
        )
        for step in run.steps
        if step.facts
    ]
    return [
        table(("rule", "rows", "bytes", "for example"), dropped, caption="Dropped rows"),
        tag("h3", "What each step counted") if facts else NONE,
        *facts,
    ]


def _fact(value: Any) -> str:
    """Write any JSON value in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return compact(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_fact(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_fact(item) for item in value)
    return "" if value is None else str(value)


def _lineage(run: RunReport) -> list[Html]:
    nodes = [Node(node.id, node.kind, _lines_of(node)) for node in run.nodes]
    edges = [Edge(edge.parent, edge.child, edge.role) for edge in run.edges]
    return [graph("What was made from what", nodes, edges)]


def _lines_of(node: LineageNode) -> str:
    short_id = node.id[:8] if re.fullmatch("[0-9a-f]{64}", node.id) else ""
    return " ".join(part for part in (node.note, short_id) if part)


def _recipe(run: RunReport) -> list[Html]:
    rows = [(tag("code", value.key), tag("code", value.value), value.origin) for value in run.recipe_values]
    return [table(("key", "value", "from"), rows)]
