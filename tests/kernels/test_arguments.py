"""What does not fit is refused before C or Triton reads it: every operator, every input, every axis."""

from collections import Counter

import pytest
import torch
from portable_kernels import small_inputs
from torch import Tensor

from marrow.core.errors import UsageError
from marrow.kernels import dispatch, roofline
from marrow.kernels.activations.rope import rope
from marrow.kernels.arguments import MOST_KNOWN, Arguments, Expects
from marrow.kernels.attention.attention import attention, pack
from marrow.kernels.norms.rms_norm import rms_norm

OPERATORS = roofline.load_operators()
inputs_of = small_inputs().inputs_of
PLACES = [
    pytest.param(operator, number, id=f"{name} {operator.arguments.names[number]}")
    for name, operator in OPERATORS.items()
    for number, x in enumerate(inputs_of(operator))
    if isinstance(x, Tensor)
]


def refused(operator, inputs, number, changed):
    """Whether the operator says what is wrong with input `number`, and names the operator."""
    given = (*inputs[:number], changed, *inputs[number + 1 :])
    with torch.no_grad(), pytest.raises(UsageError, match=operator.name) as told:
        operator(*given)
    return told.value.hint is not None


@pytest.mark.parametrize(("operator", "number"), [place for place in PLACES if place.values[1]])
def test_another_device_is_refused(operator, number):
    inputs = inputs_of(operator)
    assert refused(operator, inputs, number, inputs[number].to("meta"))


@pytest.mark.parametrize(("operator", "number"), [place for place in PLACES if place.values[1]])
def test_another_dtype_is_refused(operator, number):
    inputs = inputs_of(operator)
    other = torch.complex64 if inputs[number].is_floating_point() else torch.float32
    assert refused(operator, inputs, number, inputs[number].to(other))


@pytest.mark.parametrize(("operator", "number"), PLACES)
def test_a_size_that_another_input_contradicts_is_refused(operator, number):
    inputs, axes = inputs_of(operator), operator.arguments.axes
    tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    letters = Counter(letter for i in tensors for letter in set(axes[i]))
    given = inputs[number]
    for axis, letter in enumerate(axes[number]):
        if letters[letter] > 1 or letter.isdigit():
            assert refused(operator, inputs, number, given.narrow(axis, 0, given.shape[axis] - 1))
    if axes[number] and axes[number][0] != operator.arguments.leading:
        assert refused(operator, inputs, number, given[..., None])


def test_the_message_names_the_operator_the_input_and_a_way_out():
    with pytest.raises(UsageError) as told:
        rms_norm(torch.ones(3, 8), torch.ones(7), 1e-5)
    assert told.value.message == "rms_norm: weight_C has shape [7]: its axis C is 7, it is 8 in x_NC"
    with pytest.raises(UsageError, match=r"weight_C is torch\.int64, must be torch\.float32 or") as told:
        rms_norm(torch.ones(3, 8), torch.ones(8, dtype=torch.int64), 1e-5)
    assert told.value.hint == "weight_C.to(torch.float32)"


@pytest.mark.parametrize("given", ["a", [[1.0]], 3, None])
def test_what_is_no_tensor_is_named(given):
    with pytest.raises(UsageError, match=r"x_NC is a \w+, not a tensor") as told:
        OPERATORS["rms_norm"](given, torch.ones(1), 1e-5)
    assert "torch.as_tensor" in str(told.value.hint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "3 query heads for 2 kv heads"),
        ({"tokens": 24}, "axis N is"),
        ({"window": -1}, "window = -1"),
    ],
)
def test_attention_says_what_names_cannot(change, message):
    packing = pack(torch.zeros(change.get("tokens", 16), dtype=torch.int32), 8)
    q, k = torch.ones(16, change.get("heads", 4), 64), torch.ones(16, 2, 64)
    with pytest.raises(UsageError, match=message):
        attention(q, k, k, packing, window=change.get("window", 0))


def test_rows_of_any_arrangement_fit_where_an_operator_takes_rows():
    x, weight = torch.randn(2, 3, 8), torch.ones(8)
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm(x.view(6, 8), weight, 1e-5).view(2, 3, 8))
    assert rms_norm(x[0, 0], weight, 1e-5).shape == (8,)
    with pytest.raises(UsageError, match="axes N, H, D"):
        rope(torch.ones(5, 16), torch.ones(5, 8), torch.ones(5, 8))


def test_what_was_once_found_good_is_not_looked_at_again_until_the_memory_is_full(monkeypatch):
    arguments = Arguments("plus", lambda x_N, y_N: x_N + y_N, Expects())
    looks = []
    monkeypatch.setattr(Arguments, "_check_all", lambda self, inputs: looks.append(len(inputs[0])))
    for size in (3, 3, 4, 3):
        arguments.check((torch.ones(size), torch.ones(size)))
    assert looks == [3, 4]
    for size in range(MOST_KNOWN + 5):
        arguments.check((torch.ones(size), torch.ones(size)))
    assert len(arguments._known) <= MOST_KNOWN


def test_a_second_derivative_is_refused_not_left_out():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    y = rms_norm(x, weight, 1e-5).square().sum()
    with pytest.raises(UsageError, match="cannot be differentiated again"):
        torch.autograd.grad(y, x, create_graph=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # which torch.func itself calls
def test_torch_func_and_forward_mode_go_through_the_reference():
    x, t, weight = torch.randn(3, 8), torch.randn(3, 8), torch.rand(8)
    theirs = torch.func.jvp(lambda x: x * (x.square().mean(-1, True) + 1e-5).rsqrt() * weight, (x,), (t,))
    ours = torch.func.jvp(lambda x: rms_norm(x, weight, 1e-5), (x,), (t,))
    torch.testing.assert_close(ours, theirs)
    rows = torch.func.vmap(lambda row: rms_norm(row, weight, 1e-5))(x)
    torch.testing.assert_close(rows, rms_norm(x, weight, 1e-5))
    with torch.autograd.forward_ad.dual_level():
        y = rms_norm(torch.autograd.forward_ad.make_dual(x, t), weight, 1e-5)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, theirs[1])


@pytest.mark.parametrize("name", ["int4_linear", "int8_linear", "fp8_linear", "sample", "quantise"])
def test_a_gradient_that_does_not_exist_is_refused_not_cut(name):
    operator = OPERATORS[name]
    first, *others = inputs_of(operator)
    with pytest.raises(UsageError, match="has no gradient"):
        operator(first.requires_grad_(), *others)
    with torch.no_grad():
        assert operator(first, *others) is not None


@pytest.mark.parametrize("path", ["cpu", "torch"])
@pytest.mark.parametrize("name", ["lora_linear", "top_k", "rms_norm", "linear_log_probs"])
def test_autocast_changes_nothing_inside_an_operator(name, path):
    operator = OPERATORS[name]
    if path not in operator.paths or operator.paths[path].unusable() is not None:
        pytest.skip("no such path here")
    dispatch.reset(path)
    inputs = inputs_of(operator)
    with torch.no_grad():
        plain = operator(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            under = operator(*inputs)
    dispatch.reset()
    torch.testing.assert_close(under, plain, rtol=0, atol=0)
