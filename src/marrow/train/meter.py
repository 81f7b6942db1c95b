"""The figures of a run: loss, speed, MFU, and what share of the time the model waited for data.

Counts over all starts of the run: the totals are kept in the checkpoints. A line goes to
`metrics.jsonl` every `log_every` steps; on resume the lines after the checkpoint are cut off.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"


@dataclass(slots=True)
class Meter:
    """Adds up steps. Seconds are wall time; `flops_per_token` is of forward and backward.

    losses, seconds and tokens with the prefix `window_` are of the steps since the last line.
    """

    flops_per_token: float
    peak_flops: float
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    wait_s: float = 0.0
    checkpoint_s: float = 0.0
    window_losses: list[float] = field(default_factory=list)
    window_tokens: int = 0
    window_s: float = 0.0
    window_wait_s: float = 0.0
    _mark_s: float = field(default_factory=time.perf_counter)

    def add(self, loss: float, *, tokens: int, targets: int, wait_s: float) -> None:
        """Count one step, all time since the last call included."""
        now = time.perf_counter()
        taken_s, self._mark_s = now - self._mark_s, now
        self.tokens += tokens
        self.targets += targets
        self.seconds += taken_s
        self.wait_s += wait_s
        self.window_losses.append(loss)
        self.window_tokens += tokens
        self.window_s += taken_s
        self.window_wait_s += wait_s

    def read(self) -> dict[str, float]:
        """Return the window's figures and begin the next window."""
        speed = self.window_tokens / self.window_s
        figures = {
            "loss": sum(self.window_losses) / len(self.window_losses),
            "tokens": self.tokens,
            "tokens_per_s": speed,
            "mfu": speed * self.flops_per_token / self.peak_flops,
            "data_wait_share": self.window_wait_s / self.window_s,
            "seconds": self.seconds,
        }
        self.window_losses = []
        self.window_tokens, self.window_s, self.window_wait_s = 0, 0.0, 0.0
        return figures

    def facts(self) -> dict[str, float]:
        """Return the figures of the whole run."""
        speed = self.tokens / self.seconds
        return {
            "tokens": self.tokens,
            "targets": self.targets,
            "seconds": self.seconds,
            "tokens_per_s": speed,
            "mfu": speed * self.flops_per_token / self.peak_flops,
            "data_wait_share": self.wait_s / self.seconds,
            "checkpoint_share": self.checkpoint_s / self.seconds,
        }

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_KEPT}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        for name, value in state.items():
            setattr(self, name, value)


_NOT_KEPT = {"flops_per_token", "peak_flops", "_mark_s"}


class MetricsFile:
    """`metrics.jsonl`: a line for each window, appended and flushed."""

    def __init__(self, folder: Path, after_step: int) -> None:
        """Open the file; lines of steps after `after_step`, or half written, are cut off."""
        path = folder / FILE_NAME
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                if json.loads(line)["step"] > after_step:
                    break
            except ValueError:
                break  # torn by a kill
            kept.append(line + "\n")
        path.write_text("".join(kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Append one line."""
        self._file.write(json.dumps({"step": step} | dict(figures)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; twice is fine."""
        self._file.close()
