"""What interpreted kernels do to memory: bounds, races, and tensors that take no memory.

    checked()   each load, store and atomic must hit the tensor whose pointer it was computed from, and no
                program may write, or read, what another program of the launch writes
    phantom()   kernels run on "meta" tensors of any size: addresses are checked, nothing is stored, loads
                give zeros; offsets beyond 2^31 are tested so

A pointer carries the number of its argument in its 16 highest bits, which no address uses, so that an access
beyond one tensor is noticed where it falls into the next. Atomics may meet atomics; that programs hand over
results through a counter, as in a reduction by the last one, is a race here and is allowed by name.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

TAG_BITS = 48
PHANTOM_BASE = 1 << 46
MANY = np.int32(2**31 - 1)

Array = np.ndarray[Any, Any]
Programs = Callable[[tuple[int, int, int]], Sequence[tuple[int, int, int]]]


class MemoryFault(AssertionError):
    """A kernel touched memory that it must not touch."""


class _Watch:
    """What is asked for, and how many launches were watched."""

    def __init__(self, *, races: bool, allow: Sequence[str], phantom: bool, programs: Programs) -> None:
        self.races, self.allow, self.phantom, self.programs = races, tuple(allow), phantom, programs
        self.launches = 0


_watch: ContextVar[_Watch | None] = ContextVar("watch", default=None)


@contextlib.contextmanager
def checked(*, races: bool = True, allow: Sequence[str] = ()) -> Iterator[_Watch]:
    """Check what kernels do to memory; a fault raises MemoryFault out of the launch.

    Args: races: look for races too. allow: names of kernels whose programs may share what they write.
    """
    with _watching(_Watch(races=races, allow=allow, phantom=False, programs=every_program)) as watch:
        yield watch


@contextlib.contextmanager
def phantom(programs: Programs | None = None) -> Iterator[_Watch]:
    """Run kernels on "meta" tensors, for their addresses alone; real arguments are read as they are.

    Args: programs: grid -> the programs to run; None takes the first, middle and last along each axis.
    """
    with _watching(
        _Watch(races=False, allow=(), phantom=True, programs=programs or outermost_programs)
    ) as watch:
        yield watch


def every_program(grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """List all programs of a grid, in the order in which they are run."""
    return [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]


def outermost_programs(grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """List the first, middle and last programs along each axis of a grid."""
    x, y, z = (sorted({0, size // 2, size - 1}) for size in grid)
    return [(a, b, c) for a in x for b in y for c in z]


def watch() -> _Watch | None:
    """Return what is asked for at this moment."""
    return _watch.get()


@contextlib.contextmanager
def _watching(new: _Watch) -> Iterator[_Watch]:
    token = _watch.set(new)
    try:
        yield new
    finally:
        _watch.reset(token)


class Memory:
    """The memory of one launch: where its tensors lie, and which program did what to them."""

    def __init__(self, kernel: str, tensors: dict[str, Tensor], watch: _Watch) -> None:
        """Note the tensors by parameter name."""
        self.kernel, self.names, self.program, self.place = kernel, list(tensors), 1, (0, 0, 0)
        sizes = [_extent(x) for x in tensors.values()]
        bases = [PHANTOM_BASE if x.is_meta else x.data_ptr() for x in tensors.values()]
        # Number 0 is for addresses that come from no argument: they lie nowhere.
        self.starts = np.array([0, *bases], np.uint64)
        self.ends = self.starts + np.array([0, *sizes], np.uint64)
        self.widths = [1, *(x.element_size() for x in tensors.values())]
        self.is_phantom = np.array([False, *(x.is_meta for x in tensors.values())])
        self.shadows = None
        if watch.races and kernel not in watch.allow and not self.is_phantom.any():
            self.shadows = _Shadows(list(zip(bases, sizes, self.widths[1:], strict=True)))
        watch.launches += 1

    def pointer(self, name: str) -> int:
        """Return the address of a tensor, marked with its number."""
        number = self.names.index(name) + 1
        return int(self.starts[number]) | number << TAG_BITS

    def start(self, number: int, place: tuple[int, int, int]) -> None:
        """Say which program runs from now on."""
        self.program, self.place = number + 1, place

    def touch(
        self, pointers: Array, mask: Array, width: int, action: str, values: Array | None = None
    ) -> tuple[Array, Array]:
        """Check an access; return real addresses, and the mask without lanes that have no memory.

        Args: width: bytes of an element. action: "load", "store" or "atomic". values: bits that are stored.
        Raises: MemoryFault.
        """
        shape = np.broadcast_shapes(pointers.shape, mask.shape)
        taken = np.array(np.broadcast_to(mask, shape), bool)
        pointers = np.broadcast_to(pointers, shape)
        real = pointers & np.uint64((1 << TAG_BITS) - 1)
        at, tags = real[taken], (pointers[taken] >> np.uint64(TAG_BITS)).astype(np.int64)
        if not len(at):
            return real, taken
        tags[tags >= len(self.starts)] = 0
        outside = (at < self.starts[tags]) | (at + np.uint64(width) > self.ends[tags])
        if outside.any():
            self._refuse(action, at[outside], tags[outside], len(at))
        if self.is_phantom.any():
            taken[taken] = ~self.is_phantom[tags]
        if self.shadows is not None:
            stored = None if values is None else np.broadcast_to(values, shape)[taken]
            fault = self.shadows.touch(at, width, action, self.program, stored)
            if fault is not None:
                number, why = fault
                raise MemoryFault(f"{self._where(action)} {self._element(at[number], tags[number])}: {why}")
        return real, taken

    def _refuse(self, action: str, at: Array, tags: Array, touched: int) -> None:
        where = self._element(at[0], tags[0])
        raise MemoryFault(f"{self._where(action)} {where}, outside, and {len(at) - 1} of {touched} others")

    def _where(self, action: str) -> str:
        return f"{self.kernel}, program {self.place}, {action}:"

    def _element(self, at: Any, tag: Any) -> str:
        if tag == 0:
            return f"address {int(at):#x}, which belongs to no argument"
        start, width = int(self.starts[tag]), self.widths[tag]
        count = (int(self.ends[tag]) - start) // width
        return f"element {(int(at) - start) // width} of {self.names[tag - 1]}, which has {count}"


class _Shadows:
    """Who read, wrote and atomically changed each cell of the memory of a launch.

    A cell is as wide as the narrowest element of its region; 0 is nobody, MANY is several programs.
    """

    def __init__(self, spans: list[tuple[int, int, int]]) -> None:
        """Merge the spans (start, bytes, width of an element) that overlap: two views of one storage."""
        regions: list[tuple[int, int, int]] = []
        for start, size, width in sorted(span for span in spans if span[1]):
            if regions and start < regions[-1][1]:
                low, high, narrow = regions.pop()
                regions.append((low, max(high, start + size), min(narrow, width)))
            else:
                regions.append((start, start + size, width))
        self.starts = np.array([start for start, _, _ in regions], np.uint64)
        self.widths = np.array([width for _, _, width in regions], np.uint64)
        cells = [-(-(end - start) // width) for start, end, width in regions]
        self.firsts = np.concatenate([[0], np.cumsum(cells)]).astype(np.int64)
        self.wrote, self.read, self.changed = (np.zeros(self.firsts[-1], np.int32) for _ in range(3))

    def touch(
        self, at: Array, width: int, action: str, program: int, values: Array | None
    ) -> tuple[int, str] | None:
        """Note an access; return the lane that races, and why."""
        region = np.searchsorted(self.starts, at, side="right") - 1
        cells = self.firsts[region] + ((at - self.starts[region]) // self.widths[region]).astype(np.int64)
        if values is not None and (twice := _written_twice(cells, values)) is not None:
            return twice, "one store gives it two values"
        lanes = np.arange(len(cells))
        parts = int(width // self.widths[region[0]])
        if parts > 1:
            cells, lanes = (cells[:, None] + np.arange(parts)).reshape(-1), np.repeat(lanes, parts)
        forbidden = {
            "load": ((self.wrote, "written"), (self.changed, "changed atomically")),
            "store": (
                (self.wrote, "written"),
                (self.read, "read"),
                (self.changed, "changed atomically"),
            ),
            "atomic": ((self.wrote, "written"), (self.read, "read")),
        }
        for owners, what in forbidden[action]:
            owner = owners[cells]
            others = (owner != 0) & (owner != program)
            if others.any():
                return int(lanes[others.argmax()]), f"another program has {what} it in this launch"
        mine = {"load": self.read, "store": self.wrote, "atomic": self.changed}[action]
        owner = mine[cells]
        mine[cells] = np.where((owner == 0) | (owner == program), program, MANY)
        return None


def _written_twice(cells: Array, values: Array) -> int | None:
    """Return a lane that stores to the cell of another one, and another value."""
    order = np.argsort(cells, kind="stable")
    same = cells[order][1:] == cells[order][:-1]
    if not same.any():
        return None
    bits = np.ascontiguousarray(values[order]).view(np.dtype(f"u{values.dtype.itemsize}"))
    differ = same & (bits[1:] != bits[:-1])
    return int(order[1:][differ][0]) if differ.any() else None


def _extent(tensor: Tensor) -> int:
    """Return the bytes from the first to the last element of a tensor."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.element_size())


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of any size that takes no memory, for `phantom`."""
    return torch.empty(shape, dtype=dtype, device="meta")
