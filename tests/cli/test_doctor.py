"""`marrow doctor`: what it tells is whole, measured, and does not need a place to write."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from marrow_process import Marrow, command

from marrow.cli import doctor
from marrow.cli.doctor import c_files, measure_disk, sections
from marrow.cli.tables import doctor_table

FOUND: dict[str, Any] = {
    "marrow": "0.1.0",
    "python": "3.11.7",
    "platform": "Linux",
    "packages": {"torch": "2.13.0", "triton": "absent"},
    "machine": {
        "cpu": "A CPU",
        "architecture": "x86_64",
        "flags": ["avx2"],
        "cores": 2,
        "threads": 1,
        "memory_bytes": 24 << 30,
        "cuda": [],
        "torch": "2.13.0",
        "compiler": "/usr/bin/g++",
    },
    "peaks": {
        "gemm_fp32_gflops": 100.0,
        "gemm_bf16_gflops": 250.0,
        "copy_gbytes_per_s": 12.0,
        "disk_write_mbytes_per_s": 800.0,
    },
    "dtype": "bfloat16",
    "can_compile": True,
    "native": {"bpe": True, "minhash": False},
    "cuda": False,
    "store": {"home": "/x/.marrow", "free_bytes": 5 << 30},
    "kernels": [
        {"op": "attention", "device": "cpu", "dtype": "float32", "path": "plain", "reason": "no triton"},
        {"op": "rope", "device": "cpu", "dtype": "bfloat16", "path": "cpu", "reason": ""},
        {"op": "rope", "device": "cpu", "dtype": "float32", "path": "cpu", "reason": ""},
    ],
}


def shown(**changes: Any) -> dict[str, str]:
    return {name: value for _, rows in sections(FOUND | changes) for name, value in rows}


def test_every_fact_is_shown_with_its_unit() -> None:
    rows = shown()
    assert rows["torch"] == "2.13.0"
    assert rows["triton"] == "absent"
    assert rows["memory"] == "24.0 GiB"
    assert rows["GEMM bf16"] == "250 GFLOP/s (2.50x fp32): training takes bfloat16"
    assert rows["disk write"] == "800 MB/s with fsync"
    assert rows["free"] == "5.0 GiB"
    assert rows["attention on cpu in float32"] == "plain (no triton)"
    assert rows["rope on cpu in bfloat16, float32"] == "cpu"
    assert "torch.compile works" in rows["C++ compiler"]
    assert rows["bpe"] == "compiled"
    assert "A CPU" in doctor_table(sections(FOUND))


def test_what_a_machine_lacks_is_said() -> None:
    poor = FOUND["machine"] | {"flags": [], "compiler": None}
    rows = shown(machine=poor, can_compile=False, peaks=FOUND["peaks"] | {"disk_write_mbytes_per_s": 0.0})
    assert rows["flags"] == "none known"
    assert rows["minhash"] == "not compiled: a slower path is taken"
    assert rows["cuda"] == "none"
    assert rows["C++ compiler"] == "none (torch.compile is off)"
    assert rows["disk write"] == "the folder is not writable"


def test_every_c_file_of_the_package_is_known() -> None:
    assert {path.stem for path in c_files()} >= {"bpe", "gather_rows", "minhash", "scan_csv"}


def test_the_disk_is_measured_and_nothing_is_left_on_it(tmp_path: Path) -> None:
    assert measure_disk(tmp_path) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_file_measures_zero(tmp_path: Path) -> None:
    assert measure_disk(tmp_path / "absent") == 0
    (tmp_path / "file").touch()
    assert measure_disk(tmp_path / "file") == 0


def test_a_full_disk_measures_zero(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the write fails half-way."""
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom marrow.cli.doctor import measure_disk\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "print(measure_disk(Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == 0
    assert doctor.DISK_BYTES > 1 << 20


@pytest.mark.slow
def test_json_has_the_shape_that_scripts_read(marrow: Marrow, tmp_path: Path) -> None:
    done = marrow("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == FOUND.keys()
    for part in ("machine", "peaks", "store"):
        assert found[part].keys() == FOUND[part].keys()
    assert all(kernel.keys() == FOUND["kernels"][0].keys() for kernel in found["kernels"])
    assert {kernel["op"] for kernel in found["kernels"]} >= {"attention", "paged_attention", "rms_norm"}
    assert all(value > 0 for value in found["peaks"].values())
    assert found["dtype"] in ("float32", "bfloat16")
    assert found["store"]["home"] == str(tmp_path / "home")
    assert not (tmp_path / "home").exists()  # looking makes no store
    sections(found)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is the folder that nobody can write in")
def test_it_works_in_a_folder_that_cannot_be_written() -> None:
    env = {key: value for key, value in os.environ.items() if key != "MARROW_HOME"}
    done = subprocess.run(
        command("doctor"), capture_output=True, text=True, cwd="/proc", env=env, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "the folder is not writable" in done.stdout
    assert "/proc/.marrow" in done.stdout
