"""The report: a reader's questions answered in a page that needs nothing but a browser."""

import json
import math
import re
from dataclasses import asdict, fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.cli.report import headline, page_of, write_report
from marrow.cli.results import (
    DroppedRule,
    LineageEdge,
    LineageNode,
    MetricPoint,
    NearestRow,
    RecipeValue,
    RunReport,
    Sample,
    Score,
    ServingFigures,
    StepReport,
)
from marrow.core.errors import SourceError


def ledger(
    name: str, wall_s: float, overlapped: dict[str, float] | None = None, **parts: float
) -> dict[str, Any]:
    """Make a ledger as `LedgerSummary.as_dict()` does; "other" fills up to the wall time."""
    named = {key.replace("_", " "): value for key, value in parts.items()}
    named["other"] = wall_s - sum(named.values())
    return {
        "name": name,
        "wall_s": wall_s,
        "cpu_s": wall_s * 1.7,
        "parts": {key: {"seconds": value, "count": 1} for key, value in named.items()},
        "overlapped": {key: {"seconds": value, "count": 1} for key, value in (overlapped or {}).items()},
    }


def sha(number: int) -> str:
    return f"{number * 2654435761 % 2**32:08x}" * 8


STEPS = (
    StepReport(
        "ingest", "built", sha(1), 5.31, 5.1, 310 << 20,
        {"rows": 48_213, "files": 1_021, "bytes": 13_914_022, "quarantined": 0},
        ledger("ingest", 5.31, read=0.4, parse=3.9, write=0.81),
    ),
    StepReport(
        "clean", "built", sha(2), 6.9, 7.4, 402 << 20,
        {"documents": 1_204, "dropped": {"tables": 141, "exact duplicate": 12, "near duplicate": 27}},
        ledger("clean", 6.9, rules=1.2, minhash=4.1, write=0.7),
    ),
    StepReport("split", "built", sha(3), 0.71, 0.8, 402 << 20, {"train": 1_031, "held out": 173}),
    StepReport("tokenizer", "cached", sha(4), 0.02, 0.02, 0, {"vocabulary": 2048, "bytes per token": 2.93}),
    StepReport(
        "shards", "built", sha(5), 4.4, 7.9, 505 << 20,
        {"rows": 7_913, "tokens": 4_050_112, "padding share": 0.0007},
        ledger("shards", 4.4, {"tokenize (2 threads)": 6.1}, tokenize=3.2, pack=0.31, write=0.6),
    ),
    StepReport(
        "train", "built", sha(6), 151.2, 296.0, 1_402 << 20,
        {"steps": 1_200, "loss": 1.874, "parameters": 2_163_072, "bf16": True},
        ledger(
            "train", 151.2, {"prefetch": 3.2}, forward=44.0, backward=71.2, optimiser=22.9,
            data_wait=0.8, checkpoint=2.2, logging=0.4, loss=6.9, snapshot=0.8,
        ),
    ),
    StepReport(
        "evaluate", "built", sha(7), 21.7, 39.0, 1_210 << 20, {},
        ledger("evaluate", 21.7, model=6.0, five_gram=13.2, xz=1.9),
    ),
    StepReport("export", "built", sha(8), 0.32, 0.3, 700 << 20),
    StepReport("serve", "built", sha(9), 14.8, 22.0, 812 << 20),
    StepReport("report", "built", sha(10), 2.9, 3.1, 640 << 20),
)  # fmt: skip

NOISE = "\x07ñ}qtr eT(ss ,\n\n]#lnnif0aVv{"
SAMPLES = (
    Sample(
        "def read(self",
        NOISE,
        ", size):\n        self.file = self.read()\n    def",
        ', size=-1):\n        if self.closed:\n            raise ValueError("read of closed file")\n'
        "        return self._buffer.read(size)\n",
    ),
    Sample(
        "class Queue:\n    def __init__(self",
        NOISE,
        "):\n        self.self = None\n        self.",
        ", maxsize=0):\n        self.maxsize = maxsize\n        self._init(maxsize)\n"
        "        self.mutex = threading.Lock()\n",
    ),
    Sample(
        "import os\nimport ",
        NOISE,
        "re\nimport os\nimport\n",
        'sys\nimport time\nimport errno\n\n__all__ = ["open", "close"]\n',
    ),
    Sample(
        "    for key, value in ",
        NOISE,
        "self:\n            if self.value(",
        "self.items():\n            if not isinstance(value, str):\n"
        '                raise TypeError(f"{key!r} is no string")\n',
    ),
    Sample(
        '    """Return the ',
        NOISE,
        "string of the file of the\n    the file",
        'number of bytes in the buffer.\n\n    If the buffer is empty, return None.\n    """\n',
    ),
)
NEAREST = tuple(
    NearestRow(sample.prompt, sample.after or "", file, line, shared)
    for sample, file, line, shared in zip(
        SAMPLES,
        ("lib/gzip.py", "lib/queue.py", "lib/tempfile.py"),
        (311, 34, 38),
        (
            'if self.closed:\n            raise ValueError("read of closed file")',
            ", maxsize=0):\n        self.maxsize = maxsize\n        self._init(maxsize)",
            "import os\nimport sys\nimport ",
        ),
        strict=False,
    )
)


@pytest.fixture(scope="module")
def run() -> RunReport:
    """A run as the quickstart makes it."""
    kinds = (
        "rows",
        "documents",
        "split",
        "tokenizer",
        "shards",
        "model",
        "evaluation",
        "export",
        "serving",
        "report",
    )
    edges = (
        "0 1 rows", "1 2 documents", "2 3 split", "2 4 split", "3 4 tokenizer", "4 5 shards", "3 5 tokenizer",
        "5 6 model", "2 6 split", "3 6 tokenizer", "5 7 model", "3 7 tokenizer", "7 8 export",
        "6 9 evaluation", "8 9 serving", "5 9 model",
    )  # fmt: skip
    return RunReport(
        recipe="quickstart",
        when="21 November 2026, 12:04 UTC",
        machine="2 x86-64 cores (AVX-512, BF16), 24 GiB, Linux 6.1",
        versions={"Marrow": "0.1.0", "Python": "3.11.2", "torch": "2.13.0", "pyarrow": "26.0.1"},
        steps=STEPS,
        metrics=tuple(
            MetricPoint(
                step,
                1.85 + 5.8 * math.exp(-step / 90) + 0.05 * math.sin(step * 1.7) + 0.4 * math.exp(-step / 500),
                13_900 + 400 * math.sin(step / 31) - (2_100 if step % 400 == 0 else 0),
                0.47 + 0.01 * math.sin(step / 31),
                0.004 + 0.002 * math.cos(step / 17),
            )
            for step in range(0, 1_201, 4)
        ),
        scores=(
            Score("5-gram (Kneser-Ney)", 1.698, note="same tokens"),
            Score("Marrow", 1.512, ours=True, note="2.16 M parameters"),
            Score("unigram", 3.391, note="same tokens"),
            Score("xz, given the training text", 1.583, note="copies at any range"),
            Score("zlib", 1.911),
        ),
        samples=SAMPLES,
        parse_rates={"Marrow": 0.412, "5-gram": 0.118, "untrained": 0.0},
        nearest=NEAREST,
        serving=ServingFigures(
            requests=96,
            concurrency=8,
            errors=0,
            wall_s=9.4,
            tokens_per_s=1_431.0,
            ttft_p50_ms=21.4,
            ttft_p99_ms=88.2,
            itl_p50_ms=5.1,
            itl_p99_ms=9.7,
            ledger=ledger("engine", 9.4, queue=0.9, prefill=1.6, decode=6.1),
        ),
        dropped=(
            DroppedRule("tables (most lines are data)", 141, 2_204_311, "lib/encodings/cp1252.py"),
            DroppedRule("exact duplicate", 12, 31_002, "lib/ctypes/macholib/__init__.py"),
            DroppedRule("near duplicate", 27, 190_441, "lib/idlelib/idle_test/htest.py"),
            DroppedRule("too short", 64, 1_201, "lib/json/scanner.py"),
        ),
        nodes=(
            LineageNode("source", "Python 3.11.2", "its own documentation"),
            *(LineageNode(sha(i + 1), kind) for i, kind in enumerate(kinds)),
        ),
        edges=(
            LineageEdge("source", sha(1), "source"),
            *(
                LineageEdge(sha(int(a) + 1), sha(int(b) + 1), role)
                for a, b, role in (edge.split() for edge in edges)
            ),
        ),
        recipe_values=(
            RecipeValue("data.source", "python", "recipes/quickstart.toml:4"),
            RecipeValue("tokenizer.vocab_size", "2048", "recipes/quickstart.toml:12"),
            RecipeValue("model.hidden_size", "192", "recipes/quickstart.toml:16"),
            RecipeValue("train.steps", "1200", "recipes/quickstart.toml:24"),
            RecipeValue("train.lr", "0.02", "--set train.lr=2e-2"),
            RecipeValue("train.checkpoint_every", "30.0"),
        ),
    )  # fmt: skip


# ---------------------------------------------------------------- what the page says


class Reader(HTMLParser):
    """The text that a reader sees, and where the page points to."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self._style = False
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._style = tag == "style"
        self.links += [
            v or "" for k, v in attrs if k in ("href", "src", "srcset", "action", "data", "poster")
        ]

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.text.append(data)


def headings(markup: str) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>", markup)


SECTIONS = [
    "What it learned",
    "What it writes",
    "Where that comes from",
    "Serving",
    "Where the time went",
    "What went in",
    "Lineage",
    "Recipe",
]


def test_a_full_run_has_every_section_in_the_order_of_the_questions(run: RunReport) -> None:
    assert headings(page_of(run)) == SECTIONS


def test_an_empty_run_is_a_page_with_a_title_and_nothing_else() -> None:
    markup = page_of(RunReport("nothing"))
    assert headings(markup) == []
    assert "<h1>nothing</h1>" in markup
    assert "<figure" not in markup and "<table" not in markup and "<dl" not in markup


OPTIONAL = [f.name for f in fields(RunReport) if f.name != "recipe"]


@pytest.mark.parametrize("name", OPTIONAL)
def test_any_part_may_be_missing(run: RunReport, name: str) -> None:
    empty = getattr(RunReport("x"), name)
    markup = page_of(replace(run, **{name: empty}))
    gone = {
        "serving": "Serving",
        "nearest": "Where that comes from",
        "steps": "Where the time went",
        "nodes": "Lineage",
        "recipe_values": "Recipe",
    }
    if name == "nodes":
        markup = page_of(replace(run, nodes=(), edges=()))
    assert headings(markup) == [title for title in SECTIONS if title != gone.get(name)]


@pytest.mark.parametrize("name", OPTIONAL)
def test_any_part_may_stand_alone(run: RunReport, name: str) -> None:
    alone = replace(RunReport("x"), **{name: getattr(run, name)})
    page = page_of(alone)
    assert page.rstrip().endswith("</html>")
    assert len(page) >= len(page_of(RunReport("x"))), "the part is missing"


def test_the_page_holds_the_run_and_points_nowhere(run: RunReport) -> None:
    markup = page_of(run)
    read = Reader(markup)
    assert all(link.startswith("#") for link in read.links)
    assert not re.search(r"url\s*\(|@import|https?:|//[a-z]", markup)
    assert not read.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    seen = "".join(read.text)
    for told in (
        "1.512",
        "lib/queue.py:34",
        "raise ValueError",
        "--set train.lr=2e-2",
        "near duplicate",
        "88.2 ms",
    ):
        assert told in seen, told


def test_every_ledger_adds_up_to_its_step(run: RunReport) -> None:
    bars = re.findall(r"<svg role=\"img\" width=\"100%\" height=\"22\">(.*?)</svg>", page_of(run))
    assert len(bars) == 2 + sum(step.ledger is not None for step in run.steps)
    for bar in bars:
        widths = [float(width) for width in re.findall(r'y="0" width="([\d.]+)%"', bar)]
        assert sum(widths) == pytest.approx(100, abs=0.1)  # eight parts of two decimals


def test_the_headline_compares_with_the_first_baseline(run: RunReport) -> None:
    told = {tile.label: (tile.value, tile.note) for tile in headline(run)}
    assert told["held-out bits per byte"] == ("1.512", "11.0% below 5-gram (Kneser-Ney) (1.698)")
    assert told["completions that parse"] == ("41%", "5-gram 12%, untrained 0%")
    assert told["the whole run"][1].endswith("1 of 10 steps cached")
    assert told["peak memory"] == ("1.4 GiB", "in train")


def test_a_model_worse_than_its_baseline_is_called_so() -> None:
    run = RunReport("x", scores=(Score("ours", 2.0, ours=True), Score("5-gram", 1.6)))
    assert headline(run)[0].note == "25.0% above 5-gram (1.600)"


def test_scores_are_ordered_and_the_model_is_set_apart(run: RunReport) -> None:
    figures = re.findall(r"<li( class=\"ours\")?><span class=\"name\">([^<]*)<", page_of(run))
    names = [name for _, name in figures[:5]]
    assert names == ["Marrow", "xz, given the training text", "5-gram (Kneser-Ney)", "zlib", "unigram"]
    assert [bool(ours) for ours, _ in figures[:5]] == [True, False, False, False, False]


def marked(prompt: str, completion: str, shared: str) -> tuple[str, str]:
    """Return what is marked, and what is bold, of a nearest row."""
    markup = page_of(RunReport("x", nearest=(NearestRow(prompt, completion, "f.py", 1, shared),)))
    block = re.search(r"<pre><code>(.*?)</code></pre>", markup, re.DOTALL).group(1)  # type: ignore[union-attr]
    bold = "".join(re.findall(r"<b>(.*?)</b>", block, re.DOTALL))
    return "|".join(re.findall(r"<mark>(.*?)</mark>", block)), re.sub("</?mark>", "", bold)


def test_shared_text_is_marked_where_the_model_wrote_it() -> None:
    assert marked("ab ", "ab cd", "ab") == ("ab", "ab ")
    assert marked("import os\n", "import sys\n", "os\nimport sys") == ("os|import sys", "import os\n")
    assert marked("a", "b", "not there") == ("", "a")
    assert marked("a", "b", "") == ("", "a")
    assert marked("", "abc", "b") == ("b", "")


@given(st.text("ab \n", max_size=8), st.text("ab \n", max_size=12), st.text("ab \n", max_size=4))
def test_marking_changes_no_text(prompt: str, completion: str, shared: str) -> None:
    markup = page_of(RunReport("x", nearest=(NearestRow(prompt, completion, "f.py", 1, shared),)))
    block = re.search(r"<pre><code>(.*?)</code></pre>", markup, re.DOTALL).group(1)  # type: ignore[union-attr]
    assert re.sub("<.*?>", "", block) == prompt + completion


# ---------------------------------------------------------------- hostile input, files, data

hostile = st.text(alphabet="<>&\"'`{}[]()/=;: abcimgscript\n\t\r\x00\x1b\ud800\u202e", max_size=30)


@settings(max_examples=40)
@given(st.lists(hostile, min_size=12, max_size=12))
def test_no_text_of_a_run_becomes_markup(texts: list[str]) -> None:
    a, b, c, d, e, f, g, h, i, j, k, l = texts  # noqa: E741
    run = RunReport(
        a, b, c, {d: e},
        (
            StepReport(
                f, "built", g, 1.0, 1.0, 1, {h: i, "list": [j, {k: l}]}, ledger(a, 2.0, {b: 1.0}, x=1.0)
            ),
        ),
        (MetricPoint(0, 1.0),),
        (Score(d, 1.0, True, e), Score(f, 2.0, note=g)),
        (Sample(h, i, j, k),),
        {l: 0.5},
        (NearestRow(a, b, c, 1, d),),
        None,
        (DroppedRule(e, 1, 2, f),),
        (LineageNode("1", g, h), LineageNode("2", i, j)),
        (LineageEdge("1", "2", k),),
        (RecipeValue(a, b, c),),
    )  # fmt: skip
    ours = (
        r"html|head|meta|title|style|body|header|main|footer|section|nav|article|h[1-4]|p|ul|li|a|div|span|b"
    )
    charts = r"|pre|code|mark|d[ldt]|details|summary|figure|figcaption|svg|rect|g|path|text|line|circle|desc"
    tables = r"|table|caption|thead|tbody|tr|th|td"
    markup = page_of(run)
    assert not [tag for tag in Reader(markup).tags if not re.fullmatch(ours + charts + tables, tag)]
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", markup)
    markup.encode("utf-8")


def test_a_run_survives_json(run: RunReport) -> None:
    data = json.loads(json.dumps(asdict(run), allow_nan=False))
    assert data["scores"][1] == {
        "name": "Marrow",
        "bits_per_byte": 1.512,
        "ours": True,
        "note": "2.16 M parameters",
    }
    assert {f.name for f in fields(run)} == set(data)


def test_equal_runs_give_equal_bytes(run: RunReport) -> None:
    assert page_of(run) == page_of(replace(run))


def test_a_report_of_a_long_run_stays_small() -> None:
    points = tuple(MetricPoint(step, 2.0 + step % 7, 1e4, 0.4, 0.01) for step in range(50_000))
    assert len(page_of(RunReport("long", metrics=points))) < 150_000


def test_the_file_is_written_whole(run: RunReport, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.html"
    write_report(run, path)
    assert path.read_text(encoding="utf-8") == page_of(run)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_folder_in_the_way_is_an_error_with_a_hint(run: RunReport, tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(SourceError, match="hint: check the path"):
        write_report(run, tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


# ---------------------------------------------------------------- in a real browser


@pytest.mark.parametrize(("width", "dark"), [(320, False), (390, True), (1280, False), (1280, True)])
def test_a_browser_shows_it_without_complaint_or_network(
    run: RunReport, browser: Any, tmp_path: Path, width: int, dark: bool
) -> None:
    path = tmp_path / "report.html"
    write_report(run, path)
    browser.open(path)
    browser.resize(width, 844, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.querySelectorAll('figure').length") >= 12
    assert browser.evaluate(
        "[...document.querySelectorAll('svg[role=img]')].every(s => s.querySelector('title').textContent)"
    )
    assert browser.evaluate("document.querySelectorAll('section').length") == len(SECTIONS)
    assert browser.errors == []
    assert browser.requests == [path.as_uri()]


def test_every_fold_and_link_is_reached_with_the_keyboard(
    run: RunReport, browser: Any, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    write_report(run, path)
    browser.open(path)
    reached = set()
    for _ in range(60):
        browser.press("Tab")
        reached.add(browser.evaluate("document.activeElement.tagName"))
    assert {"A", "SUMMARY", "DIV"} <= reached  # contents, folds, wide tables that scroll
    browser.evaluate("document.querySelector('summary').focus()")
    browser.press("Enter")
    assert browser.evaluate("document.querySelector('details').open")


def test_scripts_in_the_data_do_not_run(browser: Any, tmp_path: Path) -> None:
    bomb = "</code></pre></svg></title><script>console.error(1)</script><img src=x onerror=console.error(1)>"
    run = RunReport(
        bomb,
        samples=(Sample(bomb, bomb, bomb, bomb),),
        scores=(Score(bomb, 1.0, True, bomb),),
        nodes=(LineageNode("1", bomb, bomb),),
        steps=(StepReport(bomb, "built", facts={bomb: bomb}, ledger=ledger(bomb, 1.0, {bomb: 1.0})),),
    )
    path = tmp_path / "bomb.html"
    write_report(run, path)
    browser.open(path)
    assert browser.errors == []
    assert browser.evaluate("document.querySelectorAll('script, img').length") == 0
    assert browser.evaluate("document.querySelector('pre b').textContent") == bomb
