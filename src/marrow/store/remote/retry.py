"""How often and how long to try again: exponential backoff with full jitter, bounded.

A wait is drawn from [0, first * 2^failures), so that a thousand ranks which failed together do
not come back together. What moves on is not given up: each part that arrives starts the count
anew, so the bound is on standing still, never on the size of a file.

Source: "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015), the variant "full jitter".
"""

import random
import threading
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Retry:
    """The bounds.

    attempts: tries without progress before it is an error. total_s: time without progress.
    timeout_s: how long one answer, or the next bytes of one, may take to come. connect_attempts:
    tries where no connection comes about, by default as many: fewer where a person waits.
    """

    attempts: int = 10
    first_delay_s: float = 0.1
    max_delay_s: float = 10.0
    total_s: float = 120.0
    timeout_s: float = 30.0
    connect_attempts: int | None = None

    def delay_s(self, failures: int) -> float:
        """Draw the wait after this many failures in a row (1, 2, ...)."""
        most_s = min(self.max_delay_s, self.first_delay_s * 2.0 ** min(failures - 1, 40))
        # The jitter is to differ between processes; no result depends on it.
        return random.uniform(0.0, most_s)


class Patience:
    """Counts the failures of one piece of work. `stop` ends a wait at once."""

    def __init__(self, retry: Retry, stop: threading.Event) -> None:
        self._retry = retry
        self._stop = stop
        self.failures = 0
        self._since_s = time.monotonic()

    @property
    def spent_s(self) -> float:
        """Seconds since the work last moved."""
        return time.monotonic() - self._since_s

    def progressed(self) -> None:
        """Start the count anew."""
        self.failures = 0
        self._since_s = time.monotonic()

    def wait(self, *, connected: bool = True) -> bool:
        """Count a failure and wait for the next try; False if there is none."""
        self.failures += 1
        most = self._retry.attempts
        if not connected and self._retry.connect_attempts is not None:
            most = min(most, self._retry.connect_attempts)
        if self.failures >= most:
            return False
        delay_s = self._retry.delay_s(self.failures)
        if self.spent_s + delay_s > self._retry.total_s:
            return False
        return not self._stop.wait(delay_s)
