"""Compiling ahead of time: what is read from the cubin, and what counts as worse."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from marrow.kernels import compiled, compiled_table
from marrow.kernels.compiled_table import Row

pytest.importorskip("triton")
TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent

WANTED = [
    ("good copy", 90), ("strided copy", 90), ("unaligned copy", 90), ("a single row", 90),
    ("good product", 80), ("good product", 90), ("good product", 100),
    ("spilling product", 90), ("fp32 product", 90), ("tf32 product", 90), ("greedy product", 80),
    ("fp8", 80), ("fp8", 90), ("a shift by one", 90),
]  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """What compiling the planted kernels gives, in a process without the interpreter."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "support" / "compile_cases.py"), json.dumps(WANTED)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MARROW_CACHE": str(tmp_path_factory.mktemp("cache"))},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows(planted):
    """Rows by (name, architecture)."""
    return {(row["kernel"], row["arch"]): Row(**row) for row in planted["rows"]}


@pytest.mark.slow
def test_a_copy_uses_wide_loads_and_stores(rows):
    row = rows["good copy", 90]
    assert row.wide_loads == row.loads > 0
    assert row.wide_stores == row.stores > 0
    assert row.registers > 0
    assert compiled_table.faults(row) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["strided copy", "unaligned copy"])
def test_a_copy_that_lost_its_wide_loads_is_worse(rows, name):
    row = rows[name, 90]
    assert row.wide_loads == 0 < row.loads
    assert "lost its 128-bit loads" in compiled_table.worse(rows["good copy", 90], row)


@pytest.mark.slow
@pytest.mark.parametrize("arch", compiled.ARCHITECTURES)
def test_a_product_uses_tensor_cores_on_each_architecture(rows, arch):
    row = rows["good product", arch]
    assert row.dots == 1
    assert row.tensor_core > 0
    assert row.shared_bytes > 0
    assert compiled_table.faults(row) == []


@pytest.mark.slow
def test_a_kernel_that_spills_is_refused(rows):
    assert rows["spilling product", 90].spills > 0
    assert any("spills" in fault for fault in compiled_table.faults(rows["spilling product", 90]))


@pytest.mark.slow
def test_a_product_in_fp32_needs_no_tensor_cores_and_one_in_tf32_does(rows):
    assert (rows["fp32 product", 90].dots, rows["fp32 product", 90].tensor_core) == (0, 0)
    assert rows["tf32 product", 90].dots == 1
    assert rows["tf32 product", 90].tensor_core > 0
    lost = dataclasses.replace(rows["tf32 product", 90], tensor_core=0)
    assert "multiplies matrices without tensor cores" in compiled_table.faults(lost)
    assert "multiplies matrices without tensor cores" not in compiled_table.faults(rows["tf32 product", 90])
    assert "lost its tensor-core instructions" in compiled_table.worse(rows["tf32 product", 90], lost)


@pytest.mark.slow
def test_too_much_shared_memory_is_refused(rows):
    assert any("shared memory" in fault for fault in compiled_table.faults(rows["greedy product", 80]))


@pytest.mark.slow
def test_a_type_that_an_architecture_lacks_is_skipped_and_listed(rows):
    assert rows["fp8", 80].skipped == "sm_80 has no fp8e4nv"
    assert rows["fp8", 90].skipped == ""
    assert rows["fp8", 90].registers > 0


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_is_a_complaint_and_stops_no_other(planted, rows):
    assert len(planted["complaints"]) == 1
    assert "a shift by one" in planted["complaints"][0]
    assert "does not compile" in planted["complaints"][0]
    assert len(rows) == len(WANTED) - 1


def row(**changes):
    return Row(
        **{"op": "o", "kernel": "k", "example": "e", "dtype": "bf16", "arch": 90, "config": ""} | changes
    )


def test_a_table_survives_writing_and_reading(tmp_path):
    table = [row(registers=32, wide_loads=4), row(arch=80, skipped="sm_80 has no fp8e4nv")]
    compiled_table.write(tmp_path / "table.csv", table)
    assert compiled_table.read(tmp_path / "table.csv") == table


def test_more_registers_alone_are_no_complaint():
    assert compiled_table.check([row(registers=64)], [row(registers=32)]) == []


def test_what_the_table_does_not_know_and_what_is_gone_are_complaints():
    told = compiled_table.check([row(kernel="new")], [row(kernel="old"), row(op="other"), row(arch=80)])
    assert [line.split(": ")[1] for line in told] == ["is not in the table", "is in the table alone"]


def test_an_operator_that_is_gone_is_a_complaint_where_all_were_compiled():
    assert compiled_table.check([row()], [row(), row(op="gone")]) == []
    assert len(compiled_table.check([row()], [row(), row(op="gone")], is_whole=True)) == 1


def test_what_got_worse_is_a_complaint():
    before = row(tensor_core=8, wide_loads=4, wide_stores=4)
    assert compiled_table.check([before], [before]) == []
    assert len(compiled_table.check([row()], [before])) == 3
    assert len(compiled_table.check([row(skipped="no")], [row()])) == 1
    assert len(compiled_table.check([row(shared_bytes=1 << 20)], [row(shared_bytes=1 << 20)])) == 1


def test_a_spill_is_refused_even_where_the_table_has_it():
    known = row(spills=2, stack_bytes=8)
    assert len(compiled_table.check([known], [known])) == 1
    assert compiled_table.check([row()], [known]) == []
    assert len(compiled_table.check([known], [row()])) == 1


def test_every_kernel_has_128_bit_loads_and_streaming_ones_have_them_for_half_at_least():
    assert compiled_table.faults(row(loads=8)) == ["has no 128-bit loads"]
    assert compiled_table.faults(row(loads=8, wide_loads=3)) == ["has 128-bit loads for 3 of 8 only"]
    assert compiled_table.faults(row(loads=8, wide_loads=4)) == []
    assert compiled_table.faults(row()) == []  # a kernel that only writes
    narrow = {"op": "dequantise", "kernel": "_dequantise"}
    assert compiled_table.faults(row(loads=8, wide_loads=1, **narrow)) == []
    assert compiled_table.faults(row(loads=8, **narrow)) == ["has no 128-bit loads"]


def test_no_kernel_is_excused_that_needs_no_excuse():
    below = {
        f"{row.op}.{row.kernel}"
        for row in compiled_table.read(ROOT / compiled.TABLE)
        if 2 * row.wide_loads < row.loads
    }
    assert below == set(compiled_table.NARROW)
    assert all(compiled_table.NARROW.values())


def test_nothing_in_the_table_is_at_fault():
    table = compiled_table.read(ROOT / compiled.TABLE)
    assert len(table) > 600
    assert [(row.name, compiled_table.faults(row)) for row in table if compiled_table.faults(row)] == []


def test_each_kernel_is_compiled_in_all_three_dtypes_for_hopper():
    table = compiled_table.read(ROOT / compiled.TABLE)
    dtypes = {}
    for each in table:
        if each.arch == 90:
            dtypes.setdefault(each.op, set()).add(each.dtype)
    assert set(dtypes) == {each.op for each in table}
    assert all(found == {"bf16", "fp32", "fp16"} for found in dtypes.values()), dtypes


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_kernel_compiles_as_well_as_the_table_says():
    done = subprocess.run(
        [sys.executable, "-m", "marrow.kernels.compiled", "--check"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
