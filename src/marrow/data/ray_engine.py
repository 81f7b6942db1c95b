"""The engine that runs pieces on a Ray cluster, in place of threads or processes of this machine.

    with RayEngine("10.0.0.1:6379") as engine:
        write_shards(recipe, split, tokenizer, out, engine=engine)

Ray is asked for what it does well: placing tasks on nodes, and running them again when a worker, a
raylet or a node is gone. Order, limits and errors are those of `data/engine.py`, so the artifacts are
the same bit for bit. Two things are assumed of the cluster: every node has this version of Marrow,
and the paths that pieces name mean the same files there (one shared file system). Results come back
through Ray; the step writes its files where it was started.

Needs the extra `ray`. An address of None starts a cluster on this machine, and ends it again.
"""

import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from types import TracebackType
from typing import Any, Self

from marrow.core.errors import ResourceError, UsageError
from marrow.data.engine import ATTEMPTS, IN_FLIGHT, Item, Result, in_order, portable

OBJECT_STORE_BYTES = 200 << 20  # of a cluster that is started here; pieces' results pass through it


class RayEngine:
    """Runs pieces on the nodes of a Ray cluster.

    Args: address: of the cluster's head, or "auto"; None starts one here. workers: pieces at work at
        once; 0 takes the CPUs of the cluster, or 2 for one that is started here.
    Raises: UsageError if Ray is not installed; ResourceError if no cluster answers.
    """

    def __init__(self, address: str | None = None, workers: int = 0) -> None:
        self._ray = _import_ray()
        self._is_ours = not self._ray.is_initialized()
        if self._is_ours:
            _connect(self._ray, address, workers)
        self.workers = workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        with _quiet():
            self._task = self._ray.remote(_work).options(max_retries=ATTEMPTS - 1, num_cpus=1)

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results in the order of the items; see `Engine.map`."""
        flying: dict[Any, Item] = {}

        def start(item: Item) -> Any:
            reference = self._task.remote(sys.path, _pickled(function, item))
            flying[reference] = item
            return reference

        def finish(reference: Any) -> Any:
            try:
                done, value = pickle.loads(self._ray.get(reference))
            except self._ray.exceptions.RayError as error:
                raise _lost(error, flying[reference]) from None
            del flying[reference]
            if done:
                return value
            raise value

        try:
            yield from in_order(start, finish, items, IN_FLIGHT * self.workers)
        finally:
            for reference in flying:
                self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster, and end it if it was started here; closing twice is fine."""
        if self._is_ours and self._ray.is_initialized():
            with _quiet():
                self._ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _quiet(warnings.catch_warnings):  # noqa: N801 - a context manager, named for how it reads
    """Keep Ray's warnings about itself out of programs that take warnings for errors."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


def _work(path: list[str], task: bytes) -> bytes:
    """Run one piece on a node; errors travel as values, since Ray would wrap them in its own."""
    sys.path += [folder for folder in path if folder not in sys.path]
    try:
        function, item = pickle.loads(task)
        return pickle.dumps((True, function(item)), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # noqa: BLE001 - whatever it is, the driver raises it
        return pickle.dumps((False, portable(error)))


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        with _quiet():
            return import_module("ray")
    except ImportError as error:
        raise UsageError(
            "the ray engine needs the package ray, which is not installed",
            hint='pip install "marrow[ray]", or use --engine processes',
        ) from error


def _connect(ray: Any, address: str | None, workers: int) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        options |= {"num_cpus": workers or 2, "include_dashboard": False}
        options |= {"object_store_memory": OBJECT_STORE_BYTES}
    else:
        options |= {"address": address}
    try:
        with _quiet():
            ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ResourceError(
            f"no Ray cluster at {address or 'this machine'}: {error}",
            hint="give the address of its head, as in --engine ray:10.0.0.1:6379; ray status shows it",
        ) from error


def _pickled(function: Any, item: Any) -> bytes:
    try:
        return pickle.dumps((function, item), protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"a piece cannot be sent to another node: {error}",
            hint="functions must stand at the top level of a module",
        ) from error


def _lost(error: Exception, item: Any) -> ResourceError:
    return ResourceError(
        f"Ray lost the piece {item}, {ATTEMPTS} times at most tried: {type(error).__name__}: {error}",
        hint="ray status shows which nodes live; ray logs what became of the others",
    )
