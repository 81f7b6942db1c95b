"""Jobs and transforms for tests of the loader's workers: importable by name in other processes."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from marrow.loader.stages import count, stage


def arrays(task: int) -> dict[str, Any]:
    """A batch whose every byte follows from its task."""
    with stage("transform"):
        return {
            "task": task,
            "large": np.full((64, 257), task, dtype=np.int64),
            "small": np.arange(task % 7),
            "text": [f"row {task}"] * 3,
        }


def slow(task: int) -> dict[str, Any]:
    with stage("transform"):
        time.sleep(0.003)
    return arrays(task)


def slower(task: int) -> int:
    with stage("transform"):
        time.sleep(0.02)
    return task


def who(task: int) -> tuple[int, int]:
    time.sleep(0.002)
    return task, os.getpid()


def threads_of_pools(task: int) -> str:
    return os.environ.get("OMP_NUM_THREADS", "")


def loaded_modules(task: int) -> list[str]:
    import sys

    return [name for name in ("torch", "PIL", "transformers") if name in sys.modules]


def tensors(task: int) -> Any:
    import torch

    return {
        "bf16": torch.full((5000,), task, dtype=torch.bfloat16),
        "turned": torch.arange(6000).reshape(60, 100).t() + task,
        "bool": torch.ones(4096, dtype=torch.bool),
        "tiny": torch.tensor([task]),
        "empty": torch.empty(0, 3),
    }


class FailsAt:
    """Raises an error of a kind at one task."""

    def __init__(self, task: int, kind: type[Exception] = ValueError) -> None:
        self.task, self.kind = task, kind

    def __call__(self, task: int) -> dict[str, Any]:
        if task == self.task:
            raise self.kind(f"task {task} is bad")
        return arrays(task)


class Homemade(Exception):
    """An error that pickle cannot carry: it needs two arguments."""

    def __init__(self, first: str, second: str = "") -> None:
        super().__init__(first)
        self.lock = lambda: second


class DiesAt:
    """Kills its own process at one task: the first `times` times, by marks left in a folder."""

    def __init__(self, task: int, folder: Path, times: int = 1) -> None:
        self.task, self.folder, self.times = task, folder, times

    def __call__(self, task: int) -> dict[str, Any]:
        if task == self.task:
            deaths = len(list(self.folder.iterdir()))
            if deaths < self.times:
                (self.folder / f"{deaths}-{os.getpid()}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return arrays(task)


class HangsAt:
    """Never comes back from one task."""

    def __init__(self, task: int) -> None:
        self.task = task

    def __call__(self, task: int) -> dict[str, Any]:
        if task == self.task:
            with stage("transform"):
                time.sleep(3600)
        return arrays(task)


class GrandchildAt:
    """Leaves a child that holds every descriptor open, then dies."""

    def __init__(self, task: int, folder: Path) -> None:
        self.task, self.folder = task, folder

    def __call__(self, task: int) -> dict[str, Any]:
        mark = self.folder / "died"
        if task == self.task and not mark.exists():
            mark.touch()
            if os.fork() == 0:
                time.sleep(8)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        return arrays(task)


def counted(task: int) -> int:
    for _ in range(task % 3):
        count("samples skipped", f"task {task}")
    return task


class Unloadable:
    """Pickles, but not back."""

    def __reduce__(self) -> Any:
        return _fail, ()


def _fail() -> None:
    raise ImportError("no module named surprise")


def double(sample: dict[str, Any], position: int) -> dict[str, Any]:
    return {"id": sample["id"], "double": 2 * sample["id"], "position": position}


def fails_on_multiples_of_50(sample: dict[str, Any], position: int) -> dict[str, Any]:
    if sample["id"] % 50 == 0:
        raise KeyError("no such word")
    return double(sample, position)


def fails_always(sample: dict[str, Any], position: int) -> dict[str, Any]:
    raise ValueError("bad row")


def slow_transform(sample: dict[str, Any], position: int) -> dict[str, Any]:
    """A millisecond of Python for each sample."""
    until = time.perf_counter() + 0.001
    while time.perf_counter() < until:
        pass
    return double(sample, position)
