"""How a run talks: a progress bar per step on a terminal, a line every ten seconds elsewhere.

Everything goes to stderr, so that stdout stays data. rich is imported only for a terminal.
"""

import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from marrow.core.progress import Progress

LINE_EVERY_S = 10.0
DRAW_EVERY_S = 0.1
RATE_WINDOW_S = 15.0


def say(text: str) -> None:
    """Print one line of talk."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def progress_of(name: str) -> Iterator[Progress]:
    """Draw the progress of one step while the block runs."""
    if sys.stderr.isatty():
        with _bar(name) as progress:
            yield progress
    else:
        yield _Lines(name)


class _Lines:
    """A line at the first word of progress, then every ten seconds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rate = Rate()
        self.next_line_s = time.monotonic() + LINE_EVERY_S

    def __call__(
        self, done: float, total: float | None, unit: str, figures: Mapping[str, str] | None = None
    ) -> None:
        self.rate.update(done)
        if time.monotonic() < self.next_line_s:
            return
        self.next_line_s = time.monotonic() + LINE_EVERY_S
        say(f"{self.name:<11} {describe(done, total, unit, self.rate, figures)}")


@contextmanager
def _bar(name: str) -> Iterator[Progress]:
    # rich costs 60 ms to import and is not wanted where no terminal is
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bars

    rate = Rate()
    bars = Bars(
        SpinnerColumn(),
        TextColumn("{task.description:<11}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=8,
    )
    with bars:
        task = bars.add_task(name, total=None, text="")
        last_s = 0.0

        def draw(
            done: float, total: float | None, unit: str, figures: Mapping[str, str] | None = None
        ) -> None:
            nonlocal last_s
            rate.update(done)
            now = time.monotonic()
            if now - last_s >= DRAW_EVERY_S:
                last_s = now
                text = describe(done, total, unit, rate, figures)
                bars.update(task, completed=done, total=total, text=text)

        yield draw


class Rate:
    """Units per second over the last 15 seconds; what a resumed step had done before does not count."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque()
        self.per_s = 0.0

    def update(self, done: float, now: float | None = None) -> None:
        """Note how far the work is. now: seconds on a monotonic clock, by default this machine's."""
        now = time.monotonic() if now is None else now
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()
        if self._seen and done == self._seen[0][1]:
            self._seen.clear()  # nothing moved yet: other work is being done first
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] > RATE_WINDOW_S:
            self._seen.popleft()
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        self.per_s = (last - first) / (last_s - first_s) if last_s > first_s else 0.0


def describe(
    done: float, total: float | None, unit: str, rate: Rate, figures: Mapping[str, str] | None
) -> str:
    """Write progress in words: "1,200/2,400 steps  50%  8.1 steps/s  eta 2m28s  loss 2.31"."""
    parts = [f"{done:,.0f}/{total:,.0f} {unit}" if total else f"{done:,.0f} {unit}"]
    if total:
        parts.append(f"{100 * done / total:.0f}%")
    if rate.per_s > 0:
        parts.append(f"{quantity(rate.per_s)} {unit}/s")
        if total and total > done:
            parts.append(f"eta {duration((total - done) / rate.per_s)}")
    parts += [f"{name} {value}" for name, value in (figures or {}).items()]
    return "  ".join(parts)


def quantity(value: float) -> str:
    """Write a number with three digits and a unit prefix: 1.43k, 12.1M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if float(f"{abs(value):.3g}") >= limit:  # 999.9 is written 1k, not 1e+03
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Write a duration: 340 ms, 12.3 s, 2m05s, 1h02m."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def size(num_bytes: float) -> str:
    """Write a size in binary units: 12.1 MiB."""
    for limit, suffix in ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if num_bytes >= limit:
            return f"{num_bytes / limit:.1f} {suffix}"
    return f"{num_bytes:.0f} B"
