"""The C files on other machines: other instructions, no compiler, one that fails, a cache of no use."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import portable_kernels
import pytest
import torch

from marrow.core import native as core_native
from marrow.kernels import native
from marrow.kernels.device import facts

pytestmark = pytest.mark.skipif(core_native.find_compiler() is None, reason="there is no C compiler here")

# What each has of: AVX-512, its bf16 and int8 products, AMX. Optimised as little as its intrinsics allow, for
# compilation is what this costs: 5 to 15 CPU-seconds each.
BUILDS = {"x86-64": ("", "-O0"), "x86-64-v3": ("avx2", "-O0"), "skylake-avx512": ("avx512f", "-O1")}
COMPILER = """#!/bin/sh
# The system's compiler for another CPU; without -march=native, which is the fallback, it refuses.
found=
for each; do
    shift
    case $each in
    -march=native) each=-march={cpu} found=yes ;;
    -O3) each={level} ;;
    esac
    set -- "$@" "$each"
done
[ $found ] || exit 1
exec {compiler} "$@"
"""
NORM = """
import warnings, torch
from marrow.kernels.norms.rms_norm import OPERATOR, rms_norm, rms_norm_reference
x, weight = torch.randn(3, 40), torch.randn(40)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
print(OPERATOR.choose(OPERATOR.case((x, weight, 1e-5))))
print(*(w.message for w in caught if w.category is RuntimeWarning), sep="\\n")
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def run_norm(**environment: str) -> list[str]:
    """Return the choice that a fresh process makes for an operator, and its warnings."""
    done = subprocess.run(
        [sys.executable, "-c", NORM], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip().splitlines()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="for x86-64")
@pytest.mark.parametrize("cpu", BUILDS)
def test_c_files_compute_the_same_with_the_instructions_of_other_cpus(cpu: str, tmp_path: Path) -> None:
    """Every C file of an operator compiles as it would there, threads too, and gives this build's results."""
    flag, level = BUILDS[cpu]
    if flag and flag not in facts().flags:
        pytest.skip(f"this CPU has no {flag}")
    text = COMPILER.format(cpu=cpu, level=level, compiler=core_native.find_compiler())
    environment = {"CC": str(executable(tmp_path / "cc", text)), "MARROW_CACHE": str(tmp_path)}
    result = tmp_path / "outputs.pt"
    subprocess.run(
        [sys.executable, portable_kernels.__file__, result], env=os.environ | environment, check=True
    )
    threads = torch.get_num_threads()
    try:
        ours = portable_kernels.run_all()
    finally:
        torch.set_num_threads(threads)
    theirs = torch.load(result)
    assert ours.keys() == theirs.keys()
    for name, outputs in ours.items():
        for number, (a, b) in enumerate(zip(outputs, theirs[name], strict=True)):
            # One rounding of bf16; in fp32 sums of some 100 terms, in another order or without fma.
            within = 2.0**-8 if a.dtype == torch.bfloat16 else 2.0**-20
            scale = float(a.double().nan_to_num(0, 0, 0).abs().max()) if a.numel() else 0.0
            is_near = torch.allclose(a.double(), b.double(), within, within * scale, equal_nan=True)
            assert is_near, f"{name}, output {number}"


@pytest.mark.slow
def test_without_a_compiler_an_operator_takes_another_path_and_one_warning_says_so(tmp_path: Path) -> None:
    choice, *said = run_norm(CC=str(tmp_path / "none"), MARROW_CACHE=str(tmp_path))
    assert choice == "('reference', 'cpu: there is no C compiler')"
    assert len(said) == 1 and "there is no C compiler: slower paths are used" in said[0]


@pytest.mark.slow
def test_a_compiler_that_fails_is_quoted_and_another_path_is_taken(tmp_path: Path) -> None:
    broken = executable(tmp_path / "cc", "#!/bin/sh\necho 'cc1: out of memory' >&2\nexit 1\n")
    choice, *said = run_norm(CC=str(broken), MARROW_CACHE=str(tmp_path))
    assert choice == "('reference', 'cpu: rms_norm.c cannot be compiled or loaded')"
    assert len(said) == 1 and "rms_norm.c is not compiled" in said[0] and "cc1: out of memory" in said[0]
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_costs_a_compilation_and_no_speed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    choice, *said = run_norm(MARROW_CACHE=str(tmp_path / "file"), TMPDIR=str(temporary))
    assert choice == "('cpu', '')" and said == []
    assert list(temporary.iterdir()) == []  # the private folder is gone with the process


def test_a_file_without_its_function_is_told_by_name() -> None:
    with pytest.raises(AttributeError, match="no_such_function"):
        native.function("rms_norm", "no_such_function", "p")


def test_a_file_that_cannot_be_compiled_is_an_error_of_the_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken.c").write_text("this is no C\n")
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    with (
        pytest.warns(RuntimeWarning, match=r"broken\.c is not compiled"),
        pytest.raises(RuntimeError, match=r"broken\.c cannot be compiled"),
    ):
        native.function("broken", "anything", "p")


@pytest.mark.parametrize("mode", ["reference", "torch", "triton"])
def test_c_files_for_numpy_are_switched_off_with_those_for_tensors(mode: str, monkeypatch) -> None:
    assert native.load("gather_rows") is not None
    monkeypatch.setenv("MARROW_KERNELS", mode)
    assert native.load("gather_rows") is None


def test_an_address_keeps_its_tensor_while_it_lives() -> None:
    """`native.pointers(x.contiguous())` must not point to freed memory when the call begins."""
    import gc
    import weakref

    made = torch.ones(3)
    (address,), watch = native.pointers(made), weakref.ref(made)
    del made
    gc.collect()
    assert watch() is not None and address == watch().data_ptr()
    del address
    gc.collect()
    assert watch() is None
