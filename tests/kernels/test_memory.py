"""Faults of kernels that the interpreter notices: each one is planted here, beside a sound twin."""

import faulty_kernels as faulty
import pytest
import torch

from marrow.kernels import tile
from marrow.kernels.memory import MemoryFault, checked, every_program, meta, outermost_programs, phantom

pytestmark = pytest.mark.skipif(not tile.IS_INTERPRETED, reason="kernels run on a GPU here")


def test_a_masked_copy_is_clean():
    source, target = torch.randn(37), torch.empty(37)
    with checked() as watch:
        tile.launch(faulty.copy, (3,), source, target, 37, MASKED=True, SHIFT=0, BLOCK=16)
    assert torch.equal(source, target)
    assert watch.launches == 1


@pytest.mark.parametrize(("masked", "shift"), [(False, 0), (True, -1)])
def test_a_load_beyond_its_tensor_is_a_fault(masked, shift):
    # One storage: what lies beyond the one tensor is the other, and no page fault would tell.
    source, target = torch.zeros(16 + 37 + 37).split([16, 37, 37])[1:]
    with (
        checked(),
        pytest.raises(MemoryFault, match=r"copy, program .*, load: element .* of source"),
    ):
        tile.launch(faulty.copy, (3,), source, target, 37, MASKED=masked, SHIFT=shift, BLOCK=16)


def test_a_store_beyond_its_tensor_is_a_fault_and_writes_nothing():
    storage = torch.zeros(64)
    with checked(), pytest.raises(MemoryFault, match=r"store: element 10 of target, which has 10, outside"):
        tile.launch(faulty.write_beyond, (1,), storage[:10], 10, BLOCK=16)
    assert (storage == 0).all()


def test_without_the_check_the_fault_goes_unnoticed():
    storage = torch.zeros(64)
    tile.launch(faulty.write_beyond, (1,), storage[:10], 10, BLOCK=16)
    assert (storage[10:16] != 0).all()


def test_two_programs_that_write_one_element_are_a_race():
    target = torch.zeros(64)
    with checked():
        tile.launch(faulty.overlap, (4,), target, STEP=16, BLOCK=16)
    with checked(), pytest.raises(MemoryFault, match=r"program \(1, 0, 0\), store: element 8 of target"):
        tile.launch(faulty.overlap, (4,), target, STEP=8, BLOCK=16)
    with checked(races=False):
        tile.launch(faulty.overlap, (4,), target, STEP=8, BLOCK=16)
    with checked(allow=["overlap"]):
        tile.launch(faulty.overlap, (4,), target, STEP=8, BLOCK=16)


@pytest.mark.parametrize("shift", [1, 3])  # what is written later, and what was written before
def test_reading_what_another_program_writes_is_a_race(shift):
    values = torch.zeros(64)
    with checked():
        tile.launch(faulty.read_neighbour, (4,), values, SHIFT=0, BLOCK=16)
    with checked(), pytest.raises(MemoryFault, match=r"another program has (read|written) it"):
        tile.launch(faulty.read_neighbour, (4,), values, SHIFT=shift, BLOCK=16)


def test_two_views_of_one_storage_are_one_memory():
    storage = torch.zeros(48)
    with checked():
        tile.launch(faulty.copy, (2,), storage[:16], storage[16:32], 16, MASKED=True, SHIFT=0, BLOCK=8)
    with checked(), pytest.raises(MemoryFault, match="another program"):
        tile.launch(faulty.copy, (2,), storage[:16], storage[8:24], 16, MASKED=True, SHIFT=0, BLOCK=8)


def test_one_store_with_two_values_for_an_element_is_a_race():
    places, target = torch.tensor([0, 1, 2, 2]), torch.zeros(8)
    with checked(), pytest.raises(MemoryFault, match="one store gives it two values"):
        tile.launch(faulty.scatter, (1,), target, places, ATOMIC=False, BLOCK=4)
    with checked():
        tile.launch(faulty.scatter, (1,), target, places, ATOMIC=True, BLOCK=4)
    assert target[:3].tolist() == [1, 1, 2]


def test_atomics_race_with_stores_but_not_with_each_other():
    rows, total = torch.ones(4, 10), torch.zeros(10)
    with checked():
        tile.launch(faulty.add_rows, (4,), rows, total, 10, BLOCK=16)
    assert (total == 4).all()
    with checked(), pytest.raises(MemoryFault, match="another program has written it"):
        tile.launch(faulty.store_then_add, (2,), torch.zeros(16), BLOCK=16)


def test_an_atomic_beyond_its_tensor_is_a_fault():
    with checked(), pytest.raises(MemoryFault, match="atomic: element 10 of total"):
        tile.launch(faulty.add_rows, (1,), torch.ones(1, 16), torch.zeros(10), 16, BLOCK=16)


def test_an_offset_beyond_2_to_the_31_needs_no_memory():
    rows, columns = 3 * 2**18, 2**13
    x, y = meta(rows, columns, dtype=torch.bfloat16), meta(rows, columns, dtype=torch.bfloat16)
    with phantom() as watch:
        tile.launch(faulty.double_rows, (rows,), x, y, columns, WIDE=True, BLOCK=columns)
    assert watch.launches == 1
    with (
        phantom(),
        pytest.raises(MemoryFault, match=r"load: element -\d+ of x, which has 6442450944"),
    ):
        tile.launch(faulty.double_rows, (rows,), x, y, columns, WIDE=False, BLOCK=columns)


def test_phantom_tensors_stand_beside_real_ones():
    table = torch.tensor([5, 2**20 - 1])
    x, y = meta(2**20, 4096), meta(2, 4096)
    with phantom(every_program):
        tile.launch(faulty.follow, (2,), table, x, y, BLOCK=4096)
    table[1] += 1
    with (
        phantom(every_program),
        pytest.raises(MemoryFault, match="load: element 4294967296"),
    ):
        tile.launch(faulty.follow, (2,), table, x, y, BLOCK=4096)


def test_phantom_tensors_read_as_zeros_but_masked_lanes_as_asked():
    out = torch.full((8,), 7.0)
    with phantom():
        tile.launch(faulty.masked_load, (1,), meta(4), out, 4, BLOCK=8)
    assert out.tolist() == [0.0] * 4 + [-1.0] * 4


def test_what_cannot_run_on_phantoms_says_so():
    with phantom(), pytest.raises(MemoryFault, match="atomic_cas"):
        tile.launch(faulty.swap, (1,), meta(1, dtype=torch.int32))


def test_meta_tensors_launch_nothing_otherwise():
    tile.launch(faulty.write_beyond, (1,), meta(10), 10, BLOCK=16)
    with checked() as watch:
        tile.launch(faulty.write_beyond, (1,), meta(10), 10, BLOCK=16)
    assert watch.launches == 0


def test_the_outermost_programs_are_first_middle_and_last():
    assert outermost_programs((9, 1, 2)) == [(0, 0, 0), (0, 0, 1), (4, 0, 0), (4, 0, 1), (8, 0, 0), (8, 0, 1)]
    assert every_program((2, 2, 1)) == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
