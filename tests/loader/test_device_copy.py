"""Copies to a device: the same values in the same order, wherever they go. CUDA runs where it is."""

from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from marrow.loader.device_copy import DeviceCopy, map_tensors

Pair = namedtuple("Pair", "left right")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")),
]


@dataclass(frozen=True, slots=True)
class Held:
    tokens_N: Tensor
    name: str


def batches(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {
            "x": torch.full((3, 5), number),
            "nested": [torch.tensor([number]), ("text", Pair(torch.zeros(2) + number, None))],
            "held": Held(torch.arange(number), f"batch {number}"),
        }


@pytest.mark.parametrize("device", DEVICES)
def test_batches_arrive_whole_and_in_order(device: str) -> None:
    found = list(DeviceCopy(batches(7), device))
    assert len(found) == 7
    for number, batch in enumerate(found):
        assert batch["x"].device.type == device
        assert (batch["x"] == number).all()
        assert batch["nested"][1][1].left.tolist() == [number, number]
        assert batch["nested"][1][0] == "text"
        assert (batch["held"].name, batch["held"].tokens_N.tolist()) == (
            f"batch {number}",
            list(range(number)),
        )


def test_every_tensor_goes_to_the_device() -> None:
    batch = next(DeviceCopy(batches(3), "meta"))
    seen: list[str] = []
    map_tensors(batch, lambda tensor: (seen.append(tensor.device.type), tensor)[1])
    assert seen == ["meta"] * 4


def test_on_the_cpu_nothing_is_copied() -> None:
    batch = next(batches(1))
    assert next(DeviceCopy(iter([batch]), "cpu")) is batch


@pytest.mark.parametrize("device", DEVICES)
def test_a_function_on_the_batch_runs_on_the_device(device: str) -> None:
    def normalise(batch: dict[str, Any]) -> dict[str, Any]:
        return {"x": batch["x"].float() / 2, "device": batch["x"].device.type}

    found = list(DeviceCopy(batches(4), device, normalise))
    assert [batch["x"][0, 0].item() for batch in found] == [0.0, 0.5, 1.0, 1.5]
    assert {batch["device"] for batch in found} == {device}


@pytest.mark.parametrize("device", DEVICES)
def test_an_error_of_the_source_comes_after_the_batches_before_it(device: str) -> None:
    def failing() -> Iterator[Any]:
        yield from batches(3)
        raise OSError("the disk is gone")

    copies = DeviceCopy(failing(), device)
    assert [int(next(copies)["x"][0, 0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(copies)


@pytest.mark.parametrize("device", DEVICES)
def test_an_end_stays_an_end(device: str) -> None:
    copies = DeviceCopy(batches(1), device)
    next(copies)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(copies)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_memory_in_use_is_not_overwritten_by_the_next_copy() -> None:
    many = ({"x": torch.full((1 << 20,), number)} for number in range(40))
    sums = []
    for batch in DeviceCopy(many, "cuda", depth=3):
        torch.cuda._sleep(2_000_000)  # the step is late: the copy of later batches overtakes it
        sums.append(batch["x"].sum())
        del batch
    assert [int(one) for one in sums] == [number << 20 for number in range(40)]
