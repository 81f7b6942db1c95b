"""Run the C path of every operator on its small inputs; as a program it keeps what they return.

    python portable_kernels.py RESULT

Runs in a process of its own, whose CC and MARROW_CACHE say which instructions the C files are compiled for.
Every operator is run in fp32 and, where it may be, in bf16; with one thread and with two, which must agree.
"""

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from marrow.kernels import roofline
from marrow.kernels.dispatch import Operator

# Operators with inputs that are fp32 whatever the first one is: scales, probabilities, masters.
FIRST_ALONE = {"int8_linear", "int4_linear", "fp8_linear"}
FP32_ALONE = {"adamw", "dequantise", "lora_linear", "newton_schulz", "sample", "top_k_int8", "verify_draft"}


def small_inputs() -> ModuleType:
    """Load the file that holds every operator's small inputs."""
    path = Path(__file__).parents[1] / "kernels" / "test_operators.py"
    spec = importlib.util.spec_from_file_location("small_inputs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_bf16(operator: Operator, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast what may be bf16."""
    cast = [x.bfloat16() if isinstance(x, Tensor) and x.dtype == torch.float32 else x for x in inputs]
    return (cast[0], *inputs[1:]) if operator.name in FIRST_ALONE else tuple(cast)


def outputs_of(small: ModuleType, operator: Operator, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Return outputs, and the gradients of their results."""
    given = small.mapped(torch.clone, inputs)
    outputs = small.computed(operator, "cpu", given)
    backward = operator.paths["cpu"].backward
    if backward is None or operator.gradient is None:
        return outputs
    grads = [torch.ones_like(x) for x in outputs[: operator.results]]
    return outputs + small.tensors(backward(*grads, *operator.gradient.saves(given, tuple(outputs))))


def run_all() -> dict[str, list[Tensor]]:
    """Return the outputs of every operator that has a C path, by name and dtype."""
    small, found = small_inputs(), {}
    for name, operator in roofline.load_operators().items():
        if "cpu" not in operator.paths:
            continue
        assert (why := operator.paths["cpu"].unusable()) is None, f"{name}: {why}"
        both = {"fp32": small.inputs_of(operator)}
        if name not in FP32_ALONE:
            both["bf16"] = in_bf16(operator, both["fp32"])
        for dtype, inputs in both.items():
            each = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                each.append(outputs_of(small, operator, inputs))
            assert small.same(*each), f"{name} in {dtype}: threads change the result"
            found[f"{name} {dtype}"] = each[0]
    return found


def main() -> None:
    """Run all and keep the results."""
    warnings.simplefilter("error", RuntimeWarning)  # a C file that does not compile
    torch.save(run_all(), sys.argv[1])


if __name__ == "__main__":
    main()
