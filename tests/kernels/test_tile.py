"""Launches, records and configurations of Triton kernels."""

import json

import faulty_kernels
import pytest
import torch

from marrow.kernels import compiled, tile
from marrow.kernels.configs import tables
from marrow.kernels.memory import meta

pytestmark = pytest.mark.skipif(tile.triton is None, reason="triton is not installed")


def test_a_recorded_launch_says_all_and_runs_nothing():
    target = torch.zeros(4)
    with tile.recording() as recorded:
        tile.launch(faulty_kernels.write_beyond, (2,), target, 4, BLOCK=16, num_warps=2)
    (launch,) = recorded
    assert launch.kernel is faulty_kernels.write_beyond
    assert launch.grid == (2,)
    assert list(launch.arguments) == ["target", "count"]
    assert launch.constants == {"BLOCK": 16}
    assert launch.options == {"num_warps": 2}
    assert (target == 0).all()


def test_an_empty_grid_launches_nothing():
    with tile.recording() as recorded:
        tile.launch(faulty_kernels.write_beyond, (0,), meta(4), 4, BLOCK=16)
    assert recorded == []


def test_a_record_is_of_one_architecture():
    with tile.recording(80):
        assert tile.capability(torch.device("meta")) == 80
        assert tile.multiprocessors(torch.device("meta")) == 108
    assert tile.capability(torch.device("meta")) == 90
    assert tile.multiprocessors(torch.device("cpu")) == 2


def test_a_configuration_is_the_default_unless_something_else_is_known():
    default = {"BLOCK": 64, "num_warps": 4}
    assert tile.config("op", (1, 2), default) == default
    with tile.configuring({("op", "(1, 2)"): {"BLOCK": 128}}) as asked:
        assert tile.config("op", (1, 2), default, [{"BLOCK": 32}]) == {"BLOCK": 128, "num_warps": 4}
        assert tile.config("op", "other", default) == default
    assert [question.shape_class for question in asked] == ["(1, 2)", "other"]
    assert asked[0].candidates == ({"BLOCK": 32},)
    assert tile.config("op", (1, 2), default) == default


def test_the_default_is_not_handed_out_to_be_changed():
    default = {"BLOCK": 64}
    tile.config("op", None, default)["BLOCK"] = 1
    assert default == {"BLOCK": 64}


def test_a_table_is_read_by_device_and_grows(tmp_path):
    facts = {"capability": "90", "torch": "2", "triton": "3", "date": "2026-01-31"}
    tables.write("NVIDIA H200", {"a": {"x": {"BLOCK": 1}}, "b": {"x": {"BLOCK": 2}}}, facts, tmp_path)
    path = tables.write("NVIDIA H200", {"a": {"x": {"BLOCK": 3}, "y": {}}}, facts, tmp_path)
    assert path.name == "nvidia-h200.json"
    expected = {"a": {"x": {"BLOCK": 3}, "y": {}}, "b": {"x": {"BLOCK": 2}}}
    assert tables.load("NVIDIA H200", tmp_path) == expected
    assert tables.load("NVIDIA H100", tmp_path) == {}
    assert json.loads(path.read_text())["date"] == "2026-01-31"
    assert tables.of_capability(90, tmp_path) == [expected]
    assert tables.of_capability(80, tmp_path) == []


def test_every_committed_table_can_be_read():
    for path in tables.FOLDER.glob("*.json"):
        found = json.loads(path.read_text())
        assert path.stem == tables.slug(found["device"])
        assert tables.load(found["device"]) == found["configs"]


@pytest.mark.parametrize(("columns", "block"), [(1, 16), (16, 16), (17, 32), (4096, 4096), (4097, 8192)])
def test_a_row_fits_into_its_block(columns, block):
    options = tile.row_options(columns, torch.bfloat16)
    assert options["BLOCK"] == block
    assert options["num_warps"] in (1, 2, 4, 8, 16, 32)


def test_what_was_tuned_on_a_device_is_compiled_ahead_of_time_too(tmp_path, monkeypatch):
    from marrow.kernels.search import top_k  # registers an operator that asks for its configuration

    table = {"top_k": {"('one', 'torch.bfloat16')": {"num_warps": 16}}}
    monkeypatch.setattr(tables, "of_capability", lambda capability: [table] if capability == 90 else [])
    tasks, complaints = compiled.collect([top_k.OPERATOR.name])
    assert complaints == []
    assert {task.row.arch for task in tasks if "num_warps=16" in task.row.config} == {90}
