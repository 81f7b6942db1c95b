"""What holds for every operator, whatever it computes: a new one gives its small inputs here."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from operator_checks import filled_with_nan
from torch import Tensor

from marrow.kernels import roofline
from marrow.kernels.dispatch import Operator
from marrow.kernels.memory import checked

OPERATORS = roofline.load_operators()
Inputs = tuple[Any, ...]


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape) * scale


def whole(*shape: int, below: int = 8) -> Tensor:
    return torch.randint(0, below, shape)


def _attention() -> Inputs:
    from marrow.kernels.attention.attention import _plain, pack

    packing = pack(torch.arange(32) // 11, 16)
    return normal(32, 4, 64), normal(32, 2, 64), normal(32, 2, 64), *_plain(packing), 0, 0.0


def _paged_attention() -> Inputs:
    caches = [normal(6, 16, 2, 64) for _ in range(2)]
    numbers = [torch.tensor(x, dtype=torch.int32) for x in ([[5, 2, 0], [1, 3, 4]], [0, 1, 2], [40, 17])]
    return normal(2, 4, 64), *caches, None, None, *numbers, 1, 40, 0, 0.0


def _draws(rows: int) -> Inputs:
    from marrow.kernels.sampling.draws import Draw, Draws

    made = Draws.of([Draw(temperature=0.8, top_k=20, top_p=0.9, seed=row) for row in range(rows)])
    return made.factors_S6, made.keys_S4, made.history_N, made.starts_S1


def _int4() -> Inputs:
    from marrow.kernels.matmul.int4_weights import quantise_to_int4

    return normal(3, 128), *quantise_to_int4(normal(32, 128), group=32)


def _packed() -> Inputs:
    from marrow.kernels.search.top_k_int8 import quantise_vectors

    vectors = normal(70, 20)
    return vectors, *quantise_vectors(vectors), normal(2, 20), 3, None


def _quantised() -> Inputs:
    from marrow.kernels.matmul.quantise import quantise

    return *quantise(normal(6, 128), "int8", 1, 0), torch.float32, 1, 0


def _fp8() -> Inputs:
    return normal(3, 256), normal(32, 256).to(torch.float8_e4m3fn), torch.rand(1, 2), True


SMALL: dict[str, Callable[[], Inputs]] = {
    "adamw": lambda: (
        *([normal(5, 7), normal(9)] for _ in range(2)),
        *([torch.rand(5, 7), torch.rand(9)] for _ in range(2)),
        *([], 1e-3, 0.9, 0.999, 1e-8, 0.1, 3, 1.0),
    ),
    "add_rms_norm": lambda: (normal(5, 33), normal(5, 33), normal(33), 1e-5),
    "attention": _attention,
    "cross_entropy": lambda: (normal(5, 33), whole(5), 0.0, 0.0),
    "dequantise": _quantised,
    "fake_quantise": lambda: (normal(4, 128), "int8", 1, 0),
    "fp8_linear": _fp8,
    "geglu": lambda: (normal(5, 34), True),
    "grouped_linear": lambda: (
        normal(12, 16),
        normal(3, 16, 16),
        torch.tensor([4, 4, 12], dtype=torch.int32),
    ),
    "int4_linear": _int4,
    "int8_linear": lambda: (
        normal(3, 64),
        torch.randint(-127, 128, (32, 64), dtype=torch.int8),
        torch.rand(32),
        True,
    ),
    "layer_norm": lambda: (normal(5, 33), normal(33), normal(33), 1e-5),
    "linear_cross_entropy": lambda: (normal(6, 16), normal(20, 16), whole(6), True, True, 0.0, 0.0),
    "linear_log_probs": lambda: (normal(6, 16), normal(20, 16), whole(6), 1.0, True, True, True),
    "lora_linear": lambda: (
        *(normal(4, 32), normal(4, 16), normal(2, 16, 16), normal(2, 32, 16), torch.ones(2)),
        *(torch.tensor([0, 1, 1, 0], dtype=torch.int32), torch.rand(0, 32)),
    ),
    "newton_schulz": lambda: (normal(2, 16, 32), 5),
    "paged_attention": _paged_attention,
    "quantise": lambda: (normal(6, 128), "int8", 1, 0),
    "rms_norm": lambda: (normal(5, 33), normal(33), 1e-5),
    "rope": lambda: (normal(5, 2, 16), normal(5, 8), normal(5, 8)),
    "sample": lambda: (normal(3, 70), *_draws(3), 5),
    "softcap": lambda: (normal(5, 33), 30.0),
    "swiglu": lambda: (normal(5, 34),),
    "top_k": lambda: (normal(70, 20), normal(2, 20), 3, None),
    "top_k_int8": _packed,
    "verify_draft": lambda: (
        *(normal(4, 70), whole(4), torch.tensor([0, 2, 4]), normal(4, 70).softmax(-1)),
        *_draws(4),
    ),
}
CASES = [
    pytest.param(operator, path, id=f"{name} {path}")
    for name, operator in OPERATORS.items()
    for path in operator.paths
    if "cpu" in operator.paths[path].devices and operator.paths[path].unusable() is None
]
PLAIN = [case for case in CASES if case.values[1] != "triton"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


def inputs_of(operator: Operator) -> Inputs:
    torch.manual_seed(0)
    return SMALL[operator.name]()


def mapped(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """Apply a function to the tensors of inputs, in lists too."""
    if isinstance(values, Tensor):
        return function(values)
    return type(values)(mapped(function, x) for x in values) if isinstance(values, list | tuple) else values


def tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [x for one in values for x in tensors(one)] if isinstance(values, list | tuple) else []


def strided(x: Tensor) -> Tensor:
    """Return the same numbers, every other element of what holds them."""
    return torch.stack([x, x], -1)[..., 0] if x.ndim else x


def computed(operator: Operator, path: str, inputs: Inputs) -> list[Tensor]:
    """Return the outputs of a path, and the inputs that it writes to."""
    with filled_with_nan(), checked(), torch.no_grad():
        outputs = operator.paths[path].forward(*inputs)
    if operator.name == "top_k_int8":
        outputs = outputs[:2]  # the third counts how often a bound was not enough: each thread has its own
    return tensors(outputs) + (tensors(inputs) if operator.name == "adamw" else [])


def same(ours: list[Tensor], theirs: list[Tensor], *, within: float = 0.0) -> bool:
    return len(ours) == len(theirs) and all(
        torch.allclose(a.double(), b.double(), rtol=within, atol=within, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_every_operator_has_small_inputs_here() -> None:
    assert set(OPERATORS) == set(SMALL)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_reference_paths_and_examples_that_cost(name: str) -> None:
    operator = OPERATORS[name]
    assert "triton" in operator.paths or name == "top_k_int8", "only that one has none"
    assert {"cpu", "torch"} & set(operator.paths), "a path of its own on the CPU"
    results = operator.run("reference", *mapped(torch.clone, inputs_of(operator)))
    assert results is None or tensors(results)
    examples = operator.examples(torch.bfloat16, "meta")
    assert examples
    assert all(one.bytes > 0 and one.flops >= 0 and one.label for one in examples)
    assert len({one.label for one in examples}) == len(examples)


@pytest.mark.parametrize(("operator", "path"), CASES)
def test_fakes_tell_shape_type_and_strides_of_what_a_path_returns(operator: Operator, path: str) -> None:
    inputs = inputs_of(operator)
    expected = operator.fake(*mapped(lambda x: x.to("meta"), inputs))
    with torch.no_grad():
        outputs = operator.paths[path].forward(*inputs)
    assert len(tensors(outputs)) == len(tensors(expected))
    for real, fake in zip(tensors(outputs), tensors(expected), strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize(
    ("operator", "path"), [case for case in CASES if case.values[0].gradient is not None]
)
def test_fakes_tell_shape_type_and_strides_of_gradients(operator: Operator, path: str) -> None:
    gradient, inputs = operator.gradient, inputs_of(operator)
    assert gradient is not None and operator.paths[path].backward is not None
    with torch.no_grad():
        outputs = tensors(operator.paths[path].forward(*inputs))
        grads = [torch.ones_like(x) for x in outputs[: operator.results]]
        kept = gradient.saves(inputs, tuple(outputs))
        found = operator.paths[path].backward(*grads, *kept)
    expected = gradient.fake(*mapped(lambda x: x.to("meta"), [*grads, *kept]))
    assert len(tensors(found)) == len(tensors(expected)) == len(gradient.places)
    for real, fake in zip(tensors(found), tensors(expected), strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize(("operator", "path"), CASES)
def test_inputs_are_not_written_and_two_calls_agree(operator: Operator, path: str) -> None:
    inputs = inputs_of(operator)
    given = mapped(torch.clone, inputs)
    first = computed(operator, path, given)
    if operator.name != "adamw":  # which is made to write
        assert same(tensors(given), tensors(inputs))
    assert same(computed(operator, path, mapped(torch.clone, inputs)), first)


@pytest.mark.parametrize(("operator", "path"), PLAIN)
def test_the_number_of_threads_changes_no_bit(operator: Operator, path: str) -> None:
    inputs = inputs_of(operator)
    alone = computed(operator, path, mapped(torch.clone, inputs))
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same(computed(operator, path, mapped(torch.clone, inputs)), alone)


@pytest.mark.parametrize(("operator", "path"), [case for case in CASES if case.values[0].name != "adamw"])
def test_inputs_need_not_be_contiguous(operator: Operator, path: str) -> None:
    inputs = inputs_of(operator)
    # BLAS adds in another order for other strides: some ulp of values up to 10.
    within = 1e-5 if path == "torch" or operator.name == "newton_schulz" else 0.0
    ours = computed(operator, path, mapped(strided, inputs))
    assert same(ours, computed(operator, path, inputs), within=within)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_torch_library_accepts_every_operator(name: str) -> None:
    inputs = inputs_of(OPERATORS[name])
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "fp8_linear":
        checks.remove("test_schema")  # it multiplies inputs, which torch cannot do in fp8
    torch.library.opcheck(getattr(torch.ops.marrow, name).default, inputs, test_utils=checks)


def test_operators_are_imported_without_triton() -> None:
    """Where neither a GPU nor the interpreter is there, Triton is not loaded, though it is installed."""
    code = (
        "import os, sys\nos.environ.pop('TRITON_INTERPRET', None)\n"
        "from marrow.kernels.roofline import load_operators\n"
        "import torch\nprint(len(load_operators()), 'triton' in sys.modules, torch.version.cuda)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, is_loaded, cuda = done.stdout.split()
    assert int(count) == len(OPERATORS)
    assert is_loaded == "False" or cuda != "None"
