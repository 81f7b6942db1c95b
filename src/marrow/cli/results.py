"""What a run measured, as plain data: `json.dumps(dataclasses.asdict(results))` works.

Whatever a run does not have stays empty. `story.py` fills it from the artifacts, `report.py` sets it as
a page.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["built", "cached", "rebuilt"]


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step of the run. `ledger` is `LedgerSummary.as_dict()`; a cached step may have none."""

    name: str
    status: Status
    artifact_id: str = ""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_rss_bytes: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    ledger: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """Training at one step. loss in nats per token; mfu and data_wait are shares (0 to 1)."""

    step: int
    loss: float
    tokens_per_s: float | None = None
    mfu: float | None = None
    data_wait: float | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """Bits per byte on the held-out text; `ours` marks the model among its baselines."""

    name: str
    bits_per_byte: float
    ours: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and what the model wrote after it, without the prompt, at three ages."""

    prompt: str
    before: str | None = None
    midway: str | None = None
    after: str | None = None


@dataclass(frozen=True, slots=True)
class NearestRow:
    """The training row that shares the longest text with a completion."""

    prompt: str
    completion: str
    file: str
    line: int | None
    shared: str


@dataclass(frozen=True, slots=True)
class ServingFigures:
    """What the load run measured over HTTP. Latencies in milliseconds."""

    requests: int
    concurrency: int
    errors: int
    wall_s: float
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    ledger: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class DroppedRule:
    """How many rows (and bytes) one quality rule dropped, and one example of them."""

    rule: str
    num_rows: int
    num_bytes: int | None = None
    example: str = ""


@dataclass(frozen=True, slots=True)
class LineageNode:
    """An artifact, or a source outside the store, in the lineage graph."""

    id: str
    kind: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class LineageEdge:
    """`child` used `parent` as its `role`."""

    parent: str
    child: str
    role: str = ""


@dataclass(frozen=True, slots=True)
class RecipeValue:
    """A resolved value of the recipe and where it came from."""

    key: str
    value: str
    origin: str = "default"


@dataclass(frozen=True, slots=True)
class RunReport:
    """All that a run has to tell. `when` is printed as it is; parse rates are shares (0 to 1)."""

    recipe: str
    when: str = ""
    machine: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[StepReport, ...] = ()
    metrics: tuple[MetricPoint, ...] = ()
    scores: tuple[Score, ...] = ()
    samples: tuple[Sample, ...] = ()
    parse_rates: Mapping[str, float] = field(default_factory=dict)
    nearest: tuple[NearestRow, ...] = ()
    serving: ServingFigures | None = None
    dropped: tuple[DroppedRule, ...] = ()
    nodes: tuple[LineageNode, ...] = ()
    edges: tuple[LineageEdge, ...] = ()
    recipe_values: tuple[RecipeValue, ...] = ()

    @property
    def wall_s(self) -> float:
        """Seconds of all steps that ran."""
        return sum(step.wall_s for step in self.steps)

    @property
    def cpu_s(self) -> float:
        """CPU seconds of all steps that ran."""
        return sum(step.cpu_s for step in self.steps)

    @property
    def peak_rss_bytes(self) -> int:
        """The largest memory of any step."""
        return max((step.peak_rss_bytes for step in self.steps), default=0)
