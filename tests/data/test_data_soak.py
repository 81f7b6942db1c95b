"""The long forms of what the data steps promise: a million files, a gigabyte in little memory, 200 kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from data_faults import outcome

PEAK = "import resource, json, sys; from pathlib import Path\n"
INGEST = (
    PEAK + "from marrow.data.config import DataRecipe; from marrow.data.ingest import ingest\n"
    "out = Path(sys.argv[2]); out.mkdir()\n"
    "facts = ingest(DataRecipe(source=sys.argv[1]), out)\n"
    "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == 'linux' else 1)\n"
    "told = {'rows': facts['rows'], 'files': facts['files'], 'broken': facts['broken_rows'], 'peak': peak}\n"
    "print(json.dumps(told))\n"
)


def ingested(source: Path, out: Path) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", INGEST, str(source), str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_million_tiny_files_in_bounded_memory(tmp_path: Path) -> None:
    for i in range(1_000_000):
        if i % 1000 == 0:
            (tmp_path / "many" / f"{i // 1000:04}").mkdir(parents=True)
        (tmp_path / "many" / f"{i // 1000:04}" / f"{i:07}.csv").write_bytes(b"n,t\n%d,x\n" % i)
    found = ingested(tmp_path / "many", tmp_path / "out")
    assert (found["rows"], found["files"], found["broken"]) == (1_000_000, 1_000_000, 0)
    assert found["peak"] < 512 << 20


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_gigabyte_takes_no_more_than_half_of_one(tmp_path: Path, suffix: str) -> None:
    """The whole process, interpreter and imports too; every hundredth row is broken."""
    path = tmp_path / f"a.{suffix}"
    text = "x" * 90
    rows = broken = 0
    with path.open("w") as file:
        file.write("n,t\n" if suffix == "csv" else "")
        while file.tell() < 1 << 30:
            for _ in range(10_000):
                rows += 1
                if rows % 100 == 0:
                    broken += 1
                    file.write("a,b,c,d\n" if suffix == "csv" else '{"n": \n')
                else:
                    file.write(f"{rows},{text}\n" if suffix == "csv" else f'{{"n": {rows}, "t": "{text}"}}\n')
    found = ingested(path, tmp_path / "out")
    assert (found["rows"], found["broken"]) == (rows - broken, broken)
    assert found["peak"] < 512 << 20


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(12, id="few", marks=pytest.mark.slow),
        pytest.param(200, id="many", marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
def test_killed_at_random_moments_the_data_steps_end_in_the_same_bytes(tmp_path: Path, kills: int) -> None:
    told = outcome(tmp_path, kills=kills)
    assert told["kills"] == kills
    assert told["finished"] > 0
