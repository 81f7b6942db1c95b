"""Triton's interpreter, mended: bf16, fp8, NaN and TF32 as a GPU has them.

The bare interpreter keeps bf16 as uint16 and then computes with those integers: sums, products, `tl.dot`,
int -> bf16 and reductions are silently wrong, and fp32 -> bf16 cuts off instead of rounding. `mend` puts
thin functions around its builder: bf16 and fp8 become fp32 before every operation and are rounded once
after it, to nearest even; fp8 saturates, as `cvt.satfinite` does. Beyond types, minima and maxima ignore
NaN, and `tl.dot` of fp32 rounds its operands to TF32 unless the kernel asks for another precision.

`marrow.kernels.tile` applies it where TRITON_INTERPRET=1. Inside Triton's private names: other versions
than the proved ones are refused. fp64 -> bf16 goes through fp32.
"""

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as bare

from marrow.core.errors import UsageError
from marrow.kernels.memory import Memory, MemoryFault, every_program, watch

PROVED = ("3.6", "3.7")

Array = np.ndarray[Any, Any]

_FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_TABLES = {
    kind: torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy() for kind, dtype in _FP8.items()
}


def mend() -> None:
    """Put the mended operations into the interpreter. Calling twice is fine.

    Raises: UsageError for a Triton that this was not proved for.
    """
    if ".".join(triton.__version__.split(".")[:2]) not in PROVED:
        raise UsageError(
            f"the interpreter of triton {triton.__version__} is not known to be mended right",
            hint=f"unset TRITON_INTERPRET, or install triton {' or '.join(PROVED)}",
        )
    builder = bare.InterpreterBuilder
    if hasattr(builder, "get_bf16"):
        return
    for name, method in _REPLACED.items():
        setattr(builder, name, method)
    for owner, methods in _WRAPPED:
        for name, method in methods.items():
            setattr(owner, name, _around(getattr(owner, name), method))
    builder.memory = None
    bare.interpreter_builder.options = bare.InterpreterOptions(sanitize_overflow=False)
    bare.interpreter_builder.codegen_fns["min_dot_size"] = _min_dot_size
    bare._patch_lang_tensor = functools.partial(_patch_tensor, bare._patch_lang_tensor)
    # PERF: the bare interpreter looks through all of triton.language at every call of a device function, such
    # as tl.sum. With that gone, and no sums checked for overflow, rms_norm's rows take 1 / 14 of the time.
    bare._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    bare._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)


def run(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Run a kernel on the CPU, checked where `memory.checked` or `memory.phantom` ask for it.

    Args: arguments, constants: as of `tile.launch`; options such as num_warps mean nothing here.
    Raises: MemoryFault.
    """
    asked, names = watch(), kernel.arg_names
    given = inspect.getcallargs(kernel.fn, *arguments, **{k: v for k, v in constants.items() if k in names})
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    if any(x.is_meta for x in tensors.values()) and not (asked and asked.phantom):
        return
    launch = bare.GridExecutor(kernel.rewrite(), names, grid)
    memory = Memory(kernel.fn.__name__, tensors, asked) if asked else None
    for name, value in given.items():
        # The compiler makes a plain number of an integer that is 1, without `.to`; so does this.
        if name not in launch.constexprs and not (type(value) is int and value == 1):
            given[name] = _argument(value)
            if memory and name in tensors:
                given[name].handle.data[0] = memory.pointer(name)
    whole = (grid[0], grid[1] if len(grid) > 1 else 1, grid[2] if len(grid) > 2 else 1)
    builder = bare.interpreter_builder
    builder.set_grid_dim(*whole)
    builder.memory = memory
    try:
        with np.errstate(all="ignore"):
            for number, place in enumerate(asked.programs(whole) if asked else every_program(whole)):
                builder.set_grid_idx(*place)
                if memory:
                    memory.start(number, place)
                launch.fn(**given)
    except Exception as error:  # noqa: BLE001 (raised again)
        raise _root(error) from None
    finally:
        builder.memory = None


def _argument(value: Any) -> Any:
    """Return what a kernel gets for an argument; the bare interpreter leaves floats to Python."""
    if isinstance(value, bool):
        return tl.tensor(bare.TensorHandle(np.array([value]), tl.int1), tl.int1)
    if isinstance(value, float):
        return tl.tensor(bare.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    return bare._implicit_cvt(value)


def _root(error: BaseException) -> BaseException:
    """Return the memory fault inside of an interpreter's error, or the error."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, MemoryFault):
        found = found.__cause__
    return found or error


def decode(data: Array, kind: Any) -> Array:
    """Return the numbers that stored bits stand for: fp32 for bf16 and fp8, else the data itself."""
    if kind == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    return _TABLES[kind][data] if kind in _TABLES else data


def encode(numbers: Array, kind: Any, rounding: Any = None) -> Array:
    """Round numbers to bf16 or fp8 (to nearest even; bf16 towards zero on demand) and return the bits."""
    numbers = np.asarray(numbers, np.float32)
    if kind == tl.bfloat16:
        bits = numbers.view(np.uint32)
        up = 0 if rounding == ir.ROUNDING_MODE.RTZ else 0x7FFF + ((bits >> 16) & 1)
        rounded = np.where(np.isnan(numbers), bits | 0x400000, bits + up)
        return (rounded >> 16).astype(np.uint16)
    limit = float(_TABLES[kind][np.isfinite(_TABLES[kind])].max())
    clipped = torch.from_numpy(np.clip(numbers, -limit, limit))
    bits8: Array = clipped.to(_FP8[kind]).view(torch.uint8).numpy()
    return bits8


def _is_narrow(kind: Any) -> bool:
    return kind == tl.bfloat16 or kind in _FP8


def _around(plain: Callable[..., Any], mended: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that calls `mended` with the plain method first."""
    return lambda self, *arguments, **named: mended(plain, self, *arguments, **named)


def _handle(numbers: Array, kind: Any) -> Any:
    """Return a handle; bf16 and fp8 are rounded, truth values get their own type."""
    if numbers.dtype == np.bool_:
        return bare.TensorHandle(numbers, tl.int1)
    return bare.TensorHandle(encode(numbers, kind) if _is_narrow(kind) else numbers, kind)


def _wide(*handles: Any) -> list[Array]:
    return [decode(handle.data, handle.dtype.scalar) for handle in handles]


def _binary(plain: Any, self: Any, lhs: Any, rhs: Any, operation: Any) -> Any:
    if not _is_narrow(lhs.dtype.scalar):
        return plain(self, lhs, rhs, operation)
    return _handle(operation(*_wide(lhs, rhs)), lhs.dtype.scalar)


def _unary(plain: Any, self: Any, value: Any, operation: Any) -> Any:
    if not _is_narrow(value.dtype.scalar):
        return plain(self, value, operation)
    return _handle(operation(*_wide(value)), value.dtype.scalar)


def _ternary(plain: Any, self: Any, first: Any, second: Any, third: Any, operation: Any) -> Any:
    if operation is np.where or not _is_narrow(third.dtype.scalar):
        return plain(self, first, second, third, operation)
    return _handle(operation(*_wide(first, second, third)), third.dtype.scalar)


def _cast(self: Any, source: Any, target: Any) -> Any:
    numbers, kind = decode(source.data, source.dtype.scalar), target.scalar
    if _is_narrow(kind):
        return bare.TensorHandle(encode(numbers, kind), kind)
    return bare.TensorHandle(numbers.astype(bare._get_np_dtype(target)), kind)


def _convert(plain: Any, self: Any, source: Any, target: Any, rounding: Any) -> Any:
    kinds, kind = (source.dtype.scalar, target.scalar), target.scalar
    if rounding == ir.ROUNDING_MODE.RTZ and kind != tl.bfloat16:
        return plain(self, source, target, rounding)
    if any(kind.is_fp8() and kind not in _FP8 for kind in kinds):  # kinds that NVIDIA's GPUs lack
        return plain(self, source, target, rounding)
    numbers = decode(source.data, kinds[0])
    if _is_narrow(kind):
        return bare.TensorHandle(encode(numbers, kind, rounding), kind)
    return bare.TensorHandle(numbers.astype(bare._get_np_dtype(target)), kind)


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    x_wide, y_wide, z_wide = (numbers.astype(np.float64) for numbers in _wide(x, y, z))
    kind = z.dtype.scalar
    numbers = x_wide * y_wide + z_wide
    return _handle(numbers if _is_narrow(kind) else numbers.astype(z.data.dtype), kind)


def _clamp(self: Any, value: Any, low: Any, high: Any, propagates: Any) -> Any:
    def ignoring_nan(x: Array, a: Array, b: Array) -> Array:
        found: Array = np.fmin(np.fmax(x, a), b)
        return found

    keeps = propagates == ir.PROPAGATE_NAN.ALL
    return self.ternary_op(value, low, high, np.clip if keeps else ignoring_nan)


def _pick(operation: Any) -> Callable[..., Any]:
    """Make a minimum or maximum that ignores NaN."""
    return lambda self, lhs, rhs: self.binary_op(lhs, rhs, operation)


def _dot(self: Any, left: Any, right: Any, sums: Any, precision: Any, imprecise: Any) -> Any:
    a, b = _wide(left, right)
    if np.issubdtype(a.dtype, np.integer):  # exact: 53 bits hold the products of int8 and their sums
        found = (a.astype(np.float64) @ b.astype(np.float64)).astype(sums.data.dtype)
    else:
        wide = np.float64 if a.dtype == np.float64 else np.float32
        a, b = a.astype(wide), b.astype(wide)
        if left.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32:
            a, b = _tf32(a), _tf32(b)
        found = a @ b
    return bare.TensorHandle((found + sums.data).astype(sums.data.dtype), sums.dtype.scalar)


def _tf32(numbers: Array) -> Array:
    """Round to 10 bits of mantissa, ties away from zero; what is not finite stays."""
    bits = numbers.view(np.uint32)
    rounded = ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(numbers), rounded, numbers)


def _min_dot_size(left: Any, right: Any) -> tuple[int, int, int]:
    """Demand what the tensor cores of all architectures demand."""
    return (1, 1, 32 if left.scalar.primitive_bitwidth == 8 else 16)


def _atomic(plain: Any, self: Any, operation: Any, places: Any, value: Any, mask: Any, *rest: Any) -> Any:
    """Add to bf16 in memory one number after another: two of them may have one address."""
    kind = value.dtype.scalar
    if kind != tl.bfloat16 or operation != ir.ATOMIC_OP.FADD:
        return plain(self, operation, places, value, mask, *rest)
    shape = np.broadcast_shapes(places.data.shape, value.data.shape, mask.data.shape)
    at, new, taken = (np.broadcast_to(x.data, shape).reshape(-1) for x in (places, value, mask))
    before, yes, none = np.zeros(len(at), np.uint16), np.ones(1, bool), np.zeros(1, np.uint16)
    for number in np.flatnonzero(taken):
        place = np.array(at[number : number + 1])
        old = bare._interpreter.load(place, yes, none, none.dtype)
        sums = decode(old, kind) + decode(new[number : number + 1], kind)
        bare._interpreter.store(place, encode(sums, kind), yes)
        before[number] = old[0]
    return bare.TensorHandle(before.reshape(shape), kind)


def _sum(plain: Any, self: Any, given: Any) -> Any:
    """Sum by halves, rounding each partial sum, as a tree of bf16 additions does."""
    if not _is_narrow(given.dtype):
        return plain(self, given)
    axis, numbers = self.axis, decode(given.handle.data, given.dtype)
    if axis is None:
        numbers, axis = numbers.reshape((-1,) + (1,) * (numbers.ndim - 1)), 0
    numbers = np.moveaxis(numbers, axis, 0)
    while len(numbers) > 1:
        half = len(numbers) // 2
        numbers = decode(encode(numbers[:half] + numbers[half:], given.dtype), given.dtype)
    kept = np.moveaxis(numbers, 0, axis) if self.keep_dims else numbers[0]
    bits = encode(kept if self.keep_dims or self.axis is not None else kept.reshape(()), given.dtype)
    return self.to_tensor(bits, given.dtype)


def _extreme(plain: Any, self: Any, given: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
    """Ignore NaN where plain values are reduced, without numpy's warning for rows of nothing else."""
    given = given[0] if isinstance(given, tuple) else given
    operation = {np.nanmax: np.fmax, np.nanmin: np.fmin}.get(val_reduce_op)
    numbers = decode(given.handle.data, given.dtype)
    if operation is not None:
        found = operation.reduce(numbers, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(encode(found, given.dtype) if _is_narrow(given.dtype) else found, given.dtype)
    assert not _is_narrow(given.dtype), "tl.max and tl.min promote before they look for an index"
    return plain(self, given, val_reduce_op, idx_reduce_op)


def _scan(operation: Any) -> Callable[..., Any]:
    def scan(plain: Any, self: Any, given: Any) -> Any:
        if not _is_narrow(given.dtype):
            return plain(self, given)
        sums = operation(decode(given.handle.data, given.dtype), axis=self.axis)
        return [self.to_tensor(encode(sums, given.dtype), given.dtype)]

    return scan


def _patch_tensor(plain: Any, tensor: Any, *scope: Any) -> None:
    """Let a number be an index of `range`: Triton 3.6 fails with NumPy 2.4."""
    plain(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.squeeze())


def _load(plain: Any, self: Any, places: Any, mask: Any, *rest: Any, **named: Any) -> Any:
    places, kept = _watched(self, places, mask, "load")
    found = plain(self, places, kept, *rest, **named)
    if kept is not mask:
        phantom = np.broadcast_to(mask.data, kept.data.shape) & ~kept.data
        if phantom.any():
            found.data = np.where(phantom, np.zeros((), found.data.dtype), found.data)
    return found


def _store(plain: Any, self: Any, places: Any, value: Any, mask: Any, *rest: Any) -> Any:
    places, mask = _watched(self, places, mask, "store", value)
    return plain(self, places, value, mask, *rest)


def _change(plain: Any, self: Any, operation: Any, places: Any, value: Any, mask: Any, *rest: Any) -> Any:
    places, mask = _watched(self, places, mask, "atomic")
    return plain(self, operation, places, value, mask, *rest)


def _compare_and_swap(plain: Any, self: Any, places: Any, *rest: Any) -> Any:
    everywhere = bare.TensorHandle(np.ones_like(places.data, bool), tl.int1)
    places, mask = _watched(self, places, everywhere, "atomic")
    if not mask.data.all():
        raise MemoryFault("tl.atomic_cas has no mask, so that it cannot run on phantom tensors")
    return plain(self, places, *rest)


def _watched(self: Any, places: Any, mask: Any, action: str, value: Any = None) -> tuple[Any, Any]:
    """Check an access and take the marks off its addresses."""
    if self.memory is None:
        return places, mask
    width = max(1, places.get_element_ty().primitive_bitwidth // 8)
    stored = None if value is None else value.data
    real, taken = self.memory.touch(places.data, np.asarray(mask.data), width, action, stored)
    return bare.TensorHandle(real, places.dtype), bare.TensorHandle(taken, tl.int1)


def _quietly(plain: Any, self: Any, *arguments: Any, **named: Any) -> Any:
    """Run a launch without numpy's warnings: overflow and 0 / 0 are silent on a GPU."""
    with np.errstate(all="ignore"):
        return plain(self, *arguments, **named)


# What stands in the place of a method, and what is put around one: (the plain method, self, ...).
_REPLACED: dict[str, Callable[..., Any]] = {
    "cast_impl": _cast,
    "create_fma": _fma,
    "create_clampf": _clamp,
    "create_dot": _dot,
    "create_maxnumf": _pick(np.fmax),
    "create_minnumf": _pick(np.fmin),
    "get_bf16": lambda self, value: bare.TensorHandle(encode(np.array([value]), tl.bfloat16), tl.bfloat16),
}
_WRAPPED: list[tuple[Any, dict[str, Callable[..., Any]]]] = [
    (
        bare.InterpreterBuilder,
        {
            "binary_op": _binary,
            "unary_op": _unary,
            "ternary_op": _ternary,
            "create_fp_to_fp": _convert,
            "create_atomic_rmw": _atomic,
        },
    ),
    (bare.ReduceOps, {"sum": _sum, "min_max": _extreme}),
    (bare.ScanOps, {"cumsum": _scan(np.cumsum), "cumprod": _scan(np.cumprod)}),
    (bare.GridExecutor, {"__call__": _quietly}),
    (  # last, and so first to see an access
        bare.InterpreterBuilder,
        {
            "create_masked_load": _load,
            "create_masked_store": _store,
            "create_atomic_rmw": _change,
            "create_atomic_cas": _compare_and_swap,
        },
    ),
]
