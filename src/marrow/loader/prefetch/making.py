"""The making of batches: rows are taken, then collated, and each stage's time is noted.

A maker is what runs on the loader's thread or in a worker process: it keeps no place of its own,
all it needs to know comes with the job.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from marrow.loader.order import Job, Jobs
from marrow.loader.source import Reader
from marrow.loader.stages import enter, stage

B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class Maker(Generic[B]):
    """Makes batches of a reader's rows. collate: (what `take` gives, samples) -> batch."""

    reader: Reader[Any]
    collate: Callable[[Any, range], B]

    def __call__(self, job: Job) -> tuple[B, int]:
        """Return the job's batch, and the position where the global batch ends."""
        with stage("decode"):
            picked = self.reader.take(job.rows_B)
        with stage("collate"):
            return self.collate(picked, job.samples), job.end


@dataclass(frozen=True, slots=True)
class GroupMaker(Generic[B]):
    """Makes several batches for each job, in one pass over their rows if the collate can.

    A collate that can has `many(picked, samples of each) -> batches`. What is done once for each
    job then costs a small batch little. One that reads the rows itself, in the pass that makes the
    batch, says `decodes = True`: its time is that of "decode".
    """

    reader: Reader[Any]
    collate: Callable[[Any, range], B]

    def __call__(self, jobs: Jobs) -> list[tuple[B, int]]:
        """Return the batches, each with the position where its global batch ends."""
        enter("decode")
        picked = self.reader.take(jobs.rows_N)
        if not getattr(self.collate, "decodes", False):
            enter("collate")
        if len(jobs.samples) == 1:
            made = [(self.collate(picked, jobs.samples[0]), jobs.ends[0])]
        else:
            many: Callable[..., list[B]] = self.collate.many  # type: ignore[attr-defined]
            made = list(zip(many(picked, jobs.samples), jobs.ends, strict=True))
        return made
