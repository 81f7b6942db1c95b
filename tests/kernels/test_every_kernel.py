"""What holds for the Triton path of every operator, whatever it computes."""

import pytest
import torch

from marrow.kernels import compiled, dispatch, tile
from marrow.kernels.dispatch import Example
from marrow.kernels.memory import meta, phantom

pytestmark = pytest.mark.skipif(not tile.IS_INTERPRETED, reason="kernels run on a GPU here")

BF16, FP32, INT8, UINT8 = torch.bfloat16, torch.float32, torch.int8, torch.uint8
FAILED = compiled.load_operators() if tile.IS_INTERPRETED else []
OPERATORS = {name: x for name, x in sorted(dispatch.operators().items()) if "triton" in x.paths}
EXAMPLES = [
    pytest.param(operator, example, id=f"{name} {example.label}")
    for name, operator in OPERATORS.items()
    for example in operator.examples(BF16, "meta")[::-1][:2]
]


def half(*shape):
    return meta(*shape, dtype=BF16)


def int64(*shape):
    return meta(*shape, dtype=torch.int64)


def int32(numbers):
    return torch.as_tensor(numbers, dtype=torch.int32)


def rows_of_tokens(tokens, row):
    """The first and the last token of each token's document, where each row is one."""
    at = torch.arange(tokens)
    return int32(at // row * row), int32(at // row * row + row - 1)


def long_attention():
    q, k = half(1 << 20, 32, 128), half(1 << 20, 32, 128)
    return q, k, k, *rows_of_tokens(1 << 20, 256), 256, True, 0, 0.0


def far_blocks():
    """Two sequences in the last blocks of a cache of 2^32 elements."""
    cache = half(1 << 18, 16, 8, 128)
    blocks = int32(torch.arange((1 << 18) - 128, 1 << 18).view(2, 64))
    plain = (1, 1024, 0, 0.0)
    return half(2, 32, 128), cache, cache, None, None, blocks, int32([0, 1, 2]), int32([1024, 900]), *plain


# Inputs whose largest tensor has more than 2^31 elements; none of it is allocated but numbers that steer.
HUGE = {
    "adamw": lambda: (
        *([half(1 << 16, 1 << 16)] for _ in range(2)),
        *([meta(1 << 16, 1 << 16)] for _ in range(2)),
        [], 1e-3, 0.9, 0.999, 1e-8, 0.1, 3, 1.0,
    ),
    "add_rms_norm": lambda: (half(3 << 18, 8192), half(3 << 18, 8192), half(8192), 1e-5),
    "attention": long_attention,
    "cross_entropy": lambda: (half(1 << 15, 3 << 16), int64(1 << 15), 0.0, 0.0),
    "dequantise": lambda: (
        meta(1 << 17, 1 << 15, dtype=UINT8), meta(1 << 17, 256), meta(1 << 17, 256, dtype=UINT8),
        BF16, 1, 128,
    ),
    "fake_quantise": lambda: (half(1 << 17, 1 << 15), "fp8", 128, 128),
    "fp8_linear": lambda: (
        half(16, 1 << 15), meta(1 << 17, 1 << 15, dtype=torch.float8_e4m3fn), meta(1 << 10, 256), True,
    ),
    "geglu": lambda: (half(1 << 17, 3 << 14), True),
    "grouped_linear": lambda: (half(64, 2048), half(2048, 1408, 2048), int32([0] * 2047 + [64])),
    "int4_linear": lambda: (
        half(1, 1 << 15),
        meta(1 << 14, 1 << 12, 64, dtype=UINT8),
        meta(1 << 14, 256, 16, dtype=torch.float16),
        meta(1 << 14, 256, 16, dtype=UINT8),
        None,
    ),
    "int8_linear": lambda: (half(1, 1 << 15), meta(1 << 17, 1 << 15, dtype=INT8), meta(1 << 17), False),
    "layer_norm": lambda: (half(3 << 18, 8192), half(8192), half(8192), 1e-5),
    "linear_cross_entropy": lambda: (
        half(64, 4096), half(1 << 20, 4096), int64(64), True, True, 0.0, 0.0,
    ),
    "linear_log_probs": lambda: (
        half(64, 4096), half(1 << 20, 4096), int64(64), 1.0, True, True, True,
    ),
    "lora_linear": lambda: (
        half(3 << 17, 1 << 13), half(3 << 17, 1 << 13), half(1, 16, 1 << 13), half(1, 1 << 13, 16),
        meta(1), None, meta(1, 1 << 13),
    ),
    "newton_schulz": lambda: (half(4096, 1024, 1024), 1),
    "paged_attention": far_blocks,
    "quantise": lambda: (half(1 << 17, 1 << 15), "int4z", 1, 128),
    "rms_norm": lambda: (half(3 << 18, 8192), half(8192), 1e-5),
    "rope": lambda: (half(1 << 20, 32, 128), half(1 << 20, 64), half(1 << 20, 64)),
    "sample": lambda: (
        half(5 << 15, 1 << 14), meta(5 << 15, 6), int64(5 << 15, 4),
        int64(24), int64((5 << 15) + 1), -1,
    ),
    "softcap": lambda: (half(1 << 17, 1 << 15), 50.0),
    "swiglu": lambda: (half(1 << 17, 3 << 14),),
    "top_k": lambda: (half(3 << 20, 1024), half(1, 1024), 10, None),
    "verify_draft": lambda: (
        half(5 << 15, 1 << 14), int64(5 << 15), torch.arange(0, (5 << 15) + 1, 5), meta(5 << 15, 1 << 14),
        meta(5 << 15, 6), int64(5 << 15, 4), int64(24), int64((5 << 15) + 1),
    ),
}  # fmt: skip


def ends(grid):
    """The first program of a grid and the last."""
    return sorted({(0, 0, 0), tuple(size - 1 for size in grid)})


def test_all_operators_can_be_imported():
    assert FAILED == []


def test_every_operator_is_tested_beyond_2_to_the_31():
    assert set(HUGE) == set(OPERATORS)


@pytest.mark.slow
@pytest.mark.parametrize(("operator", "example"), EXAMPLES)
def test_no_address_is_outside_of_its_tensor(operator, example):
    with phantom(ends) as watch:
        compiled.run_example(operator, operator.paths["triton"], example)
    assert watch.launches > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(HUGE))
def test_offsets_beyond_2_to_the_31_are_right(name, monkeypatch):
    # As many programs as rows: each takes few of them.
    monkeypatch.setattr(tile, "multiprocessors", lambda device: 1 << 15)
    operator, inputs = OPERATORS[name], HUGE[name]()
    tensors = [x for y in inputs for x in (y if isinstance(y, list) else [y]) if isinstance(x, torch.Tensor)]
    assert max(x.numel() for x in tensors) > 2**31
    with phantom(ends) as watch:
        compiled.run_example(operator, operator.paths["triton"], Example("huge", inputs, 0, 0))
    assert watch.launches > 0
