"""How near to the machine's limits: rows that agree with their own parts, at any shape and type."""

import json
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from marrow.core.errors import UsageError
from marrow.kernels import dispatch, roofline
from marrow.kernels.dispatch import Case, Example, Operator
from marrow.kernels.roofline import describe, load_operators, measure, page, usable

CASE = Case("cpu", torch.float32)
FIGURES = ("microseconds", "gbytes_per_s", "gflops", "flops_per_byte", "peak_gbytes_per_s", "peak_gflops")
ROWS, HUGE = 64, 1e15


def _doubled(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _examples(dtype: torch.dtype, device: str) -> list[Example]:
    if dtype == torch.float16:
        return []
    x = torch.randn(ROWS, ROWS, device=device, dtype=dtype)
    small = Example("64x64", (x,), 2.0 * x.numel() * dtype.itemsize, 1.0 * x.numel())
    return [small, Example("pretends to be huge", (x,), HUGE, HUGE)]


@pytest.fixture(scope="module")
def doubled() -> Iterator[Operator]:
    """An operator of two paths that run, one that does not, and an example that would take a day."""
    operator = Operator("roofline_doubled", lambda x: x + x, fake=_doubled, examples=_examples)
    operator.add("torch", lambda x: 2 * x)
    operator.add("cpu", lambda x: 2 * x, unusable=lambda: "there is no compiler")
    yield operator
    del dispatch._operators["roofline_doubled"]


@pytest.fixture(scope="module")
def rows(doubled: Operator) -> list[dict[str, object]]:
    """Measured once: the two peaks take a second. The caller's random numbers are left alone."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    found = measure({"doubled": doubled}, seconds=1e-3)
    assert torch.equal(torch.randn(3), expected)
    return found


def test_every_operator_of_the_package_is_loaded_in_order_of_names() -> None:
    found = load_operators()
    assert list(found) == sorted(found)
    assert "rms_norm" in found
    assert list(load_operators(["rms_norm"])) == ["rms_norm"]


def test_an_unknown_operator_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no operator 'rms_nrom'") as caught:
        load_operators(["rms_nrom"])
    assert "rms_norm" in str(caught.value.hint)


@pytest.mark.slow
def test_only_paths_that_run_are_measured_the_reference_among_them(
    doubled: Operator, rows: list[dict[str, object]]
) -> None:
    assert usable(doubled, CASE) == ["torch", "reference"]
    assert [(row["op"], row["path"], row["is_chosen"]) for row in rows] == [
        ("roofline_doubled", "torch", True),
        ("roofline_doubled", "reference", False),
    ]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_examples_that_take_too_long_even_at_the_roof_are_left_out(
    doubled: Operator, rows: list[dict[str, object]]
) -> None:
    assert {row["shape"] for row in rows} == {"64x64"}
    kept = roofline._affordable(doubled.examples(torch.float32, "cpu")[1:], 1.0, 1.0)
    assert [one.label for one in kept] == ["pretends to be huge"], "the smallest stays, whatever it costs"


@pytest.mark.slow
def test_operators_without_examples_or_with_too_large_ones_have_no_row(
    doubled: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "LARGEST_BYTES", 2 * 4 * ROWS**2 - 1)  # two examples of a matrix in fp32
    assert measure({"doubled": doubled}, seconds=1e-3) == []
    assert doubled.examples(torch.float16, "cpu") == [], "and in this dtype there is none"
    assert measure({"doubled": doubled}, dtype=torch.float16, seconds=1e-3) == []


def test_figures_are_positive_and_agree_with_each_other(rows: list[dict[str, object]]) -> None:
    for row in rows:
        assert all(isinstance(row[name], float) and row[name] > 0 for name in FIGURES), row  # type: ignore[operator]
        memory = row["gbytes_per_s"] / row["peak_gbytes_per_s"]  # type: ignore[operator]
        compute = row["gflops"] / row["peak_gflops"]  # type: ignore[operator]
        assert row["share_of_peak"] == max(memory, compute)
        assert row["bound"] == ("memory" if memory > compute else "compute")
        moved = row["gbytes_per_s"] * row["microseconds"]  # type: ignore[operator]
        assert moved == pytest.approx(8 * ROWS**2 / 1e3)  # 1 GB/s for 1 us is 1 kB
    assert len({row["peak_gflops"] for row in rows}) == 1, "measured once"


def test_a_row_is_told_with_units_and_a_star_on_the_path_that_is_taken(rows: list[dict[str, object]]) -> None:
    told = [describe(row) for row in rows]
    assert {len(cells) for cells in told} == {len(roofline.HEADER)}
    assert [cells[1] for cells in told] == ["torch*", "reference"]
    assert told[0][4].endswith(" us") and told[0][7].endswith("%")


def test_the_page_has_a_point_for_every_row_and_both_roofs(rows: list[dict[str, object]]) -> None:
    other = [row | {"dtype": "bfloat16"} for row in rows]
    markup = page([*rows, *other])
    assert markup.count("<circle") == len(rows) * 2
    assert markup.count("GFLOP/s</text>") == 0
    for name in ("float32", "bfloat16", "memory, ", "compute, ", "roofline_doubled reference 64x64"):
        assert name in markup
    assert not re.search(r"https?://|<script", markup), "self-contained"
    assert page([*rows, *other]) == markup


def test_a_page_of_nothing_is_a_page() -> None:
    assert "<h1>Roofline</h1>" in page([])
