import subprocess
import sys
import warnings

import pytest
import torch

from marrow.core.errors import UsageError
from marrow.kernels import dispatch
from marrow.kernels.norms.rms_norm import rms_norm, rms_norm_reference


@pytest.fixture
def op(monkeypatch):
    """An op with three paths: a reference, a fast one, and a faster one that cannot run here."""
    monkeypatch.setitem(dispatch._paths, "double", {})
    dispatch.register("double", "reference", lambda x: ("reference", 2 * x))
    dispatch.register("double", "torch", lambda x: ("torch", 2 * x))
    dispatch.register(
        "double", "triton", lambda x: ("triton", 2 * x), devices=("cuda",), unusable=lambda: "no triton here"
    )
    return "double"


def test_auto_takes_the_fastest_path_of_the_device(op):
    assert dispatch.choose(op, "cpu")(1) == ("torch", 2)


def test_a_slower_path_than_expected_is_one_warning_with_the_reason(op):
    with pytest.warns(RuntimeWarning, match=r"double on cuda takes its torch path: triton: no triton here"):
        assert dispatch.choose(op, "cuda")(1)[0] == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.choose(op, "cuda")


def test_reference_can_be_asked_for_without_a_warning(op):
    dispatch.reset("reference")
    assert dispatch.choose(op, "cpu")(1)[0] == "reference"
    assert dispatch.choose(op, "cuda")(1)[0] == "reference"


def test_a_path_that_the_op_lacks_is_replaced_with_a_warning(op):
    dispatch.reset("cpu")
    with pytest.warns(RuntimeWarning, match="cpu was asked for, double has no such path on cpu"):
        assert dispatch.choose(op, "cpu")(1)[0] == "torch"


def test_the_environment_is_read_again_after_a_reset(op, monkeypatch):
    assert dispatch.choose(op, "cpu")(1)[0] == "torch"
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    assert dispatch.choose(op, "cpu")(1)[0] == "torch"  # a choice holds until the table is reset
    dispatch.reset()
    assert dispatch.choose(op, "cpu")(1)[0] == "reference"


@pytest.mark.parametrize("mode", ["fast", "AUTO", "tritno"])
def test_an_unknown_mode_is_refused_with_the_allowed_ones(mode, monkeypatch):
    with pytest.raises(UsageError, match="auto, triton, cpu, torch, reference"):
        dispatch.reset(mode)
    monkeypatch.setenv(dispatch.ENVIRONMENT, mode)
    with pytest.raises(UsageError, match=mode):
        dispatch.wanted()


def test_choices_are_listed_for_doctor(op):
    listed = {(c.op, c.device): c.path for c in dispatch.choices()}
    assert listed["double", "cpu"] == "torch"
    assert ("rms_norm", "cpu") in listed


def test_the_public_op_follows_the_choice():
    x, weight = torch.randn(3, 8), torch.randn(8)
    dispatch.reset("reference")
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    assert {c.path for c in dispatch.choices() if c.op == "rms_norm"} == {"reference"}


@pytest.mark.slow
def test_the_environment_decides_in_a_fresh_process():
    program = "import marrow.kernels.norms.rms_norm, marrow.kernels.dispatch as d; print([c.path for c in d.choices()])"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={"MARROW_KERNELS": "reference", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "['reference']"
