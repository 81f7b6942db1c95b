"""Where ranks stand, and whom they talk to: arithmetic first, then real groups."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from spread_jobs import members

from marrow.core.errors import TrainError
from marrow.train.parallel.config import AXES, ParallelRecipe
from marrow.train.parallel.mesh import GROUPS, Mesh, group_ranks, place_of, rank_of

sizes_of_axes = st.fixed_dictionaries({axis: st.integers(1, 3) for axis in AXES})


@given(sizes_of_axes)
def test_every_place_has_one_rank_and_every_rank_one_place(sizes):
    places = [
        dict(zip(AXES, numbers, strict=True))
        for numbers in itertools.product(*(range(sizes[axis]) for axis in AXES))
    ]
    assert [rank_of(place, sizes) for place in places] == list(range(len(places)))
    assert [place_of(rank, sizes) for rank in range(len(places))] == places


@given(sizes_of_axes, st.sets(st.sampled_from(AXES), min_size=1))
def test_groups_along_axes_part_the_world_and_differ_in_nothing_else(sizes, axes):
    groups = list(group_ranks(sizes, axes))
    world = len({rank for group in groups for rank in group})
    assert sorted(rank for group in groups for rank in group) == list(range(world))
    for group in groups:
        assert group == sorted(group)
        fixed = [tuple(place_of(rank, sizes)[axis] for axis in AXES if axis not in axes) for rank in group]
        assert len(set(fixed)) == 1


def test_neighbours_in_tensor_parallelism_are_neighbours():
    assert list(group_ranks({"pp": 1, "dp": 2, "fsdp": 1, "tp": 2}, ("tp",))) == [[0, 1], [2, 3]]


def test_one_process_is_a_mesh_without_groups():
    mesh = Mesh.open(ParallelRecipe())
    assert mesh.size(*AXES) == 1 and mesh.rank(*AXES) == 0
    assert all(mesh.group(*axes) is None for axes in GROUPS)


def test_a_mesh_that_is_not_the_world_is_refused_with_both_numbers():
    with pytest.raises(TrainError, match=r"dp 2 x tp 3 = 6 ranks, the job has 1") as told:
        Mesh.open(ParallelRecipe(dp=2, tp=3))
    assert "start 6 processes" in str(told.value.hint)


@pytest.mark.slow
def test_sums_along_axes_reach_the_ranks_that_the_arithmetic_names(tmp_path):
    parallel = ParallelRecipe(pp=2, dp=2, tp=2)
    for rank, (found, ends) in enumerate(run_ranks(8, members, parallel, folder=tmp_path)):
        for axes, ranks in found.items():
            assert ranks in list(group_ranks(parallel.sizes, axes)), (rank, axes)
        assert ends in list(group_ranks(parallel.sizes, ("pp",)))
