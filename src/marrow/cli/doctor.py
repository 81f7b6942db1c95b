"""`marrow doctor`: this machine, what it measures, and which kernels run on it."""

import json
import os
import platform
import shutil
import tempfile
import time
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import click

import marrow
from marrow import __version__
from marrow.cli.console import quantity, size
from marrow.core import native
from marrow.store.version import package_versions

PACKAGES = ("torch", "numpy", "pyarrow", "tokenizers", "safetensors", "sqlalchemy", "fastapi", "triton")
DISK_BYTES = 64 << 20


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Show environment, devices, measured peaks, and the kernel chosen for each operator."""
    found = examine()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from marrow.cli.tables import doctor_table

    click.echo(doctor_table(sections(found)), nl=False)


def examine() -> dict[str, Any]:
    """Look at the machine and measure it. Takes about 3 s, on an idle machine."""
    import torch

    from marrow.kernels import device, dispatch, roofline

    device.raise_malloc_thresholds()
    roofline.load_operators()
    dtype = device.choose_dtype()
    home = Path(os.environ.get("MARROW_HOME") or ".marrow").absolute()
    place = next(path for path in (home, *home.parents) if path.exists())
    return {
        "marrow": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(PACKAGES),
        "machine": asdict(device.facts()),
        "peaks": {
            "gemm_fp32_gflops": dtype.gemm_fp32_gflops,
            "gemm_bf16_gflops": dtype.gemm_bf16_gflops,
            "copy_gbytes_per_s": device.measure_copy_bandwidth(),
            "disk_write_mbytes_per_s": measure_disk(place),
        },
        "dtype": str(dtype.dtype).removeprefix("torch."),
        "can_compile": device.compiler_available(),
        "native": {path.stem: native.load(path) is not None for path in c_files()},
        "cuda": torch.cuda.is_available(),
        "store": {"home": str(home), "free_bytes": shutil.disk_usage(place).free},
        "kernels": [asdict(choice) for choice in dispatch.choices()],
    }


def c_files() -> list[Path]:
    """Return the C files of the package (`core/native.py`)."""
    return sorted(Path(marrow.__file__).parent.glob("*/csrc/*.c"))


def measure_disk(folder: Path) -> float:
    """Return MB/s of writing 64 MiB to a file in `folder`, fsync included; 0 if it is not writable."""
    block = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start_s = time.perf_counter()
            for _ in range(DISK_BYTES >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return DISK_BYTES / (time.perf_counter() - start_s) / 1e6
    except OSError:
        return 0.0


def sections(found: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Arrange what was found in sections of (name, value) rows for the terminal."""
    machine, peaks, store = found["machine"], found["peaks"], found["store"]
    disk = peaks["disk_write_mbytes_per_s"]
    return [
        (
            "environment",
            [
                ("marrow", found["marrow"]),
                ("python", f"{found['python']}, {found['platform']}"),
                *found["packages"].items(),
            ],
        ),
        (
            "machine",
            [
                ("cpu", f"{machine['cpu']} ({machine['architecture']})"),
                ("flags", " ".join(machine["flags"]) or "none known"),
                ("cores", f"{machine['cores']}, torch uses {machine['threads']} threads"),
                ("memory", size(machine["memory_bytes"])),
                ("cuda", ", ".join(machine["cuda"]) or "none"),
                (
                    "C++ compiler",
                    f"{machine['compiler'] or 'none'}"
                    f" ({'torch.compile works' if found['can_compile'] else 'torch.compile is off'})",
                ),
            ],
        ),
        (
            "measured peaks",
            [
                ("GEMM fp32", f"{quantity(peaks['gemm_fp32_gflops'])} GFLOP/s"),
                (
                    "GEMM bf16",
                    f"{quantity(peaks['gemm_bf16_gflops'])} GFLOP/s"
                    f" ({peaks['gemm_bf16_gflops'] / peaks['gemm_fp32_gflops']:.2f}x fp32)"
                    f": training takes {found['dtype']}",
                ),
                ("memory copy", f"{quantity(peaks['copy_gbytes_per_s'])} GB/s read + written"),
                ("disk write", f"{disk:.0f} MB/s with fsync" if disk else "the folder is not writable"),
            ],
        ),
        (
            "store",
            [("home", store["home"]), ("free", size(store["free_bytes"]))],
        ),
        (
            "C files",
            [
                (name, "compiled" if is_there else "not compiled: a slower path is taken")
                for name, is_there in found["native"].items()
            ],
        ),
        ("kernels", kernel_lines(found["kernels"])),
    ]


def kernel_lines(kernels: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Name the path of each operator and device, in one line for dtypes that take the same."""

    def taken(kernel: dict[str, str]) -> tuple[str, ...]:
        return kernel["op"], kernel["device"], kernel["path"], kernel["reason"]

    lines = []
    for (op, device, path, reason), same in groupby(kernels, taken):
        dtypes = ", ".join(kernel["dtype"] for kernel in same)
        lines.append((f"{op} on {device} in {dtypes}", path + (f" ({reason})" if reason else "")))
    return lines
