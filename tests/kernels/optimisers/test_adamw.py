"""adamw: every path against fp64, plain torch and torch.optim.AdamW."""

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import assert_near, rounded, usable
from thread_counts import one_and_two

from marrow.kernels.optimisers.adamw import OPERATOR, adamw

PATHS = usable(OPERATOR)
OURS = [path for path in PATHS if path != "reference"]
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
KINDS = [(F32, F32, None), (F32, BF16, BF16), (BF16, BF16, None), (BF16, F32, F32), (F32, F32, BF16)]
SHAPES: list[tuple[int, ...]] = [(1,), (33, 7), (), (0,), (129,)]
FACTORS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

Lists = dict[str, list[torch.Tensor]]


def inputs(kinds: tuple[Any, ...], shapes: list[Any], seed: int = 0) -> Lists:
    """Tensors in fp64 that their dtypes hold exactly, moments as after some steps."""
    make = {
        name: [rounded(*shape or (1,), seed=seed + 9 * i).view(shape) for shape in shapes]
        for i, name in enumerate("pgmv")
    }
    squares = [square.square() for square in make["v"]]
    copies = [torch.full(shape, float("nan"), dtype=F64) for shape in shapes] if kinds[2] else []
    return {"params": make["p"], "grads": make["g"], "means": make["m"], "squares": squares, "copies": copies}


def step(path: str, lists: Lists, dtypes: tuple[Any, ...], count: int = 1, **factors: Any) -> Lists:
    """Run a path for one step on copies of `lists` in its dtypes; step numbers begin at `count`."""
    kinds = dict(zip(("params", "grads", "copies"), dtypes, strict=True))
    moments = F64 if dtypes[0] == F64 else F32
    given = {name: [x.to(kinds.get(name, moments), copy=True) for x in xs] for name, xs in lists.items()}
    before = [grad.clone() for grad in given["grads"]]
    used = {"step": count, "scale": 0.5, **FACTORS, **factors}
    numbers = [used[n] for n in ("lr", "beta1", "beta2", "eps", "weight_decay", "step", "scale")]
    OPERATOR.run(path, *given.values(), *numbers)
    for now, then in zip(given["grads"], before, strict=True):
        assert torch.equal(now.nan_to_num(), then.nan_to_num()), "a gradient was written"
    return given


def assert_near_fp64(path: str, kinds: tuple[Any, ...], shapes: list[Any], seed: int, **factors: Any) -> None:
    lists = inputs(kinds, shapes, seed)
    wide = tuple(kind and F64 for kind in kinds)
    ours, plain = step(path, lists, kinds, **factors), step("reference", lists, kinds, **factors)
    exact = step("reference", lists, wide, **factors)
    for name in ("params", "means", "squares", "copies"):
        for number, (a, b, c) in enumerate(zip(ours[name], plain[name], exact[name], strict=True)):
            # A parameter is a difference, a moment a sum of two: their ulp is that of the larger term.
            term = 4.0 if name != "squares" else 16.0  # normal numbers are below 4 or so
            assert_near(a, b, c, term=term, what=f"{path} {kinds} {name}[{number}]")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kinds", KINDS)
def test_a_step_stays_within_the_error_budget(path, kinds):
    assert_near_fp64(path, kinds, SHAPES, seed=1, count=3)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "triton"])
@pytest.mark.parametrize("kinds", KINDS)
@settings(max_examples=15)
@hypothesis.given(
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    count=st.integers(1, 10_000),
    decay=st.sampled_from([0.0, 0.1]),
)
def test_any_list_stays_within_the_error_budget(path, kinds, sizes, seed, count, decay):
    assert_near_fp64(path, kinds, [(size,) for size in sizes], seed, count=count, weight_decay=decay)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_ten_steps_are_those_of_torch_s_own(path, decay):
    params = [rounded(*shape, seed=i).float() for i, shape in enumerate([(5,), (9, 70)])]
    theirs = [torch.nn.Parameter(param.clone()) for param in params]
    optimiser = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    moments = [[torch.zeros_like(param) for param in params] for _ in range(2)]
    for count in range(1, 11):
        grads = [rounded(*param.shape, seed=100 * count + i).float() for i, param in enumerate(params)]
        for param, grad in zip(theirs, grads, strict=True):
            param.grad = grad.clone()
        optimiser.step()
        numbers = [1e-2, 0.9, 0.95, 1e-8, decay, count, 1.0]
        OPERATOR.run(path, params, grads, *moments, [], *numbers)
    for ours, expected in zip(params, theirs, strict=True):
        # Ten steps of up to lr each, whose roundings differ: some ulp of a parameter of up to 4.
        torch.testing.assert_close(ours, expected.detach(), rtol=0, atol=10 * 2.0**-22)


@pytest.mark.parametrize("path", OURS)
def test_a_copy_is_the_parameter_after_the_step(path):
    found = step(path, inputs((F32, F32, BF16), SHAPES), (F32, F32, BF16))
    for param, copy in zip(found["params"], found["copies"], strict=True):
        assert torch.equal(param.bfloat16(), copy)


@pytest.mark.parametrize("path", PATHS)
def test_a_gradient_that_is_not_finite_spoils_its_own_element_only(path):
    lists = inputs((F32, F32, None), [(40,), (3,)])
    lists["grads"][0][7] = float("nan")
    found = step(path, lists, (F32, F32, None))
    assert found["params"][0].isnan().nonzero().tolist() == [[7]]
    assert found["params"][1].isfinite().all()


@pytest.mark.parametrize("path", OURS)
def test_a_gradient_may_be_a_view(path):
    lists = inputs((F32, F32, None), [(12, 20)])
    whole = step(path, lists, (F32, F32, None))
    param, mean, square = (lists[name][0].float() for name in ("params", "means", "squares"))
    turned = lists["grads"][0].float().T.contiguous().T
    OPERATOR.run(path, [param], [turned], [mean], [square], [], *FACTORS.values(), 1, 0.5)
    assert torch.equal(param, whole["params"][0])


def test_threads_change_nothing():
    lists = inputs((F32, BF16, BF16), [(9000,), (70, 300), (5,)])
    one, two = one_and_two(lambda: step("cpu", lists, (F32, BF16, BF16)))
    assert all(torch.equal(a, b) for name in one for a, b in zip(one[name], two[name], strict=True))


def test_nothing_to_do_is_fine():
    assert adamw([], [], [], [], lr=0.1, step=1) is None


def test_what_does_not_fit_is_refused():
    x, y = torch.zeros(3), torch.zeros(4)
    with pytest.raises(ValueError, match="lists"):
        adamw([x], [x, x], [x], [x], lr=0.1, step=1)
    with pytest.raises(ValueError, match="shapes"):
        adamw([x], [y], [x], [x], lr=0.1, step=1)
    with pytest.raises(ValueError, match="contiguous"):
        adamw([torch.zeros(3, 2).T], [torch.zeros(2, 3)], *[[torch.zeros(2, 3)]] * 2, lr=0.1, step=1)
    with pytest.raises(ValueError, match="dtype"):
        adamw([x], [x], [x.bfloat16()], [x], lr=0.1, step=1)
    with pytest.raises(ValueError, match="dtype"):
        adamw([x, x.bfloat16()], [x, x], [x, x], [x, x], lr=0.1, step=1)
    with pytest.raises(ValueError, match="copy"):
        adamw([x], [x], [x], [x], lr=0.1, step=1, copies=[y])
    with pytest.raises(ValueError, match="step"):
        adamw([x], [x], [x], [x], lr=0.1, step=0)
    far = torch.zeros(3, device="meta")
    for given in ([far], [x], [x]), ([x], [far], [x]), ([x], [x], [far]):
        with pytest.raises(ValueError, match="not on cpu"):
            adamw([x], *given, lr=0.1, step=1)


def test_a_backward_through_the_old_values_is_refused():
    """The parameter is written in place: autograd must see that."""
    x, param = torch.randn(2, 3), torch.randn(3, 4, requires_grad=True)
    y = (x.requires_grad_() @ param).sum()
    with torch.no_grad():
        adamw([param], [torch.ones(3, 4)], [torch.zeros(3, 4)], [torch.zeros(3, 4)], lr=0.1, step=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    lists = [[x.float() for x in xs] for xs in inputs((F32, F32, None), [(5,), (3, 4)]).values()]
    torch.library.opcheck(torch.ops.marrow.adamw.default, (*lists, *FACTORS.values(), 1, 0.5))

    def work(params: list[Any], grads: list[Any], means: list[Any], squares: list[Any]) -> torch.Tensor:
        adamw(params, grads, means, squares, lr=0.1, step=2)
        return params[0] * 2

    eager, compiled = ([[x.clone() for x in xs] for xs in lists[:4]] for _ in range(2))
    expected = work(*eager)
    found = torch.compile(work, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(found, expected)
    assert all(
        torch.equal(a, b) for x, y in zip(eager, compiled, strict=True) for a, b in zip(x, y, strict=True)
    )
