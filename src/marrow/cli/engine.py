"""The flags --engine and --workers: how the pieces of a data step are run, never what comes out."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from marrow.core.errors import UsageError
from marrow.data.engine import INLINE, Engine, Processes, Threads

NAMES = "inline, threads, processes, ray or ray:ADDRESS"
MOST_BY_DEFAULT = 16


Command = TypeVar("Command", bound=Callable[..., Any])


def engine_options(what: str) -> Callable[[Command], Command]:
    """Give a command the flags, as parameters engine_name and workers. what: what is done."""
    engine = click.option(
        "--engine",
        "engine_name",
        default="inline",
        show_default=True,
        metavar="NAME",
        help=f"Who {what}: {NAMES}.",
    )
    workers = click.option(
        "--workers", type=click.IntRange(0), default=0, show_default="one a CPU", help="Of the engine."
    )
    return lambda command: engine(workers(command))


def engine_of(name: str, workers: int = 0) -> Engine:
    """Make the engine of a flag's value.

    Args: name: inline, threads, processes, ray (a cluster started here) or ray:ADDRESS. workers: pieces
        at work at once; 0 takes one for each CPU that this process may use, at most 16, and with an
        address all of the cluster's.
    Raises: UsageError for another name or number, or if Ray is not installed; ResourceError if no
        cluster answers.
    """
    if workers < 0:
        raise UsageError(f"--workers {workers} is less than 0", hint="0 takes one for each CPU")
    kind, _, address = name.partition(":")
    own = workers or min(MOST_BY_DEFAULT, _cpus())
    if kind == "ray":
        from marrow.data.ray_engine import RayEngine  # loads Ray when it connects

        return RayEngine(address, workers) if address else RayEngine(None, own)
    if name == "inline":
        return INLINE
    if name == "threads":
        return Threads(own)
    if name == "processes":
        return Processes(own)
    raise UsageError(f"there is no engine {name!r}", hint=f"choose {NAMES}")


def _cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
