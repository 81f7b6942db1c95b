"""The step cache: work is done once, and what was done is found again by what it depends on.

    key = hash(kind, parents' ids, config, hash of the step's sources, declared environment)

`run_step` looks for an intact artifact of that key; else, under the key's lock, it lets the step
build into a fresh folder and publishes it. A killed attempt leaves its `work` folder to the next
one, and nothing else. A damaged blob is set aside and the step rebuilt: since ids are content
hashes, a deterministic step gives the same artifact back, and all that follows stays valid.
"""

import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from marrow.core.errors import explain_os_errors
from marrow.core.hashes import hash_sources, hash_value
from marrow.core.records import Artifact, Parent
from marrow.core.span import Ledger
from marrow.store.lock import Say
from marrow.store.store import Store
from marrow.store.version import base_environment

COST = "cost"  # the key of an artifact's facts that holds what building it took


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where a step works.

    out: a fresh folder; its files become the artifact. work: persists over killed attempts of
    the same key, removed after success. inputs: role -> folder with the parent's files.
    """

    out: Path
    work: Path
    inputs: Mapping[str, Path]
    details: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def used(self, role: str, **detail: Any) -> None:
        """Note on the edge to a parent which part of it was used; deterministic JSON values."""
        assert role in self.inputs, f"the step has no parent {role!r}"
        self.details[role] = detail


@dataclass(frozen=True, slots=True)
class Step:
    """One cached piece of work, described by everything that its result depends on.

    Args: kind: of the artifact. parents: one per role; a folder view of each is an input. config:
        what it is asked, any value with canonical JSON. sources: files (or folders of them) whose
        text decides what it does. environment: what else does, such as {"torch": "2.13.0"}.
        build: fills workspace.out and returns the facts. name: for people, by default the kind.
    """

    kind: str
    build: Callable[[Workspace], Mapping[str, Any]]
    parents: Sequence[Parent] = ()
    config: Any = None
    sources: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        roles = [parent.role for parent in self.parents]
        assert len(set(roles)) == len(roles), f"roles must differ: {roles}"

    @property
    def title(self) -> str:
        """The name for people."""
        return self.name or self.kind

    def key(self) -> str:
        """Return the hash of everything that the step depends on."""
        return hash_value(
            {
                "kind": self.kind,
                "parents": {p.role: [p.artifact_id, dict(p.detail)] for p in self.parents},
                "config": self.config,
                "sources": hash_sources(self.sources),
                "environment": self.environment,
            }
        )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of a step.

    status: "built" now, "cached" from before, or "rebuilt" since a blob was damaged. wall_s: of
    this call. cpu_s, peak_rss_bytes, ledger: of the build, whenever that was.
    """

    artifact: Artifact
    status: Literal["built", "cached", "rebuilt"]
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    ledger: Mapping[str, Any]


class Watcher(Protocol):
    """Is told of steps as they begin and end; must not raise."""

    def started(self, step: Step) -> None:
        """Take note that a step begins."""

    def ended(self, step: Step, result: StepResult | None, error: BaseException | None) -> None:
        """Take note of a step's result, or of the error that ended it."""


def run_step(
    store: Store,
    step: Step,
    *,
    say: Say = lambda _: None,
    recipe_hash: str = "",
    watcher: Watcher | None = None,
) -> StepResult:
    """Return the step's artifact, from the cache if it is there and intact, else by building it.

    Of two processes that run the same step at once one builds and the other waits, then reads.
    Args: say: called with a sentence for the user: a wait, a damaged blob. recipe_hash: noted with
        what is built, no part of the key. watcher: told when the step begins and how it ends.
    Raises: whatever the build raises (its `work` folder stays); DamagedBlob if a parent is
        damaged; DiskFull, NotPermitted.
    """
    if watcher is None:
        return _run_step(store, step, say, recipe_hash)
    watcher.started(step)
    try:
        result = _run_step(store, step, say, recipe_hash)
    except BaseException as error:
        watcher.ended(step, None, error)
        raise
    watcher.ended(step, result, None)
    return result


def _run_step(store: Store, step: Step, say: Say, recipe_hash: str) -> StepResult:
    started_s = time.perf_counter()
    key = step.key()
    artifact = store.find_key(key)
    if artifact is not None and not store.verify(artifact):
        store.discard_finished_work(key)
        return _result(artifact, "cached", started_s)
    with store.step_lock(key, doing=f"building {step.title}", say=say):
        artifact = store.find_key(key)
        damaged = () if artifact is None else store.verify(artifact)
        if artifact is not None and not damaged:
            return _result(artifact, "cached", started_s)
        for file in {file.sha256: file for file in damaged}.values():
            what = "damaged" if store.blobs.quarantine(file.sha256) else "missing"
            say(f"blob {file.sha256[:12]} ({file.name}) of {step.title} is {what}: rebuilding")
        built = _build(store, step, key, recipe_hash)
        if artifact is not None and built.id != artifact.id:
            say(f"{step.title} was rebuilt with other bytes than before: {built.id[:12]}")
        store.discard_work(key)
        return _result(built, "rebuilt" if damaged else "built", started_s)


def _build(store: Store, step: Step, key: str, recipe_hash: str) -> Artifact:
    inputs = {parent.role: store.view(store.get(parent.artifact_id)) for parent in step.parents}
    out = store.staging.new()
    with explain_os_errors(f"start {step.title}", out):
        out.mkdir()
    workspace = Workspace(out, store.work_folder(key), inputs)
    try:
        with explain_os_errors(f"build {step.title}", out), _Meter(step.title) as meter:
            facts = dict(step.build(workspace))
        assert COST not in facts, f"{COST!r} is the store's own key"
        facts[COST] = meter.cost()
        return store.publish(
            step.kind,
            key,
            out,
            parents=[
                replace(p, detail={**p.detail, **workspace.details.get(p.role, {})}) for p in step.parents
            ],
            facts=facts,
            recipe_hash=recipe_hash,
            environment=base_environment() | dict(step.environment),
        )
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _result(
    artifact: Artifact, status: Literal["built", "cached", "rebuilt"], started_s: float
) -> StepResult:
    cost = artifact.facts[COST]
    wall_s = time.perf_counter() - started_s
    return StepResult(artifact, status, wall_s, cost["cpu_s"], cost["peak_rss_bytes"], cost["ledger"])


class _Meter:
    """Measures a build: its ledger, CPU seconds with waited-for children, peak memory."""

    def __init__(self, name: str) -> None:
        self._ledger = Ledger(name)
        self._cpu_s = 0.0
        self._peak_rss_bytes = 0

    def __enter__(self) -> "_Meter":
        _reset_peak()
        self._children_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        self._cpu_s = _cpu_s()
        self._ledger.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._ledger.__exit__(*error)
        self._cpu_s = _cpu_s() - self._cpu_s
        scale = 1 if sys.platform == "darwin" else 1024
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        # The children's peak is of the process's whole life: it counts if this step raised it.
        self._peak_rss_bytes = scale * max(own, children if children > self._children_kb else 0)

    def cost(self) -> dict[str, Any]:
        ledger = self._ledger.summary().as_dict()
        return {
            "wall_s": ledger["wall_s"],
            "cpu_s": self._cpu_s,
            "peak_rss_bytes": self._peak_rss_bytes,
            "ledger": ledger,
        }


def _cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _reset_peak() -> None:
    """Let the peak of memory start anew, so that it is the step's own; Linux only, else a no-op."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return
