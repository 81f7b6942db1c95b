"""Batches onto the accelerator while it still works on the one before.

    for batch in DeviceCopy(loader, "cuda"):       # batch lies on the device, its copy was overlapped
        step(batch)

On CUDA a batch goes through pinned memory and a stream of its own; the stream that computes waits
for that copy alone. One batch is under way while one is in use (double buffering); memory of a
batch is not given to another before the computing stream is done with it. On other devices it is
a plain `.to(device)`, and on the CPU nothing at all. `on_device` is a plain function on the batch,
run on the copying stream: decoding, normalising or augmenting there, as DALI does.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from marrow.core.span import span
from marrow.loader.stages import WAIT

DEPTH = 2  # batches on the device: one in use, one under way


class DeviceCopy:
    """An iterator of batches on a device.

    Args: batches: gives them on the CPU: tensors in dictionaries, lists, tuples or dataclasses; all else
        is handed through. device: where to. on_device: batch -> batch, applied there. depth:
        batches on the device at once, the one in use included.
    Cost: one copy into pinned memory a batch (skipped if it is pinned already) and the transfer.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        device: str | torch.device,
        on_device: Callable[[Any], Any] | None = None,
        *,
        depth: int = DEPTH,
    ) -> None:
        self._batches = iter(batches)
        self._device = torch.device(device)
        self._on_device = on_device
        self._depth = max(1, depth)
        self._under_way: deque[tuple[Any, Any]] = deque()  # (batch, event of its copy)
        self._error: BaseException | None = None
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._stream is None:
            return self._moved(next(self._batches))
        if not self._under_way:
            self._start_copy()
        if not self._under_way:
            assert self._error is not None
            raise self._error
        batch, event = self._under_way.popleft()
        with span(f"{WAIT}: copy"):
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)  # the stream waits, not this thread
            map_tensors(batch, lambda tensor: _used_on(tensor, current))
        while self._error is None and len(self._under_way) < self._depth - 1:
            self._start_copy()
        return batch

    def _start_copy(self) -> None:
        """Begin to copy the next batch; keep the end or an error of the source for its turn."""
        assert self._stream is not None
        try:
            batch = next(self._batches)
        except BaseException as error:  # noqa: BLE001 - raised when the batches before it are taken
            self._error = error
            return
        with torch.cuda.stream(self._stream):
            moved = self._moved(map_tensors(batch, _pinned))
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self._under_way.append((moved, event))

    def _moved(self, batch: Any) -> Any:
        if self._device.type != "cpu":
            batch = map_tensors(batch, lambda tensor: tensor.to(self._device, non_blocking=True))
        return batch if self._on_device is None else self._on_device(batch)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a value with each tensor in it replaced.

    Dictionaries, lists, tuples and dataclasses are gone into.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(one, function) for key, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(one, function) for one in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(one, function) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value,
            **{field.name: map_tensors(getattr(value, field.name), function) for field in fields(value)},
        )
    return value


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_pinned() else tensor.pin_memory()


def _used_on(tensor: Tensor, stream: Any) -> Tensor:
    """Tell the allocator that a stream other than the copying one reads the tensor."""
    tensor.record_stream(stream)
    return tensor
