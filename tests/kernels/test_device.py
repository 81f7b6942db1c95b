import os
import subprocess
import sys

import pytest
import torch

from marrow.kernels import device


def test_facts_describe_this_machine():
    facts = device.facts()
    assert 1 <= facts.cores <= (os.cpu_count() or 1)
    assert facts.memory_bytes > 1 << 28
    assert facts.cpu and facts.architecture and facts.torch == torch.__version__
    assert (len(facts.cuda) > 0) == torch.cuda.is_available()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemm_peak_is_of_the_order_of_one_product_timed_here(dtype):
    peak = device.measure_gemm_peak(dtype, size=128, seconds=0.02)
    assert 0.01 < peak < 1e5  # GFLOP/s: between a broken timer and more than any CPU has


def test_copy_bandwidth_counts_reads_and_writes():
    assert 0.05 < device.measure_copy_bandwidth(num_bytes=8 << 20, seconds=0.02) < 1e4


def test_the_dtype_follows_from_the_measurement_alone():
    assert device.decide_dtype(100.0, 130.0) is torch.bfloat16
    assert device.decide_dtype(100.0, 110.0) is torch.float32  # within the noise
    assert device.decide_dtype(100.0, 20.0) is torch.float32


def test_the_choice_carries_its_figures(monkeypatch):
    monkeypatch.setattr(
        device, "measure_gemm_peak", lambda dtype, **_: {torch.float32: 10.0}.get(dtype, 30.0)
    )
    choice = device.choose_dtype()
    assert (choice.dtype, choice.gemm_fp32_gflops, choice.gemm_bf16_gflops) == (torch.bfloat16, 10.0, 30.0)


def test_a_missing_compiler_is_seen(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert device.find_compiler() is None
    assert not device.compiler_available()


def test_a_compiler_that_does_not_work_is_seen(monkeypatch, tmp_path):
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    assert device.find_compiler() == str(fake)
    assert not device.compiler_available()


def test_the_compiler_of_this_machine_is_judged_by_use():
    if device.find_compiler() is None:
        pytest.skip("no C++ compiler is installed here")
    assert isinstance(device.compiler_available(), bool)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_raised_thresholds_keep_freed_memory():
    """Hold and free 0.5 GB over and over: page faults fall by more than tenfold.

    By itself glibc gives back what is free at the top of the heap beyond 64 MiB, and always what
    is larger than 32 MiB.
    """
    program = """
import resource, sys, torch
from marrow.kernels.device import raise_malloc_thresholds
if sys.argv[1] == "raise":
    assert raise_malloc_thresholds() and raise_malloc_thresholds()
def step():
    return [torch.ones(size) for size in (5 << 20, 1 << 18, 10_000_000) for _ in range(3)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):  # in one of which the heap may still grow by a block of 40 MB and one of 20
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = [
        int(subprocess.run([sys.executable, "-c", program, mode], capture_output=True, check=True).stdout)
        for mode in ("leave", "raise")
    ]
    if faults[0] < 1000:
        pytest.skip("the C library here keeps freed memory by itself")
    assert faults[1] * 10 < faults[0]
