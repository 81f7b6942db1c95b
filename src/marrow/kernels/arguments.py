"""What an operator's tensors must be, read off the names of its reference's parameters: k_NKD is [N, K, D].

    attention(q_NHD, k_NKD, v_NKD, first_N, ...)     one size for each letter, over all tensors
                 bf16   bf16   bf16   int32          the first one's dtype, or what is said of a name
                 one device for all

C code and Triton kernels read what they are told to: a wrong size or dtype is memory of somebody else, not an
error. So every eager call is checked here, once for each set of shapes, dtypes and devices.
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from marrow.core.errors import UsageError

Dtypes = torch.dtype | tuple[torch.dtype, ...]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDE = (torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MOST_KNOWN = 4096  # sets of shapes; a server sees a few hundred
_AXES = re.compile(r"_([A-Z0-9]+)$")


@dataclass(frozen=True, slots=True)
class Expects:
    """What the names of the inputs do not say.

    dtypes: of the inputs that do not have the first one's. leading: the first letter of the first input
    stands for any number of axes (rows of any arrangement), wherever an input begins with that letter.
    axes: in place of those in a name; "" for any shape. also: inputs -> what is wrong and a hint, or None;
    asked at every call, since it may look at numbers beside the tensors.
    """

    dtypes: Mapping[str, Dtypes] = field(default_factory=dict)
    leading: bool = False
    axes: Mapping[str, str] = field(default_factory=dict)
    also: Callable[..., tuple[str, str] | None] | None = None


class Arguments:
    """The checks of one operator, whose reference names the inputs."""

    def __init__(self, operator: str, reference: Callable[..., Any], expects: Expects) -> None:
        self.operator, self.expects = operator, expects
        try:
            self.names = tuple(inspect.signature(reference).parameters)
        except ValueError:  # a function of torch's own, which names nothing
            self.names = ()
        self.axes = tuple(expects.axes.get(name, _axes_in(name)) for name in self.names)
        assert not {*expects.dtypes, *expects.axes} - set(self.names), f"{operator}: no such inputs"
        self.leading = self.axes[0][:1] if expects.leading else None
        self._known: set[Any] = set()

    def check(self, inputs: tuple[Any, ...]) -> None:
        """Refuse tensors that do not fit one another.

        Raises: UsageError naming the operator, the input, what it is and what it must be.
        """
        key = tuple(
            [
                (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else len(x) if type(x) is list else None
                for x in inputs
            ]
        )
        if key not in self._known:
            self._check_all(inputs)
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known.add(key)
        if self.expects.also is not None and (found := self.expects.also(*inputs)) is not None:
            self._refuse(*found)

    def _check_all(self, inputs: tuple[Any, ...]) -> None:
        first, sizes = inputs[0], dict[str, tuple[int, str]]()
        if isinstance(first, list) and all(isinstance(x, Tensor) for x in first):
            return  # an optimiser, which checks its lists itself
        if not isinstance(first, Tensor):
            what = f"{self.names[0]} is a {type(first).__name__}, not a tensor"
            self._refuse(what, "torch.as_tensor makes one")
        for name, axes, x in zip(self.names, self.axes, inputs, strict=False):
            if not isinstance(x, Tensor):
                continue
            if x.device != first.device:
                what = f"{name} is on {x.device}, {self.names[0]} on {first.device}"
                self._refuse(what, f'{name}.to("{first.device}")')
            allowed = self.expects.dtypes.get(name, first.dtype)
            allowed = allowed if isinstance(allowed, tuple) else (allowed,)
            if x.dtype not in allowed:
                what = f"{name} is {x.dtype}, must be {' or '.join(map(str, allowed))}"
                self._refuse(what, f"{name}.to({allowed[0]})")
            if axes:
                self._check_shape(name, axes, x, sizes)

    def _check_shape(self, name: str, axes: str, x: Tensor, sizes: dict[str, tuple[int, str]]) -> None:
        shape, given = list(x.shape), f"{name} has shape {list(x.shape)}"
        inner = len(axes) - 1
        if axes[0] == self.leading and len(shape) >= inner:
            shape = [math.prod(shape[: len(shape) - inner]), *shape[len(shape) - inner :]]
        if len(shape) != len(axes):
            self._refuse(f"{given}, must have the axes {', '.join(axes)}", "reshape it")
        for letter, size in zip(axes, shape, strict=True):
            wanted, where = (int(letter), "") if letter.isdigit() else sizes.setdefault(letter, (size, name))
            if size != wanted:
                is_so = f"it is {wanted} in {where}" if where else f"must be {wanted}"
                self._refuse(f"{given}: its axis {letter} is {size}, {is_so}", "both must be equal")

    def _refuse(self, what: str, hint: str) -> NoReturn:
        raise UsageError(f"{self.operator}: {what}", hint=hint)


def _axes_in(name: str) -> str:
    found = _AXES.search(name)
    return found[1] if found else ""
