"""How near to the machine's limits: rows that agree with their own parts, at any shape and type."""

import json

import pytest
import torch

from marrow.kernels import dispatch, roofline
from marrow.kernels.roofline import OPS, describe, known, measure

FIGURES = ("microseconds", "gbytes_per_s", "gflops", "peak_gbytes_per_s", "peak_gflops", "share_of_peak")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def measured(dtype: torch.dtype = torch.float32) -> list[dict[str, object]]:
    """As small as it gets: one row of 512 tokens, each path timed for about a millisecond."""
    return measure(dtype=dtype, seconds=1e-4, scale=0.01)


def test_every_op_is_known_with_its_reference_first() -> None:
    found = known()
    assert list(dict.fromkeys(op for op, _ in found)) == list(OPS)
    assert len(found) == len(set(found))
    for op in OPS:
        assert (op, "reference") in found, "what everything is compared to runs everywhere"
        assert all("cpu" in dispatch.paths(op)[name].devices for one, name in found if one == op)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    torch.set_num_threads(1)
    return measured()


def test_there_is_one_row_for_each_path_in_order_and_json_holds_it(rows: list[dict[str, object]]) -> None:
    assert [(row["op"], row["path"]) for row in rows] == known()
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_figures_are_positive_and_agree_with_each_other(rows: list[dict[str, object]]) -> None:
    for row in rows:
        figures = {name: row[name] for name in FIGURES}
        assert all(isinstance(value, float) and value > 0 for value in figures.values()), row
        memory = row["gbytes_per_s"] / row["peak_gbytes_per_s"]  # type: ignore[operator]
        compute = row["gflops"] / row["peak_gflops"]  # type: ignore[operator]
        assert row["share_of_peak"] == max(memory, compute)
        assert row["bound"] == ("memory" if memory > compute else "compute")
    assert len({row["peak_gflops"] for row in rows}) == 1, "measured once"


def test_paths_of_one_op_do_the_same_work(rows: list[dict[str, object]]) -> None:
    for op in OPS:
        mine = [row for row in rows if row["op"] == op]
        assert len({row["shape"] for row in mine}) == 1
        # bytes = rate times time, and likewise FLOPs; rounding of three floats apart, they are equal.
        for rate in ("gbytes_per_s", "gflops"):
            work = [row[rate] * row["microseconds"] for row in mine]  # type: ignore[operator]
            assert work == pytest.approx([work[0]] * len(work), rel=1e-9)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_path_gives_what_the_reference_gives_at_the_shapes_measured(op: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    (arguments, cost) = roofline._CASES[op](dtype, "cpu", 0.01)
    assert cost["bytes"] > 0 and cost["flops"] > 0
    with torch.inference_mode():
        expected = dispatch.paths(op)["reference"].function(*arguments)
        for _, name in (one for one in known() if one[0] == op):
            found = dispatch.paths(op)[name].function(*arguments)
            for ours, theirs in zip(_tensors(found), _tensors(expected), strict=True):
                # Another order of sums: some units in the last place of values of about 1.
                bound = 1e-4 if dtype == torch.float32 else 0.1
                torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


def _tensors(value: object) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [one for one in value if torch.is_tensor(one)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("scale", "tokens"), [(1 / 16, 512), (1 / 8, 1024), (0.0, 512), (0.2, 1536)])
def test_the_scale_is_of_the_tokens(scale: float, tokens: int) -> None:
    for op in ("rms_norm", "rope", "swiglu", "attention", "linear_cross_entropy"):
        (first, *_), _ = roofline._CASES[op](torch.float32, "cpu", scale)
        assert len(first) == tokens, op
    (query, *_), _ = roofline._CASES["paged_attention"](torch.float32, "cpu", scale)
    assert len(query) == tokens // roofline.ROW_TOKENS, "one query for each sequence of that length"


def test_a_row_is_told_in_one_line() -> None:
    row = {
        "op": "rms_norm", "path": "reference", "dtype": "float32", "microseconds": 1234.5,
        "gbytes_per_s": 6.789, "gflops": 1.25, "bound": "memory", "share_of_peak": 0.456,
    }  # fmt: skip
    assert describe(row).split() == [
        *("rms_norm", "reference", "float32", "1,234", "us", "6.79", "GB/s"),
        *("1.2", "GFLOP/s", "46%", "of", "memory", "peak"),
    ]


def test_bfloat16_is_measured_by_its_own_peak() -> None:
    found = measured(torch.bfloat16)
    assert {row["dtype"] for row in found} == {"bfloat16"}
    assert [(row["op"], row["path"]) for row in found] == known()
