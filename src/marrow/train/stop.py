"""Stopping on request: Ctrl-C and SIGTERM wait for the end of the current step.

    with StopRequest() as stop:
        for step in ...:
            ...
            if stop.is_asked: save, then raise Interrupted

The second Ctrl-C interrupts at once, as ever. Off the main thread no signal arrives and none is
asked for. The handlers found are put back at the end.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Turns the first signal into a question that the loop asks."""

    def __init__(self) -> None:
        self.is_asked = False
        self._found: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._found[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._found.items():
            signal.signal(number, handler)
        self._found.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
