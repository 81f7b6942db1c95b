"""Parcels: what goes in comes out, in memory that is used again only when nobody looks."""

import gc
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marrow.loader.prefetch.parcels import Packed, Packer, Unpacker

NUMPY = [np.int8, np.uint16, np.int32, np.int64, np.float16, np.float32, np.float64, np.bool_, np.complex64]
TORCH = [torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float16, torch.float32, torch.bool]


def sent(packer: Packer, unpacker: Unpacker, value: Any) -> Any:
    packed, descriptor = packer.pack(value)
    return unpacker.open(packed, descriptor)


@given(
    sizes=st.lists(st.integers(0, 40_000), max_size=6),
    numpy_type=st.sampled_from(NUMPY),
    torch_type=st.sampled_from(TORCH),
)
@settings(max_examples=40, deadline=None)
def test_arrays_and_tensors_come_out_as_they_went_in(
    sizes: list[int], numpy_type: Any, torch_type: Any
) -> None:
    draw = np.random.default_rng(len(sizes))
    value = {
        "arrays": [draw.integers(0, 2, size).astype(numpy_type) for size in sizes],
        "tensors": tuple(torch.from_numpy(draw.integers(0, 2, size)).to(torch_type) for size in sizes),
        "text": "x" * sum(sizes[:1]),
    }
    found = sent(Packer(), Unpacker(), value)
    assert found["text"] == value["text"]
    for mine, theirs in zip(value["arrays"], found["arrays"], strict=True):
        assert mine.dtype == theirs.dtype
        assert np.array_equal(mine, theirs)
    for one, other in zip(value["tensors"], found["tensors"], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@dataclass(frozen=True, slots=True)
class Held:
    tokens: torch.Tensor
    name: str


def test_dataclasses_views_and_shapes_survive() -> None:
    whole = torch.arange(60_000, dtype=torch.int64).reshape(200, 300)
    value = [Held(whole, "a"), whole.t(), whole[::7, 3:], whole[5:5], torch.tensor(3.5)]
    found = sent(Packer(), Unpacker(), value)
    assert torch.equal(found[0].tokens, whole)
    for mine, theirs in zip(value[1:], found[1:], strict=True):
        assert torch.equal(mine, theirs)
        assert mine.shape == theirs.shape


def test_arrow_tables_come_too() -> None:
    table = pa.table({"n": np.arange(20_000), "t": [str(n) for n in range(20_000)]})
    assert sent(Packer(), Unpacker(), table).equals(table)


def test_a_parameter_keeps_that_it_is_one() -> None:
    found = sent(Packer(), Unpacker(), torch.nn.Parameter(torch.ones(9000)))
    assert isinstance(found, torch.nn.Parameter)
    assert found.requires_grad


def test_large_arrays_do_not_go_through_the_socket() -> None:
    packed, _ = Packer().pack({"x": np.zeros(1_000_000), "y": torch.zeros(1_000_000)})
    assert len(packed.head) < 1000
    assert [end - start for start, end in packed.places] == [8_000_000, 4_000_000]


def test_a_crate_is_free_when_the_last_view_is_gone() -> None:
    packer, unpacker = Packer(), Unpacker()
    found = sent(packer, unpacker, {"x": np.arange(10_000), "y": torch.zeros(10_000)})
    rows = found["x"][10:20].view(np.uint64)[::2]
    del found
    gc.collect()
    assert unpacker.freed() == ()
    del rows
    assert unpacker.freed() == (0,)
    assert unpacker.freed() == ()


def test_crates_are_used_again_and_those_too_small_replaced() -> None:
    packer, unpacker = Packer(), Unpacker()
    crates = []
    for size in (10_000, 11_000, 9_000, 100_000, 90_000, 10_000):
        packed, descriptor = packer.pack(np.zeros(size))
        crates.append((packed.crate, packed.num_bytes > 0, packed.dropped))
        unpacker.open(packed, descriptor)
        packer.free(unpacker.freed())
    # The third and fourth: 80 kB, made 128 kB, holds 88 kB; 800 kB does not fit.
    assert crates == [
        (0, True, ()),
        (0, False, ()),
        (0, False, ()),
        (1, True, (0,)),
        (1, False, ()),
        (1, False, ()),
    ]


def test_what_cannot_be_pickled_is_said_so() -> None:
    with pytest.raises((TypeError, AttributeError)):
        Packer().pack({"x": lambda: 0})


def test_small_things_need_no_crate() -> None:
    packed, descriptor = Packer().pack({"x": np.arange(10)})
    assert (packed.crate, descriptor) == (-1, None)
    assert isinstance(packed, Packed)
    assert Unpacker().open(packed, None)["x"].tolist() == list(range(10))
