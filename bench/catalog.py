"""CPU time of logging 1000 metric points: Marrow's catalog beside MLflow's, both on SQLite.

    python bench/all.py catalog       (installs MLflow into .bench/catalog first)

Every measurement is a fresh process that imports, makes its database and logs 10 points to warm
up; then the CPU time (user + system, all threads) of 1000 points is taken inside it, until they
are committed. Ways take turns; the median of the repetitions is shown, wall time beside it.

    mlflow log_metric         one call and one commit a point: what its tutorials show
    mlflow log_metric async   synchronous=False and a flush at the end: its own buffering
    mlflow log_batch          the user collects 1000 points and passes them at once: its fastest
    marrow add                one call a point, buffered, one durable flush at the end
    marrow add and flush      one call and one durable commit a point
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NUM_POINTS = 1000
NUM_WARM_UP = 10
REPETITIONS = 3
ROOT = Path(__file__).resolve().parent.parent
GOAL = 20.0


def marrow_add(folder: Path, *, each: bool = False) -> Callable[[int], None]:
    """Log through a run's buffer."""
    from marrow.store.store import Store

    store = Store.open(folder / "home")
    run_id = store.runs.start("bench", "")

    def log(num_points: int) -> None:
        with store.runs.log(run_id) as points:
            for step in range(num_points):
                points.add("loss", step, 1.0 / (step + 1))
                if each:
                    points.flush()

    return log


def marrow_flush(folder: Path) -> Callable[[int], None]:
    """Make every point durable before the next."""
    return marrow_add(folder, each=True)


def _mlflow(folder: Path) -> None:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    mlflow.set_experiment("bench")
    mlflow.start_run()


def mlflow_metric(folder: Path) -> Callable[[int], None]:
    """Log each point with its own call."""
    _mlflow(folder)
    import mlflow

    def log(num_points: int) -> None:
        for step in range(num_points):
            mlflow.log_metric("loss", 1.0 / (step + 1), step=step)

    return log


def mlflow_async(folder: Path) -> Callable[[int], None]:
    """Log through MLflow's own queue."""
    _mlflow(folder)
    import mlflow

    def log(num_points: int) -> None:
        for step in range(num_points):
            mlflow.log_metric("loss", 1.0 / (step + 1), step=step, synchronous=False)
        mlflow.flush_async_logging()

    return log


def mlflow_batch(folder: Path) -> Callable[[int], None]:
    """Log all points with one call."""
    _mlflow(folder)
    import mlflow
    from mlflow.entities import Metric

    client = mlflow.MlflowClient()
    run_id = mlflow.active_run().info.run_id

    def log(num_points: int) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric("loss", 1.0 / (step + 1), now, step) for step in range(num_points)]
        client.log_batch(run_id, metrics=metrics)

    return log


WAYS = {
    "mlflow log_metric": mlflow_metric,
    "mlflow log_metric async": mlflow_async,
    "mlflow log_batch": mlflow_batch,
    "marrow add": marrow_add,
    "marrow add and flush": marrow_flush,
}


def child(way: str, folder: Path) -> None:
    """Measure one way in this process; print JSON."""
    log = WAYS[way](folder)
    log(NUM_WARM_UP)
    before, start_s = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    log(NUM_POINTS)
    wall_s = time.perf_counter() - start_s
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"cpu_s": cpu_s, "wall_s": wall_s}))


def measure(way: str, python: str) -> dict[str, float]:
    """Measure one way in a fresh process."""
    with tempfile.TemporaryDirectory(dir=ROOT / ".bench") as folder:
        command = [python, __file__, "--child", way, folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure all ways in turns, print the table, write the results."""
    (ROOT / ".bench").mkdir(exist_ok=True)
    peer = os.environ.get("MARROW_BENCH_MLFLOW") or str(ROOT / ".bench/catalog/bin/python")
    if not Path(peer).exists():
        sys.exit(f"no MLflow at {peer}: see the head of {__file__} for the two commands")
    samples: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(REPETITIONS):
        for way, taken in samples.items():
            taken.append(measure(way, peer if way.startswith("mlflow") else sys.executable))
    rows = {
        way: {
            "cpu_ms": 1e3 * statistics.median(sample["cpu_s"] for sample in taken),
            "wall_ms": 1e3 * statistics.median(sample["wall_s"] for sample in taken),
        }
        for way, taken in samples.items()
    }
    ours = rows["marrow add"]["cpu_ms"]
    print(f"{NUM_POINTS} metric points, median of {REPETITIONS} processes\n")
    print(f"{'':<26}{'CPU ms':>10}{'wall ms':>10}{'CPU, x marrow add':>20}")
    for way, row in rows.items():
        print(f"{way:<26}{row['cpu_ms']:>10.1f}{row['wall_ms']:>10.1f}{row['cpu_ms'] / ours:>19.1f}x")
    ratio = rows["mlflow log_metric"]["cpu_ms"] / ours
    batch = rows["mlflow log_batch"]["cpu_ms"] / ours
    print(f"\ngoal: log_metric >= {GOAL:.0f}x: {ratio:.0f}x; its fastest way (log_batch): {batch:.1f}x")
    results = ROOT / "bench" / "results"
    results.mkdir(exist_ok=True)
    data = {"points": NUM_POINTS, "repetitions": REPETITIONS, "goal": GOAL, "ratio": ratio, "ways": rows}
    (results / "catalog.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
