"""How a run talks: rates that mean something, figures with units."""

import contextlib
import os
import pty
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marrow.cli.console import Rate, describe, duration, progress_of, quantity, size


def test_the_rate_is_that_of_the_last_seconds() -> None:
    rate = Rate()
    for second in range(100):
        rate.update(done=second, now=float(second))
    for second in range(100, 130):
        rate.update(done=100 + 10 * (second - 100), now=float(second))
    assert rate.per_s == pytest.approx(10, rel=0.01)


def test_work_done_before_a_resume_and_a_slow_start_do_not_count() -> None:
    rate = Rate()
    rate.update(done=1000, now=0.0)  # resumed at 1000
    rate.update(done=1000, now=60.0)  # and nothing moved for a minute
    rate.update(done=1010, now=65.0)
    assert rate.per_s == pytest.approx(2.0)


def test_progress_in_words() -> None:
    rate = Rate()
    rate.update(0, now=0.0)
    rate.update(50, now=5.0)
    told = describe(50, 200, "step", rate, {"loss": "2.31"})
    assert told == "50/200 step  25%  10 step/s  eta 15.0 s  loss 2.31"
    assert describe(7, None, "rows", Rate(), None) == "7 rows"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.012, "0.012"),
        (999, "999"),
        (999.4, "999"),
        (999.6, "1k"),
        (1430, "1.43k"),
        (-1430, "-1.43k"),
        (999_600, "1M"),
        (12.1e6, "12.1M"),
        (3e9, "3G"),
    ],
)
def test_quantities(value: float, text: str) -> None:
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.34, "340 ms"), (12.34, "12.3 s"), (125, "2m05s"), (3720, "1h02m"), (59.99, "60.0 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("num_bytes", "text"), [(12, "12 B"), (2048, "2.0 KiB"), (12.5 * 2**20, "12.5 MiB")])
def test_sizes(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


def test_without_a_terminal_progress_is_quiet_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_of("train") as progress:
        progress(1, 10, "step")
        progress.next_line_s = 0.0  # type: ignore[attr-defined]  ten seconds later
        progress(2, 10, "step", {"loss": "1.0"})
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("train       2/10 step  20%")
    assert told.err.count("\n") == 1


@given(st.floats(0, 9.99e11))
def test_any_quantity_is_three_digits_within_half_a_percent(value: float) -> None:
    text = quantity(value)
    unit = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1], 1.0)
    digits = text.rstrip("kMG")
    assert float(digits) * unit == pytest.approx(value, rel=0.005)
    assert value < 1e-4 or "e" not in digits
    assert value < 1e-4 or len(digits.replace(".", "").strip("0")) <= 3


@given(st.integers(0, 10**6))
def test_any_duration_from_a_minute_on_is_whole_minutes_and_less_than_sixty_of_the_next(seconds: int) -> None:
    text = duration(seconds + 60)
    if hours := re.fullmatch(r"(\d+)h(\d\d)m", text):
        assert int(hours[1]) * 3600 + int(hours[2]) * 60 == (seconds + 60) // 60 * 60
        assert int(hours[2]) < 60
    else:
        minutes = re.fullmatch(r"(\d+)m(\d\d)s", text)
        assert minutes is not None
        assert int(minutes[1]) * 60 + int(minutes[2]) == seconds + 60
        assert int(minutes[2]) < 60 and int(minutes[1]) < 60


@pytest.mark.parametrize("unit", [1 << 10, 1 << 20, 1 << 30, 1 << 40])
def test_a_size_changes_its_unit_at_the_unit(unit: int) -> None:
    suffix = {1 << 10: "KiB", 1 << 20: "MiB", 1 << 30: "GiB", 1 << 40: "TiB"}[unit]
    assert size(unit) == f"1.0 {suffix}"
    assert not size(unit - 1).endswith(suffix)


def test_a_rate_that_goes_back_begins_anew() -> None:
    rate = Rate()
    for done, now in ((0, 0.0), (100, 1.0), (10, 2.0)):
        rate.update(done, now=now)
    assert rate.per_s == 0
    rate.update(30, now=3.0)
    assert rate.per_s == 20


def test_what_is_done_has_no_time_left() -> None:
    rate = Rate()
    rate.update(0, now=0.0)
    rate.update(10, now=1.0)
    assert describe(10, 10, "rows", rate, None) == "10/10 rows  100%  10 rows/s"


def test_on_a_terminal_a_bar_is_drawn_on_stderr_and_taken_away_again() -> None:
    """A real terminal of its own: the child's stderr is a pseudo-terminal, its stdout a pipe."""
    code = (
        "from marrow.cli.console import progress_of\n"
        "import time\n"
        "with progress_of('train') as progress:\n"
        "    for step in range(4):\n"
        "        progress(step, 4, 'steps', {'loss': '2.31'})\n"
        "        time.sleep(0.15)\n"
    )
    ours, its = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=its,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(its)
    drawn = b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while part := os.read(ours, 65536):
            drawn += part
    os.close(ours)
    out, _ = child.communicate(timeout=30)
    assert (child.returncode, out) == (0, b"")
    text = drawn.decode()
    assert "train" in text
    assert "loss 2.31" in text
    assert "75%" in text
    assert text.rstrip().endswith("\x1b[2K"), "the line of the bar is erased at the end"
