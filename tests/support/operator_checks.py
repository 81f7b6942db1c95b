"""Checks that every operator of `marrow.kernels` must pass, whatever it computes.

A test gives inputs in fp64 whose values fit the tested dtypes (`rounded`), and the checks run a path in a
dtype, plain torch in that dtype, and plain torch in fp64 on the very same numbers.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from marrow.kernels.dispatch import Operator
from marrow.kernels.memory import checked

ULP = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def rounded(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Return normal numbers in fp64 that bf16 holds exactly, so that every dtype sees the same ones."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (numbers * scale).bfloat16().double()


def usable(operator: Operator, device: str = "cpu") -> list[str]:
    """Return the paths of an operator that run here, the reference among them."""
    paths = operator.paths.items()
    return ["reference"] + [n for n, p in paths if device in p.devices and p.unusable() is None]


def run(
    operator: Operator, path: str, inputs: Sequence[Any], dtype: torch.dtype, *, seed: int = 0
) -> list[Tensor]:
    """Return results and gradients of a path, whose fp64 inputs are cast to `dtype` first.

    The gradients of the results are drawn from `seed`.
    """
    places = operator.gradient.numbers if operator.gradient else ()
    given = [x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float64 else x for x in inputs]
    for place in places:
        if isinstance(given[place], Tensor):
            given[place] = given[place].detach().requires_grad_()
    before = [x.detach().clone() if isinstance(x, Tensor) else x for x in given]
    with filled_with_nan(), checked():
        results = operator.run(path, *given)
        results = results if isinstance(results, tuple) else (results,)
        found = [x.detach() for x in results]
        leaves = [given[place] for place in places if isinstance(given[place], Tensor)]
        if leaves:
            float_results = [x for x in results if x.is_floating_point() and x.requires_grad]
            grads = [rounded(*x.shape, seed=seed + i).to(x.dtype) for i, x in enumerate(float_results)]
            found += torch.autograd.grad(float_results, leaves, grads, allow_unused=True)
    for now, then in zip(given, before, strict=True):
        if isinstance(now, Tensor):
            assert torch.equal(torch.nan_to_num(now.detach()), torch.nan_to_num(then)), "an input was written"
    return found


def assert_within_budget(
    operator: Operator,
    path: str,
    inputs: Sequence[Any],
    dtype: torch.dtype,
    *,
    plain: Callable[..., Any] | None = None,
    terms: Sequence[float] = (),
) -> None:
    """Assert that a path errs little more than plain torch in the same dtype.

    Budget, for each result and gradient: 1.5 times the greatest error that the reference (or `plain`)
    makes in this dtype against fp64, plus 2 units in the last place of the largest value: a path may round
    elsewhere, but not much more often. Where fp64 is not finite, the path must have the same.
    terms: for outputs whose sums cancel, the size of the largest term, whose ulp counts then (0: none).
    """
    ours = run(operator, path, inputs, dtype)
    exact = run(operator, "reference", inputs, torch.float64)
    theirs = run(operator, "reference", inputs, dtype) if plain is None else plain(inputs, dtype)
    for number, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.shape == c.shape, (number, a.shape, c.shape)
        assert a.dtype == b.dtype, (number, a.dtype, b.dtype)
        assert c.dtype == torch.float64 or not c.is_floating_point(), number
        term = terms[number] if number < len(terms) else 0.0
        assert_near(a, b, c, term=term, what=f"{operator.name} {path} {dtype} output {number}")


def assert_near(ours: Tensor, theirs: Tensor, exact: Tensor, *, term: float = 0.0, what: str = "") -> None:
    """Assert the budget of `assert_within_budget` for one tensor."""
    finite = exact.isfinite() & theirs.isfinite()
    a, b, c = ours.double(), theirs.double(), exact.double()
    same = (a == b) | (a.isnan() & b.isnan()) | (a == c)
    assert bool(same[~finite].all()), f"{what}: not finite elsewhere than plain torch"
    if not bool(finite.any()):
        return
    error, allowed = (a - c)[finite].abs().max(), (b - c)[finite].abs().max()
    ulp = ULP.get(ours.dtype, 0.0) * max(float(c[finite].abs().max()), term)
    assert error <= 1.5 * allowed + 2 * ulp, (
        f"{what}: error {error:.3e}, torch's {allowed:.3e}, ulp {ulp:.3e}"
    )


@contextlib.contextmanager
def filled_with_nan() -> Iterator[None]:
    """Let `torch.empty` give memory full of NaN (the largest integers): what is not written shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    was, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]


def assert_is_node(operator: Operator, inputs: Sequence[Any]) -> None:
    """Assert that torch.library accepts the operator and that a compiled graph gives what eager gives.

    Inputs in the dtype to test. Eager and compiled run the same path here, to the bit.
    """
    torch._dynamo.reset()  # all operators share the function below, and dynamo recompiles one 8 times only
    op = getattr(torch.ops.marrow, operator.name).default
    torch.library.opcheck(op, tuple(inputs))
    compiled = torch.compile(lambda *given: operator(*given), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), operator(*inputs), rtol=0, atol=0, equal_nan=True)
