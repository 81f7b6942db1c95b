"""Terminal text: plain where it is piped, bold on a terminal, and never what the data smuggles in."""

import os
import pty
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.cli.results import MetricPoint, RunReport, Score, StepReport
from marrow.cli.tables import ADVICE, bottleneck, doctor_table, ledger_table, lineage_tree, run_table
from marrow.core.span import Ledger, span

RUN = RunReport(
    "quickstart",
    steps=(
        StepReport("ingest", "built", "ab" * 32, 5.3, 5.1, 310 << 20),
        StepReport("train", "cached", "cd" * 32, 0.02, 0.02),
    ),
    metrics=(MetricPoint(1, 2.0, 13_900.0, 0.47, 0.01),),
    scores=(Score("Marrow", 1.5, ours=True), Score("5-gram", 1.6)),
)


def ledger(**parts: float) -> dict[str, Any]:
    named = {name.replace("_", " "): {"seconds": value, "count": 3} for name, value in parts.items()}
    wall_s = sum(parts.values())
    return {"name": "train", "wall_s": wall_s, "cpu_s": wall_s, "parts": named, "overlapped": {}}


def node(kind: str, *children: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": kind[0] * 64, "kind": kind, "names": [], "children": list(children), "seen": False} | more


# ---------------------------------------------------------------- what is said


def test_a_run_shows_each_step_and_the_figures() -> None:
    text = run_table(RUN)
    lines = [line.split() for line in text.splitlines()]
    assert ["ingest", "built", "5.3", "s", "5.1", "s", "310.0", "MiB", "ab" * 6] in lines
    assert ["train", "cached", "20", "ms", "20", "ms", "cd" * 6] in lines
    assert "6.2% below 5-gram (1.600)" in text
    assert run_table(RunReport("empty")) == ""


def test_a_ledger_shows_parts_that_add_up_largest_first_and_other_last() -> None:
    text = ledger_table(ledger(other=5.0, forward=1.0, backward=4.0))
    rows = [line for line in text.splitlines() if "%" in line and "bottleneck" not in line]
    assert [row.split()[0] for row in rows] == ["backward", "forward", "other"]
    assert [row.split()[3] for row in rows] == ["40.0%", "10.0%", "50.0%"]
    assert [row.count("█") for row in rows] == [11, 3, 14]
    assert all(row.count("█") + row.count("░") == 28 for row in rows)


def test_overlapped_work_is_told_apart_from_the_sum() -> None:
    told = ledger(forward=1.0) | {"overlapped": {"prefetch": {"seconds": 9.0, "count": 1}}}
    text = ledger_table(told)
    assert "meanwhile, on other threads: prefetch 9.0 s" in text
    assert "100.0%" in text


def test_a_real_ledger_can_be_shown() -> None:
    with Ledger("work") as open_ledger, span("read rows"):
        sum(range(1000))
    text = ledger_table(open_ledger.summary().as_dict())
    assert text.startswith("work: ") and "read rows" in text and "bottleneck: " in text


def test_the_largest_part_is_the_bottleneck() -> None:
    found = bottleneck(ledger(data_wait=6.0, forward=3.0, other=1.0))
    assert found is not None
    assert (found.part, found.share) == ("data wait", 0.6)
    assert found.advice == ADVICE["data wait"]
    assert f"hint: {found.advice}" in ledger_table(ledger(data_wait=6.0, forward=3.0, other=1.0))


@pytest.mark.parametrize(
    ("other", "named"), [(5.0, "other"), (2.4, "a"), (3.9, "a")], ids=["most", "below a quarter", "not most"]
)
def test_unmeasured_time_is_named_only_when_it_is_most(other: float, named: str) -> None:
    found = bottleneck(ledger(a=4.0, b=3.5, other=other))
    assert found is not None and found.part == named


def test_no_time_has_no_bottleneck() -> None:
    assert bottleneck(ledger()) is None
    assert bottleneck(ledger(a=0.0, other=0.0)) is None
    assert "bottleneck" not in ledger_table(ledger(a=0.0))


def test_a_part_nobody_knows_still_gets_a_sentence() -> None:
    found = bottleneck(ledger(frobnicate=1.0))
    assert found is not None and "frobnicate" in found.advice


@given(st.dictionaries(st.sampled_from([*ADVICE, "x", "y"]), st.floats(0, 1e6), max_size=6))
def test_the_bottleneck_is_no_smaller_than_any_measured_part(parts: dict[str, float]) -> None:
    found = bottleneck(ledger(**parts))
    if found is None:
        assert sum(parts.values()) == 0
        return
    # one part in a million of rounding: shares are quotients of sums of floats
    assert found.share * sum(parts.values()) >= max(
        v for k, v in parts.items() if k != "other" or len(parts) == 1
    ) * (1 - 1e-6)
    assert 0 < found.share <= 1 + 1e-9


def test_lineage_is_a_tree_with_roles_names_and_what_was_seen() -> None:
    shards = node("shards", node("split"), num_bytes=12 << 20, role="shards")
    again = node("tokenizer", seen=True, role="tokenizer", num_bytes=5)
    text = lineage_tree(
        node("export", node("train", shards, again, role="checkpoint"), names=["quickstart@3"])
    )
    assert text.splitlines() == [
        "export  eeeeeeeeeeee  quickstart@3",
        "└── checkpoint: train  tttttttttttt",
        "    ├── shards  ssssssssssss  12.0 MiB",
        "    │   └── split  ssssssssssss",
        "    └── tokenizer  tttttttttttt  (unfolded above)",
    ]


def test_the_doctor_names_each_section_once() -> None:
    text = doctor_table([("machine", [("cores", "2"), ("memory", "24 GiB")]), ("store", [("home", "/x")])])
    assert [line.split() for line in text.splitlines()[2:]] == [
        ["machine", "cores", "2"],
        ["memory", "24", "GiB"],
        ["store", "home", "/x"],
    ]


def test_names_are_data_and_no_markup() -> None:
    text = doctor_table([("[bold]a[/bold]", [("[red]b", ":smile: \x1b[31mred\x1b[0m \x07")])])
    assert "[bold]a[/bold]" in text and "[red]b" in text and ":smile: ␛[31mred␛[0m ␇" in text
    assert "\x1b" not in lineage_tree(node("a", names=["\x1b]0;title\x07"]))
    hostile = {"\x1b[2J": {"seconds": 1.0, "count": 1}}
    assert "\x1b" not in ledger_table(
        ledger(a=1.0) | {"parts": hostile, "overlapped": hostile, "name": "\x1b[2J"}
    )


def test_piped_text_is_plain_and_cuts_nothing() -> None:
    long = "w" * 500
    text = doctor_table([("store", [("home", long)])])
    assert long in text
    assert "\x1b" not in text + run_table(RUN) + ledger_table(ledger(a=1.0)) + lineage_tree(node("a"))
    assert all(line == line.rstrip() for line in text.splitlines())


# ---------------------------------------------------------------- on a real terminal, in a real process

SHOW = """
import sys
from marrow.cli import tables
assert "rich" not in sys.modules, "rich is loaded before anything is shown"
parts = {"data wait": {"seconds": 3.0, "count": 1}, "other": {"seconds": 1.0, "count": 1}}
ledger = {"name": "x", "wall_s": 4.0, "cpu_s": 4.0, "parts": parts, "overlapped": {}}
print(tables.ledger_table(ledger), end="")
print(tables.doctor_table([("store", [("home", "é" + "w" * 200)])]), end="")
"""


def shown_on_a_terminal(**environment: str) -> str:
    """Run SHOW with a pseudo-terminal of 80 columns for stdout."""
    ours, theirs = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    env = clean | {"TERM": "xterm-256color", "COLUMNS": "80"} | environment
    with subprocess.Popen([sys.executable, "-c", SHOW], stdout=theirs, env=env) as process:
        os.close(theirs)
        read = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux tells the end of a terminal so
                piece = b""
            if not piece:
                break
            read += piece
    os.close(ours)
    assert process.returncode == 0
    return read.decode().replace("\r\n", "\n")


def test_a_terminal_gets_bold_headings_and_lines_that_fit() -> None:
    text = shown_on_a_terminal()
    assert "\x1b[1m" in text
    assert text.count("w") >= 200  # folded, not cut
    plain = text.replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert all(len(line) <= 80 for line in plain.splitlines())


def test_no_color_means_no_escape_codes() -> None:
    text = shown_on_a_terminal(NO_COLOR="1")
    assert "\x1b" not in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_pipe_stays_plain_even_if_colour_is_forced_and_ascii_is_enough() -> None:
    env = os.environ | {"FORCE_COLOR": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, env=env, check=True)
    text = done.stdout.decode("ascii")
    assert "\x1b" not in text
    assert "#####################......." in text
    assert "w" * 200 in text
