"""What this machine is and can do: facts, measured peaks, and the choices that follow from them.

Peaks are measured, not looked up: the roofline, MFU and the choice of dtype all stand on the same
numbers. A caller records a choice with its figures and reuses it on resume, so that a measurement
never changes a run half-way.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h of glibc
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more
_KEEP_BYTES = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Facts:
    """The machine. `flags`: those of the CPU that matter to us. Sizes in bytes."""

    cpu: str
    architecture: str
    flags: tuple[str, ...]
    cores: int
    threads: int
    memory_bytes: int
    cuda: tuple[str, ...]
    torch: str
    compiler: str | None


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """A dtype and the measurement that it follows from, in GFLOP/s."""

    dtype: torch.dtype
    gemm_fp32_gflops: float
    gemm_bf16_gflops: float


def raise_malloc_thresholds() -> bool:
    """Keep freed memory in the process instead of giving it back after every operator.

    Call before the first large tensor. Returns False where malloc is not glibc's. Calling twice
    is fine. Costs memory: the process keeps its high-water mark.
    """
    # PERF: an eager bf16 step of 8192 tokens and 3.5 M parameters on one core: page faults fall
    # from 79,000 to 200 a step, system time from 0.15 s to 0.002 s of 1.3 s; in fp32 from 61,000
    # to 900 and from 0.09 s to 0.006 s of 2.5 s (without M_MMAP_MAX: 5,000 and 0.02 s).
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has no mallopt
        return False
    # What is larger than the largest threshold comes from the heap too: no maps at all.
    settings = (
        (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
        (_M_TRIM_THRESHOLD, _KEEP_BYTES),
        (_M_MMAP_MAX, 0),
    )
    return all(mallopt(name, value) for name, value in settings)


def available_cores() -> int:
    """Count the cores that this process may use (affinity and cgroup quota)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2: affinity is all there is to know
    return cores


def measure_gemm_peak(
    dtype: torch.dtype, *, device: str = "cpu", size: int = 1024, seconds: float = 0.3
) -> float:
    """Return GFLOP/s of a square matrix product of `size`, the best of what fits into `seconds`."""
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(left)
    best_s = best_seconds(lambda: torch.mm(left, right, out=out), device, seconds)
    return 2 * size**3 / best_s / 1e9


def measure_copy_bandwidth(*, device: str = "cpu", num_bytes: int = 256 << 20, seconds: float = 0.3) -> float:
    """Return GB/s of a large copy, read and written bytes both counted."""
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.ones_like(source)  # written once, so that its pages exist
    best_s = best_seconds(lambda: target.copy_(source), device, seconds)
    return 2 * num_bytes / best_s / 1e9


def choose_dtype(*, device: str = "cpu") -> DtypeChoice:
    """Choose bf16 where its measured matrix product is faster, else fp32. Takes about 0.6 s."""
    fp32 = measure_gemm_peak(torch.float32, device=device)
    bf16 = measure_gemm_peak(torch.bfloat16, device=device)
    return DtypeChoice(decide_dtype(fp32, bf16), fp32, bf16)


def decide_dtype(gemm_fp32_gflops: float, gemm_bf16_gflops: float) -> torch.dtype:
    """Return the dtype for a measurement: bf16 must win by a fifth, more than the noise."""
    return torch.bfloat16 if gemm_bf16_gflops > 1.2 * gemm_fp32_gflops else torch.float32


def facts() -> Facts:
    """Describe the machine; starts nothing but a look for a compiler."""
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu, flags = _cpu()
    return Facts(
        cpu=cpu,
        architecture=platform.machine(),
        flags=flags,
        cores=available_cores(),
        threads=torch.get_num_threads(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cuda=tuple(cuda),
        torch=torch.__version__,
        compiler=find_compiler(),
    )


def find_compiler() -> str | None:
    """Return the C++ compiler that torch.compile would use, by path, if there is one."""
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def compiler_available() -> bool:
    """Tell whether torch.compile can work on the CPU: a C++ compiler that builds with Python's headers.

    Compiles an empty extension; takes some 0.3 s.
    """
    compiler = find_compiler()
    if compiler is None:
        return False
    import sysconfig  # only here: slow to import

    with tempfile.TemporaryDirectory(prefix="marrow-compiler-") as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(
            "#include <Python.h>\n#include <cmath>\n#include <omp.h>\nint probe() { return 0; }\n"
        )
        command = [compiler, "-shared", "-fPIC", "-fopenmp", f"-I{sysconfig.get_path('include')}"]
        try:
            done = subprocess.run(
                [*command, str(source), "-o", str(Path(folder, "probe.so"))],
                capture_output=True,
                timeout=60,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
    return done.returncode == 0


_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx512_fp16", "amx_bf16", "amx_int8")
_ARM_FLAGS = ("asimd", "bf16", "i8mm", "sve", "sve2")


def _cpu() -> tuple[str, tuple[str, ...]]:
    """Return the CPU's name and the flags of it that matter."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # macOS
        return platform.processor() or platform.machine(), ()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    present = (values.get("flags") or values.get("Features") or "").split()
    name = values.get("model name") or values.get("CPU part") or platform.machine()
    return name, tuple(flag for flag in (*_FLAGS, *_ARM_FLAGS) if flag in present)


def best_seconds(work: Callable[[], Any], device: str, seconds: float) -> float:
    """Time `work` over and over; return the best, after two calls that are not counted."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    work()
    work()
    wait()
    best_s, deadline = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        work()
        wait()
        now = time.perf_counter()
        best_s = min(best_s, now - start)
        if now > deadline:
            return best_s
