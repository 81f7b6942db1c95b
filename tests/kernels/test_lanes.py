"""lanes.h by itself, with the instructions of this CPU and without them: rounding to bf16 to the last tie."""

import ctypes
import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from marrow.core import native as core_native
from marrow.kernels import native

SOURCE = """
#include "lanes.h"
void narrow_all(const float *x, uint16_t *y, long count) {
    for (; count > 0; count -= LANES, x += LANES, y += LANES)
        store_some(y, 0, count, load_some(x, 0, count, F32), BF16);
}
void narrow_pairs(const float *x, uint16_t *y, long count) {
    for (; count > 0; count -= 2 * LANES, x += 2 * LANES, y += 2 * LANES)
        store_pair(y, 0, count, load_pair(x, 0, count, F32), BF16, 0);
}
void widen_all(const uint16_t *x, float *y, long count) {
    for (; count > 0; count -= LANES, x += LANES, y += LANES)
        store_some(y, 0, count, load_some(x, 0, count, BF16), F32);
}
"""
CPUS = ["native", *(["x86-64"] if platform.machine() == "x86_64" else [])]

pytestmark = pytest.mark.skipif(core_native.find_compiler() is None, reason="there is no C compiler here")


@pytest.fixture(scope="module", params=CPUS)
def lanes(request, tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("lanes")
    (folder / "lanes.c").write_text(SOURCE)
    include = Path(native.__file__).parent / "csrc"
    options = ["-O1", "-std=gnu11", "-fPIC", "-shared", f"-I{include}", f"-march={request.param}"]
    command = [core_native.find_compiler(), *options, "-o", folder / "lanes.so", folder / "lanes.c"]
    subprocess.run(command, check=True, env=os.environ | {"LC_ALL": "C"})
    return ctypes.CDLL(str(folder / "lanes.so"))


def call(function, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.full_like(x, 7.0, dtype=dtype)
    (source, target), count = native.pointers(x, y), ctypes.c_long(x.numel())
    function(ctypes.c_void_p(source), ctypes.c_void_p(target), count)
    return y


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all is equal to the bit, but for which NaN it is."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a[~a.isnan()].float().view(torch.int32), b[~b.isnan()].float().view(torch.int32)
    )


@pytest.mark.parametrize("name", ["narrow_all", "narrow_pairs"])
@pytest.mark.parametrize("rest", [0, 1, 15, 17])
def test_bf16_is_the_nearest_and_of_two_the_even_one(lanes, name, rest):
    """Every number, every tie and its neighbours, both signs; what is not finite; some of everything."""
    high = torch.arange(1 << 16, dtype=torch.int64) << 16
    lows = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (high[:, None] | lows).flatten()
    bits = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int()
    x = bits.view(torch.float32)
    # Subnormals, which the instruction takes for 0: no operator tells them from it.
    x = x[(x == 0) | (x.abs() >= 2.0**-126) | x.isnan()]
    x = x[: len(x) // 32 * 32 - 32 + rest].contiguous()
    assert is_same(call(getattr(lanes, name), x, torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize("rest", [0, 1, 15])
def test_every_bf16_widens_to_itself(lanes, rest):
    x = (
        torch.arange(1 << 16, dtype=torch.int32)
        .to(torch.uint16)
        .view(torch.bfloat16)[: (1 << 16) - 16 + rest]
    )
    assert is_same(call(lanes.widen_all, x, torch.float32), x.float())
