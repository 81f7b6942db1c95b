"""Find the fastest tile configurations on this device, and keep them: `marrow bench kernels --tune`.

Each case of the GPU bench runs once, to see which configurations it asks for (`tile.config`) and what they
could be besides the default; then default and candidates take turns, and one that is faster by more than
the noise goes to the table of the device. One question at a time, what is found holds for the next. A
candidate that does not compile, or does not fit, is out.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from marrow.kernels import dispatch, tile
from marrow.kernels.compiled import fill_cache
from marrow.kernels.configs import tables
from marrow.kernels.gpu_bench import Case, facts
from marrow.kernels.gpu_times import Function, TooLateError, limited, times

GAIN = 1.02  # a candidate must win by this much: medians of the same kernel differ by about half of it
QUESTION_S = 30.0

Key = tuple[str, str]
Forced = dict[Key, dict[str, Any]]


def tune(
    cases: Sequence[Case],
    *,
    device: str = "cuda",
    budget_s: float = 540.0,
    folder: Path = tables.FOLDER,
    is_tiny: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Try the candidates of all cases until the budget is spent, and write the table; return its path.

    Args: tell: is given a line for each question. Keys that an earlier case answered are not asked again.
    """
    deadline, found = time.monotonic() + budget_s, dict[Key, dict[str, Any]]()
    mode = dispatch.wanted()
    try:
        # Of several paths one may lose, which only auto asks.
        dispatch.reset("auto" if device.startswith("cuda") else None)
        for case in cases:
            if (left := deadline - time.monotonic()) <= 0:
                tell("no time is left")
                break
            try:
                with limited(left):
                    _tune_case(case, found, device, is_tiny, tell)
            except TooLateError:
                tell(f"{case.name}: took too long")
            except Exception as error:  # noqa: BLE001 (a case that fails stops no other)
                tell(f"{case.name}: {error!r}")
    finally:
        dispatch.reset(mode)
    table: tables.Table = {}
    for (op, shape_class), entries in found.items():
        table.setdefault(op, {})[shape_class] = entries
    versions = {name: str(value) for name, value in facts(device).items() if name != "device"}
    return tables.write(facts(device)["device"], table, versions, folder)


def _tune_case(case: Case, found: Forced, device: str, is_tiny: bool, tell: Callable[[str], None]) -> None:
    """Answer the questions of one case."""
    work = case.make(device, is_tiny)
    _choose_anew()
    with tile.configuring(found) as asked:
        work.ours()
    questions = {(question.op, question.shape_class): question for question in asked}
    if device.startswith("cuda"):
        try:
            count = _compile_ahead(work.ours, questions, found)
        except TooLateError:
            raise
        except Exception as error:  # noqa: BLE001 (each candidate is compiled when its turn comes, then)
            tell(f"{case.name}: not compiled ahead: {error!r}")
        else:
            tell(f"{case.name}: {count} kernels compiled ahead")
    # Which path is faster is asked when the tiles of ours are known.
    for key, question in sorted(questions.items(), key=lambda item: item[0][0].endswith(tile.PATH)):
        if key in found or not question.candidates:
            continue
        best, gain = _best(work.ours, key, question, found, device)
        # A question that is answered by its default is kept too: an empty entry.
        found[key] = best
        if key[0].endswith(tile.PATH):
            _choose_anew()
        tell(f"{key[0]} {key[1]}: {best or 'default'} ({gain:.2f}x)")


def _choose_anew() -> None:
    """Let operators choose their paths again, by what is answered now."""
    for operator in dispatch.operators().values():
        operator.forget()


def _compile_ahead(ours: Function, questions: dict[Key, tile.Asked], found: Forced) -> int:
    """Compile the candidates of all questions on all cores: one by one, they would take most of the time."""
    arch = tile.capability(torch.device("cuda"))
    launches = [
        launch
        for key, question in questions.items()
        if key not in found
        for candidate in question.candidates
        for launch in launches_of(ours, found | {key: candidate}, arch)
    ]
    return fill_cache(launches, arch, len(os.sched_getaffinity(0)))


def launches_of(ours: Function, forced: Forced, arch: int) -> list[tile.Launch]:
    """Return what a call would launch, and launch nothing; backward runs in this thread, to be seen."""
    with (
        torch.autograd.set_multithreading_enabled(False),
        tile.configuring(forced),
        tile.recording(arch) as recorded,
    ):
        ours()
    return recorded


def _best(
    ours: Function, key: Key, question: tile.Asked, found: Forced, device: str
) -> tuple[dict[str, Any], float]:
    """Return the fastest entries for a question, and the default's time over theirs."""

    def under(entries: dict[str, Any]) -> Function:
        def run() -> None:
            with tile.configuring(found | {key: entries}):
                if key[0].endswith(tile.PATH):
                    _choose_anew()
                ours()

        return run

    functions, options = {"default": under({})}, {"default": dict[str, Any]()}
    for number, candidate in enumerate(question.candidates):
        function = under(candidate)
        try:
            with limited(QUESTION_S):
                function()
        except Exception:  # noqa: BLE001 (a candidate that does not run is out)
            continue
        functions[str(number)], options[str(number)] = function, candidate
    medians = {name: statistics.median(took) for name, took in times(functions, device).items()}
    fastest = min(medians, key=lambda name: medians[name])
    gain = medians["default"] / medians[fastest]
    return (options[fastest], gain) if gain >= GAIN else ({}, 1.0)
