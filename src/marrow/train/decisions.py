"""What a run decides about its machine at the first start, and keeps.

dtype, threads and compilation change the last bits of the weights. A resumed run must reach the
bits of an unbroken one, so it reads these from `work/run.json` and measures nothing again. The
same file holds the run's identity: checkpoints of another recipe, model or data are not used.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from marrow.core.errors import TrainError, explain_os_errors
from marrow.core.files import atomic_file, sweep
from marrow.kernels import device, dispatch
from marrow.train.checkpoint import remove_checkpoints
from marrow.train.config import TrainRecipe

FILE_NAME = "run.json"
# PERF: compiling the layers costs 26 CPU-seconds and makes a step of 2048 tokens of a 1 M model 1.18x
# faster (147 for 174 ms), which is paid back after 1000 steps; 5000 leave a margin for slow compilers.
COMPILE_PAYS_STEPS = 5_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decisions:
    """dtype: of the working weights and activations, a key of `DTYPES`. threads: of torch.

    peak_flops: measured GEMM peak in this dtype with these threads, FLOP/s; MFU is a share of it.
    kernels: the path of each operator (`kernels/dispatch.py`); one that is gone is said at a resume.
    """

    dtype: str
    threads: int
    compile: bool
    peak_flops: float
    kernels: Mapping[str, str]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return DTYPES[self.dtype]


def decide(recipe: TrainRecipe, identity: str, work: Path, *, resume: bool = True) -> Decisions:
    """Take the decisions of the run in `work`, or make them and begin a new run there.

    Args: identity: hash of all that decides the weights. resume: False begins anew in any case.
    """
    path = work / FILE_NAME
    if resume:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["identity"] == identity:
                return _resumed(Decisions(**kept["decisions"]))
            logger.warning("%s is of another run; its checkpoints are not used", work)
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s); the run begins anew", path, error)
    decisions = _decide(recipe)
    with explain_os_errors("begin a training run", work):
        work.mkdir(parents=True, exist_ok=True)
        sweep(work)
        remove_checkpoints(work)
        shutil.rmtree(work / "snapshots", ignore_errors=True)
        (work / "metrics.jsonl").unlink(missing_ok=True)
        with atomic_file(path, "w") as file:
            values = {"identity": identity, "decisions": asdict(decisions), "torch": torch.__version__}
            file.write(json.dumps(values, indent=1, sort_keys=True) + "\n")
    return decisions


def _decide(recipe: TrainRecipe) -> Decisions:
    threads = recipe.threads or device.available_cores()
    with torch_threads(threads):
        measured = device.choose_dtype()
    dtype = recipe.dtype if recipe.dtype != "auto" else str(measured.dtype).removeprefix("torch.")
    gflops = measured.gemm_bf16_gflops if dtype == "bfloat16" else measured.gemm_fp32_gflops
    kernels = dispatch.chosen("cpu", DTYPES[dtype])
    return Decisions(dtype, threads, _worth_compiling(recipe), gflops * 1e9, kernels)


def _resumed(decisions: Decisions) -> Decisions:
    """Say where this machine computes an operator in another way than the run began with."""
    now = dispatch.chosen("cpu", decisions.torch_dtype)
    other = [
        f"{op}: {path}, now {now.get(op)}" for op, path in decisions.kernels.items() if now.get(op) != path
    ]
    if other:
        logger.warning("the last bits of the weights may differ, kernels changed (%s)", "; ".join(other))
    return decisions


def _worth_compiling(recipe: TrainRecipe) -> bool:
    if recipe.compile != "auto":
        if recipe.compile == "on" and not device.compiler_available():
            raise TrainError(
                "compile = 'on' needs a C++ compiler, none was found",
                hint='install g++ with the headers of Python, or set train.compile = "auto"',
            )
        return recipe.compile == "on"
    return recipe.steps >= COMPILE_PAYS_STEPS and device.compiler_available()


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Run the block with this many torch threads; the number found is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
