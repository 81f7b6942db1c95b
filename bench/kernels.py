"""The CPU kernels beside their peers: torch eager and compiled, aten's quantised products, SDPA, faiss.

One thread, malloc's thresholds raised for both sides, CPU time. In each round every side runs once (or as
often as a few milliseconds hold), in another order; the figure is the ratio of medians, peer over ours, with
the quartiles of the rounds' own ratios. A peer's line says whether its goal is met, if it has one. The malloc
rows alone compare processes with and without the thresholds. Rows stand in `peers/*_rows.py`.

    python bench/kernels.py [--rows NAME ...] [--seconds 3]

A run of all rows writes results/kernels.json when the last one is done; a run of some writes nothing.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["KINETO_LOG_LEVEL"] = "99"  # torch's profiler, which measures memory, says when it begins and ends
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / ".bench" / "kernels"))

import torch

from peers import kernel_rows, loss_rows, sampling_rows
from peers.kernel_rows import Row, Work

RESULT = Path(__file__).parent / "results" / "kernels.json"
ROWS = kernel_rows.ROWS | loss_rows.ROWS | sampling_rows.ROWS
LEAST_ROUNDS, MOST_ROUNDS, LEAST_S = 3, 41, 4e-3


def main() -> None:
    """Measure the rows that are asked for and print the table; of all rows, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=[], help="beginnings of names; all by default")
    parser.add_argument("--seconds", type=float, default=3.0, help="of rounds, for each row")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    options = parser.parse_args()
    from marrow.core.files import atomic_file
    from marrow.kernels.device import raise_malloc_thresholds

    wanted = [name for name in ROWS if not options.rows or name.startswith(tuple(options.rows))]
    if options.list or not wanted:
        print("\n".join(wanted or ROWS))
        sys.exit(0 if options.list else "no row's name begins so; these are all")
    raise_malloc_thresholds()
    torch.set_num_threads(1)
    start_s = time.perf_counter()
    rows: dict[str, Any] = {}
    print(f"{'':44}{'ours':>10}  peer over ours: median, quartiles")
    for name in wanted:
        row = ROWS[name]()  # tensors that can have gradients: not in inference mode
        with torch.inference_mode():
            rows[name] = measure(row, options.seconds)
        row.close()
        describe(name, rows[name])
    peers = [peer for row in rows.values() for peer in row["peers"].values() if "met" in peer]
    met = sum(peer["met"] for peer in peers)
    spent_s = time.perf_counter() - start_s
    print(f"{met} of {len(peers)} goals met; {len(rows)} of {len(ROWS)} rows in {spent_s:.0f} s")
    if len(rows) == len(ROWS):
        with atomic_file(RESULT, "w") as file:
            file.write(json.dumps(about() | {"rows": rows}, indent=1) + "\n")


def about() -> dict[str, Any]:
    """Tell where and how the rows were measured."""
    from marrow.kernels.device import facts

    machine = facts()
    return {
        "machine": {"cpu": machine.cpu, "flags": machine.flags, "cores": machine.cores},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **kernel_rows.versions(),
        },
        "conditions": "one thread, CPU time, malloc thresholds raised for both sides, interleaved rounds",
    }


def measure(row: Row, seconds: float) -> dict[str, Any]:
    """Time ours and the peers in turns."""
    sides = {"ours": row.ours, **row.peers}
    calls = {name: _calls(work, row.is_telling) for name, work in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    names, start_s, rounds = list(sides), time.perf_counter(), 0
    while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() - start_s < seconds):
        turn = rounds % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(_seconds(sides[name], calls[name], row.is_telling))
        rounds += 1
    ours = times["ours"]
    found: dict[str, Any] = {"ours_ms": 1e3 * statistics.median(ours), "rounds": rounds, "peers": {}}
    for name in row.peers:
        each = sorted(theirs / mine for theirs, mine in zip(times[name], ours, strict=True))
        low, _, high = statistics.quantiles(each, n=4) if len(each) > 2 else (each[0], 0.0, each[-1])
        ratio = statistics.median(times[name]) / statistics.median(ours)
        peer: dict[str, Any] = {
            "ms": 1e3 * statistics.median(times[name]),
            "ratio": ratio,
            "quartiles": [low, high],
        }
        if name in row.goals:
            peer |= {"goal": row.goals[name], "met": ratio >= row.goals[name]}
        found["peers"][name] = peer
    return found | ({"notes": dict(row.notes)} if row.notes else {})


def _calls(work: Work, is_telling: bool) -> int:
    """Return how many calls make a sample long enough; warms up."""
    work()
    return max(1, min(200, round(LEAST_S / max(1e-7, _seconds(work, 1, is_telling)))))


def _seconds(work: Work, calls: int, is_telling: bool) -> float:
    """Return the CPU seconds of a call: this process's, or what a process of its own tells."""
    if is_telling:
        return sum(work() for _ in range(calls)) / calls
    start = time.process_time()
    for _ in range(calls):
        work()
    return (time.process_time() - start) / calls


def describe(name: str, row: dict[str, Any]) -> None:
    """Print a row: ours, then a line for each peer. A note on a peer stands on its line."""
    notes, peers = row.get("notes", {}), row["peers"]
    ours = [note if key == "ours" else f"{key} {note}" for key, note in notes.items() if key not in peers]
    print(f"{name:44}{row['ours_ms']:>7.2f} ms  {', '.join(ours)}", flush=True)
    for peer, one in peers.items():
        low, high = one["quartiles"]
        goal = f"goal {one['goal']:g}: {'met' if one['met'] else 'MISSED'}" if "goal" in one else "no goal"
        figures = f"{one['ms']:>7.2f} ms  {one['ratio']:6.2f}x  {low:.2f} to {high:.2f}"
        print(f"    {peer:40}{figures}  {goal}  {notes.get(peer, '')}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
