"""How near each operator is to what this machine can do.

Each operator runs at its own examples, by every path that is usable here. Its cost model gives bytes and
FLOPs; the measured copy bandwidth and GEMM peak give the two roofs, and the one that it is nearer to is its
bound. More than 100 % of the memory roof means that data stayed in cache, or was only read; more than 100 %
of the compute roof, that arithmetic is in 8 bits.

Source: Williams, Waterman and Patterson 2009.
"""

import importlib
import pkgutil
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from marrow.core.charts import Point, Series, scatter_chart
from marrow.core.errors import UsageError
from marrow.core.page import Page, prose, table
from marrow.core.progress import Progress, silent
from marrow.kernels import dispatch
from marrow.kernels.device import measure_copy_bandwidth, measure_gemm_peak
from marrow.kernels.dispatch import Case, Example, Operator

HEADER = ("op", "path", "dtype", "shape", "time", "GB/s", "GFLOP/s", "of roof", "roof")
LARGEST_BYTES = 4 << 30  # of an operator's examples on the CPU, which are made all at once
LONGEST_S = 0.1  # at the roof: larger examples are left out
SLOW_S = 0.5  # behind a path that takes longer the others, slower ones, are left out
_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


def load_operators(names: Iterable[str] = ()) -> dict[str, Operator]:
    """Import every file of the groups of `marrow.kernels`; return the operators, or those named.

    Raises: UsageError for a name that no operator has.
    """
    package = importlib.import_module("marrow.kernels")
    for module in pkgutil.walk_packages(package.__path__, "marrow.kernels."):
        if module.name.count(".") == 3:  # an operator's file; those above are not operators
            importlib.import_module(module.name)
    known = dict(sorted(dispatch.operators().items()))
    for name in (wanted := list(names)):
        if name not in known:
            raise UsageError(f"there is no operator {name!r}", hint=f"known: {', '.join(known)}")
    return {name: known[name] for name in wanted} if wanted else known


@torch.inference_mode()
def measure(
    operators: Mapping[str, Operator],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seconds: float = 0.2,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """Time every usable path of operators at their examples.

    Args: seconds: for each path and example, and for each of the two peaks.
    Returns: a JSON-able row for each (operator, example, path): op, path, is_chosen, dtype, shape,
        microseconds of a forward, gbytes_per_s, gflops, flops_per_byte, their peaks, bound,
        share_of_peak. Operators without an example in this dtype have none, nor have those whose examples
        would take more than LARGEST_BYTES of a CPU's memory.
    """
    peak_gbytes = measure_copy_bandwidth(device=device, seconds=seconds)
    size = _GEMM_SIZE[torch.device(device).type]
    peak_gflops = measure_gemm_peak(dtype, device=device, size=size, seconds=seconds)
    rows = []
    for done, operator in enumerate(operators.values()):
        progress(done, len(operators), "operator")
        if device == "cpu" and _bytes_of(operator.examples(dtype, "meta")) > LARGEST_BYTES:
            continue
        with torch.random.fork_rng():
            torch.manual_seed(0)
            examples = operator.examples(dtype, device)
        for example in _affordable(examples, peak_gbytes, peak_gflops):
            case = operator.case(example.inputs)
            chosen, _ = operator.choose(case)
            for path in usable(operator, case):
                took_s = _best_seconds(operator, path, example, device, seconds)
                figures = _figures(example, took_s, peak_gbytes, peak_gflops)
                name = str(dtype).removeprefix("torch.")
                row = {"op": operator.name, "path": path, "is_chosen": path == chosen, "dtype": name}
                rows.append(row | {"shape": example.label} | figures)
                if took_s > SLOW_S:
                    break
    return rows


def usable(operator: Operator, case: Case) -> list[str]:
    """Return the paths that can compute a case here, the fastest first, the reference last."""
    paths = [operator.paths[name] for name in dispatch.ORDER if name in operator.paths]
    found = [path.name for path in paths if case.device in path.devices and path.name != "triton"]
    if case.device == "cuda" and "triton" in operator.paths:  # on the CPU it is an interpreter
        found.insert(0, "triton")
    return [name for name in found if not operator.paths[name].refuses(case, is_asked_for=True)[0]] + [
        "reference"
    ]


def describe(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of a row of `measure` under HEADER; the path that dispatch takes has a star."""
    return (
        row["op"],
        row["path"] + ("*" if row["is_chosen"] else ""),
        row["dtype"],
        row["shape"],
        f"{row['microseconds']:,.0f} us",
        f"{row['gbytes_per_s']:.2f}",
        f"{row['gflops']:,.1f}",
        f"{row['share_of_peak']:.0%}",
        row["bound"],
    )


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows of `measure` as one HTML page: the roofs, a point for each path, and the table."""
    report = Page("Roofline", "how near the operators are to the limits of this machine")
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        mine = [row for row in rows if row["dtype"] == dtype]
        gbytes, gflops = mine[0]["peak_gbytes_per_s"], mine[0]["peak_gflops"]
        intensities = [row["flops_per_byte"] for row in mine if row["flops_per_byte"] > 0]
        ridge = gflops / gbytes
        first, last = min([ridge / 10, *intensities]), max([ridge * 10, *intensities])
        roofs = [
            Series(f"memory, {gbytes:.1f} GB/s", [(first, first * gbytes), (ridge, gflops)]),
            Series(f"compute, {gflops:,.0f} GFLOP/s", [(ridge, gflops), (last, gflops)]),
        ]
        points = [
            Point(
                f"{row['op']} {row['path']} {row['shape']}",
                row["flops_per_byte"],
                row["gflops"],
                row["is_chosen"],
            )
            for row in mine
        ]
        report.section(
            dtype,
            prose(
                "A point below the slope is bound by memory, one below the flat roof by arithmetic; how far "
                "below says what is left to gain. Full points are the paths that dispatch takes."
            ),
            scatter_chart(f"Roofline in {dtype}", points, roofs, x_label="FLOPs per byte", y_label="GFLOP/s"),
            table(("", *HEADER), [(number, *describe(row)) for number, row in enumerate(mine, 1)]),
        )
    return report.html()


def _bytes_of(examples: Sequence[Example]) -> int:
    return sum(x.nbytes for one in examples for x in one.inputs if isinstance(x, torch.Tensor))


def _affordable(examples: Sequence[Example], gbytes: float, gflops: float) -> list[Example]:
    """Leave out what takes longer than LONGEST_S even at the roof, but keep the smallest."""

    def least_s(example: Example) -> float:
        return max(example.bytes / gbytes, example.flops / gflops) / 1e9

    smallest = min(map(least_s, examples), default=0.0)
    return [one for one in examples if least_s(one) <= max(LONGEST_S, smallest)]


def _best_seconds(operator: Operator, path: str, example: Example, device: str, seconds: float) -> float:
    """Time a path over and over; return the best. A call longer than `seconds` is made twice, no more."""
    best_s, spent_s, calls = float("inf"), 0.0, 0
    while calls < 2 or spent_s < seconds:
        start = time.perf_counter()
        operator.run(path, *example.inputs)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        took_s = time.perf_counter() - start
        best_s, calls = min(best_s, took_s), calls + 1
        spent_s += took_s if calls > 1 else 0.0  # the first one warms up
    return best_s


def _figures(example: Example, took_s: float, peak_gbytes: float, peak_gflops: float) -> dict[str, Any]:
    gbytes, gflops = example.bytes / took_s / 1e9, example.flops / took_s / 1e9
    memory, compute = gbytes / peak_gbytes, gflops / peak_gflops
    return {
        "microseconds": took_s * 1e6,
        "gbytes_per_s": gbytes,
        "gflops": gflops,
        "flops_per_byte": example.flops / example.bytes,
        "peak_gbytes_per_s": peak_gbytes,
        "peak_gflops": peak_gflops,
        "bound": "memory" if memory > compute else "compute",
        "share_of_peak": max(memory, compute),
    }
