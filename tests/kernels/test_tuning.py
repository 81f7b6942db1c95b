"""What tile configurations could be: every Triton operator says it, and runs with each of them."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from marrow.kernels import compiled, dispatch, tile

pytestmark = pytest.mark.skipif(tile.triton is None, reason="triton is not installed")

FAILED = compiled.load_operators() if tile.triton is not None else []
OPERATORS = {name: x for name, x in sorted(dispatch.operators().items()) if "triton" in x.paths}
# Questions without another answer, and why. (Question, dtype or None for all.)
SETTLED = {
    ("attention", torch.float32): "fp32 is for checks: training and serving are in bf16",
    ("attention_backward_keys", torch.float32): "the same",
    ("attention_backward_queries", torch.float32): "the same",
    ("paged_attention", torch.float32): "the same",
}


@functools.cache
def examples(name, dtype):
    return OPERATORS[name].examples(dtype, "meta")


def asked_by(name, dtype, forced=None):
    """Run an operator's examples on "meta" tensors: what was asked, and what would have been launched."""
    operator = OPERATORS[name]
    with tile.configuring(forced) as asked, tile.recording() as recorded:
        for example in examples(name, dtype):
            compiled.run_example(operator, operator.paths["triton"], example)
    return {(question.op, question.shape_class): question for question in asked}, recorded


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", compiled.DTYPES, ids=str)
def test_every_operator_says_what_else_its_tiles_could_be(name, dtype):
    questions, recorded = asked_by(name, dtype)
    assert FAILED == []
    assert recorded
    open_questions = {op for (op, _), question in questions.items() if question.candidates}
    settled = {op for op, _ in questions} - open_questions
    assert questions, f"{name} never asks tile.config"
    assert all((op, dtype) in SETTLED for op in settled)


@pytest.mark.parametrize("name", OPERATORS)
def test_candidates_change_the_default_in_what_it_has(name):
    questions, _ = asked_by(name, torch.bfloat16)
    for question in questions.values():
        for candidate in question.candidates:
            assert set(candidate) <= set(question.default), question
        # The default may be among them: it is tried once more, and does not win.
        assert any(question.default | candidate != question.default for candidate in question.candidates)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_launches_with_every_candidate(name):
    """What the host works out from a tile's size holds for each size; nothing is compiled."""
    questions, plain = asked_by(name, torch.bfloat16)
    for key, question in questions.items():
        changed = 0
        for candidate in question.candidates:
            _, recorded = asked_by(name, torch.bfloat16, {key: candidate})
            assert len(recorded) == len(plain)
            assert all(0 < size < 2**31 for launch in recorded for size in launch.grid)
            before = [(launch.grid, launch.constants, launch.options) for launch in plain]
            changed += before != [(launch.grid, launch.constants, launch.options) for launch in recorded]
        assert changed > 0, key


def test_keys_of_one_operator_tell_dtypes_apart_where_tiles_depend_on_them():
    for name in OPERATORS:
        answers = {}
        for dtype in compiled.DTYPES:
            for key, question in asked_by(name, dtype)[0].items():
                answers.setdefault(key, set()).add(str(question.default))
        assert all(len(defaults) == 1 for defaults in answers.values()), (name, answers)


FILL = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
import compile_cases, triton
from marrow.kernels import compiled

folder = pathlib.Path(sys.argv[2])
launches = [compile_cases.launched(name, 90) for name in ("good copy", "good copy", "a shift by one")]
launches[2].arguments["count"] = 1  # does not compile
count = compiled.fill_cache(launches, 90, 2)
kept = sorted(folder.rglob("*.cubin"))
source, target, options = compiled._source(launches[0], 90)
triton.compile(source, target=target, options=options.__dict__)
print(json.dumps([count, len(kept), kept == sorted(folder.rglob("*.cubin"))]))
"""


@pytest.mark.slow
def test_what_is_compiled_ahead_lies_in_triton_s_own_cache(tmp_path):
    wanted = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(Path(__file__).parents[1] / "support"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=wanted | {"MARROW_COMPILE": "1", "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    # Equal launches once, the faulty one not at all; and the launcher's own compilation finds it.
    assert json.loads(done.stdout) == [1, 1, True]


def test_a_path_that_lost_on_this_device_is_not_taken_and_says_so():
    """As the table of a tuned GPU would say: SDPA for long packed rows, ours for the rest."""
    attention = dispatch.operators()["attention"]
    loses = attention.paths["triton"].loses
    long, short = (dispatch.Case("cuda", torch.bfloat16, ("packed", size)) for size in (16384, 512))
    answers = {("attention path", str((long.shape, str(long.dtype)))): {"path": "torch"}}
    with tile.configuring(answers) as asked:
        assert loses(long) == "torch was faster when this device was tuned"
        assert loses(short) is None
        assert loses(dispatch.Case("cpu", torch.bfloat16, long.shape)) is None
        assert loses(dispatch.Case("cuda", torch.bfloat16)) is None
    assert {question.op for question in asked} == {"attention path"}
    assert all(question.candidates == ({"path": "torch"},) for question in asked)
    assert "faster" not in str(attention.paths["triton"].refuses(long, is_asked_for=True)[0])
