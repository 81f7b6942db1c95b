"""Checkpoints of a run in progress: folders that are whole or not there.

    work/checkpoint-00000120/
        tensors.safetensors   master weights and optimiser moments, fp32
        state.json            step, loader state, figures of the run so far
        manifest.json         xxh3 of both

A folder is written beside its place and renamed. On reading, both files are checked against the
manifest; a folder that fails is reported and passed over for the one before, which is why two
are kept. Nothing random is stored: randomness is a function of seed and position.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from marrow.core.errors import explain_os_errors
from marrow.core.files import atomic_folder
from marrow.core.hashes import check_file

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
PREFIX = "checkpoint-"
KEPT = 2
_NUMBER = re.compile(r"os error (\d+)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in memory. step: optimiser steps done."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save_checkpoint(work: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Publish a checkpoint in `work` and remove all but the last two.

    Raises: DiskFull, NotPermitted; what was there before then still is.
    """
    target = work / f"{PREFIX}{step:08d}"
    with explain_write_errors("write a checkpoint", target), atomic_folder(target) as folder:
        write_state(folder, tensors, dict(state) | {"step": step})
        manifest = {name: check_file(folder / name) for name in (TENSORS, STATE)}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for old in _folders(work)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def write_state(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors and state into a folder; equal values give equal bytes."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / TENSORS)
    (folder / STATE).write_text(json.dumps(state, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_latest(work: Path) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest checkpoint whose bytes are the written ones.

    Returns: the checkpoint, None if there is none; and why newer ones were passed over, each as
    "name: reason". Those are also logged, and removed.
    """
    damaged: list[str] = []
    for folder in reversed(_folders(work)):
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            for name in (TENSORS, STATE):
                if check_file(folder / name) != manifest[name]:
                    raise ValueError(f"{name} is not what was written")
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            return Checkpoint(state["step"], load_file(folder / TENSORS), state), damaged
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            damaged.append(f"{folder.name}: {error}")
            logger.warning("%s is damaged (%s); going on from the one before it", folder.name, error)
            shutil.rmtree(folder, ignore_errors=True)
    return None, damaged


@contextmanager
def explain_write_errors(doing: str, path: Path) -> Iterator[None]:
    """As `explain_os_errors`; also for what safetensors says when the system refuses to write.

    Raises: DiskFull, NotPermitted, SourceError.
    """
    with explain_os_errors(doing, path):
        try:
            yield
        except SafetensorError as error:
            number = _NUMBER.search(str(error))  # it keeps the refusal's number only in its text
            if number is None:
                raise
            raise OSError(int(number[1]), str(error), str(path)) from error


def remove_checkpoints(work: Path) -> None:
    """Remove all checkpoints of a folder: they belong to another run."""
    for folder in _folders(work):
        shutil.rmtree(folder)


def _folders(work: Path) -> list[Path]:
    """List checkpoints, oldest first; the names sort as the steps do."""
    return sorted(path for path in work.glob(f"{PREFIX}*") if path.is_dir())
