"""int4_linear: exact sums of integers on the CPU, the error budget elsewhere, and the formats of others."""

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from operator_checks import assert_is_node, assert_within_budget, rounded, run, usable

from marrow.core.errors import UsageError
from marrow.kernels.matmul.int4_linear import (
    OPERATOR,
    forward_cpu,
    int4_linear,
    int4_linear_integer_reference,
    int4_linear_reference,
)
from marrow.kernels.matmul.int4_weights import (
    Int4Weight,
    dequantise_int4,
    from_awq,
    from_gptq,
    pack_int4,
    quantise_to_int4,
    unpack_int4,
)

PATHS = usable(OPERATOR)
HAS_C = "cpu" in PATHS
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def random_weight(outputs: int, inputs: int, group: int, seed: int) -> Int4Weight:
    """Return packed random numbers, with zeros 0 and 16 among them."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (outputs, inputs), generator=generator)
    scales = torch.rand(outputs, inputs // group, generator=generator) * 0.1 + 0.001
    zeros = torch.randint(0, 17, (outputs, inputs // group), generator=generator)
    return pack_int4(q, scales, zeros)


@pytest.mark.skipif(not HAS_C, reason="no C compiler")
@pytest.mark.parametrize("use_tiles", [False, True])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 256, 2048])
def test_sums_of_integers_are_exact(group, use_tiles):
    """Rows of whole numbers up to 127, scales of 1: every step is exact in fp32, so y is too."""
    outputs, inputs = 48, 2 * group
    generator = torch.Generator().manual_seed(group)
    q = torch.randint(0, 16, (outputs, inputs), generator=generator)
    zeros = torch.randint(0, 17, (outputs, 2), generator=generator)
    packed = pack_int4(q, torch.ones(outputs, 2), zeros)
    w = q - zeros.repeat_interleave(group, 1)
    for rows in (1, 2, 3, 4, 5, 6, 7, 12, 16, 17, 33, 130):
        x = torch.randint(-127, 128, (rows, inputs), generator=generator)
        x[:, ::group], x[:, 5::group] = 127, -127  # so that a step is 1
        y = forward_cpu(x.float(), *packed, use_tiles=use_tiles)
        assert torch.equal(y.long(), x @ w.T), rows
    x[:, :] = -127  # the largest sums there are
    assert torch.equal(forward_cpu(x.float(), *packed, use_tiles=use_tiles).long(), x @ w.T)


@pytest.mark.skipif(not HAS_C, reason="no C compiler")
@pytest.mark.parametrize("use_tiles", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=20)
@hypothesis.given(
    rows=st.integers(1, 40), panels=st.integers(1, 5), groups=st.integers(1, 4), seed=st.integers(0, 2**31)
)
def test_the_cpu_computes_what_the_integer_reference_does(dtype, use_tiles, rows, panels, groups, seed):
    packed = random_weight(16 * panels, 64 * groups, 64, seed)
    x = rounded(rows, 64 * groups, seed=seed).to(dtype)
    expected = int4_linear_integer_reference(x, *packed)
    y = forward_cpu(x, *packed, use_tiles=use_tiles)
    # A sum of `groups` fp32 products of three factors, then one rounding to the dtype.
    terms = int4_linear_integer_reference(x.abs(), *packed[:2], torch.zeros_like(packed.zeros)).max()
    allowed = (groups + 4) * 2.0**-24 * terms + torch.finfo(dtype).eps / 2 * expected.abs()
    assert ((y.double() - expected).abs() <= allowed).all()


@pytest.mark.skipif(not HAS_C, reason="no C compiler")
def test_rows_of_8_bits_err_as_stated():
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(1))
    x = rounded(8, 4096, seed=2)
    x[3, 7] = 300.0  # an outlier spoils its own group alone
    packed = quantise_to_int4(weight)
    exact = int4_linear_reference(x, *packed)
    error = (forward_cpu(x.float(), *packed).double() - exact).abs()
    w = dequantise_int4(*packed[:3], torch.float64).abs().view(256, 32, 128).sum(-1)
    bound = torch.einsum("mg,ng->mn", x.view(8, 32, 128).abs().amax(-1) / 254, w)
    assert (error <= bound * (1 + 1e-5)).all()
    normal = [0, 1, 2, 4, 5, 6, 7]
    assert error[normal].square().mean().sqrt() < 0.008 * exact[normal].std()


@pytest.mark.parametrize("path", [path for path in PATHS if path != "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "group"),
    [(1, 16, 128, 128), (3, 48, 256, 32), (17, 80, 128, 64), (1, 32, 32, 32), (2, 16, 512, 256)],
)
def test_values_stay_within_the_error_budget(path, dtype, rows, outputs, inputs, group):
    packed = random_weight(outputs, inputs, group, rows)
    assert_within_budget(OPERATOR, path, (rounded(rows, inputs, seed=rows), *packed), dtype)


@pytest.mark.parametrize("path", PATHS)
def test_inputs_that_were_reordered_find_theirs(path):
    packed = random_weight(32, 256, 128, 3)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(4)).int()
    x = rounded(3, 256, seed=5).float()
    expected = OPERATOR.run(path, x[:, order.long()], *packed[:3], None)
    assert torch.equal(OPERATOR.run(path, x, *packed[:3], order), expected)


@pytest.mark.parametrize("path", PATHS)
def test_views_leading_axes_and_empty_inputs_work(path):
    packed = random_weight(32, 128, 128, 6)
    x = rounded(4, 6, 256, seed=7).float()[:, ::2, ::2]
    y = run(OPERATOR, path, (x, *packed), torch.float32)[0]
    assert y.shape == (4, 3, 32)
    assert torch.equal(y, OPERATOR.run(path, x.contiguous(), *packed))
    assert OPERATOR.run(path, x[:0], *packed).shape == (0, 3, 32)
    half = [None if part is None else part[1:] for part in packed]  # a shard of the outputs
    torch.testing.assert_close(OPERATOR.run(path, x, *half), y[..., 16:])


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_is_not_finite_spoils_no_other(path):
    packed = random_weight(16, 128, 64, 8)
    x = rounded(20, 128, seed=9).float()
    x[1, 3], x[2, 70] = float("nan"), float("inf")
    y = OPERATOR.run(path, x, *packed)
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    assert y[[0, *range(3, 20)]].isfinite().all()


@pytest.mark.skipif(not HAS_C, reason="no C compiler")
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_threads_change_nothing(rows):
    packed, x = random_weight(80, 256, 128, 10), rounded(rows, 256, seed=11).float()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = OPERATOR.run("cpu", x, *packed)
        torch.set_num_threads(2)
        assert torch.equal(OPERATOR.run("cpu", x, *packed), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not HAS_C, reason="no C compiler")
def test_a_row_of_zeros_gives_zeros():
    packed = random_weight(16, 64, 32, 12)
    assert (forward_cpu(torch.zeros(3, 64), *packed) == 0).all()


def test_packing_loses_nothing():
    q = torch.randint(0, 16, (48, 96), generator=torch.Generator().manual_seed(13)).to(torch.uint8)
    packed = pack_int4(q, torch.ones(48, 3), torch.zeros(48, 3))
    assert torch.equal(unpack_int4(packed.weight), q)
    assert packed.shape == (48, 96)
    assert packed.weight.shape == (3, 12, 64)
    # The picture: output 5 of panel 1, inputs 32 + 4 i + 2 are the nibbles of dword 6 of that output.
    dword = packed.weight[1].view(torch.int32)[6, 5].item()
    assert [dword >> 4 * i & 15 for i in range(8)] == q[21, 34:64:4].tolist()


def test_weights_are_rounded_to_the_nearest_step():
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(14))
    for symmetric in (False, True):
        packed = quantise_to_int4(weight, group=64, symmetric=symmetric)
        error = (dequantise_int4(*packed[:3], torch.float32) - weight).abs().view(32, 4, 64)
        steps = packed.scales.transpose(1, 2).flatten(0, 1).float()
        # Half a step; the ends may be cut by the rounding of zero and scale.
        assert (error <= steps[..., None] * (1.01 if not symmetric else 0.51)).all()
        assert (error <= steps[..., None] * 0.51).double().mean() > 0.95
    assert torch.equal(dequantise_int4(*quantise_to_int4(torch.zeros(16, 32), group=32)[:3], torch.float32),
                       torch.zeros(16, 32))  # fmt: skip


def pack_dwords(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Pack [..., 8] numbers into int32: nibble i is number order[i]."""
    total = sum(values[..., order[i]].long() << 4 * i for i in range(8))
    return torch.where(total >= 2**31, total - 2**32, total).int()


def test_tensors_of_awq_mean_what_awq_means():
    generator = torch.Generator().manual_seed(15)
    q_KN = torch.randint(0, 16, (256, 32), generator=generator)
    zeros_GN = torch.randint(0, 16, (2, 32), generator=generator)
    scales_GN = torch.rand(2, 32, generator=generator).half()
    qweight = pack_dwords(q_KN.view(256, 4, 8), AWQ_ORDER)
    packed = from_awq(qweight, pack_dwords(zeros_GN.view(2, 4, 8), AWQ_ORDER), scales_GN)
    w_KN = (q_KN - zeros_GN.repeat_interleave(128, 0)) * scales_GN.double().repeat_interleave(128, 0)
    assert torch.equal(dequantise_int4(*packed[:3], torch.float64), w_KN.T)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("is_ordered", [False, True])
def test_tensors_of_gptq_mean_what_gptq_means(version, is_ordered):
    generator = torch.Generator().manual_seed(16)
    q_KN = torch.randint(0, 16, (128, 32), generator=generator)
    stored_GN = torch.randint(0, 16, (4, 32), generator=generator)
    scales_GN = torch.rand(4, 32, generator=generator).half()
    g_idx = torch.arange(128) // 32
    if is_ordered:
        g_idx = g_idx[torch.randperm(128, generator=generator)]
    qweight = pack_dwords(q_KN.view(16, 8, 32).transpose(1, 2))
    qzeros = pack_dwords(stored_GN.view(4, 4, 8))
    packed = from_gptq(qweight, qzeros, scales_GN, g_idx.int(), version=version)
    zeros_GN = stored_GN + (1 if version == 1 else 0)
    w_KN = (q_KN - zeros_GN[g_idx]) * scales_GN[g_idx].double()
    x = rounded(3, 128, seed=17)
    torch.testing.assert_close(int4_linear_reference(x, *packed), x @ w_KN)
    assert (packed.order is not None) == is_ordered
    with pytest.raises(UsageError, match="unequal"):
        from_gptq(qweight, qzeros, scales_GN, torch.zeros(128).int())


def test_shapes_that_cannot_be_packed_are_refused():
    with pytest.raises(UsageError, match="cannot be packed"):
        pack_int4(torch.zeros(17, 32), torch.ones(17, 1), torch.zeros(17, 1))
    with pytest.raises(UsageError, match="cannot be packed"):
        pack_int4(torch.zeros(16, 48), torch.ones(16, 1), torch.zeros(16, 1))


@pytest.mark.slow
def test_it_is_one_node_of_a_graph():
    torch._dynamo.reset()  # operators share the checked function; dynamo recompiles one 8 times at most
    assert_is_node(OPERATOR, (rounded(3, 64, seed=18).float(), *random_weight(16, 64, 32, 19)))


def test_fresh_numbers_agree_with_the_oracle():
    x, packed = torch.randn(5, 256), quantise_to_int4(torch.randn(64, 256))
    exact = int4_linear_reference(x.double(), *packed)
    assert (int4_linear(x, *packed).double() - exact).abs().max() < 0.03 * exact.std()
