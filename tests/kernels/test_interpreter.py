"""Triton's interpreter: what is wrong in the bare one is right in ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from marrow.core.errors import UsageError
from marrow.kernels import tile

triton = pytest.importorskip("triton")
import triton_cases  # noqa: E402 (needs triton)

from marrow.kernels import interpreter  # noqa: E402 (needs triton)

SUPPORT = Path(__file__).parents[1] / "support"

pytestmark = pytest.mark.skipif(not tile.IS_INTERPRETED, reason="kernels run on a GPU here")


@pytest.fixture(scope="module")
def bare_answers():
    """What the bare interpreter answers, in a process without Marrow."""
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "triton_cases.py")],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", triton_cases.CASES)
def test_what_the_bare_interpreter_does_wrong_is_mended(name, bare_answers):
    assert bare_answers[name] is not True
    assert triton_cases.CASES[name]()


@pytest.mark.parametrize("name", triton_cases.SOUND)
def test_what_the_bare_interpreter_does_right_stays_right(name, bare_answers):
    assert bare_answers[name] is True
    assert triton_cases.SOUND[name]()


def test_every_bf16_number_survives_a_round_trip():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    wide = triton_cases.converted(every, torch.float32)
    assert triton_cases.equal(wide, every.float())
    assert triton_cases.equal(triton_cases.converted(wide, torch.bfloat16), every)


def test_every_bf16_number_becomes_what_torch_makes_of_it():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert triton_cases.equal(triton_cases.converted(every, torch.float16), every.half())
    whole = every[every.float().abs() < 2.0**31]
    whole = torch.nn.functional.pad(whole, (0, (1 << 16) - len(whole)))
    assert torch.equal(triton_cases.converted(whole, torch.int32), whole.int())


@settings(max_examples=50, deadline=None)
@hypothesis.given(st.lists(st.floats(width=32), min_size=16, max_size=16))
def test_fp32_rounds_to_bf16_as_in_torch(numbers):
    given = torch.tensor(numbers, dtype=torch.float32)
    assert triton_cases.equal(triton_cases.converted(given, torch.bfloat16), given.to(torch.bfloat16))


@settings(max_examples=50, deadline=None)
@hypothesis.given(st.lists(st.integers(0, (1 << 32) - 1), min_size=16, max_size=16))
def test_any_bits_of_fp32_round_to_bf16_as_in_torch(bits):
    given = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    assert triton_cases.equal(triton_cases.converted(given, torch.bfloat16), given.to(torch.bfloat16))


def test_mending_twice_changes_nothing():
    before = triton_cases.interpreter_state()
    interpreter.mend()
    assert triton_cases.interpreter_state() == before
    assert triton_cases.CASES["bf16 add"]()


def test_another_triton_is_refused(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.8.0")
    with pytest.raises(UsageError, match=r"3\.8\.0"):
        interpreter.mend()


def test_an_argument_of_1_is_a_plain_number_as_in_the_compiler():
    out = torch.zeros(1, dtype=torch.int64)
    tile.launch(triton_cases.widened, (1,), out, 2)
    assert out.item() == 2
    with pytest.raises(AttributeError, match="to"):
        tile.launch(triton_cases.widened, (1,), out, 1)


def test_numbers_arrive_in_the_types_of_the_compiler():
    out = torch.zeros(2)
    tile.launch(triton_cases.scaled, (1,), out, 1 / 3, True)
    assert out.tolist() == [torch.tensor(1 / 3).item() * 2, 1.0]
