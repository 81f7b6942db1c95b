"""The GPU kernels beside their peers, Liger among them, within a budget: what is to run on a GPU machine.

    python bench/all.py kernels_gpu        # installs the peers first; 540 s

Results go to results/kernels_gpu.jsonl. Without a CUDA device nothing is measured, and that is no failure.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[1] / ".bench" / "kernels"))

import torch

from peers import liger

RESULT = Path(__file__).parent / "results" / "kernels_gpu.jsonl"


def main() -> None:
    """Measure all cases, print the table, keep the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=540.0, help="seconds")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("not measured: there is no CUDA device")
        return
    from marrow.kernels import gpu_bench, gpu_cases

    with tempfile.TemporaryDirectory() as folder:
        bench = gpu_bench.Bench(budget_s=options.budget, out=Path(folder), hook=liger.peers)
        rows = bench.run(gpu_cases.all_cases())
        shutil.copy(Path(folder) / "kernels.jsonl", RESULT)
    print(gpu_bench.table(rows, bench.roofs, gpu_bench.facts("cuda")))


if __name__ == "__main__":
    main()
