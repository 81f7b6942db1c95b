"""Committing a dataset: Marrow beside DVC, and beside the least that any tool must do.

    python bench/all.py commit       (installs DVC into .bench/commit first)
    python bench/commit.py [--part large|small] [--files 1277] [--megabytes 1000] [--small 20000] [--no-dvc]

Two folders: one of a few thousand files of some hundred kB (the issue's 2 GB in 2,554 files, half of it
by default), one of many small files. Every repetition takes a fresh store, in turns:

    plain     copy every file and hash it with SHA-256 while it passes, in threads, then one sync
    marrow    `Versions.commit` into an empty store, in a process that has loaded its modules
    dvc       `dvc add` in a fresh repository (no git), its cache on the same file system; its whole
              process, since nobody can use it otherwise; the time of `dvc version` is shown too

Then one file is changed and committed again, beside `os.walk` with a stat of every file. Goal: marrow
at most 1.5x plain for both folders. Wall time, medians; CPU time beside it.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from marrow.store.store import Store
from marrow.store.version import code_version
from marrow.store.versions.versions import Versions

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "bench" / "results" / "commit.json"
DVC = ROOT / ".bench" / "commit" / "bin" / "dvc"
GOAL = 1.5
THREADS = os.cpu_count() or 1


def make(folder: Path, num_files: int, num_bytes: int) -> None:
    """Write files of random bytes, 500 to a folder, sizes between half and one and a half of the mean."""
    noise = os.urandom(4 << 20)
    mean = num_bytes // num_files
    for number in range(num_files):
        if number % 500 == 0:
            (folder / f"{number // 500:04d}").mkdir(parents=True)
        size = max(8, mean // 2 + (number * 7919) % max(1, mean))
        body = (noise * (size // len(noise) + 1))[: size - 8]
        (folder / f"{number // 500:04d}" / f"{number:07d}.bin").write_bytes(number.to_bytes(8, "big") + body)
    os.sync()


def plain(source: Path, base: Path) -> None:
    """Copy and hash all files with threads, then sync once."""
    target = base / "copy"

    def one(name: str) -> str:
        sha256 = hashlib.sha256()
        with open(source / name, "rb", buffering=0) as a, open(target / name, "wb", buffering=0) as b:
            while chunk := a.read(1 << 20):
                sha256.update(chunk)
                b.write(chunk)
        return sha256.hexdigest()

    names = []
    for place, _, files in os.walk(source):
        below = os.path.relpath(place, source)
        (target / below).mkdir(parents=True, exist_ok=True)
        names += [os.path.join(below, name) for name in files]
    with ThreadPoolExecutor(THREADS) as pool:
        assert len(set(pool.map(one, names))) == len(names)
    os.sync()


def marrow(source: Path, base: Path) -> None:
    """Commit into a new store."""
    with Store.open(base / "home") as store:
        Versions(store).commit(source, "bench", "first", threads=THREADS)


def dvc(source: Path, base: Path) -> None:
    """Add the folder to a new DVC repository; it wants it inside, so it is moved there and back."""
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    inside = base / "repository" / "data"
    inside.parent.mkdir()
    source.rename(inside)
    try:
        command = [DVC, "add", "-q", "data"]
        start_s = time.perf_counter()
        for arguments in ([DVC, "init", "-q", "--no-scm"], command):
            if arguments is command:
                start_s = time.perf_counter()
            subprocess.run(arguments, cwd=inside.parent, check=True, env=environment, capture_output=True)
        os.sync()
        DVC_SECONDS.append(time.perf_counter() - start_s)
    finally:
        inside.rename(source)


DVC_SECONDS: list[float] = []


def again(source: Path, base: Path) -> dict[str, float]:
    """Commit a second time after one changed file, and beside it only look at all files."""
    seconds: dict[str, list[float]] = {"stat": [], "one file changed": [], "nothing changed": []}
    with Store.open(base / "home") as store:
        versions = Versions(store)
        versions.commit(source, "bench", "first", threads=THREADS)
        time.sleep(0.2)  # so that the clock of the file system has moved on
        victim = next(path for path in sorted(source.rglob("*")) if path.is_file())
        was = victim.read_bytes()
        for number in range(3):
            seconds["stat"].append(timed(lambda: look(source))[0])
            victim.write_bytes(f"changed {number}".encode())
            seconds["one file changed"].append(
                timed(lambda: versions.commit(source, "bench", "again", threads=THREADS))[0]
            )
            time.sleep(0.2)
            versions.commit(source, "bench", "again", threads=THREADS)
            seconds["nothing changed"].append(
                timed(lambda: versions.commit(source, "bench", "again", threads=THREADS))[0]
            )
        victim.write_bytes(was)
    return {name: statistics.median(values) for name, values in seconds.items()}


def look(source: Path) -> int:
    """Stat every file as a script would."""
    return sum(
        os.stat(os.path.join(place, name)).st_size for place, _, files in os.walk(source) for name in files
    )


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds, children's included."""
    cpu_s, start_s = _cpu_s(), time.perf_counter()
    work()
    return time.perf_counter() - start_s, _cpu_s() - cpu_s


def _cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(
    title: str, num_files: int, num_bytes: int, repeat: int, ways: dict[str, Callable[[Path, Path], None]]
):
    """Measure one folder; return what was found."""
    walls: dict[str, list[float]] = {name: [] for name in ways}
    cpus: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(dir=ROOT / ".bench") as name:
        folder = Path(name)
        make(folder / "source", num_files, num_bytes)
        for turn in range(repeat):
            order = list(ways.items())
            for way, work in order if turn % 2 else order[::-1]:
                if way == "dvc" and turn:
                    continue  # minutes; once says enough
                base = folder / f"{way}-{turn}"
                base.mkdir()
                wall_s, cpu_s = timed(lambda: work(folder / "source", base))  # noqa: B023
                walls[way].append(DVC_SECONDS[-1] if way == "dvc" else wall_s)
                cpus[way].append(cpu_s)
                shutil.rmtree(base)
                os.sync()
        (folder / "again").mkdir()
        second = again(folder / "source", folder / "again")
    median = {way: statistics.median(values) for way, values in walls.items()}
    ratios = {way: value / median["plain"] for way, value in median.items()}
    print(f"\n{title}: {num_files:,} files, {num_bytes / 1e6:,.0f} MB; wall seconds, median of {repeat}")
    for way, value in median.items():
        cpu_s = statistics.median(cpus[way])
        goal = f"  (goal: at most {GOAL}x)" if way == "marrow" else ""
        print(f"  {way:<8}{value:>9.2f} s{cpu_s:>9.2f} s CPU{ratios[way]:>8.2f}x plain{goal}")
    for what in ("one file changed", "nothing changed"):
        print(f"  again, {what}: {second[what]:.3f} s, {second[what] / second['stat']:.1f}x os.walk and stat")
    return {
        "files": num_files,
        "bytes": num_bytes,
        "wall_s": walls,
        "cpu_s": cpus,
        "ratios": ratios,
        "second": second,
    }


def main() -> None:
    """Measure both folders, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1277)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--small", type=int, default=20_000)
    parser.add_argument("--small-bytes", type=int, default=2_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-dvc", action="store_true")
    parser.add_argument("--part", choices=["large", "small"], help="Only one; the other's result stays.")
    options = parser.parse_args()
    (ROOT / ".bench").mkdir(exist_ok=True)
    code_version()
    ways: dict[str, Callable[[Path, Path], None]] = {"plain": plain, "marrow": marrow}
    versions = {}
    if not options.no_dvc:
        if not DVC.exists():
            sys.exit(f"no DVC at {DVC}: python bench/all.py commit installs it, --no-dvc goes without")
        ways["dvc"] = dvc
        start_s = time.perf_counter()
        said = subprocess.run([DVC, "--version"], check=True, capture_output=True, text=True)
        versions = {"dvc": said.stdout.strip(), "dvc_start_s": round(time.perf_counter() - start_s, 2)}
    folders = {
        "large": (options.files, options.megabytes * 1_000_000),
        "small": (options.small, options.small * options.small_bytes),
    }
    result = json.loads(RESULT.read_text()) if options.part and RESULT.exists() else {}
    for part, size in folders.items():
        if options.part in (None, part):
            result[part] = measure(f"{part} files", *size, options.repeat, ways)
    result |= {
        "goal": GOAL,
        "versions": versions,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
