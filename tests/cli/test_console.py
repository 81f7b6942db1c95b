"""How a run talks: rates that mean something, figures with units."""

import pytest

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
    ("value", "text"), [(0.012, "0.012"), (999, "999"), (1430, "1.43k"), (12.1e6, "12.1M"), (3e9, "3G")]
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
