"""The GPU kernels beside their peers, Liger among them, within a budget: what is to run on a GPU machine.

    python bench/all.py kernels_gpu        # installs the peers first; 540 s

Results go to results/kernels_gpu.jsonl, the table to results/kernels_gpu.txt. Without a CUDA device nothing
is measured, and that is no failure: a table that was measured stays, else it says so.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / ".bench" / "kernels"))

import torch

from marrow.kernels import gpu_bench, gpu_cases

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure all cases, print the table, keep the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=540.0, help="seconds")
    options = parser.parse_args()
    cases, table = gpu_cases.all_cases(), RESULTS / "kernels_gpu.txt"
    if not torch.cuda.is_available():
        print("not measured: there is no CUDA device")
        if not table.exists() or table.read_text().startswith("not measured"):
            table.write_text(gpu_bench.unmeasured(cases))
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = gpu_bench.Bench(budget_s=options.budget, out=Path(folder))
        bench.run(cases)
        shutil.copy(Path(folder) / "kernels.jsonl", RESULTS / "kernels_gpu.jsonl")
        shutil.copy(Path(folder) / "kernels.txt", table)
    print(table.read_text())


if __name__ == "__main__":
    main()
