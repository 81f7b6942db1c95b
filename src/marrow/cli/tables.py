"""Text for the terminal: the run, a ledger and its bottleneck, a lineage tree, the doctor.

Every function returns text for stdout. On a terminal it is set to its width, with bold headings;
elsewhere, or where NO_COLOR is set, it holds no escape codes, and elsewhere its lines are as long
as they need to be, so that it can be piped. rich is imported only when something is drawn.
"""

import io
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from marrow.cli.console import duration, size
from marrow.cli.report import headline
from marrow.cli.results import RunReport
from marrow.core.page import visible

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

BAR_WIDTH = 28
PLAIN_WIDTH = 1_000  # columns where no terminal cuts lines
OTHER_IS_LARGE = 0.25
WAIT_IS_LARGE = 0.05  # of the time; then it is worth a hint though something else takes more
WAIT = "data wait"  # parts "data wait: STAGE" are its own (loader/stages.py)

# What to do when a part takes most of the time: the first word that the part's name holds counts.
ADVICE = {
    "data wait: fetch": "shards come too slowly from where they are: raise "
    "the cache's max_bytes, lower loader.window, write larger shards, or move them nearer",
    "data wait: verify": "checking shards as a whole is the limit: it is done once for each and process; "
    "raise loader.prefetch to spread it",
    "data wait: decode": "reading rows is the limit: raise loader.workers, or put the data on a faster "
    "disk; for Parquet, shuffle in a window of row groups, or write smaller ones",
    "data wait: transform": "the transform is the limit: raise loader.workers, or do its work once, "
    "before training",
    "data wait: collate": "putting batches together is the limit: raise loader.workers, or pad less",
    "data wait: copy": "copies to the device are the limit: copy smaller types and convert there (on_device)",
    "data wait: queue": "batches stand in line: raise loader.prefetch, or leave the loader a core",
    "data wait": "the loader is the limit: put the shards on a faster disk, or leave a core to it",
    "checkpoint": "checkpoints stop the run: raise train.checkpoint_every",
    "snapshot": "snapshots stop the run: keep fewer of them",
    "compile": "compilation is paid once a run: it pays off in longer runs only",
    "backward": "matrix products are the limit, as they should be; `marrow doctor` shows their peak",
    "forward": "matrix products are the limit, as they should be; `marrow doctor` shows their peak",
    "optimiser": "updates are the limit: larger batches need fewer of them for as many tokens",
    "idle": "the engine waits for requests: it can take more at once",
    "queue": "requests wait for room: allow more at once, or more KV cache",
    "schedul": "choosing what to run is the limit: this is worth a bug report",
    "prefill": "prompts are the limit: let them share a prefix, or shorten them",
    "decode": "weights and KV cache are read for every token: serve more requests at once",
    "draw": "drawing tokens is the limit: temperature 0 costs least",
    "encode": "encoding is the limit: it is cached until documents or tokenizer change; "
    "--engine threads uses more cores",
    "workers": "pieces of work are waited for: raise --workers, up to the number of CPUs",
    "tokeni": "tokenising is the limit: it is cached until the rows change",
    "quality": "the quality rules are the limit: --engine processes shares them among cores",
    "personal": "looking for personal data is the limit: --engine processes shares it among cores",
    "expectation": "expectations are the limit: unique and refers_to on long texts cost most",
    "profile": "the profile is the limit: columns of different long texts cost most",
    "duplicate": "finding duplicates is the limit: it is cached until the rows or its rules change",
    "signature": "finding duplicates is the limit: it is cached until the rows or its rules change",
    "decontaminat": "looking for evaluation texts is the limit: it is cached until they or the rows change",
    "ngram": "the n-gram baseline is the limit: it is cached until the tokens change",
    "xz": "the xz baseline is the limit: it is cached until the text changes",
    "read": "reading is the limit: put the source on a faster disk",
    "write": "writing is the limit: put MARROW_HOME on a faster disk",
    "other": "no span covers this time: measure what the step does between its spans",
}


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """The part of a ledger that took the most time, its share (0 to 1) and what to do about it."""

    part: str
    share: float
    advice: str


def bottleneck(ledger: Mapping[str, Any]) -> Bottleneck | None:
    """Name the largest part of a ledger (`LedgerSummary.as_dict()`); None if no time passed.

    "other" is named only if it takes more than a quarter and more than every part: time that
    nobody measured is then the first thing to look into.
    """
    seconds = {name: float(part["seconds"]) for name, part in ledger["parts"].items()}
    whole = sum(seconds.values())
    if whole <= 0:
        return None
    waits = {name: seconds.pop(name) for name in [*seconds] if name.startswith(WAIT)}
    if waits:
        seconds[WAIT] = sum(waits.values())  # one part, whatever the awaited batches were in
    other = seconds.pop("other", 0.0)
    part, most = max(seconds.items(), key=lambda item: item[1], default=("other", 0.0))
    if other > max(most, OTHER_IS_LARGE * whole) or part == "other":
        part, most = "other", other
    if part == WAIT and len(waits) > 1:
        return data_wait(ledger)
    known = next((advice for word, advice in ADVICE.items() if word in part.lower()), "")
    return Bottleneck(part, most / whole, known or f"most of the time is spent in {part}")


def data_wait(ledger: Mapping[str, Any]) -> Bottleneck | None:
    """Return the whole wait for batches, with the stage that took most of it; None if there was none."""
    seconds = {name: float(part["seconds"]) for name, part in ledger["parts"].items()}
    waits = {name: s for name, s in seconds.items() if name.startswith(WAIT)}
    whole = sum(seconds.values())
    if not waits or whole <= 0:
        return None
    advice = _wait_advice(waits, whole, ledger.get("overlapped") or {})
    return Bottleneck(WAIT, sum(waits.values()) / whole, advice)


def _wait_advice(waits: Mapping[str, float], whole: float, overlapped: Mapping[str, Any]) -> str:
    """Name the stage that the awaited batches were in most, and how many workers would hide its work."""
    worst = max(waits, key=lambda name: (waits[name], name))
    stage = worst.removeprefix(f"{WAIT}: ")
    text = f"{stage} takes {waits[worst] / whole:.0%} of the time: {ADVICE.get(worst, ADVICE[WAIT])}"
    stepping = whole - sum(waits.values())
    work = max(waits[worst], float(overlapped.get(f"data: {stage}", {"seconds": 0.0})["seconds"]))
    if stage in ("decode", "transform", "collate") and stepping > 0.01 * whole:
        workers = math.ceil(work / stepping)
        hands = "1 worker" if workers == 1 else f"{workers} workers"
        text += f"; {duration(work)} of it beside {duration(stepping)} of steps: {hands} would hide it"
    return text


def run_table(run: RunReport) -> str:
    """Show the steps of a run and, below, its key figures."""
    steps = [
        (
            step.name,
            step.status,
            duration(step.wall_s),
            duration(step.cpu_s),
            size(step.peak_rss_bytes) if step.peak_rss_bytes else "",
            step.artifact_id[:12],
        )
        for step in run.steps
    ]
    figures = [(tile.label, tile.value, tile.note) for tile in headline(run)]
    shown: list[RenderableType] = []
    if steps:
        shown += [_table(("step", "status", "wall>", "CPU>", "peak memory>", "artifact"), steps), ""]
    if figures:
        shown.append(_table(("figure", "value>", "beside"), figures))
    return _text(*shown)


def ledger_table(ledger: Mapping[str, Any]) -> str:
    """Show where the time of a ledger went, as bars that add up, and name the bottleneck.

    Args: ledger: `LedgerSummary.as_dict()`.
    """
    full, empty = _bar_letters()
    whole = sum(part["seconds"] for part in ledger["parts"].values())
    rows = []
    for name, part in sorted(ledger["parts"].items(), key=_largest_first):
        share = part["seconds"] / whole if whole > 0 else 0.0
        filled = round(share * BAR_WIDTH)
        bar = full * filled + empty * (BAR_WIDTH - filled)
        rows.append((name, duration(part["seconds"]), f"{share:.1%}", bar, f"{part['count']:,}"))
    shown: list[RenderableType] = [
        f"{ledger['name']}: {duration(ledger['wall_s'])}, {duration(ledger['cpu_s'])} of CPU time",
        _table(("part", "time>", "share>", "", "spans>"), rows),
    ]
    if overlapped := ledger.get("overlapped"):
        others = ", ".join(f"{name} {duration(part['seconds'])}" for name, part in overlapped.items())
        shown.append(f"meanwhile, on other threads: {others}")
    if found := bottleneck(ledger):
        shown += [f"bottleneck: {found.part}, {found.share:.0%} of the time", f"hint: {found.advice}"]
        if found.part != WAIT and (wait := data_wait(ledger)) is not None and wait.share >= WAIT_IS_LARGE:
            shown += [f"{WAIT}: {wait.share:.0%} of the time", f"hint: {wait.advice}"]
    return _text(*shown)


def measured_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Show measured settings; all columns but the last are figures."""
    names = list(header)
    return _text(_table([*(f"{name}>" for name in names[:-1]), names[-1]], rows))


def lineage_tree(root: Mapping[str, Any]) -> str:
    """Show a nested lineage: an artifact, and under it what it was made from (or what was made of it).

    Args: root: as `store.lineage.tree` gives it: id, kind, names, role, seen, num_bytes, children.
    """
    from rich.tree import Tree

    def grow(branch: Tree, node: Mapping[str, Any]) -> None:
        for child in node["children"]:
            grow(branch.add(_artifact_line(child)), child)

    guide = Tree(_artifact_line(root))
    grow(guide, root)
    return _text(guide)


def doctor_table(sections: Iterable[tuple[str, Iterable[tuple[str, str]]]]) -> str:
    """Show what was found about the machine: (name, value) rows in titled sections."""
    rows = []
    for title, found in sections:
        for index, (name, value) in enumerate(found):
            rows.append(("" if index else title, name, value))
    return _text(_table(("", "what", "found"), rows))


def _artifact_line(node: Mapping[str, Any]) -> str:
    role = node.get("role") or ""
    kind = node["kind"] if role in ("", node["kind"]) else f"{role}: {node['kind']}"
    names = ", ".join(node.get("names", ()))
    seen = "(unfolded above)" if node.get("seen") else ""
    volume = size(node["num_bytes"]) if node.get("num_bytes") and not seen else ""
    part = "" if seen else ", ".join(f"{key} {value}" for key, value in (node.get("detail") or {}).items())
    return visible("  ".join(text for text in (kind, node["id"][:12], names, volume, part, seen) if text))


def _largest_first(item: tuple[str, Mapping[str, Any]]) -> tuple[bool, float, str]:
    name, part = item
    return name == "other", -part["seconds"], name


def _bar_letters() -> tuple[str, str]:
    """Choose letters for bars that the encoding of stdout has."""
    try:
        "█░".encode(sys.stdout.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return "#", "."
    return "█", "░"


def _text(*shown: "RenderableType") -> str:
    from rich.console import Console

    on_terminal = sys.stdout.isatty()
    styled = on_terminal and not os.environ.get("NO_COLOR")
    file = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding or "utf-8", errors="replace")
    console = Console(
        file=file,  # rich reads its encoding, and draws lines in ASCII where it must
        force_terminal=styled,
        color_system="standard" if styled else None,
        width=shutil.get_terminal_size().columns if on_terminal else PLAIN_WIDTH,
        markup=False,  # names and texts are data: "[train]" is no markup
        emoji=False,
        highlight=False,
        safe_box=True,
    )
    for one in shown:
        console.print(visible(one) if isinstance(one, str) else one)
    file.seek(0)
    text = file.read()
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines()) if not styled else text


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> "Table":
    """Make a table; a heading that ends in ">" is of a column set flush right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for name in header:
        right = name.endswith(">")
        table.add_column(name.removesuffix(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(visible, row))
    return table
