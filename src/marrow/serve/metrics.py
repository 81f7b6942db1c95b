"""What the engine counts, and how Prometheus reads it.

The engine's thread is the only writer; a scrape reads while it writes and may be one step
behind. Text format: Prometheus exposition 0.0.4.
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts observations in buckets with fixed upper bounds, in seconds."""

    def __init__(self, bounds: tuple[float, ...] = _LATENCY_S) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class Metrics:
    """Counters since the start, and gauges of this moment. Blocks are of KV cache."""

    running: int = 0
    waiting: int = 0
    blocks: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    computed_tokens: int = 0
    drawn_tokens: int = 0
    preemptions: int = 0
    evictions: int = 0
    failed_steps: int = 0
    finished: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("stop", "length", "abort", "error"), 0)
    )
    ttft_s: Histogram = field(default_factory=Histogram)
    itl_s: Histogram = field(default_factory=Histogram)
    e2e_s: Histogram = field(default_factory=Histogram)

    @property
    def ended(self) -> int:
        """Requests that ended, however."""
        return sum(self.finished.values())


_FAMILIES = (  # attribute, type, name, help
    ("running", "gauge", "sequences_running", "Sequences that hold blocks and compute."),
    ("waiting", "gauge", "sequences_waiting", "Sequences in the queue, preempted ones included."),
    ("blocks", "gauge", "kv_blocks", "Blocks of KV cache."),
    ("blocks_used", "gauge", "kv_blocks_used", "Blocks that sequences use."),
    ("blocks_cached", "gauge", "kv_blocks_cached", "Blocks kept for sharing that nobody uses."),
    ("steps", "counter", "steps_total", "Steps of the engine."),
    ("prompt_tokens", "counter", "prompt_tokens_total", "Prompt tokens of admitted requests."),
    ("shared_tokens", "counter", "prefix_cache_tokens_total", "Prompt tokens that the prefix cache had."),
    ("computed_tokens", "counter", "computed_tokens_total", "Tokens that went through the model."),
    ("drawn_tokens", "counter", "generation_tokens_total", "Tokens drawn."),
    ("preemptions", "counter", "preemptions_total", "Sequences sent back to be recomputed."),
    ("evictions", "counter", "kv_blocks_evicted_total", "Cached blocks given up for new ones."),
    ("failed_steps", "counter", "failed_steps_total", "Steps repeated one sequence at a time."),
)
_HISTOGRAMS = (
    ("ttft_s", "time_to_first_token_seconds", "From arrival to the first token."),
    ("itl_s", "inter_token_latency_seconds", "Between two tokens of a sequence."),
    ("e2e_s", "request_seconds", "From arrival to the end."),
)


def prometheus(metrics: Metrics, model: str, ready: bool) -> str:
    """Write the metrics in Prometheus' text format, each labelled with the model's name."""
    label = 'model="' + model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") + '"'
    return "\n".join([*_lines(metrics, label, ready), ""])


def _lines(metrics: Metrics, label: str, ready: bool) -> Iterable[str]:
    def head(name: str, kind: str, text: str) -> Iterable[str]:
        yield f"# HELP marrow_{name} {text}"
        yield f"# TYPE marrow_{name} {kind}"

    yield from head("ready", "gauge", "1 while the engine takes requests.")
    yield f"marrow_ready{{{label}}} {int(ready)}"
    for attribute, kind, name, text in _FAMILIES:
        yield from head(name, kind, text)
        yield f"marrow_{name}{{{label}}} {getattr(metrics, attribute)}"
    yield from head("requests_total", "counter", "Requests ended, by reason.")
    for reason, count in metrics.finished.items():
        yield f'marrow_requests_total{{{label},reason="{reason}"}} {count}'
    for attribute, name, text in _HISTOGRAMS:
        histogram: Histogram = getattr(metrics, attribute)
        yield from head(name, "histogram", text)
        counts, total, below = list(histogram.counts), histogram.total, 0
        for bound, count in zip((*map(str, histogram.bounds), "+Inf"), counts, strict=True):
            below += count
            yield f'marrow_{name}_bucket{{{label},le="{bound}"}} {below}'
        yield f"marrow_{name}_sum{{{label}}} {total}"
        yield f"marrow_{name}_count{{{label}}} {below}"
