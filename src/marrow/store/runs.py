"""Runs: what each start of a recipe did, step by step, and how it ended.

A run is written as it goes, so that another terminal can watch it. The run's process holds a
`FileLock` of its name while it lives: whoever reads a run that says "running" and finds its lock
free writes down that it was killed. A run whose lock is not in this store (a shared catalog,
another machine's store) is taken at its word.
"""

import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, Row, Select, insert, select, update

from marrow.core.errors import ArtifactNotFound
from marrow.store.database import Database
from marrow.store.lock import FileLock
from marrow.store.points import Point, PointLog, read_metrics, read_points
from marrow.store.tables import run_steps, runs

RunStatus = Literal["running", "done", "failed", "interrupted", "killed"]


@dataclass(frozen=True, slots=True)
class RunStep:
    """One step of a run: what it gave (None: nothing yet) and the seconds this run spent on it."""

    name: str
    status: str
    artifact_id: str | None = None
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """One start of a recipe."""

    id: str
    recipe: str
    recipe_hash: str
    status: RunStatus
    started_s: float
    ended_s: float | None
    steps: tuple[RunStep, ...]


class Runs:
    """The runs of a catalog, and their metric points."""

    def __init__(self, database: Database, locks: Path) -> None:
        self._database = database
        self._locks = locks
        self._held: dict[str, FileLock] = {}

    def start(self, recipe: str, recipe_hash: str) -> str:
        """Begin a run; return its id, which sorts by time of start."""
        now = time.time()
        run_id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{uuid.uuid4().hex[:6]}"
        lock = FileLock(self._lock_path(run_id), doing=f"running {recipe}")
        lock.try_acquire()
        self._held[run_id] = lock
        row = {"id": run_id, "recipe": recipe, "recipe_hash": recipe_hash, "started_s": now}
        with self._database.write() as connection:
            connection.execute(insert(runs), row | {"status": "running"})
        return run_id

    def record(self, run_id: str, position: int, step: RunStep) -> None:
        """Write (or overwrite) the run's step at that position, counted from 0."""
        values = {
            "name": step.name,
            "status": step.status,
            "artifact_id": step.artifact_id,
            "wall_s": step.wall_s,
        }
        here = (run_steps.c.run_id == run_id) & (run_steps.c.position == position)
        with self._database.write() as connection:
            if connection.execute(update(run_steps).where(here).values(values)).rowcount == 0:
                connection.execute(insert(run_steps), values | {"run_id": run_id, "position": position})

    def finish(self, run_id: str, status: RunStatus) -> None:
        """End a run."""
        with self._database.write() as connection:
            ended = update(runs).where(runs.c.id == run_id).values(status=status, ended_s=time.time())
            connection.execute(ended)
        if lock := self._held.pop(run_id, None):
            lock.release()

    def get(self, run_id: str) -> Run:
        """Return a run with its steps. Raises: ArtifactNotFound."""
        found = self._read(select(runs).where(runs.c.id == run_id))
        if not found:
            raise ArtifactNotFound(f"no run {run_id!r} in the catalog")
        return found[0]

    def latest(self, *, recipe: str | None = None, limit: int = 1) -> list[Run]:
        """Return the newest runs (of one recipe), newest first."""
        query = select(runs).order_by(runs.c.seq.desc()).limit(limit)
        if recipe is not None:
            query = query.where(runs.c.recipe == recipe)
        return self._read(query)

    def containing(self, artifact_id: str) -> list[Run]:
        """Return the runs that built or used an artifact as a step, newest first."""
        inside = select(run_steps.c.run_id).where(run_steps.c.artifact_id == artifact_id)
        query = select(runs).where(runs.c.id.in_(inside)).order_by(runs.c.seq.desc())
        return self._read(query)

    def log(self, run_id: str) -> PointLog:
        """Open the run's log of metric points; a context manager."""
        return PointLog(self._database, run_id)

    def metrics(self, run_id: str) -> list[str]:
        """Return the names of the metrics that a run logged."""
        return read_metrics(self._database, run_id)

    def points(self, run_id: str, metric: str) -> list[Point]:
        """Return one metric's points of a run, by step."""
        return read_points(self._database, run_id, metric)

    def close(self) -> None:
        """End the runs that are still open as failed; closing twice is fine."""
        for run_id in list(self._held):
            self.finish(run_id, "failed")

    def _read(self, query: Select[Any]) -> list[Run]:
        with self._database.read() as connection:
            rows = connection.execute(query).all()
            found = [_run(row, connection) for row in rows]
        return [self._buried(run) if run.status == "running" else run for run in found]

    def _buried(self, run: Run) -> Run:
        """Write down that a run was killed, if it was; return it as it is."""
        path = self._lock_path(run.id)
        lock = FileLock(path)
        if run.id in self._held or not path.exists() or not lock.try_acquire():
            return run
        try:
            this = (runs.c.id == run.id) & (runs.c.status == "running")
            with self._database.write() as connection:
                connection.execute(update(runs).where(this).values(status="killed"))
                row = connection.execute(select(runs).where(runs.c.id == run.id)).one()
                return _run(row, connection)
        finally:
            lock.release()

    def _lock_path(self, run_id: str) -> Path:
        return self._locks / f"run-{run_id}.lock"


def _run(row: Row[Any], connection: Connection) -> Run:
    query = select(run_steps).where(run_steps.c.run_id == row.id).order_by(run_steps.c.position)
    steps = tuple(
        RunStep(step.name, step.status, step.artifact_id, step.wall_s) for step in connection.execute(query)
    )
    return Run(row.id, row.recipe, row.recipe_hash, row.status, row.started_s, row.ended_s, steps)
