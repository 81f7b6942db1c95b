"""Run every benchmark of this folder, each beside its peers: `make bench`.

A benchmark's peers stand in requirements-NAME.txt and are installed into .bench/NAME, never into
Marrow's own environment: as an environment of its own where the peer runs in its own process,
else as a folder that the benchmark adds to its path. Results go to bench/results/NAME.json.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OWN_PROCESS = {"catalog", "commit", "dedup", "quality"}  # peers whose dependencies clash with ours
IN_PROCESS = {
    "loader",
    "csv_to_parquet",
    "train_step",
    "tokenise",
    "stream",
    "kernels",
}  # the rest find their peers among the test dependencies
SAME_PEERS = {"resume": "loader", "kernels_gpu": "kernels"}


def main() -> None:
    """Run those named on the command line, or all."""
    names = sys.argv[1:] or sorted(path.stem for path in HERE.glob("*.py") if path.stem != "all")
    failed = [name for name in names if not run(name)]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run(name: str) -> bool:
    """Run one benchmark; return whether it ended well."""
    print(f"\n== {name}", flush=True)
    install(name)
    return subprocess.run([sys.executable, HERE / f"{name}.py"], cwd=ROOT, check=False).returncode == 0


def install(name: str) -> None:
    """Install a benchmark's peers once."""
    name = SAME_PEERS.get(name, name)
    folder, wanted = ROOT / ".bench" / name, HERE / f"requirements-{name}.txt"
    ready = folder / "ready"
    if name not in OWN_PROCESS | IN_PROCESS or (ready.exists() and ready.read_text() == wanted.read_text()):
        return
    if name in OWN_PROCESS:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    else:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--upgrade",
            "--target",
            folder,
        ]
    subprocess.run([*pip, "-r", wanted], check=True)
    ready.write_text(wanted.read_text())


if __name__ == "__main__":
    main()
