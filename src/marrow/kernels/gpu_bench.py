"""Measure operators on a GPU against peers and the limits of the device, within a budget of seconds.

First the device's own roofs: copy and read bandwidth, matrix products by type. Then the cases, the most
important first, in two rounds: ours and the peers that are ready at once, then the peers that compile for
long. In a round ours and the peers take turns (`gpu_times.py`); medians count. Every result is a JSON line
as soon as it is there, so that a run that is cut keeps its rows; a peer that fails is a word in its row.
The same code runs on a CPU, on tiny shapes: that is how it is tested. Cases live in `gpu_cases.py`.
"""

import contextlib
import datetime
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from marrow.kernels import dispatch, gpu_peers
from marrow.kernels.gpu_times import Function, TooLateError, limited, roofs, times
from marrow.kernels.tile import triton

# (operator, direction, inputs) -> what prepares the calls of peers besides those of the case: Liger's.
Hook = Callable[[str, str, tuple[Any, ...]], dict[str, Callable[[], Function]]]

CASE_S, PEER_S = 20.0, 45.0


@dataclass(frozen=True, slots=True)
class Goal:
    """What a row shall reach.

    kind: "copy" or "read": share of that bandwidth; "peer": the peer's time over ours; "memory": the peer's
    peak over ours; "error": the largest error allowed. factor: the least (or most, of an error).
    """

    kind: str
    factor: float
    peer: str = ""

    def __str__(self) -> str:
        if self.kind == "error":
            return f"error <= {self.factor:g}"
        against = {"copy": "copy bandwidth", "read": "read bandwidth"}.get(self.kind, self.peer)
        return f"{self.kind if self.kind == 'memory' else 'speed'} >= {self.factor:.2f} of {against}"


@dataclass(frozen=True, slots=True)
class Work:
    """A case with its inputs. peers: name -> what prepares the call; late: those that compile for long.

    bytes, flops: of one call of ours. error: what `Goal("error")` compares.
    """

    ours: Function
    inputs: tuple[Any, ...]
    peers: dict[str, Callable[[], Function]]
    bytes: float
    flops: float
    late: tuple[str, ...] = ()
    error: Callable[[], float] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A row to be. make: (device, is_tiny) -> Work."""

    op: str
    shape: str
    direction: str
    dtype: str
    goals: tuple[Goal, ...]
    make: Callable[[str, bool], Work]

    @property
    def name(self) -> str:
        """Return what the row is called."""
        return f"{self.op} {self.shape} {self.dtype} {self.direction}"


class Bench:
    """One run: its device, clock, roofs and rows."""

    def __init__(
        self,
        *,
        device: str = "cuda",
        budget_s: float = 540.0,
        out: Path | None = None,
        hook: Hook = gpu_peers.peers,
        is_tiny: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: out: a folder for kernels.jsonl and kernels.txt. is_tiny: small shapes, to try it out."""
        self.device, self.hook, self.is_tiny, self.clock = device, hook, is_tiny, clock
        self.deadline, self.out = clock() + budget_s, out
        self.rows: dict[str, dict[str, Any]] = {}
        self.roofs: dict[str, float] = {}
        self._file: TextIO | None = None

    def run(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """Measure the roofs, then all cases in their order; return the rows."""
        with contextlib.ExitStack() as stack:
            if self.out is not None:
                self.out.mkdir(parents=True, exist_ok=True)
                self._file = stack.enter_context((self.out / "kernels.jsonl").open("w"))
            stack.callback(dispatch.reset, dispatch.wanted())
            self._tell({"kind": "device", **facts(self.device)})
            for name, value in roofs(self.device, is_tiny=self.is_tiny):
                self.roofs[name] = value
                self._tell({"kind": "roof", "name": name, "value": value})
            for is_late in (False, True):
                rows = self.measure(cases, is_late=is_late)
                if self.out is not None:  # after the first round too: a second that is cut leaves a table
                    (self.out / "kernels.txt").write_text(table(rows, self.roofs, facts(self.device)))
        return rows

    def measure(self, cases: Sequence[Case], *, is_late: bool = False) -> list[dict[str, Any]]:
        """Measure one round of all cases; return the rows so far."""
        for case in cases:
            self._round(case, is_late=is_late)
        return list(self.rows.values())

    def _round(self, case: Case, *, is_late: bool) -> None:
        """Measure a case against the peers of one round, and tell its row."""
        row = self.rows.get(case.name, {})
        if is_late and (not row or "error" in row or not row["late"]):
            return
        left = self.deadline - self.clock()
        if left < (1.0 if self.is_tiny else 5.0):
            row = self._stopped(case, row, "no time was left")
        else:
            # In the second round each peer has its own limit.
            limit_s = left if is_late else min(left, CASE_S)
            try:
                with limited(limit_s):
                    row = self._measure(case, row, is_late=is_late)
            except TooLateError:
                row = self._stopped(case, row, f"took longer than {limit_s:.0f} s")
            except ModuleNotFoundError:
                row = self._stopped(case, row, "there is no such operator")
            except Exception as error:  # noqa: BLE001 (a case that fails stops no other)
                row = self._stopped(case, row, _words(error))
        self.rows[case.name] = row
        self._tell({"kind": "row", **row})
        if self.device.startswith("cuda"):
            gc.collect()  # what failed holds its tensors in cycles of frames
            torch.cuda.empty_cache()

    def _stopped(self, case: Case, row: dict[str, Any], why: str) -> dict[str, Any]:
        """Note why a round of a case has no figures; those of the first round stay."""
        if not row:
            return self._row(case) | {"error": why}
        return row | {"peers_failed": row["peers_failed"] | dict.fromkeys(row["late"], why)}

    def _row(self, case: Case) -> dict[str, Any]:
        return {
            "case": case.name,
            "op": case.op,
            "shape": case.shape,
            "dtype": case.dtype,
            "direction": case.direction,
            "peers_us": {},
            "peers_failed": {},
            "late": [],
        }

    def _measure(self, case: Case, row: dict[str, Any], *, is_late: bool) -> dict[str, Any]:
        row = row or self._row(case)
        # Ours is the kernel, even where dispatch would take another path; the row says what that is.
        dispatch.reset("triton" if self.device.startswith("cuda") else None)
        work = case.make(self.device, self.is_tiny)
        row["late"], row["path"] = list(work.late), self._path(case, work)
        functions, failed = {"ours": work.ours}, row["peers_failed"]
        makers = {} if is_late else dict(self.hook(case.op, case.direction, work.inputs))
        if not is_late:
            absent = {goal.peer for goal in case.goals if goal.peer} - {*makers, *work.peers}
            failed |= dict.fromkeys(sorted(absent), "is not here")
        makers |= {name: make for name, make in work.peers.items() if (name in work.late) == is_late}
        for name, make in makers.items():
            try:
                with limited(min(PEER_S, self.deadline - self.clock())):
                    functions[name] = make()
                    functions[name]()
                    self._wait()
            except TooLateError:
                failed[name] = "took too long to prepare"
                functions.pop(name, None)
            except Exception as error:  # noqa: BLE001 (a peer that fails is a word in the row)
                failed[name] = _words(error)
                functions.pop(name, None)
        with limited(max(1.0, self.deadline - self.clock())):
            took = times(functions, self.device)
            if any(goal.kind == "memory" for goal in case.goals):
                peaks = {name: self._peak(function) for name, function in functions.items()}
                row["peaks"] = row.get("peaks", {}) | peaks
            if work.error is not None and not is_late:
                row["max_error"] = work.error()
        return _judged(case, self._filled(row, took, work), self.roofs)

    def _path(self, case: Case, work: Work) -> str:
        """Return the path that ours takes: a slower one, where the kernel is not usable, shows."""
        operator = dispatch.operators()[case.op]
        flat = (x for each in work.inputs for x in (each if isinstance(each, list) else [each]))
        first = next(x for x in flat if isinstance(x, torch.Tensor))
        return operator.choose(dispatch.Case(first.device.type, first.dtype))[0]

    def _filled(self, row: dict[str, Any], took: dict[str, list[float]], work: Work) -> dict[str, Any]:
        """Put times into a row: medians, and ratios to what was measured in turns with it."""
        medians = {name: statistics.median(runs) * 1e6 for name, runs in took.items()}
        ours = medians.pop("ours")
        row["peers_us"] = row["peers_us"] | medians
        row["ratios"] = row.get("ratios", {}) | {name: theirs / ours for name, theirs in medians.items()}
        if "ours_us" not in row:
            row |= {
                "ours_us": ours,
                "gbytes_per_s": work.bytes / ours / 1e3,
                "tflops": work.flops / ours / 1e6,
            }
        return row

    def _peak(self, function: Function) -> int | None:
        """Return the bytes that a call takes beyond what lies there before."""
        if not self.device.startswith("cuda"):
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def _tell(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def facts(device: str) -> dict[str, Any]:
    """Return what a table must say of where it was measured."""
    is_gpu = device.startswith("cuda")
    major, minor = torch.cuda.get_device_capability() if is_gpu else (0, 0)
    return {
        "device": torch.cuda.get_device_name() if is_gpu else "cpu",
        "capability": 10 * major + minor,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": getattr(triton, "__version__", None),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _judged(case: Case, row: dict[str, Any], roofs: dict[str, float]) -> dict[str, Any]:
    """Add to a row how it stands to its goals: met is None where there is nothing to compare with."""
    judged = []
    for goal in case.goals:
        value: float | None = None
        if goal.kind in ("copy", "read"):
            value = row["gbytes_per_s"] / roofs[goal.kind] if goal.kind in roofs else None
        elif goal.kind == "peer":
            value = row["ratios"].get(goal.peer)
        elif goal.kind == "memory":
            peaks = row.get("peaks", {})
            ours, theirs = peaks.get("ours"), peaks.get(goal.peer)
            value = theirs / ours if ours and theirs else None
        elif goal.kind == "error":
            value = row.get("max_error")
        met = (
            None if value is None else value <= goal.factor if goal.kind == "error" else value >= goal.factor
        )
        judged.append({"goal": str(goal), "value": value, "met": met})
    return row | {"goals": judged}


def table(rows: Sequence[dict[str, Any]], roofs: dict[str, float], facts: dict[str, Any]) -> str:
    """Return the rows as text: time, share of what bounds it, ratios to peers, goals met or missed."""
    lines = [
        " ".join(f"{name} {value}" for name, value in facts.items()),
        "roofs: " + ", ".join(f"{name} {value:,.0f} {_unit(name)}" for name, value in roofs.items()),
        "",
    ]
    for row in rows:
        lines.append(row["case"])
        if "ours_us" in row:
            figures = f"{row['gbytes_per_s']:,.0f} GB/s, {row['tflops']:,.1f} TFLOP/s"
            lines.append(f"    {row['ours_us']:,.1f} us, {figures}, path {row['path']}")
        for name, ratio in row.get("ratios", {}).items():
            lines.append(f"    {ratio:.2f}x the speed of {name}")
        for goal in row.get("goals", []):
            verdict = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
            value = "" if goal["value"] is None else f" ({goal['value']:.3g})"
            lines.append(f"    {goal['goal']}: {verdict}{value}")
        lines += [f"    {name}: {why}" for name, why in row.get("peers_failed", {}).items()]
        if "error" in row:
            lines.append(f"    {row['error']}")
    return "\n".join(lines) + "\n"


def unmeasured(cases: Sequence[Case]) -> str:
    """Return the table as it stands before anything is measured: what will be, and the goals."""
    lines = [
        "not measured: no GPU was at hand.",
        "`marrow bench kernels --budget 540 --out DIR` measures it, with date, device, versions.",
        "",
    ]
    for case in cases:
        lines.append(case.name)
        lines += [f"    {goal}: not measured" for goal in case.goals]
    return "\n".join(lines) + "\n"


def _unit(roof: str) -> str:
    return "GB/s" if roof in ("copy", "read") else "TFLOP/s"
