"""Small Triton kernels whose right results are known, run by Triton's interpreter.

`CASES` holds, by name, functions that run one and say whether the result is right. Run as a program, this
file does so in the bare interpreter, without the mends of Marrow, and prints a JSON object of the answers
(or the error, in words).
"""

import json
import math
import os
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl

BF16 = torch.bfloat16


@triton.jit
def convert(source, target, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at).to(target.dtype.element_ty))


@triton.jit
def arithmetic(a, b, out, OPERATION: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    x, y = tl.load(a + at), tl.load(b + at)
    if OPERATION == "add":
        z = x + y
    elif OPERATION == "subtract":
        z = x - y
    elif OPERATION == "multiply":
        z = x * y
    elif OPERATION == "divide":
        z = x / y
    elif OPERATION == "less":
        z = tl.where(x < y, x, y)
    elif OPERATION == "maximum":
        z = tl.maximum(x, y)
    elif OPERATION == "minimum":
        z = tl.minimum(x, y)
    elif OPERATION == "negate":
        z = -x
    elif OPERATION == "absolute":
        z = tl.abs(x)
    elif OPERATION == "fma":
        z = tl.fma(x, y, y)
    elif OPERATION == "clamp":
        z = tl.clamp(x, -1.0, 1.0)
    elif OPERATION == "constant":
        z = x + tl.full([N], 1.5, x.dtype)
    tl.store(out + at, z.to(out.dtype.element_ty))


@triton.jit
def reduce(a, out, OPERATION: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(a + at)
    if OPERATION == "sum":
        tl.store(out, tl.sum(x, 0).to(out.dtype.element_ty))
    elif OPERATION == "max":
        tl.store(out, tl.max(x, 0).to(out.dtype.element_ty))
    elif OPERATION == "argmax":
        tl.store(out, tl.argmax(x, 0).to(out.dtype.element_ty))
    elif OPERATION == "cumsum":
        tl.store(out + at, tl.cumsum(x, 0).to(out.dtype.element_ty))
    elif OPERATION == "sort":
        tl.store(out + at, tl.sort(x))
    elif OPERATION == "exp":
        tl.store(out + at, tl.exp(x.to(tl.float32)).to(out.dtype.element_ty))


@triton.jit
def product(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x, y, input_precision=PRECISION))


@triton.jit
def widened(out, count):
    tl.store(out, count.to(tl.int64))


@triton.jit
def scaled(out, factor, flag):
    tl.store(out, factor.to(tl.float32) * 2)
    tl.store(out + 1, flag.to(tl.float32))


@triton.jit
def add_atomically(values, out, N: tl.constexpr, DISTINCT: tl.constexpr):
    at = tl.arange(0, N)
    tl.atomic_add(out + at % DISTINCT, tl.load(values + at), mask=at != 3)


def converted(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what the interpreter makes of 2^n numbers."""
    target = torch.empty(source.shape, dtype=dtype)
    convert[(1,)](source, target, source.numel())
    return target


def computed(name: str, a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    b = a if b is None else b
    out = torch.empty_like(a)
    arithmetic[(1,)](a, b, out, name, a.numel())
    return out


def reduced(name: str, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    reduce[(1,)](a, out, name, a.numel())
    return out


def dotted(a: torch.Tensor, b: torch.Tensor, precision: str = "ieee") -> torch.Tensor:
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.int32 if a.dtype == torch.int8 else torch.float32)
    product[(1,)](a, b, out, a.shape[0], b.shape[1], a.shape[1], precision)
    return out


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare to the bit; NaN equals NaN."""
    return (
        a.dtype == b.dtype
        and torch.equal(torch.isnan(a), torch.isnan(b))
        and bool(((a == b) | torch.isnan(a)).all())
    )


def numbers(n: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(BF16)


def _is_right(name: str, function: Callable[..., torch.Tensor]) -> Callable[[], bool]:
    def run() -> bool:
        a, b = numbers(), numbers(seed=1)
        return equal(computed(name, a, b), function(a.float(), b.float()).to(BF16))

    return run


def _dot_is_near(dtype: torch.dtype) -> bool:
    a, b = (numbers(256, seed).view(16, 16).repeat(1, 2).to(dtype) for seed in (2, 3))
    b = b.T.contiguous()
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    return bool(((dotted(a, b).double() - exact).abs() <= 32 * 2.0**-24 * size).all())


def _tf32_is_coarse() -> bool:
    """fp32 operands lose 13 bits of mantissa on a GPU unless the kernel says otherwise."""
    a = torch.full((16, 16), 1 + 2.0**-12)
    eye = torch.eye(16)
    return equal(dotted(a, eye, "tf32"), torch.ones(16, 16)) and equal(dotted(a, eye, "ieee"), a)


def _rounds_to_even() -> bool:
    bits = torch.arange(0x3F800000, 0x3F800000 + (1 << 18), 1 << 10, dtype=torch.int32)
    source = torch.cat([bits, bits | (-(2**31))]).view(torch.float32)
    return equal(converted(source, BF16), source.to(BF16))


def _keeps_nan() -> bool:
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7F80FFFF, -1], dtype=torch.int32)
    return bool(converted(bits.view(torch.float32), BF16).isnan().all())


def _atomic_adds() -> bool:
    values, out = torch.ones(16, dtype=BF16), torch.zeros(4, dtype=BF16)
    add_atomically[(1,)](values, out, 16, 4)
    return equal(out, torch.tensor([4, 4, 4, 3], dtype=BF16))


def _maximum_ignores_nan() -> bool:
    nan = float("nan")
    a, b = torch.tensor([nan, 1.0, nan, 4.0]), torch.tensor([3.0, nan, nan, 2.0])
    return equal(computed("maximum", a, b), torch.tensor([3.0, 1.0, nan, 4.0])) and equal(
        computed("minimum", a, b), torch.tensor([3.0, 1.0, nan, 2.0])
    )


def _clamp_ignores_nan() -> bool:
    given = torch.tensor([float("nan"), 5.0, -5.0, 0.5])
    return equal(computed("clamp", given), torch.tensor([-1.0, 1.0, -1.0, 0.5]))


def _max_of_nan_is_silent() -> bool:
    return math.isnan(reduced("max", torch.full((4,), float("nan")), torch.empty(1)).item())


def _fp8_saturates(dtype: torch.dtype) -> bool:
    limit = torch.finfo(dtype).max
    given = torch.tensor([1e6, -1e6, float("inf"), float("nan"), limit, limit * 1.01, 0.0, -0.0])
    expected = torch.tensor([limit, -limit, limit, float("nan"), limit, limit, 0.0, -0.0])
    return equal(converted(given, dtype).float(), expected)


def _fp8_is_the_nearest(dtype: torch.dtype) -> bool:
    """Search all values of the type for the nearest, ties to the even one."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    bits = torch.arange(256)
    kept = every.isfinite() & ~((every == 0) & (bits == 128))
    values, order = every[kept].sort()
    bits = bits[kept][order]
    middles = (values[1:] + values[:-1]) / 2
    given = torch.cat([values, middles, middles.nextafter(values[1:]), middles.nextafter(values[:-1])])
    given = given.float().double()
    distance = (given[:, None] - values[None, :]).abs()
    nearest = distance.min(1, keepdim=True).values == distance
    even = nearest & (bits % 2 == 0)
    place = torch.where(even.any(1), even.int().argmax(1), nearest.int().argmax(1))
    padded = torch.zeros(1 << (len(given) - 1).bit_length())
    padded[: len(given)] = given.float()
    return equal(converted(padded, dtype)[: len(given)].double(), values[place])


def _sum_is_near() -> bool:
    a = numbers(128)
    found = reduced("sum", a, torch.empty(1, dtype=BF16)).item()
    return abs(found - a.double().sum().item()) <= 7 * 2.0**-8 * a.double().abs().sum().item()


def _cumsum_is_near() -> bool:
    a = numbers(32)
    found = reduced("cumsum", a, torch.empty(32, dtype=torch.float32))
    return bool(((found - a.float().cumsum(0)).abs() <= 1e-5).all())


def _int_is_rounded() -> bool:
    given = torch.arange(-(2**20), 2**20, 1 << 12, dtype=torch.int32) + 257
    return equal(converted(given, BF16), given.to(BF16))


def _fp16_is_rounded() -> bool:
    given = numbers().half() * 1.003
    return equal(converted(given, BF16), given.to(BF16))


def _sorts() -> bool:
    return equal(reduced("sort", numbers(), torch.empty(64, dtype=BF16)), numbers().sort().values)


def _arguments_of_exp_are_promoted() -> bool:
    a = numbers()
    return equal(reduced("exp", a, torch.empty(64, dtype=BF16)), a.float().exp().to(BF16))


CASES: dict[str, Callable[[], bool]] = {
    "bf16 add": _is_right("add", torch.add),
    "bf16 subtract": _is_right("subtract", torch.sub),
    "bf16 multiply": _is_right("multiply", torch.mul),
    "bf16 divide": _is_right("divide", torch.div),
    "bf16 compare": _is_right("less", torch.minimum),
    "bf16 negate": _is_right("negate", lambda a, b: -a),
    "bf16 fma": _is_right("fma", lambda a, b: (a.double() * b + b).float()),
    "bf16 constant": _is_right("constant", lambda a, b: a + 1.5),
    "bf16 dot": lambda: _dot_is_near(BF16),
    "bf16 sum": _sum_is_near,
    "bf16 atomic add": _atomic_adds,
    "int to bf16": _int_is_rounded,
    "fp32 to bf16": _rounds_to_even,
    "fp32 NaN to bf16": _keeps_nan,
    "fp16 to bf16": lambda: equal(
        converted(numbers().half() * 1.003, BF16), (numbers().half() * 1.003).to(BF16)
    ),
    "fp32 to e4m3": lambda: _fp8_is_the_nearest(torch.float8_e4m3fn),
    "fp32 to e5m2": lambda: _fp8_is_the_nearest(torch.float8_e5m2),
    "e4m3 saturates": lambda: _fp8_saturates(torch.float8_e4m3fn),
    "e5m2 saturates": lambda: _fp8_saturates(torch.float8_e5m2),
    "maximum ignores NaN": _maximum_ignores_nan,
    "clamp ignores NaN": _clamp_ignores_nan,
    "max of nothing but NaN": _max_of_nan_is_silent,
    "fp32 dot is TF32": _tf32_is_coarse,
    "bf16 exp": _arguments_of_exp_are_promoted,
    "bf16 sort": lambda: equal(
        reduced("sort", numbers(), torch.empty(64, dtype=BF16)), numbers().sort().values
    ),
}
SOUND: dict[str, Callable[[], bool]] = {  # right in the bare interpreter too
    "bf16 absolute": _is_right("absolute", lambda a, b: a.abs()),
    "bf16 maximum": lambda: equal(computed("maximum", numbers()), numbers()),
    "bf16 max": lambda: reduced("max", numbers(), torch.empty(1)).item() == numbers().max().item(),
    "bf16 argmax": lambda: reduced("argmax", numbers(), torch.empty(1)).item() == numbers().argmax().item(),
    "bf16 cumsum": _cumsum_is_near,
    "fp16 dot": lambda: _dot_is_near(torch.float16),
    "fp32 dot": lambda: _dot_is_near(torch.float32),
    "fp8 dot": lambda: _dot_is_near(torch.float8_e4m3fn),
}


def interpreter_state() -> dict[str, object]:
    """Return the operations of the interpreter, to see whether something replaced them."""
    return dict(vars(triton.runtime.interpreter.InterpreterBuilder))


def answers() -> dict[str, bool | str]:
    """Run all cases; an error counts as an answer."""
    found: dict[str, bool | str] = {}
    for name, case in (CASES | SOUND).items():
        try:
            found[name] = case()
        except Exception as error:  # noqa: BLE001 (any error of a broken interpreter is an answer)
            found[name] = repr(error)
    return found


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("error")
    print(json.dumps(answers()))
