"""What an operator is, and which path it takes: the only place that chooses.

    Operator   a name, its plain-torch reference (the oracle), and the paths that compute it faster
    Path       one way to compute it: "torch" (fast plain torch, any device), "cpu" (a C file),
               "triton"; a forward and a backward on plain tensors that know nothing of autograd
    Case       what a choice depends on: device type, dtype, and the operator's own shape class

`MARROW_KERNELS=auto|reference|torch|cpu|triton` asks for a path; auto takes the fastest that is
registered and usable, and not known to lose in the case. A path that was asked for, or that auto would
take, and that is not usable here gives one RuntimeWarning with the reason, and the next best is used.
Every operator is `torch.ops.marrow.NAME` too, with fakes and gradients, so that `torch.compile`, FSDP2
and export see one opaque node; eager calls skip that way, which costs 3 times as much. `choices()` lists
what is used (for `marrow doctor`); `reset()` forgets it all and reads the environment again.
"""

import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from marrow.core.errors import UsageError
from marrow.kernels.arguments import Arguments, Expects

ENVIRONMENT = "MARROW_KERNELS"
ORDER = ("triton", "cpu", "torch", "reference")  # fastest first
MODES = ("auto", *ORDER)
DEVICES = ("cpu", "cuda")
LISTED_DTYPES = (torch.bfloat16, torch.float32)

_PLAIN = (Tensor, torch.nn.Parameter)

_library: Any = torch.library.Library("marrow", "FRAGMENT")  # type: ignore[no-untyped-call]
_operators: dict[str, "Operator"] = {}
_mode: str | None = None


class Case(NamedTuple):
    """What the choice of a path depends on. shape: the operator's shape class; None where it has one."""

    device: str
    dtype: torch.dtype
    shape: Hashable = None


@dataclass(frozen=True, slots=True)
class Path:
    """One way to compute an operator.

    forward: the operator's inputs -> its outputs; allocates them, never writes into inputs.
    backward: the gradients of the results, then what `Gradient.saves` kept -> gradients.
    dtypes: of the first tensor; None takes all. unusable: says why not on this machine, or None; that is
    worth a warning. loses: says why another path is better in a case, or None; that is not.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] | None
    unusable: Callable[[], str | None]
    loses: Callable[[Case], str | None]

    def refuses(self, case: Case, *, is_asked_for: bool) -> tuple[str | None, bool]:
        """Return why not to take this path in a case, or None, and whether that surprises a user."""
        if self.dtypes is not None and case.dtype not in self.dtypes:
            return f"not made for {_short(case.dtype)}", True
        if (why := self.unusable()) is not None:
            # A C file that does not compile has warned itself.
            return why, is_asked_for or self.name == "triton"
        return (None if is_asked_for else self.loses(case)), False


class _Found(NamedTuple):
    """What was chosen (path None: the reference), and why not the path that was wanted."""

    path: Path | None
    reason: str = ""
    is_surprise: bool = False

    @property
    def name(self) -> str:
        return self.path.name if self.path else "reference"


@dataclass(frozen=True, slots=True)
class Gradient:
    """How an operator is differentiated, whatever its path.

    inputs: numbers of the inputs that have gradients, in the order in which backward returns them; a
    tuple of numbers where several inputs share one, which backward returns once.
    saves: (inputs, outputs), two tuples -> what backward gets after the gradients of the results, tensors
    and plain values. fake: shapes of what backward returns, from the same arguments; annotated.
    """

    inputs: tuple[int | tuple[int, ...], ...]
    saves: Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Any, ...]]
    fake: Callable[..., Any]

    @property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """The inputs that each of backward's outputs belongs to."""
        return tuple(place if isinstance(place, tuple) else (place,) for place in self.inputs)

    @property
    def numbers(self) -> tuple[int, ...]:
        """All inputs that have gradients."""
        return tuple(number for place in self.places for number in place)


@dataclass(frozen=True, slots=True)
class Example:
    """Inputs at one shape, for the roofline, ahead-of-time compilation and tests.

    bytes and flops: of one forward, by the operator's cost model.
    """

    label: str
    inputs: tuple[Any, ...]
    bytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class Choice:
    """What an operator uses in a case; `reason` is empty when it is the path that was wanted."""

    op: str
    device: str
    dtype: str
    path: str
    reason: str = ""


class Operator:
    """One operator: call it with plain tensors, and it takes the path that suits them.

    name: unique; also torch.ops.marrow.NAME. The first input is a tensor, or a list of them.
    reference: plain torch, differentiable by torch itself, any dtype.
    fake: the outputs' shapes from the inputs, annotated (torch.library reads the schema off it).
    results: how many leading outputs are the results; those behind them are kept for backward only.
    gradient: None where the operator has none. examples: (dtype, device) -> inputs at standard shapes.
    shape_class: inputs -> what the choice of a path depends on besides device and dtype.
    mutates: names of the inputs that it writes to (optimisers alone). expects: what the inputs must be,
    beside what their names say.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        *,
        fake: Callable[..., Any],
        gradient: Gradient | None = None,
        results: int = 1,
        examples: Callable[[torch.dtype, str], list[Example]] = lambda dtype, device: [],
        shape_class: Callable[..., Hashable] | None = None,
        mutates: tuple[str, ...] = (),
        expects: Expects = Expects(),  # noqa: B008 - frozen
    ) -> None:
        assert name not in _operators, f"{name} is registered twice"
        self.name, self.reference, self.fake, self.gradient = name, reference, fake, gradient
        self.results, self.examples, self.shape_class = results, examples, shape_class
        self.arguments = Arguments(name, reference, expects)
        self.paths: dict[str, Path] = {}
        self._differentiable = gradient.numbers if gradient else ()
        self._chosen: dict[Case, _Found] = {}
        _operators[name] = self
        self._define(mutates)

    def add(
        self,
        name: str,
        forward: Callable[..., Any],
        backward: Callable[..., Any] | None = None,
        *,
        devices: tuple[str, ...] | None = None,
        dtypes: tuple[torch.dtype, ...] | None = None,
        unusable: Callable[[], str | None] = lambda: None,
        loses: Callable[[Case], str | None] = lambda case: None,
    ) -> None:
        """Add a path. Called at the end of the operator's file."""
        assert name in ORDER[:-1] and (backward is not None) == (self.gradient is not None), name
        devices = devices or (("cpu",) if name == "cpu" else DEVICES)
        self.paths[name] = Path(name, forward, backward, devices, dtypes, unusable, loses)

    def __call__(self, *inputs: Any) -> Any:
        """Compute the results: a tensor, or a tuple where there are several."""
        if torch.compiler.is_compiling():
            return self._traced(*inputs)
        if _is_transformed():
            return self.reference(*inputs)
        self.arguments.check(inputs)
        if torch.is_autocast_enabled(device := _first(inputs).device.type):
            with torch.autocast(device, enabled=False):  # the operator's dtypes are those of its inputs
                return self(*inputs)
        path = self._choose(self.case(inputs))
        if path is None:
            return self.reference(*inputs)
        if torch.is_grad_enabled():
            for number in self._differentiable:
                if inputs[number] is not None and inputs[number].requires_grad:
                    return self._traced(*inputs) if _is_traced(inputs) else self._eager(path, inputs)
            if self.gradient is None and getattr(inputs[0], "requires_grad", False):
                raise UsageError(
                    f"{self.name} has no gradient, and {self.arguments.names[0]} asks for one",
                    hint="call it under torch.no_grad(), or detach the input",
                )
        if _is_traced(inputs):
            return self._traced(*inputs)
        return self._only_results(path.forward(*inputs))

    def case(self, inputs: Sequence[Any]) -> Case:
        """Return what the choice of a path depends on."""
        first = _first(inputs)
        shape = None if self.shape_class is None else self.shape_class(*inputs)
        return Case(first.device.type, first.dtype, shape)

    def choose(self, case: Case) -> tuple[str, str]:
        """Return the name of the path taken in a case, and why a faster one is not; no warning."""
        found = self._resolve(case)
        return found.name, found.reason

    def run(self, path: str, *inputs: Any) -> Any:
        """Compute the results by a path of your choice (tests, the roofline), gradients and all."""
        return self.reference(*inputs) if path == "reference" else self._eager(self.paths[path], inputs)

    def forget(self) -> None:
        """Choose anew at the next call."""
        self._chosen.clear()

    def _traced(self, *inputs: Any) -> Any:
        if not _is_node(self.name, *self.case(inputs)[:2]):
            return self.reference(*inputs)
        return self._only_results(self._op(*inputs))

    def _eager(self, path: Path, inputs: tuple[Any, ...]) -> Any:
        if self.gradient is None:
            return self._only_results(path.forward(*inputs))
        return self._only_results(_Differentiable.apply(self, path, *inputs))  # type: ignore[no-untyped-call]

    def _only_results(self, outputs: Any) -> Any:
        if not isinstance(outputs, tuple):
            return outputs
        return outputs[0] if self.results == 1 else outputs[: self.results]

    def _choose(self, case: Case) -> Path | None:
        found = self._chosen.get(case)
        if found is None:
            found = self._chosen[case] = self._resolve(case)
            if found.is_surprise and case.dtype != torch.float64:  # which is for oracles
                where = f"{self.name} on {case.device} in {_short(case.dtype)}"
                warnings.warn(
                    f"{where} takes its {found.name} path: {found.reason}", RuntimeWarning, stacklevel=4
                )
        return found.path

    def _resolve(self, case: Case) -> "_Found":
        """Return the path for a case, and why it is not the one that was wanted."""
        mode = wanted()
        if mode == "reference":
            return _Found(None)
        known = {name: path for name, path in self.paths.items() if case.device in path.devices}
        if case.device == "cpu" and mode != "triton":
            known.pop("triton", None)  # which is an interpreter there, for tests
        found = _Found(None)
        if mode != "auto" and mode not in known:
            found = _Found(None, f"{mode} was asked for, it has no such path", True)
        for name in sorted(known, key=lambda name: (name != mode, ORDER.index(name))):
            path = known[name]
            why, is_surprise = path.refuses(case, is_asked_for=name == mode)
            if why is None:
                return _Found(path, found.reason, found.is_surprise)
            if not found.reason or (is_surprise and not found.is_surprise):
                found = _Found(None, f"{name}: {why}", is_surprise)
        return found

    def _define(self, mutates: tuple[str, ...]) -> None:
        """Register torch.ops.marrow.NAME, and NAME_backward where there is a gradient."""
        schema = torch.library.infer_schema(self.fake, mutates_args=mutates)
        self._op = self._register(self.name, schema, self._forward, self.fake)
        if (gradient := self.gradient) is None:
            return
        backward_schema = torch.library.infer_schema(gradient.fake, mutates_args=())
        backward_op = self._register(f"{self.name}_backward", backward_schema, self._backward, gradient.fake)

        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return _spread(backward_op(*grads[: self.results], *_kept(ctx)), ctx.places, ctx.num_inputs)

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            _keep(ctx, gradient, inputs, output)

        torch.library.register_autograd(f"marrow::{self.name}", backward, setup_context=setup, lib=_library)

    def _register(
        self, name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]
    ) -> Callable[..., Any]:
        _library.define(name + schema)
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"marrow::{name}", fake, lib=_library)
        op: Callable[..., Any] = getattr(torch.ops.marrow, name).default
        return op

    def _forward(self, *inputs: Any) -> Any:
        path = self._choose(self.case(inputs)) or self._fastest(inputs)
        return path.forward(*inputs)

    def _backward(self, *arguments: Any) -> Any:
        backward = self._fastest(arguments).backward
        assert backward is not None
        return backward(*arguments)

    def _fastest(self, arguments: tuple[Any, ...]) -> Path:
        """Return a path by device and dtype alone: all keep the same for backward, so any may follow any."""
        first = _first(arguments)
        path = self._choose(Case(first.device.type, first.dtype))
        if path is None:
            raise UsageError(
                f"torch.ops.marrow.{self.name} has no path for {_short(first.dtype)} on {first.device.type}",
                hint=f"call {self.name}() of marrow.kernels, which has its reference, or cast the input",
            )
        return path


class _Differentiable(torch.autograd.Function):
    """A path's forward and backward, eager."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, path: Path, *inputs: Any) -> Any:
        """Run the path's forward and keep what its backward needs."""
        assert operator.gradient is not None
        outputs = path.forward(*inputs)
        ctx.path, ctx.results, ctx.name = path, operator.results, operator.name
        _keep(ctx, operator.gradient, inputs, outputs)
        if isinstance(outputs, tuple):
            ctx.mark_non_differentiable(*outputs[operator.results :])
        ctx.set_materialize_grads(operator.results > 1)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """Run the path's backward."""
        if all(grad is None for grad in grads[: ctx.results]):
            return (None,) * (2 + int(ctx.num_inputs))
        kept = _kept(ctx)
        if torch.is_grad_enabled():  # which is so in a backward only with create_graph
            for x in (*grads, *kept):
                if isinstance(x, Tensor) and x.requires_grad:
                    raise UsageError(
                        f"the gradient of {ctx.name} cannot be differentiated again",
                        hint=f"set {ENVIRONMENT}=reference for second derivatives, or leave out create_graph",
                    )
        found = ctx.path.backward(*grads[: ctx.results], *kept)
        return (None, None, *_spread(found, ctx.places, ctx.num_inputs))


def choices() -> list[Choice]:
    """List what the operators of the loaded files use, by device and dtype; CUDA where there is one."""
    devices = DEVICES if torch.cuda.is_available() else DEVICES[:1]
    listed = []
    for name, operator in sorted(_operators.items()):
        for device in devices:
            for dtype in LISTED_DTYPES:
                path, reason = operator.choose(Case(device, dtype))
                listed.append(Choice(name, device, _short(dtype), path, reason))
    return listed


def chosen(device: str, dtype: torch.dtype) -> dict[str, str]:
    """Return the path of each operator of the loaded files on a device type, for one dtype."""
    return {name: one.choose(Case(device, dtype))[0] for name, one in sorted(_operators.items())}


def operators() -> dict[str, Operator]:
    """Return the operators of the loaded files by name."""
    return dict(_operators)


def reset(mode: str | None = None) -> None:
    """Forget all choices; the next ones follow `mode`, or the environment where that is None.

    Raises: UsageError for an unknown mode.
    """
    global _mode
    if mode is not None:
        _check(mode, "kernels mode")
    _mode = mode
    for operator in _operators.values():
        operator.forget()


def wanted() -> str:
    """Return the mode in force.

    Raises: UsageError if the environment variable holds an unknown one.
    """
    if _mode is not None:
        return _mode
    mode = os.environ.get(ENVIRONMENT, "auto") or "auto"
    _check(mode, ENVIRONMENT)
    return mode


def _is_node(name: str, device: str, dtype: torch.dtype) -> bool:
    """Return whether a graph shows the operator as one node, not its reference (fakes have their device)."""
    usable = [path for path in _operators[name].paths.values() if device in path.devices]
    usable = [path for path in usable if path.dtypes is None or dtype in path.dtypes]
    return wanted() != "reference" and any(path.unusable() is None for path in usable)


# It looks for compilers and devices, which a graph cannot. torch.compiler.assume_constant_result does this
# too, but that imports dynamo, and Triton with it: a second of every process that uses a kernel.
_is_node._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check(mode: str, what: str) -> None:
    if mode not in MODES:
        raise UsageError(f"{what} = {mode!r} is unknown", hint=f"allowed: {', '.join(MODES)}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first(inputs: Sequence[Any]) -> Tensor:
    """Return the tensor whose device and dtype an operator goes by."""
    first: Tensor = inputs[0][0] if isinstance(inputs[0], list) else inputs[0]
    return first


def _is_transformed() -> bool:
    """Return whether torch.func or forward-mode differentiation is at work: both go through the reference."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_traced(inputs: tuple[Any, ...]) -> bool:
    """Return whether something must see one node: a tensor subclass (fake, DTensor) or a mode."""
    for x in inputs:  # any() with a generator costs a microsecond
        first = x[0] if type(x) is list and x else x
        if type(first) not in _PLAIN and isinstance(first, Tensor):
            return True
    return _get_current_dispatch_mode() is not None


def _keep(ctx: Any, gradient: Gradient, inputs: tuple[Any, ...], outputs: Any) -> None:
    """Store what backward needs: tensors where autograd looks after them, the rest beside."""
    kept = gradient.saves(inputs, outputs if isinstance(outputs, tuple) else (outputs,))
    ctx.save_for_backward(*(x for x in kept if isinstance(x, Tensor)))
    ctx.plain = [None if isinstance(x, Tensor) else (x,) for x in kept]
    ctx.places, ctx.num_inputs = gradient.places, len(inputs)


def _kept(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if plain is None else plain[0] for plain in ctx.plain]


def _spread(grads: Any, places: tuple[tuple[int, ...], ...], num_inputs: int) -> tuple[Any, ...]:
    """Put gradients to the inputs that they belong to, None to the rest."""
    spread: list[Any] = [None] * num_inputs
    for place, grad in zip(places, grads if isinstance(grads, tuple) else (grads,), strict=True):
        for number in place:
            spread[number] = grad
    return tuple(spread)
