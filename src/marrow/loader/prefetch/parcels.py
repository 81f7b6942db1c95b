"""Parcels: batches that travel from a worker to its parent in memory that both of them map.

    worker   pickle the batch, arrays left out -> copy the arrays into a crate -> send the small rest
    parent   unpickle, arrays as views of the crate -> the crate is free again when no view is left

A *crate* is an anonymous file (memfd): it has no name, so there is nothing to leave behind in
/dev/shm, whoever is killed whenever, and a container's small /dev/shm is no limit. Its descriptor
is sent once; crates are used again, so pages are faulted in once. A batch is copied once, by the
worker. torch's own ways were not taken: `file_system` leaves its files after kill -9, and
`file_descriptor` opens one descriptor for each tensor of each batch.

torch is not imported here: a worker that makes numpy arrays never loads it.
"""

import io
import mmap
import os
import pickle
import sys
import tempfile
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

ALIGN = 64  # bytes; arrays begin at cache lines
GRAIN = 1 << 16  # sizes of crates are multiples of this
INLINE_BYTES = 4096  # smaller arrays go through the socket with the rest
SPARE = 1.25  # a crate's room over the batch it is made for, so that the next one fits too


@dataclass(frozen=True, slots=True)
class Packed:
    """A parcel under way. head: the pickle without its arrays. places: (start, end) of each in the crate.

    crate: which one, -1 for none. num_bytes: size of a crate that is sent for the first time, else
    0. dropped: crates that are not used any more.
    """

    head: bytes
    places: tuple[tuple[int, int], ...]
    crate: int
    num_bytes: int = 0
    dropped: tuple[int, ...] = ()


def anonymous_file(num_bytes: int) -> int:
    """Open a file without a name that lies in memory; return its descriptor."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("marrow", os.MFD_CLOEXEC)
    else:
        descriptor, path = tempfile.mkstemp()
        os.unlink(path)
    os.ftruncate(descriptor, num_bytes)
    return descriptor


class Packer:
    """The worker's side: packs batches into its crates."""

    def __init__(self) -> None:
        self._crates: dict[int, mmap.mmap] = {}
        self._free: set[int] = set()
        self._next = 0

    def free(self, crates: tuple[int, ...]) -> None:
        """Hear that nobody looks into these crates any more."""
        self._free.update(crates)

    def pack(self, value: Any) -> tuple[Packed, int | None]:
        """Pack a value. Returns: the parcel and, if its crate is new, the descriptor to send and close.

        Raises: what pickle raises for a value that it cannot carry.
        """
        buffers: list[memoryview] = []
        file = io.BytesIO()
        _Pickler(file, buffers).dump(value)
        head = file.getvalue()
        if not buffers:
            return Packed(head, (), -1), None
        places, end = [], 0
        for buffer in buffers:
            start = -(-end // ALIGN) * ALIGN
            end = start + buffer.nbytes
            places.append((start, end))
        crate, descriptor, dropped = self._crate(end)
        target = np.frombuffer(self._crates[crate], np.uint8)
        for buffer, (low, high) in zip(buffers, places, strict=True):
            target[low:high] = np.frombuffer(buffer, np.uint8)  # lets Python's lock go, unlike a memoryview
        num_bytes = len(target) if descriptor is not None else 0
        return Packed(head, tuple(places), crate, num_bytes, dropped), descriptor

    def _crate(self, num_bytes: int) -> tuple[int, int | None, tuple[int, ...]]:
        """Choose the smallest free crate that is large enough, or make one in place of one too small."""
        fitting = [crate for crate in self._free if len(self._crates[crate]) >= num_bytes]
        if fitting:
            crate = min(fitting, key=lambda one: (len(self._crates[one]), one))
            self._free.remove(crate)
            return crate, None, ()
        dropped = tuple(sorted(self._free))
        for old in dropped:
            self._crates.pop(old)
        self._free.clear()
        room = -(-int(num_bytes * SPARE) // GRAIN) * GRAIN
        descriptor = anonymous_file(room)
        crate, self._next = self._next, self._next + 1
        self._crates[crate] = mmap.mmap(descriptor, room)
        return crate, descriptor, dropped


class Unpacker:
    """The parent's side for one worker: opens parcels, and knows which crates are free again."""

    def __init__(self) -> None:
        self._crates: dict[int, mmap.mmap] = {}
        self._freed: deque[int] = deque()  # appended to by whatever thread drops the last view
        self._leases: dict[int, weakref.ref[Any]] = {}
        self._opened = 0

    def open(self, packed: Packed, descriptor: int | None) -> Any:
        """Unpack a value; its arrays are views of the crate, writable, and hold it as long as they live."""
        for old in packed.dropped:
            self._crates.pop(old, None)
        if packed.crate < 0:
            return pickle.loads(packed.head)
        if descriptor is not None:
            try:
                self._crates[packed.crate] = mmap.mmap(descriptor, packed.num_bytes)
            finally:
                os.close(descriptor)
        whole = np.frombuffer(self._crates[packed.crate], np.uint8)
        freed, crate, leases = self._freed, packed.crate, self._leases
        self._opened = number = self._opened + 1

        def give_back(_: "weakref.ref[Any]") -> None:
            del leases[number]
            freed.append(crate)

        leases[number] = weakref.ref(whole, give_back)
        return pickle.loads(packed.head, buffers=[whole[low:high] for low, high in packed.places])

    def freed(self) -> tuple[int, ...]:
        """Return the crates that became free since the last call."""
        found = []
        while self._freed:
            found.append(self._freed.popleft())
        return tuple(found)


class _Pickler(pickle.Pickler):
    """Leaves large arrays, also those in tensors, out of the pickle."""

    def __init__(self, file: io.BytesIO, buffers: list[memoryview]) -> None:
        def leave_out(buffer: pickle.PickleBuffer) -> bool:
            raw = buffer.raw()
            if raw.nbytes < INLINE_BYTES:
                return True  # keep it in
            buffers.append(raw)
            return False

        super().__init__(file, protocol=5, buffer_callback=leave_out)
        torch = sys.modules.get("torch")
        self._tensor = None if torch is None else torch.Tensor

    def reducer_override(self, value: Any) -> Any:
        if self._tensor is None or type(value) is not self._tensor:
            return NotImplemented
        if (
            value.device.type != "cpu"
            or value.layout is not sys.modules["torch"].strided
            or value.requires_grad
        ):
            return NotImplemented
        return _tensor_of, _array_of(value)


def _array_of(tensor: Any) -> tuple[Any, str]:
    """Return a tensor's memory as an array that numpy knows, and the name of its own type."""
    torch = sys.modules["torch"]
    name = str(tensor.dtype).removeprefix("torch.")
    tensor = tensor.resolve_conj().resolve_neg()
    try:
        return np.ascontiguousarray(tensor.numpy()).reshape(tensor.shape), name
    except TypeError:  # numpy has no such type, as bfloat16
        whole = {1: torch.int8, 2: torch.int16}[tensor.element_size()]
        return tensor.contiguous().view(whole).numpy(), name


def _tensor_of(array: Any, name: str) -> Any:
    import torch  # only where a tensor comes

    tensor = torch.from_numpy(array)
    dtype = getattr(torch, name)
    return tensor if tensor.dtype == dtype else tensor.view(dtype)
